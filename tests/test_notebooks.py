"Every component notebook runs from top to bottom; generated files and notebooks are as nbdev would make them."
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from nbdev.config import get_config
from nbdev.test import test_nb as run_notebook

ROOT = Path(__file__).resolve().parent.parent
run_notebook.__test__ = False  # it is nbdev's, not a test of ours


def runs_in_ci(notebook: Path) -> bool:
    "Not a checkpoint copy, and not in a folder that nbdev_test skips."
    hidden = any(part.startswith((".", "_")) for part in notebook.relative_to(ROOT).parts)
    return not hidden and not (notebook.parent / ".notest").exists()


NOTEBOOKS = [n for n in sorted((ROOT / "nbs").rglob("*.ipynb")) if runs_in_ci(n)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: str(n.relative_to(ROOT / "nbs")))
def test_runs(notebook, capfd):
    passed, _ = run_notebook(notebook, skip_flags=get_config().tst_flags.split(), basepath=ROOT)
    assert passed, capfd.readouterr().err


@pytest.fixture(scope="session")
def rebuilt(tmp_path_factory):
    "A copy of the project, exported and cleaned again."
    copy = tmp_path_factory.mktemp("rebuilt")
    for name in ("settings.ini", "pyproject.toml"): shutil.copy(ROOT / name, copy)
    for name in ("nbs", "flare"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # which running a notebook leaves behind, and nbdev_export then does nothing
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run([Path(sys.executable).parent / command], cwd=copy, check=True, capture_output=True, env=env)
    return copy


@pytest.mark.parametrize("folder, ending, remedy", [("flare", "*.py", "nbdev_export"), ("nbs", "*.ipynb", "nbdev_clean")])
def test_in_sync(rebuilt, folder, ending, remedy):
    here = {p.relative_to(ROOT): p.read_text() for p in (ROOT / folder).rglob(ending)
            if not {"__pycache__", ".ipynb_checkpoints", "_modidx.py"} & set(p.parts)}
    there = {p.relative_to(rebuilt): p.read_text() for p in (rebuilt / folder).rglob(ending) if p.name != "_modidx.py"}
    differs = sorted(str(p) for p in here | there if here.get(p) != there.get(p))
    assert not differs, f"run {remedy}: {differs}"


def test_every_module_has_its_notebook():
    for module in (ROOT / "flare").rglob("*.py"):
        source = re.search(r"File to edit: (\S+\.ipynb)", module.read_text()[:600])
        if source: assert (module.parent / source[1]).resolve().exists(), f"{module} is left over from {source[1]}"


def test_outputs_carry_no_paths_of_a_machine():
    for notebook in (ROOT / "nbs").rglob("*.ipynb"):
        found = re.findall(r"[\"' (](/(?:home|root|work|Users|tmp)/[^\"\\ ]*)", notebook.read_text())
        assert not found, f"{notebook.name} shows {found[:3]}"
