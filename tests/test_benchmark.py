"The benchmark command: one line of JSON, or one line that says what is wrong."
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest

from flare import benchmark
from flare.benchmark import generated_events, line_code, read_events, read_lines, side_by_side

SMALL = ["--hidden-size", "16", "--ffn", "32", "--threads", "1", "--batch-size", "64"]
ROOT = Path(__file__).resolve().parent.parent
KEYS = {"epoch_s", "steps", "tokens_per_s", "fill", "masks", "batch_share", "eval_s", "peak_mb", "recall@10", "ndcg@10", "device",
        "precision"}


@pytest.fixture
def csv(tmp_path):
    generated_events(200, 80).to_csv(tmp_path / "events.csv", index=False)
    return tmp_path / "events.csv"


@pytest.mark.parametrize("more, steps, users", [([], 4, 200), (["--epochs", "2"], 8, 200), (["--max-steps", "3"], 3, 200),
                                                (["--eval-users", "7"], 4, 7),
                                                (["--model", "flare", "--text", "random:16:3", "--validate"], 4, 200)])
def test_one_line_with_everything(csv, capsys, more, steps, users):
    assert benchmark.main(["--csv", str(csv), *SMALL, *more]) == 0
    out, error = capsys.readouterr()
    line = json.loads(out)
    assert error.startswith("memory: about") and error.count("\n") == 1 and out.count("\n") == 1 and KEYS <= set(line)
    assert (line["steps"], line["eval_users"], line["items"], line["epoch_steps"]) == (steps, users, 80, 4)
    assert len(line.get("history",
                        [])) == ("--validate" in more) and 0 < line["fill"] <= 1 and line["peak_mb"] > line["loaded_mb"] - 1 > line["base_mb"]  # the kernel counts pages in batches


@pytest.mark.parametrize("content, more, message", [
    ("user,item,timestamp\nann,lamp,soon\n", [], "events.csv, row 2: timestamp 'soon'"),
    ("user,item\nann,lamp\n", [], "lacks the columns ['timestamp']"),
    ("user,item,timestamp\nann,lamp,1\n", [], "nothing to test on"),
    (None, ["--text", "minilm", "--model", "flare"], "random:384:32"), (None, ["--dropout", "2"], "dropout is 2.0"),
    (None, ["--hidden-size", str(2**24), "--heads", "1"], "lower hidden_size"), (None, ["--heads", "3"], "heads=3"), (None, ["--epochs", "0"], "--epochs is 0; it must be at least 1"),
    (None, ["--threads", "0"], "--threads is 0; it must be at least 1"), (None, ["--max-steps", "0"], "--max-steps is 0; it must be at least 1"),
    (None, ["--eval-users", "-3"], "--eval-users is -3; it must be at least 1"), (None, ["--text", "random:8:2"], "is for --model flare"),
    (None, ["--model", "flare", "--text", "random:100000:200000"], "shorten texts")])
