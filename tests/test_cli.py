"The `flare` command: what it prints, and one line and exit code 2 for every mistake."
import os
import subprocess
import sys

import pytest

from flare import cli
from flare.experiments import run
from flare.results import read_records
from shop import HOME, write_project


@pytest.fixture
def project(tmp_path, monkeypatch):
    folder = write_project(tmp_path / "project")
    monkeypatch.chdir(folder / "nbs")  # any folder inside will do
    return folder


def flare(capsys, *arguments):
    "Exit code, standard output and standard error."
    try:
        code = cli.main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("arguments, message", [
    ([], "required: command"), (["shelve"], "invalid choice: 'shelve'"), (["run"], "required: NAME"),
    (["run", "benchmrk"], "there is no experiment benchmrk; there are: benchmark"),
    (["grid", "good.yml", "--only", "dataset=ml-1m"], "the grid has no point with {'dataset': 'ml-1m'}"),
    (["run", "benchmark", "--set", "epoch=3"], "benchmark.ipynb does not declare epoch; it declares experiment, model"),
    (["run", "benchmark", "--set", "seed"], "seed: write it as key=value"),
    (["run", "benchmark", "--set", "seed=[1"], "seed=[1, line 1: not YAML"),
    (["run", "benchmark", "--set", "seed=one"], "seed is 'one' (str); it must be of type int"),
    (["run", "benchmark", "--set", "seed=[0, 1]"], "seed is [0, 1] (list); it must be of type int"),
    (["run", "benchmark", "--set", "model=bert"], "there is no model 'bert'"),
    (["run", "benchmark", "--set", "model=bert4rec", "heads=7"], "heads=7"),
    (["run", "benchmark", "--set", "split=random"], "there is no split 'random'"),
    (["run", "benchmark", "--set", "dataset=nowhere/at-all"], "nowhere/at-all"),
    (["run", "benchmark", "--set", "experiment=../up", "dataset=../shop", "model=lir"], "'../up' does not name"),
    (["grid", "nowhere.yml"], "there is no grid nowhere.yml"), (["grid", "bad.yml"], "bad.yml, line 2: not YAML"),
    (["grid", "empty.yml"], "empty.yml: a grid has the keys"), (["grid", "latin.yml"], "latin.yml: byte 22 is not UTF-8"),
    (["grid", "twice.yml"], "twice.yml, line 2: not YAML: model stands twice"), (["grid", "number.yml"], "number.yml: 1 is not the name"),
    (["run", "benchmark", "--set", "model=flare_pushed", "before=[1]"], "before holds 1; it must be a list of texts"),
    (["grid", "good.yml", "--workers", "0"], "workers is 0"),
    (["grid", "good.yml", "--workers", "two"], "invalid int value: 'two'"),
    (["grid", "good.yml", "--set", "droput=1"], "does not declare droput"),
    (["table", "books"], "no records of books (leave_one_out) in experiment benchmark"),
    (["table", "books", "--split", "random"], "invalid choice: 'random'"),
    (["table", "books", "--experiment", "../up"], "does not name an experiment"),
    (["renew", "benchmark", "0123456789ab"], "there is no record")])
def test_a_mistake_is_one_line(project, capsys, arguments, message):
    (project / "nbs/bad.yml").write_text("notebook: benchmark\ngrid: [")
    (project / "nbs/empty.yml").write_text("")
    (project / "nbs/latin.yml").write_bytes("notebook: benchmark # é".encode("latin1"))
    (project / "nbs/twice.yml").write_text("notebook: benchmark\nbase: {model: lir, model: popularity}\ngrid: [{}]")
    (project / "nbs/number.yml").write_text("notebook: benchmark\ngrid: [{1: 2}]")
    (project / "nbs/good.yml").write_text("notebook: benchmark\ngrid: [{model: lir, dataset: ../shop}]")
    code, out, error = flare(capsys, *arguments)
    assert code == 2 and out == "" and message in error and error.count("\n") == 1 and error.startswith("flare")
    assert not (project / "paper").exists()


