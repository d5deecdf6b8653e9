"The panel as somebody sees it: JupyterLab in a headless Chromium. Skipped where there is none; FLARE_CHROMIUM names one."
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

import nbformat
import pytest
from tornado.websocket import websocket_connect

CHROMIUM = os.environ.get("FLARE_CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; FLARE_CHROMIUM=/path/to/chromium")

PANEL = """
import numpy as np, pandas as pd, torch
from torch import nn
from flare.playground import Playground
from flare.sequences import Catalogue, Dataset, Sequences

class Shouts(nn.Module):
    "Scores fall with the number of the item; who is told something turns them round, as strongly as is said."
    def __init__(self, strength):
        super().__init__()
        self.strength = strength
    def scorer(self, batch):
        return lambda items: torch.arange(20.0)[items] * torch.where(batch.asked >= 0, self.strength, 0.0)[:, None] - 2 * torch.arange(20.0)[items]

items = pd.DataFrame({"item": [str(i) for i in range(20)], "title": [f"thing {i}" for i in range(20)], "category": [("shop", "things")] * 20})
shop = Dataset("shop", Catalogue(items), Sequences.from_lists([[1, 2, 3]]), np.array(["u"]), {})
Playground(lambda said: (Shouts, np.array([0 if said[0] else -1]), None), shop, [3, 4])
"""


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
        with urlopen(Request(f"http://127.0.0.1:{port}/json/new?{address}", method="PUT")) as answer: socket = json.load(answer)["webSocketDebuggerUrl"]
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
        for kind in ("keyDown", "keyUp"): self.tell("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, text="\r" if key == "Enter" else "")

    def type(self, placeholder: str, text: str):
        "Write into a field, then Enter."
        assert self.value(f"document.querySelector('input[placeholder=\"{placeholder}\"]').focus() || true")
        self.tell("Input.insertText", text=text)
        self.press("Enter", 13)

    def titles(self) -> list[str]:
        "The list on the page."
        return self.value("[...document.querySelectorAll('.jp-OutputArea table tbody tr')].map(row => row.children[1].textContent)") or []


@pytest.fixture
def page(tmp_path):
    "The notebook, opened in JupyterLab, in a browser."
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(PANEL)], metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}}), tmp_path / "panel.ipynb")
    places = {name: str(tmp_path / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTERLAB_WORKSPACES_DIR", "JUPYTERLAB_SETTINGS_DIR")}
    environment = os.environ | places | {"PYTHONPATH": str(Path(__file__).parents[1])}
    lab = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser", "--ip=127.0.0.1", "--port=0", f"--ServerApp.root_dir={tmp_path}", "--IdentityProvider.token="],
                           cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=open(tmp_path / "lab.log", "w"))
    browser = subprocess.Popen([CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--remote-allow-origins=*", "--window-size=1400,1000",
                                f"--user-data-dir={tmp_path / 'profile'}", "about:blank"], stdout=subprocess.DEVNULL, stderr=open(tmp_path / "browser.log", "w"))
    try:
        address = until(lambda: re.search(r"http://127\.0\.0\.1:\d+", (tmp_path / "lab.log").read_text()))[0]
        port = until(lambda: re.search(r"ws://127\.0\.0\.1:(\d+)", (tmp_path / "browser.log").read_text()))[1]
        yield Page(int(port), f"{address}/lab/tree/panel.ipynb")
    finally:
        for process in (browser, lab):
            process.terminate()
            process.wait(20)


def test_the_panel_is_used_in_a_browser(page):
    until(lambda: page.value("window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"))
    page.value("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
    until(lambda: page.titles() == [f"thing {i}" for i in range(10)])  # in silence
    page.type("say what you want", "the last ones")
    page.value("document.querySelector('.noUi-handle').focus()")
    for _ in range(8): page.press("ArrowRight", 39)  # a quarter each: strength 3
    until(lambda: page.titles() == [f"thing {i}" for i in range(19, 9, -1)])
    page.type("part of a title", "thing 7")
    until(lambda: page.value("document.querySelector('.widget-select select').options.length") == 1)
    page.value("[...document.querySelectorAll('button')].find(button => button.textContent === 'into the history').click()")
    until(lambda: page.value("[...document.querySelectorAll('.jp-OutputArea ol li')].map(item => item.textContent).join()") == "thing 3,thing 4,thing 7")