def test_what_is_wrong_is_said_in_one_line(csv, capsys, content, more, message):
    if content is not None: csv.write_text(content)
    assert benchmark.main(["--csv", str(csv), *SMALL, *more]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and message in error


def test_a_run_that_diverges_is_said_in_one_line(csv, capsys):
    assert benchmark.main(["--csv", str(csv), *SMALL, "--lr", "1e30", "--epochs", "3"]) == 2
    plan, said = capsys.readouterr().err.splitlines()
    assert plan.startswith("memory: about") and said.startswith("flare.benchmark: the loss is") and "lower learning_rate" in said


def test_the_plan_comes_before_the_texts_with_the_real_length_and_device(csv, capsys, monkeypatch):
    made, planned, plan_memory = [], [], benchmark.plan_memory
    monkeypatch.setattr(benchmark, "random_states", lambda *given: made.append(given))
    monkeypatch.setattr(benchmark, "plan_memory", lambda *given: planned.append((given, len(made))) or plan_memory(*given))
    assert benchmark.main(["--csv", str(csv), *SMALL, "--model", "flare", "--text", "random:100000:200000"]) == 2
    (_, _, text, mean_length, device), before = planned[0]
    assert not made and not before and text.states.nbytes == 2 * 80 * 10**5 * 2 * 10**5 and mean_length < 9
    assert device == "cpu" or benchmark.torch.cuda.is_available()


def test_first_steps_are_in_no_rate_where_steps_are_few(csv, capsys, monkeypatch):
    step = benchmark.Trainer.step
    def slow_at_first(self, batch):
        if self.at.step < 2: benchmark.time.sleep(0.5)
        return step(self, batch)
    monkeypatch.setattr(benchmark.Trainer, "step", slow_at_first)
    lines = []
    for more in (["--max-steps", "8", "--epochs", "3"], []):
        assert benchmark.main(["--csv", str(csv), *SMALL, "--batch-size", "16", *more]) == 0
        lines.append(json.loads(capsys.readouterr().out))
    assert lines[0]["steps"] == 8 and lines[0]["epoch_s"] < 1 < lines[1]["epoch_s"] and lines[0]["tokens_per_s"] > 2 * lines[1]["tokens_per_s"]


def test_rows_in_any_order_are_the_same_events(tmp_path, csv):
    "Times decide; equal times keep the order of the file."
    table = pd.read_csv(csv)
    table.sample(frac=1, random_state=0).to_csv(tmp_path / "mixed.csv", index=False)
    one, two = read_events(csv), read_events(tmp_path / "mixed.csv")
    def histories(data):
        raw = data.catalogue.table["item"].to_numpy()
        return {user: raw[data.sequences[row]].tolist() for row, user in enumerate(data.users)}
    assert histories(one) == histories(two)
    table.assign(timestamp=0).to_csv(tmp_path / "ties.csv", index=False)
    assert histories(read_events(tmp_path / "ties.csv")) == histories(one)


def test_generated_events_follow_and_are_skewed():
    events = generated_events(4000, 300, follow=0.5, exponent=1.0)
    item, user = events["item"].to_numpy(), events["user"].to_numpy()
    within = user[1:] == user[:-1]
    pairs = pd.Series(item[1:][within]).groupby(item[:-1][within]).agg(lambda nexts: nexts.value_counts(normalize=True).iloc[0])
    assert 0.45 < np.average(pairs, weights=np.bincount(item[:-1][within], minlength=300)[pairs.index]) < 0.6
    counts = np.sort(np.bincount(item, minlength=300))[::-1]
    assert counts[0] > 5 * np.median(counts) and counts[-1] > 0
    assert abs(events.groupby("user").size().mean() - 7) < 0.2


def test_lines_are_laid_side_by_side(tmp_path):
    (tmp_path / "speed").mkdir()
    for i, (system, model, epoch_s, eval_users) in enumerate([("recbole", "bert4rec", 60.0, 10), ("flare", "bert4rec", 1.5, 40),
                                                              ("flare", "flare", 3.0, 40)]):
        line = {"system": system, "model": model, "epoch_s": epoch_s, "eval_s": 2.0, "eval_users": eval_users, "users": 40, "items": 9, "steps": 2,
                "epoch_steps": 2, "peak_mb": 1.0, "base_mb": 1.0, "loaded_mb": 1.0, "fill": 1.0, "batch_share": 0.1, "recall@10": 0.1, "ndcg@10": 0.1}
        question = {"part": "sides", "system": system, "shape": "small", "more": ["--model", model]}
        code = line_code(question, tmp_path.parent) | ({"flare.losses": "0"} if model == "flare" else {})  # Flare's line is of another time
        (tmp_path / f"speed/{i}.json").write_text(json.dumps(question | {"line": line, "code": code, "environment": {"device": "cpu", "commit": "0"}}))
    (tmp_path / "speed/9.json").write_text(json.dumps({"part": "users", "system": "flare", "shape": "small", "line": line,
                                                       "environment": {"device": "cpu", "commit": "0"}}))
    lines = read_lines(tmp_path)
    assert lines["stale"].tolist() == [False, False, True, True]  # what has no digests is not known to hold
    table = side_by_side(lines).loc["small"]
    assert table.index.tolist() == ["ours", "Flare †", "RecBole"]
    assert table["epoch_s, times ours"].tolist() == [1, 2, 40] and table["eval_s"].tolist() == [2, 2, 8]  # a quarter of the users was ranked


def test_committed_lines_are_read_and_a_peer_depends_on_its_own_script():
    lines = read_lines(ROOT / "paper")
    assert len(lines) == len(list((ROOT / "paper/speed").glob("*.json"))) and lines[["system", "part", "date", "commit", "on"]].notna().all().all()
    assert set(line_code({"system": "rectools"}, ROOT)) == {"peer.py", "rectools_bert4rec.py", "rectools.txt", "generated_events"}
    ours, flare = (line_code({"system": "flare", "more": more}, ROOT) for more in (["--epochs", "3"], ["--model", "flare"]))
    assert {"flare.benchmark", "flare.losses", "flare.trainer"} <= set(ours) <= set(flare)


def test_a_page_with_lines_of_a_gpu(tmp_path):
    "They stand in tables of their own; without them the page says so (test_notebooks runs it)."
    for folder in ("nbs/results", "paper/tables"): (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "settings.ini", tmp_path)
    shutil.copy(ROOT / "nbs/results/figure_speed.ipynb", tmp_path / "nbs/results")
    shutil.copytree(ROOT / "paper/speed", tmp_path / "paper/speed")
    about = {"device": "NVIDIA H200", "processor": "some", "bf16": True, "commit": "0" * 40, "date": "2026-01-02T03:04:05+00:00"}
    loss = {"part": "loss", "system": "cut", "shape": "5000 items", "masks": 4096, "size": 768, "on": "cuda",
            "line": {"system": "cut", "items": 5000, "seconds": 0.001, "peak_mb": 99.0}}
    base = {"part": "gpu", "system": "flare", "shape": "clothing", "more": ["--model", "bert4rec"], "line": {
        "system": "flare", "model": "bert4rec", "items": 376843, "users": 1219592, "epoch_s": 50.0, "steps": 200, "epoch_steps": 1191, "tokens_per_s": 900000,
        "tflops": 395.6, "eval_s": 20.0, "eval_users": 1219592, "peak_mb": 20000.0, "base_mb": 200.0, "loaded_mb": 400.0}}
    for name, line in {"a": loss, "b": loss | {"system": "ours", "line": loss["line"] | {"system": "ours"}}, "c": base}.items():
        (tmp_path / f"paper/speed/{name}.json").write_text(json.dumps(line | {"environment": about}))
    done = subprocess.run([sys.executable, "-m", "jupyter", "nbconvert", "--to", "markdown", "--execute", "--no-input", "--stdout", tmp_path / "nbs/results/figure_speed.ipynb"],
                          capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and "The lines are of 2 runs" in done.stdout and "GPU: not measured" not in done.stdout, done.stderr[-2000:]
    found = pd.read_csv(tmp_path / "paper/tables/speed_gpu.csv").iloc[0]
    assert found["share of the bf16 peak"] == 0.4 and found["tokens_per_s"] == 900000 and found["stale"] and found["eval_s"] == 20
    assert "cut" not in pd.read_csv(tmp_path / "paper/tables/speed_floor.csv")


def speed(**given):
    "Run the experiment in this process, with parameters of ours."
    space = {}
    for cell in nbformat.read(ROOT / "nbs/experiments/speed.ipynb", 4).cells:
        if cell.cell_type == "code": exec(cell.source, space)
        if "parameters" in cell.metadata.get("tags", []): space.update({"threads": 1, "vocabularies": 100} | given)
    return space["lines"]


def test_what_is_stale_is_measured_again_and_only_that(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "paper/speed").iterdir()}
    speed(parts="floor", vocabularies="100,200", kept_in=str(tmp_path))
    one, *others = paths = sorted(tmp_path.glob("*.json"))
    for path in paths:
        record = json.loads(path.read_text())
        assert record["code"] == line_code(record, ROOT) and record["environment"]["device"] == "cpu, 1 threads"
        record["line"]["seconds"] = -1.0
        path.write_text(json.dumps(record | ({"code": {"flare.losses": "0"}} if path == one else {})))
    speed(parts="floor", vocabularies="100,200", kept_in=str(tmp_path))
    assert others and json.loads(one.read_text())["line"]["seconds"] > 0
    assert all(json.loads(path.read_text())["line"]["seconds"] < 0 for path in others)
    assert before == {path: path.stat().st_mtime_ns for path in (ROOT / "paper/speed").iterdir()}


def test_lines_of_a_cpu_see_no_gpu_and_texts_without_room_are_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    called, run = [], subprocess.run
    def answer(call, **how):
        if "flare.benchmark" not in call: return run(call, **how)
        called.append(("flare" in call, how["env"]["CUDA_VISIBLE_DEVICES"]))
        if "flare" in call:
            return SimpleNamespace(returncode=2, stdout="",
                                   stderr="flare.benchmark: this training needs about 9.0 GiB and 1.0 GiB are free\n")
        return SimpleNamespace(returncode=0, stdout='{"system": "flare", "model": "bert4rec"}\n', stderr="memory: about 1 MiB\n")
    monkeypatch.setattr(subprocess, "run", answer)
    plain, with_texts = speed(parts="vocabulary", kept_in=str(tmp_path))
    assert called == [(False, ""), (True, "")] and plain["model"] == "bert4rec" and "1.0 GiB are free" in with_texts["missing"]
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_first_steps_of_a_peer_are_in_no_rate_either(monkeypatch):
    spec = importlib.util.spec_from_file_location("peer", ROOT / "nbs/experiments/peers/peer.py")
    spec.loader.exec_module(peer := importlib.util.module_from_spec(spec))
    now = [0.0]
    monkeypatch.setattr(peer, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    watch = peer.Watch(8)
    watch.start()
    for seconds in (10, 10, 1, 1, 1, 1, 1, 1):
        now[0] += seconds
        watch.lap(1)
    assert watch.epoch_s(100) == 100 and watch.seconds == 26