def test_outside_a_project(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments in (["run", "benchmark"], ["grid", "benchmark.yml"], ["table", "ml-100k"]):
        code, _, error = flare(capsys, *arguments)
        assert code == 2 and "no settings.ini in" in error and error.count("\n") == 1


def test_a_damaged_record_is_one_line(project, capsys):
    path = run("benchmark", "lir", str(project / "shop"), root=project / "paper").path(project / "paper")
    path.write_text(path.read_text()[:300])
    code, _, error = flare(capsys, "table", "shop")
    assert code == 2 and path.name in error and error.count("\n") == 1


def test_the_table_reads_records(project, capsys):
    models, shop = ("popularity", "lir"), str(project / "shop")
    records = [run("benchmark", model, shop, root=project / "paper") for model in models]
    code, out, _ = flare(capsys, "table", "shop")
    lines = out.splitlines()
    assert code == 0 and lines[0].startswith("shop, leave_one_out: 24 users, 12 items") and len(lines) == 4
    assert all(len(line) <= 120 for line in lines)
    for record in records:
        (line,) = [line for line in lines if line.split()[0] == record.model]
        for metric in ("ndcg@10", "mrr_pessimistic"):
            assert f"{record.metrics['test'][metric]:.4f}" in line


def test_a_stale_record_is_marked(project, capsys):
    run("benchmark", "lir", str(project / "shop"), root=project / "paper")
    path = next((project / "paper/records/benchmark").glob("*.json"))
    path.write_text(path.read_text().replace('"flare.metrics": "', '"flare.metrics": "0'))
    assert "lir (stale)" in flare(capsys, "table", "shop")[1]


def test_a_table_of_a_folder_is_compared_with_what_lies_there(project, capsys):
    run("benchmark", "lir", str(project / "shop"), root=project / "paper")
    (project / "link").symlink_to(project / "shop")
    assert "(stale)" not in flare(capsys, "table", "../link")[1]
    with (project / "shop/interactions.csv").open("a") as lines: lines.write("u0,i9,99\n")
    assert "lir (stale)" in flare(capsys, "table", "../shop")[1]


def test_all_settings_are_shown_where_they_are_asked_for(project, capsys):
    for b in (0.0, 0.75): run("benchmark", "lir", str(project / "shop"), parameters={"b": b}, root=project / "paper")
    run("benchmark", "popularity", str(project / "shop"), root=project / "paper")
    best, every = (flare(capsys, "table", "shop", *more)[1] for more in ((), ("--all",)))
    assert len(best.splitlines()) == 2 + 2 + 1 and best.splitlines()[-1] == "the best on validation of 2 settings of lir"
    assert every.count("b=0.0") == 1 and len(every.splitlines()) == 2 + 3


def test_run_from_a_shell_and_a_grid_from_inside_a_project(project, monkeypatch, capsys):
    "The installed command, from a folder inside the project; a relative dataset is relative to that folder."
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    first = subprocess.run(["flare", "run", "benchmark", "--set", "model=popularity", f"dataset={project / 'shop'}", "learning_rate=1e-3"],
                           cwd=project / "nbs", env=environment, capture_output=True, text=True)
    assert first.returncode == 0 and "done" in first.stdout, first.stderr
    assert list(read_records("benchmark", project / "paper")["model"]) == ["popularity"]
    (project / "nbs/experiments/two.yml").write_text("notebook: benchmark\ngrid: [{model: [popularity, repeat_last]}]")
    monkeypatch.chdir(project / "nbs")
    code, out, _ = flare(capsys, "grid", "two.yml", "--dry-run", "--set", "dataset=../shop")
    assert code == 0 and "fresh" in out and "missing" in out
    assert len(read_records("benchmark", project / "paper")) == 1


def test_a_failed_run_says_where_to_look(project, capsys):
    path = project / "nbs/experiments/benchmark.ipynb"
    spoilt = path.read_text().replace("from flare.experiments import run", "raise RuntimeError('the disk is full')")
    path.write_text(spoilt)
    code, out, error = flare(capsys, "run", "benchmark", "--set", "model=lir", f"dataset={project / 'shop'}")
    last = error.strip().splitlines()[-1]
    assert code == 1 and "failed" in out and "RuntimeError: the disk is full (see paper/runs/benchmark/" in last
    assert not list(project.glob("paper/records/**/*.json"))
