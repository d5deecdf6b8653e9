"The panel of chapter 29 as somebody sees it: JupyterLab in a headless Chromium. Skipped where there is none; FLARE_CHROMIUM names one."
import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from tornado.websocket import websocket_connect

CHROMIUM = os.environ.get("FLARE_CHROMIUM") or next(filter(None,
                                                           map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                                                    None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; FLARE_CHROMIUM=/path/to/chromium")

ROOT = Path(__file__).parents[1]
CHAPTER = ROOT / "nbs/29_playground.ipynb"


def until(done, seconds: float = 60, every: float = 0.2):
    "The first answer of `done` that is true."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if answer := done(): return answer
        time.sleep(every)
    raise AssertionError(f"nothing happened in {seconds} seconds: {done.__doc__}")


class Page:
    "A page of a browser that is told what to do over its debugging protocol."

    def __init__(self, port: int, address: str):
        self.runner, self.sent = asyncio.Runner(), 0
        with urlopen(Request(f"http://127.0.0.1:{port}/json/new?{address}", method="PUT")) as answer:
            socket = json.load(answer)["webSocketDebuggerUrl"]
        self.socket = self.runner.run(self.awaited(lambda: websocket_connect(socket, max_message_size=2**28)))

    async def awaited(self, begin):
        "What something comes to that is begun within the loop."
        return await asyncio.wait_for(begin(), 60)

    def tell(self, method: str, **parameters) -> dict:
        "Send a command, wait for its result."
        self.sent += 1
        self.runner.run(self.awaited(lambda: self.socket.write_message(json.dumps({"id": self.sent, "method": method, "params": parameters}))))
        while True:
            answer = json.loads(self.runner.run(self.awaited(self.socket.read_message)))
            if answer.get("id") == self.sent: return answer["result"]

    def value(self, script: str):
        "What a piece of JavaScript says; None where it fails."
        return self.tell("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)["result"].get("value")

    def press(self, key: str, code: int):
        "A key down, and up again."
        for kind in ("keyDown", "keyUp"):
            self.tell("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code,
                      text="\r" if key == "Enter" else "")

    def type(self, placeholder: str, text: str):
        "Write into a field in the place of what it holds, then Enter."
        assert self.value(f"document.querySelector('input[placeholder=\"{placeholder}\"]').select() || true")
        self.tell("Input.insertText", text=text)
        self.press("Enter", 13)

    def column(self, number: int) -> list[str]:
        "Of the list in the panel: 1 is the title, 2 the category, 4 the place in silence."
        return self.value(f"[...document.querySelectorAll('.widget-html-content table tbody tr')].map(row => row.children[{number}].textContent)") or []

    def text(self) -> str:
        "What the panel shows."
        return self.value("[...document.querySelectorAll('.widget-html-content')].map(part => part.textContent).join()") or ""


@pytest.fixture
def page(tmp_path):
    "The chapter, opened in JupyterLab, in a browser."
    shutil.copy(CHAPTER, tmp_path)
    places = {name: str(tmp_path / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTERLAB_WORKSPACES_DIR",
                                                      "JUPYTERLAB_SETTINGS_DIR")}
    settings = tmp_path / "JUPYTERLAB_SETTINGS_DIR/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"windowingMode": "none"}')  # or cells out of sight are not on the page
    environment = os.environ | places | {"PYTHONPATH": str(ROOT)}
    lab = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser", "--ip=127.0.0.1", "--port=0", f"--ServerApp.root_dir={tmp_path}", "--IdentityProvider.token="],
                           cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=open(tmp_path / "lab.log", "w"))
    browser = subprocess.Popen([CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--remote-allow-origins=*", "--window-size=1400,1000",
                                f"--user-data-dir={tmp_path / 'profile'}", "about:blank"], stdout=subprocess.DEVNULL, stderr=open(tmp_path / "browser.log", "w"))
    try:
        address = until(lambda: re.search(r"http://127\.0\.0\.1:\d+", (tmp_path / "lab.log").read_text()))[0]
        port = until(lambda: re.search(r"ws://127\.0\.0\.1:(\d+)", (tmp_path / "browser.log").read_text()))[1]
        yield Page(int(port), f"{address}/lab/tree/{CHAPTER.name}")
    finally:
        for process in (browser, lab):
            process.terminate()
            process.wait(20)


@pytest.mark.timeout(600)
def test_the_panel_is_used_in_a_browser(page):
    notebook = "window.jupyterapp?.shell.currentWidget"
    until(lambda: page.value(f"{notebook}?.sessionContext?.session?.kernel?.status === 'idle'"))
    page.value("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
    until(lambda: page.value(f"{notebook}.content.widgets.at(-1).model.executionCount"), 480)  # a model is trained meanwhile
    until(lambda: "choose an item first" in page.text())  # all is forgotten at the end of the chapter
    page.type("part of a title", "blade runner")
    until(lambda: page.value("document.querySelector('.widget-select select').options.length") == 1)
    page.value("[...document.querySelectorAll('button')].find(button => button.textContent === 'into the history').click()")
    until(lambda: page.value("[...document.querySelectorAll('.widget-html-content ol li')].map(item => item.textContent).join()") == "Blade Runner")
    until(lambda: len(page.column(1)) == 10)
    children = lambda: sum("Children" in category or "Animation" in category for category in page.column(2))
    assert children() < 5
    page.type("say what you want", "animation for children")
    until(lambda: children() >= 8)
    page.value("document.querySelector('.noUi-handle').focus()")
    for _ in range(8): page.press("ArrowLeft", 37)  # a quarter each: from strength 2 to none
    until(lambda: page.column(4) == [str(place) for place in range(1, 11)])
    assert children() < 5
