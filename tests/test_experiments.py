"Records, runs and grids: what must not depend on the machine, and what must not be left behind."
import ast
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock
from nbdev.test import _keep_file

from flare import experiments, grid, records
from flare.comparison import verdict
from flare.experiments import renew, run
from flare.files import write_text
from flare.grid import WHICH, Board, Grid, answers, asked_of, changes, declared_parameters, make_points, read_yaml, run_grid
from flare.metrics import Ranks
from flare.results import benchmark_records, compared, of_its_time, over_seeds, read_beside, read_heard, read_records
from flare.records import (MODELS, SCHEMA, Record, code_digest, essence, parameters_of, read_record, record_key,
                           resolve, staleness, write_record)
from processes import ended, start
from shop import HOME, write_project, write_shop
from tiny_encoder import write_encoder

SMALL = {"hidden_size": 16, "heads": 2, "ffn_size": 32, "layers": 1, "batch_size": 8}
EVERY = {name: list(default) if isinstance(default, tuple) else default for model in MODELS
         for name, default in parameters_of(model).items()}
NOTEBOOKS = HOME / "nbs/experiments"


@pytest.fixture
def shop(tmp_path):
    return write_shop(tmp_path / "shop")


@pytest.fixture
def project(tmp_path):
    return write_project(tmp_path / "project")


@pytest.fixture
def record(shop, tmp_path):
    return run("tests", "popularity", str(shop), root=tmp_path / "paper")


def here(executor_calls):
    "An executor that runs at once, in this process, and counts."
    class Here(Executor):
        def submit(self, function, *arguments):
            executor_calls.append(function)
            future = Future()
            future.set_result(function(*arguments))
            return future
    return Here()


# records

def test_a_key_never_changes():
    assert record_key("bert4rec", "ml-100k", 0, "leave_one_out", {"dropout": 0.3, "epochs": 2}) == "9c8f5211dbb2"
    assert record_key("bert4rec", "ml-100k", 0, "leave_one_out", {"epochs": 2, "dropout": 0.3}) == "9c8f5211dbb2"


def test_the_key_is_the_same_for_the_same_values_in_other_types(shop, tmp_path):
    asked = [{"dropout": 0, "epochs": 1}, {"epochs": np.int64(1), "dropout": np.float64(0)}]
    assert len({json.dumps(resolve("bert4rec", a)[0]) for a in asked}) == 1


def test_a_record_is_named_by_its_content(record, tmp_path):
    (path,) = (tmp_path / "paper/records/tests").glob("*.json")
    assert path.stem == record.key and read_record(path) == record
    content = json.loads(path.read_text())
    assert content["schema"] == SCHEMA and set(content["dataset"]) == {
        "name", "fingerprint", "split", "users", "items", "interactions", "text_coverage"}
    ranks = Ranks.from_parquet(path.with_suffix(".ranks.parquet"))
    assert ranks.metrics() == pytest.approx(record.metrics["test"])
    assert str(tmp_path) not in path.read_text()


@pytest.mark.parametrize("last", ["ranks", "json"])
def test_a_write_that_is_interrupted_leaves_no_record(record, tmp_path, monkeypatch, last):
    ranks, root = Ranks(np.arange(2), np.array([1, 2]), np.array([1, 2])), tmp_path / "other"
    moved, replace_file = [], os.replace

    def full(source, target):
        moved.append(str(target))
        if last == "ranks" or str(target).endswith(".json"):
            raise OSError("no space left on device")
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        write_record(record, ranks, root)
    assert moved and not list(root.rglob("*.json"))
    monkeypatch.undo()
    assert len(read_records("tests", root)) == 0
    write_record(record, ranks, root)
    assert len(read_records("tests", root)) == 1


@pytest.mark.parametrize("ending", ["ranks", "heard", "history", "json"])
def test_a_full_disk_leaves_the_older_record_as_it_was(record, tmp_path, monkeypatch, ending):
    ranks, root, whole = Ranks(np.arange(2), np.array([1, 2]), np.array([1, 2])), tmp_path / "other", Path.write_bytes
    older = replace(record, code={})
    folder = write_record(older, ranks, root, {".heard.parquet": b"old", ".history.parquet": b"old"}).parent
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(path, content):
        whole(path, content[: len(content) // 2] if ending in path.name else content)
        if ending in path.name: raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space left"):
        write_record(record, ranks.subset([0]), root, {".heard.parquet": b"new", ".history.parquet": b"new"})
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before and len(before) == 4
    write_record(record, ranks.subset([0]), root, {".heard.parquet": b"new"})
    assert {path.name.partition(".")[2] for path in folder.iterdir()} == {"json", "ranks.parquet", "heard.parquet"}
    assert read_record(record.path(root)) == record and record.path(root).with_suffix(".heard.parquet").read_bytes() == b"new"


def test_a_metric_that_is_no_number_is_refused(record, tmp_path):
    metrics = record.metrics | {"test": record.metrics["test"] | {"mrr": float("nan")}}
    ranks = Ranks(np.arange(1), np.ones(1, int), np.ones(1, int))
    with pytest.raises(ValueError, match="metrics.test.mrr of popularity on shop is nan"):
        write_record(replace(record, metrics=metrics), ranks, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("old, new, message", [
    ('"users": 24', '"users": NaN', "holds NaN, which is not JSON"), ('"seed": 0', '"seed": 3', "edited or renamed"),
    ('"cost"', '"costs"', "lacks or adds the fields cost, costs"),
    (f'"schema": {SCHEMA}', '"schema": 99', "update flare"),
    (f'"schema": {SCHEMA}', '"schema": "one"', "has no schema number"), ("}", "", "is not JSON")])
def test_a_damaged_record_is_named(record, tmp_path, old, new, message):
    path = record.path(tmp_path / "paper")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message) as caught:
        read_records("tests", tmp_path / "paper")
    assert path.name in str(caught.value)


def test_an_older_schema_is_stale_and_run_again(record, shop, tmp_path):
    path = record.path(tmp_path / "paper")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: content[k] for k in ("experiment", "model", "seed", "metrics")} | {"schema": 0}))
    (row,) = read_records("tests", tmp_path / "paper").itertuples()
    assert row.stale and row.why_stale == f"schema 0 is older than {SCHEMA}" and row.key == record.key
    assert len(over_seeds(read_records("tests", tmp_path / "paper"))) == 0
    run("tests", "popularity", str(shop), root=tmp_path / "paper")
    assert read_record(path).schema == SCHEMA


# what is stale

def test_the_reasons_are_named(record):
    assert staleness(record, {"shop": record.dataset["fingerprint"]}) == ""
    assert staleness(record, {"shop": "0" * 12}) == "data changed: shop"
    assert staleness(replace(record, code=record.code | {"flare.gone": "0"})) == "code changed: flare.gone"
    assert staleness(replace(record, model="sasrec")) == "there is no model sasrec any more"


def test_a_changed_default_is_noticed_and_an_added_field_is_not():
    asked, complete = resolve("bert4rec", {"epochs": 2})
    data = {"name": "shop", "fingerprint": "0"}
    made = Record("tests", "bert4rec", 0, asked, complete, data, {}, {}, {}, code_digest("bert4rec"))
    assert staleness(made) == ""
    assert staleness(replace(made, config=complete | {"dropout": 0.77})) == "parameters changed: dropout"
    assert staleness(replace(made, config={k: v for k, v in complete.items() if k != "dropout"})) == ""
    spelt_out = replace(made, parameters=asked | {"dropout": 0.77}, config=complete | {"dropout": 0.77})
    assert staleness(spelt_out) == ""


def test_the_digest_follows_imports_and_not_what_is_loaded():
    script = "from flare.records import code_digest; print(code_digest('popularity'))"
    alone = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    import flare.cli  # noqa: F401
    assert ast.literal_eval(alone) == code_digest("popularity")
    assert {"flare.data", "flare.metrics", "flare.baselines.popularity"} <= set(code_digest("popularity"))
    assert {"flare.trainer", "flare.models", "flare.losses", "flare.masking"} <= set(code_digest("bert4rec"))
    for model in MODELS:
        assert not {"flare.records", "flare.experiments", "flare.grid", "flare.cli"} & set(code_digest(model))


def test_what_does_not_compute_is_not_code():
    source = 'def f(x):  # a comment\n    """Long\n    words."""\n    return "# text", x\n'
    assert essence(source) == essence('def f(x): return ("# text",\n x,\n)')
    assert essence(source) == essence(source.replace("comment", "remark").replace("words", "text"))
    assert essence(source) != essence(source.replace("# text", "# another"))
    assert essence("x = None") != essence("x = 0") != essence("x = False") != essence("x = ''")
    assert essence('if a:\n    b()\nc()\n') != essence('if a:\n    b()\n    c()\n')
    assert essence('def f(x): "One line."; return x') != essence('def f(x): "One line."; return -x')


def test_threads_parse_one_after_the_other(monkeypatch):
    "CPython 3.11 cannot do it at once (gh-106905)."
    inside, most, parse = [], [], ast.parse

    def watched(*args, **kwargs):
        inside.append(1), most.append(len(inside)), time.sleep(0.001)
        try: return parse(*args, **kwargs)
        finally: inside.pop()

    records.essence.cache_clear(), records.imported.cache_clear()  # what was parsed before is remembered
    monkeypatch.setattr(ast, "parse", watched)
    with ThreadPoolExecutor(4) as pool: digests = list(pool.map(code_digest, ["flare"] * 8))
    assert max(most) == 1 and len(most) > 20 and all(digest == digests[0] for digest in digests)


def test_a_renewed_record_has_what_the_new_code_keeps_beside_it(shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where `shop` is the name of a folder, as in the record
    root = tmp_path / "paper"
    made = [run("tests", "bert4rec", "shop", seed, parameters=SMALL | {"epochs": epochs}, root=root, progress=False)
            for seed, epochs in ((0, 2), (1, 2))]
    for record in made:
        write_text(record.path(root), replace(record, code={"flare.models": "an older one", "flare.gone": "and its helper"},
                                              cost={"train_seconds": -1.0}, environment={"date": "then"}).to_json())
    witness, other = (record.path(root) for record in made)
    kept = [path.with_suffix(".history.parquet") for path in (witness, other)]
    curve = pd.read_parquet(kept[0])
    for path in kept: path.write_bytes(b"older")
    witness.with_suffix(".traces.parquet").write_bytes(b"of the older code")
    assert renew("tests", witness.stem, root) == [witness, other]
    now, theirs = read_record(witness), read_record(other)
    assert now.code == theirs.code == made[0].code and now.metrics == made[0].metrics
    assert now.cost["train_seconds"] > 0 and now.environment["date"] != "then" and {"device", "renewed"} <= set(now.environment)
    assert theirs.cost == {"train_seconds": -1.0} and theirs.environment["date"] == "then" and theirs.environment["renewed"] == now.environment["renewed"]
    assert pd.read_parquet(kept[0]).equals(curve) and kept[1].read_bytes() == b"older" and not witness.with_suffix(".traces.parquet").exists()


def test_a_renewal_that_was_stopped_goes_on(shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "paper"
    record = run("tests", "bert4rec", "shop", parameters=SMALL | {"epochs": 2}, root=root, progress=False)
    write_text(record.path(root), replace(record, code={"flare.models": "an older one"}).to_json())
    measure, trained = experiments.measure, experiments.train
    monkeypatch.setattr(experiments, "measure", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError): renew("tests", record.key, root)
    monkeypatch.setattr(experiments, "measure", measure)
    found = []
    monkeypatch.setattr(experiments, "train", lambda model, split, config, folder, *more:
                        found.extend(Path(folder).glob("epoch-*")) or trained(model, split, config, folder, *more))
    assert renew("tests", record.key, root) == [record.path(root)]
    assert len(found) == 1 and not list((root / "runs/renew").rglob("epoch-*"))


def test_what_cannot_be_renewed_is_refused_before_anything_is_run(shop, tmp_path, monkeypatch):
    root = tmp_path / "paper"
    made = [run("tests", "popularity", str(shop), seed, root=root) for seed in (0, 1)]
    witness, other = (record.path(root) for record in made)
    monkeypatch.setattr(experiments, "run", lambda *_: 1 / 0)
    write_text(witness, replace(made[0], code={}).to_json())
    other.write_text("{")
    with pytest.raises(ValueError, match=f"{other.name}: is not JSON"): renew("tests", made[0].key, root)
    witness.write_text(json.dumps({"schema": 0, "model": "popularity", "seed": 0, "metrics": {}}))
    with pytest.raises(ValueError, match="has schema 0, which is older"): renew("tests", made[0].key, root)


def test_a_fused_model_does_not_stand_for_what_it_was(shop, tmp_path):
    root = tmp_path / "paper"
    made = run("critiquing", "popularity", str(shop), root=root)
    models = {"flare_listens": "flare", "bert4rec_fused": None}
    for model, stands_for in models.items():
        record = replace(made, model=model)
        write_record(record, Ranks.from_parquet(made.path(root).with_suffix(".ranks.parquet")), root)
    assert benchmark_records(root)["model"].tolist() == ["flare"]


def test_what_lies_beside_an_older_record_is_left_out(shop, tmp_path):
    root = tmp_path / "paper"
    record = run("tests", "bert4rec", str(shop), parameters=SMALL | {"epochs": 2}, root=root, progress=False)
    path = record.path(root)
    (path.parent / "killed.history.parquet").write_bytes(path.with_suffix(".history.parquet").read_bytes())  # and no record
    assert set(read_beside("tests", "history", root)["key"]) == {record.key}
    path.write_text(json.dumps({"schema": 0, "model": "bert4rec", "seed": 0, "metrics": {"precise|who": {"mrr": 0.5}}}))
    assert len(read_records("tests", root)) == 1 and read_beside("tests", "history", root).empty and read_heard("tests", root)[0].empty


def test_what_is_stale_stands_back_where_another_seed_holds(shop, tmp_path):
    root = tmp_path / "paper"
    made = [run("tests", "popularity", str(shop), seed=seed, root=root, progress=False) for seed in (0, 1)]
    for held in (1, 0):
        for record in made[held:]:
            older = replace(record, code={"flare.baselines.popularity": "older"}, metrics=record.metrics | {"precise|silent": {"mrr": 0.5}})
            write_text(record.path(root), older.to_json())
        if held: write_text(made[0].path(root), replace(made[0], metrics=made[0].metrics | {"precise|silent": {"mrr": 0.5}}).to_json())
        assert sorted(read_heard("tests", root)[0]["seed"]) == ([0] if held else [0, 1])


# a run

def test_a_failing_run_leaves_no_record(shop, tmp_path, monkeypatch):
    def broken(*arguments):
        raise ValueError("scores are not finite")
    monkeypatch.setattr(experiments, "evaluate", broken)
    with pytest.raises(ValueError, match="not finite"):
        run("tests", "lir", str(shop), root=tmp_path / "paper")
    assert not (tmp_path / "paper/records").exists()


def test_bad_input_leaves_nothing(shop, tmp_path):
    for arguments, message in [(dict(model="bert"), "there is no model 'bert'"),
                               (dict(parameters={"droput": 1}), "unknown parameter droput"),
                               (dict(parameters={"dropout": "high"}), "dropout is 'high'"),
                               (dict(parameters={"heads": 7}), "heads=7"),
                               (dict(parameters={"epochs": 0}), "epochs is 0"),
                               (dict(parameters={"heads": 0}), "heads is 0"),
                               (dict(parameters={"dropout": 1.5}), "dropout is 1.5"),
                               (dict(parameters={"window_stride": "x"}), "window_stride is 'x'"),
                               (dict(model="flare", parameters={"perceiver_heads": 3}), "not a multiple of perceiver_heads=3"),
                               (dict(model="flare", parameters={"cross_attends": 5}), "cross_attends=5"),
                               (dict(model="flare", parameters={"temperature": 0.0}), "temperature is 0.0"),
                               (dict(split="random"), "there is no split"),
                               (dict(experiment="a/b"), "does not name an experiment")]:
        given = dict(experiment="tests", model="bert4rec", dataset=str(shop), root=tmp_path / "paper") | arguments
        with pytest.raises(ValueError, match=message):
            run(**given)
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        run("tests", "lir", str(tmp_path / "nowhere"), root=tmp_path / "paper")
    with pytest.raises(ValueError, match="has the name of a dataset that is known"):
        run("tests", "lir", str(write_shop(tmp_path / "ml-100k")), root=tmp_path / "paper")
    assert not (tmp_path / "paper").exists()


def test_flare_reads_the_texts_of_a_shop(shop, tmp_path, monkeypatch):
    monkeypatch.setenv("FLARE_CACHE", str(tmp_path / "cache"))
    parameters = SMALL | {"encoder": str(write_encoder(tmp_path / "encoder")), "latents": 2, "perceiver_size": 8,
                          "perceiver_heads": 2, "epochs": 2}
    record = run("tests", "flare", str(shop), parameters=parameters, root=tmp_path / "paper", progress=False)
    assert record.config["encoder"] == parameters["encoder"] and record.config["alpha"] == parameters_of("flare")["alpha"]
    assert {"flare.text", "flare.perceiver", "flare.models"} <= set(record.code) and list((tmp_path / "cache/text").glob("*/states.f16"))
    assert run("tests", "flare", str(shop), parameters=parameters, root=tmp_path / "paper") == record


def test_flare_without_texts_is_refused(shop, tmp_path):
    table = (shop / "items.csv").read_text().splitlines()
    (shop / "items.csv").write_text("\n".join([table[0], *(line.split(",")[0] + "," for line in table[1:])]))
    with pytest.raises(ValueError, match="none of the 12 items has a text: train without modalities"):
        run("tests", "flare", str(shop), root=tmp_path / "paper", progress=False)


def test_only_flare_has_the_parameters_of_texts():
    only = set(parameters_of("flare")) - set(parameters_of("bert4rec"))
    assert {"encoder", "latents", "output_tie", "alpha", "reader_rate"} <= only and "text_width" not in only
    assert not set(parameters_of("bert4rec")) - set(parameters_of("flare"))


def test_two_at_once_run_it_once(shop, tmp_path, monkeypatch):
    built, build = [], experiments.build

    def slow(*arguments):
        built.append(1)
        time.sleep(0.5)
        return build(*arguments)

    monkeypatch.setattr(experiments, "build", slow)
    with ThreadPoolExecutor(2) as pool:
        records = list(pool.map(lambda _: run("tests", "lir", str(shop), root=tmp_path / "paper"), range(2)))
    assert len(built) == 1 and records[0] == records[1]


@pytest.mark.parametrize("model", ["bert4rec", "flare"])
def test_a_killed_run_goes_on_and_ends_the_same(model, shop, tmp_path):
    parameters = SMALL | {"epochs": 60, "patience": 60, "encoder": str(write_encoder(tmp_path / "encoder")), "latents": 2,
                          "perceiver_size": 8, "perceiver_heads": 2, "refresh_every": 5}
    given = dict(experiment="tests", model=model, dataset=str(shop), parameters=parameters, progress=False)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start(partial(run, root=killed, **given))
    while not list(killed.glob("runs/tests/*/epoch-0000[3-9]*")) and process.is_alive():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert ended(process) == -signal.SIGKILL, "it ended before it could be killed"
    assert list(killed.glob("runs/tests/*/epoch-*")) and len(read_records("tests", killed)) == 0
    one, other = run(root=killed, **given), run(root=whole, **given)
    assert one.metrics == other.metrics and one.cost["steps"] == other.cost["steps"]
    assert not [path for path in killed.glob("runs/tests/*") if path.is_dir()]


def test_checkpoints_of_other_code_are_not_continued(tmp_path):
    folder = tmp_path / "run"
    experiments.claim(folder, {"code": 1})
    (folder / "epoch-1").mkdir()
    experiments.claim(folder, {"code": 1})
    assert (folder / "epoch-1").exists()
    experiments.claim(folder, {"code": 2})
    assert not (folder / "epoch-1").exists()


# grids

def test_numbers_as_people_write_them():
    assert read_yaml("[1e-3, 1E3, -2.5e-2, 1.0, 3, 1e]", "a test") == [0.001, 1000.0, -0.025, 1.0, 3, "1e"]


def test_a_point_is_answered_by_its_seeds_and_named_by_what_it_changes(shop, tmp_path):
    root, points = tmp_path / "paper", [{"model": "lir", "dataset": str(shop), "k1": k1, "seed": seed} for k1 in (1.5, 3)
                                        for seed in (1, 0)]
    for point in points: run("tests", "lir", point["dataset"], point["seed"], parameters={"k1": point["k1"]}, root=root, progress=False)
    run("tests", "lir", str(shop), split="unseen_users", root=root, progress=False)
    records = read_records("tests", root)
    named = [point | {"dataset": records["dataset"].iloc[0]} for point in points]
    assert asked_of(points[0])[0] == {} and asked_of(points[2]) == ({"k1": 3.0}, {**asked_of(points[0])[1], "k1": 3.0})
    assert answers(records, named[2])[["seed", "parameters"]].values.tolist() == [[0, '{"k1": 3.0}'], [1, '{"k1": 3.0}']]
    assert len(answers(records, named[0])) == 2 and len(answers(records, named[0] | {"split": "unseen_users"})) == 1
    assert answers(records, named[0] | {"k1": 9}).empty
    assert answers(records, points[2]).equals(answers(records, named[2])) and len(answers(records, points[2])) == 2  # by the folder
    assert [changes(point, points[0]) for point in points] == ["", "", "k1 = 3.0", "k1 = 3.0"]
    assert changes(points[0] | {"split": "norepeat"}, points[2]) == "k1 = 1.5, norepeat"
    found = compared(answers(records, named[0]), {"other": answers(records, named[2]), "none": records[:0]}, {"MRR": "mrr"}, root)
    means = [answers(records, point)["test.mrr_pessimistic"].mean() for point in (named[0], named[2])]
    assert found["other"].tolist() == ["other"] and found[["first", "second"]].values[0] == pytest.approx(means)
    assert found["difference"].item() == pytest.approx(means[0] - means[1]) and found["low"].item() <= found["difference"].item() <= found["high"].item()
    assert compared(records[:0], {"other": records}, {"MRR": "mrr"}, root).empty
    assert found["verdict"].item() == verdict(found["low"].item(), found["high"].item()) and found["seeds"].item() == "2, 2"


def test_what_is_stale_is_compared_with_what_is_stale():
    now, older = pd.DataFrame({"stale": [False, False]}), pd.DataFrame({"stale": [True]})
    assert of_its_time(now, now, older) is now and of_its_time(pd.concat([now, older]), now, older) is older
    assert of_its_time(older, now, older[:0]).empty and of_its_time(now[:0], now, older) is now
    assert [verdict(*interval) for interval in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1),
                                                (float("nan"), float("nan")))] == ["ahead", "behind", "no difference", "—"]


def test_without_repeats_it_is_another_split(tmp_path):
    folder = tmp_path / "again"
    folder.mkdir()
    rows = [(f"u{u}", item, t) for u in range(12) for t, item in enumerate(["a", "a", "b", "c", "c", "d" if u % 2 else "e", "e"])]
    pd.DataFrame(rows, columns=["user", "item", "timestamp"]).to_csv(folder / "interactions.csv", index=False)
    pd.DataFrame({"item": list("abcde"), "title": list("abcde")}).to_csv(folder / "items.csv", index=False)
    with_repeats, without = (run("tests", "repeat_last", str(folder), split=split, root=tmp_path / "paper", progress=False)
                             for split in ("leave_one_out", "norepeat"))
    assert with_repeats.metrics["test"]["recall@1"] == 0.5 > without.metrics["test"]["recall@1"] == 0
    assert with_repeats.key != without.key and without.dataset["split"] == "norepeat"


def test_an_undeclared_key_is_refused(project):
    message = "benchmark.ipynb does not declare learning_rat; it declares experiment, model, dataset"
    with pytest.raises(ValueError, match=message):
        run_grid(Grid("benchmark", {"learning_rat": 1.0}, [{}]), project=project)
    assert not (project / "paper").exists()


@pytest.mark.parametrize("cell, message", [
    ("seed = 0\nfor i in (1, 2): pass", "line 2 of the parameters cell"),
    ("seed = max(1, 2)", "line 1 of the parameters cell"), ("seed = 0\n%time", "line 2 of the parameters cell is not Python"),
    ("seed = 0", "does not declare experiment, model, dataset, split")])
def test_a_parameters_cell_is_plain(project, cell, message):
    path = project / "nbs/experiments/benchmark.ipynb"
    content = json.loads(path.read_text())
    next(c for c in content["cells"] if c["metadata"].get("tags"))["source"] = cell
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        make_points(path, [{}])
    assert "benchmark.ipynb" in str(caught.value)


def test_two_folders_of_one_name_are_refused(project):
    write_shop(project / "other/shop", customers=30)
    both = Grid("benchmark", {"model": "lir"}, [{"dataset": [str(project / "shop"), str(project / "other/shop")]}])
    with pytest.raises(ValueError, match="two folders are called shop"): run_grid(both, project=project)


def test_a_known_encoder_is_not_a_folder(project, monkeypatch):
    monkeypatch.chdir(project)
    for name in ("minilm", "mine"): (project / name).mkdir()
    points = make_points(project / "nbs/experiments/benchmark.ipynb", [{"model": "flare", "dataset": "shop", "encoder": name}
                                                                       for name in ("minilm", "mine")])
    assert [point.values["encoder"] for point in points] == ["minilm", str(project / "mine")]


def test_a_lost_tag_is_noticed(project):
    path = project / "nbs/experiments/benchmark.ipynb"
    path.write_text(path.read_text().replace('"parameters"', '"params"'))
    with pytest.raises(ValueError, match="0 cells are tagged parameters"):
        make_points(path, [{}])


def test_two_workers_then_nothing_left_to_do(project):
    shop = Grid("benchmark", {"dataset": str(project / "shop")}, [{"model": ["popularity", "repeat_last"]}])
    planned = run_grid(shop, dry_run=True, project=project)
    assert list(planned["state"]) == ["missing"] * 2 and not (project / "paper").exists()
    done = run_grid(shop, workers=2, project=project, progress=False)
    assert list(done["state"]) == ["done"] * 2, list(done["note"])
    assert set(read_records("benchmark", project / "paper")["key"]) == set(done["key"]) == set(planned["key"])
    kept = sorted(p.suffix for p in (project / "paper/runs/benchmark").iterdir())
    assert kept == [".ipynb", ".ipynb", ".lock", ".lock"]
    calls = []
    again = run_grid(shop, executor=here(calls), project=project, progress=False)
    assert list(again["state"]) == ["fresh"] * 2 and not calls


def test_stale_ones_only_on_request(project, monkeypatch):
    shop = Grid("benchmark", {"dataset": str(project / "shop")}, [{"model": ["popularity", "lir"]}])
    for model in ("popularity", "lir"):
        run("benchmark", model, str(project / "shop"), root=project / "paper")
    with (project / "shop/interactions.csv").open("a") as lines:
        lines.write("u0,i9,99\n")
    calls = []
    monkeypatch.setattr(grid, "execute", lambda point, project, threads, gpu: calls.append(point.key) or (0.0, ""))
    left = run_grid(shop, executor=here([]), project=project, progress=False)
    assert list(left["state"]) == ["stale"] * 2 and not calls and set(left["note"]) == {"data changed: shop"}
    assert list(run_grid(shop, executor=here([]), stale=True, project=project, progress=False)["state"]) == ["done"] * 2
    assert len(calls) == 2


def test_a_failure_keeps_notebook_and_log_and_stops_nobody(project):
    path = project / "nbs/experiments/benchmark.ipynb"
    content = json.loads(path.read_text())
    code = [c for c in content["cells"] if c["cell_type"] == "code" and not c["metadata"].get("tags")]
    code[0]["source"] = "assert model != 'lir', 'the index\\nis broken'\n" + "".join(code[0]["source"])
    path.write_text(json.dumps(content))
    shop = Grid("benchmark", {"dataset": str(project / "shop")}, [{"model": ["lir", "popularity"]}])
    outcome = run_grid(shop, workers=2, project=project, progress=False).set_index("model")
    assert dict(outcome["state"]) == {"lir": "failed", "popularity": "done"}
    assert outcome.loc["lir", "note"] == "AssertionError: the index is broken"
    failed = project / "paper/runs/benchmark" / outcome.loc["lir", "key"]
    assert failed.with_suffix(".ipynb").exists()
    assert "Traceback (most recent call last)" in failed.with_suffix(".log").read_text()
    assert list(read_records("benchmark", project / "paper")["model"]) == ["popularity"]


def test_a_notebook_that_was_cut_short_stops_nobody(project, monkeypatch):
    def papermill(command, **_):
        "A disk that is full, for one of two."
        Path(command[4]).write_text("" if "model: lir" in command[-1] else json.dumps({"cells": []}))
        return subprocess.CompletedProcess(command, 1, "", "OSError: no space left on device")

    monkeypatch.setattr(grid, "subprocess", SimpleNamespace(run=papermill))
    shop = Grid("benchmark", {"dataset": str(project / "shop")}, [{"model": ["lir", "popularity"]}])
    outcome = run_grid(shop, project=project, progress=False)
    assert list(outcome["state"]) == ["failed"] * 2 and set(outcome["note"]) == {"OSError: no space left on device"}


def test_a_run_that_another_process_is_at_is_told(project, monkeypatch, capsys):
    monkeypatch.setattr(grid, "execute", lambda *_: (0.0, ""))
    shop = Grid("benchmark", {"dataset": str(project / "shop")}, [{"model": ["lir", "popularity"]}])
    key = run_grid(shop, dry_run=True, project=project)["key"][1]
    lock = project / f"paper/runs/benchmark/{key}.lock"
    lock.parent.mkdir(parents=True)
    with FileLock(lock): run_grid(shop, executor=here([]), project=project, progress=False)
    assert capsys.readouterr().err == f"another process is running {key}: waiting for its record\n"
    run_grid(shop, executor=here([]), project=project, progress=False)
    assert capsys.readouterr().err == ""


def test_code_that_is_edited_during_a_run_leaves_its_record(project, monkeypatch):
    root = project / "paper"

    def papermill(command, **_):
        record = run("benchmark", "popularity", str(project / "shop"), root=root)
        write_text(record.path(root), replace(record, code=record.code | {"flare.metrics": "before it was edited"}).to_json())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(grid, "subprocess", SimpleNamespace(run=papermill))
    shop = Grid("benchmark", {"dataset": str(project / "shop")}, [{"model": "popularity"}])
    assert list(run_grid(shop, project=project, progress=False)["state"]) == ["done"]
    assert list(run_grid(shop, project=project, progress=False)["note"]) == ["code changed: flare.metrics"]


def test_a_notebook_that_drops_a_parameter_is_caught(project):
    path = project / "nbs/experiments/benchmark.ipynb"
    path.write_text(path.read_text().replace("dataset, seed, split, parameters", "dataset, 0, split, parameters"))
    shop = Grid("benchmark", {"dataset": str(project / "shop")}, [{"model": "popularity", "seed": 5}])
    outcome = run_grid(shop, project=project, progress=False)
    assert outcome["state"][0] == "failed" and "does it pass all its parameters on" in outcome["note"][0]


def test_a_stale_record_that_is_not_replaced_is_caught(project):
    record = run("benchmark", "popularity", str(project / "shop"), root=project / "paper")
    write_text(record.path(project / "paper"), replace(record, code={}).to_json())
    path = project / "nbs/experiments/benchmark.ipynb"
    content = json.loads(path.read_text())
    for cell in content["cells"]:
        if cell["cell_type"] == "code" and not cell["metadata"].get("tags"):
            cell["source"] = "dict(model=model)"  # which is all that it does
    path.write_text(json.dumps(content))
    outcome = run_grid(Grid("benchmark", {"dataset": str(project / "shop")}, [{"model": "popularity"}]), project=project,
                       progress=False, stale=True)
    assert outcome["state"][0] == "failed" and "does it pass all its parameters on" in outcome["note"][0]


@pytest.mark.parametrize("workers", [1, 2])
def test_threads_are_divided(project, monkeypatch, workers):
    seen = []

    def papermill(command, env, **_):
        seen.append(int(env["OMP_NUM_THREADS"]))
        return subprocess.CompletedProcess(command, 1, "", "stopped")

    monkeypatch.setattr(grid.subprocess, "run", papermill)
    monkeypatch.setattr(grid.torch, "get_num_threads", lambda: 8)
    shop = Grid("benchmark", {"dataset": str(project / "shop")}, [{"model": ["popularity", "lir"]}])
    run_grid(shop, workers=workers, project=project, progress=False)
    assert seen == [8 // workers] * 2


def test_each_place_has_a_gpu_of_its_own(project, monkeypatch):
    seen = []

    def papermill(command, env, **_):
        seen.append(env.get("CUDA_VISIBLE_DEVICES"))
        time.sleep(0.1)
        return subprocess.CompletedProcess(command, 1, "", "stopped")

    monkeypatch.setattr(grid.subprocess, "run", papermill)
    shop = Grid("benchmark", {"dataset": str(project / "shop")}, [{"model": ["popularity", "lir", "repeat_last"]}])
    for visible, expected in (("4,7", {"4", "7"}), ("4", {"4"})):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        run_grid(shop, workers=2, project=project, progress=False)
        assert set(seen) == expected and len(seen) == 3
        seen.clear()


def test_dask_runs_a_grid(project, monkeypatch):
    distributed = pytest.importorskip("distributed")
    shop = Grid("benchmark", {"dataset": str(project / "shop")}, [{"model": ["popularity", "repeat_last"]}])
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None,
                                  local_directory=str(project)) as cluster, cluster.get_client() as client:
        executor, ran = client.get_executor(), []
        monkeypatch.setattr(executor, "submit",
                            lambda function, *arguments, submit=executor.submit: ran.append(submit(function, *arguments))
                            or ran[-1])
        done = run_grid(shop, workers=2, executor=executor, project=project, progress=False)
        assert len(client.run(os.getpid)) == len(ran) == 2 and all(future.result()[1] == "" for future in ran)  # each point went to the cluster
    assert list(done["state"]) == ["done"] * 2, list(done["note"])
    assert set(read_records("benchmark", project / "paper")["key"]) == set(done["key"])


@pytest.mark.parametrize("given", [True, False])
def test_a_given_executor_runs_every_point_and_is_left_open(project, monkeypatch, given):
    monkeypatch.setattr(grid, "execute", lambda point, *_: (0.0, ""))
    shop, calls = Grid("benchmark", {"dataset": str(project / "shop")}, [{"model": ["popularity", "repeat_last", "lir"]}]), []
    executor = here(calls)
    monkeypatch.setattr(executor, "shutdown", lambda **_: calls.append("shut down"))
    done = run_grid(shop, executor=executor if given else None, project=project, progress=False)
    assert list(done["state"]) == ["done"] * 3 and calls == [grid.execute] * 3 * given


class Screen(StringIO):
    "A terminal: `seen` is what stands on it."
    def isatty(self): return True

    def seen(self) -> list[str]:
        lines = [""]
        for up, text in re.findall(r"(?:\x1b\[(\d+)A\x1b\[J)?([^\x1b]*)", self.getvalue()):
            if up: lines = lines[: len(lines) - 1 - int(up)] + [""]
            first, *more = text.split("\n")
            lines = lines[:-1] + [lines[-1] + first] + more
        return lines[:-1]


def test_a_board_is_drawn_in_its_place(project, monkeypatch):
    shop, screen, seen = Grid("benchmark", {"dataset": str(project / "shop")},
                              [{"model": "popularity", "seed": list(range(12))}]), Screen(), []
    monkeypatch.setenv("COLUMNS", "100"), monkeypatch.setenv("LINES", "30"), monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(grid, "execute", lambda point, *_: seen.append(screen.seen())
                        or (61.0, "it broke" if point.values["seed"] == 3 else ""))
    run_grid(shop, executor=here([]), project=project)
    assert [next((line for line in lines if "of 12 runs" in line), "")
            for lines in seen][0] == "" and all(len(lines) <= 9 for lines in seen)
    last = screen.seen()
    assert last[0].split() == ["model", "dataset", "seed", "state", "time",
                               "left"] and len(last) == 8 and last[-1].startswith("12 of 12 runs, 1 failed, 00:0")
    assert [line.split()[2:5] for line in last[1:-1]] == [[str(seed), "done", "01:01"] for seed in range(6, 12)]
    assert sum("of 12 runs" in line for line in last) == 1
    monkeypatch.setattr(sys, "stderr", log := StringIO())
    run_grid(replace(shop, base=shop.base | {"experiment": "another"}), executor=here([]), project=project)
    assert log.getvalue().count("\n") == 12 and "\x1b" not in log.getvalue() and "failed after 01:01: popularity" in log.getvalue()


def test_a_board_knows_what_is_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(grid.time, "perf_counter", lambda: now[0])
    board = Board(6, 2, StringIO())
    for number, model in enumerate(["flare", "lir", "flare"]): board.begin(number, {"model": model, "dataset": "shop", "seed": number})
    assert board.table()["left"].tolist() == [""] * 3 and "left" not in board.summary()
    board.end(1, 10.0, "it broke")  # says nothing about time
    assert np.isnan(board.left())
    board.end(0, 100.0, "")
    now[0] = 30.0
    assert board.table()["left"].tolist() == ["", "", "01:10"] and board.left() == (70 + 3 * 100) / 2
    board.total = 3
    assert board.left() == 70 and board.summary() == "2 of 3 runs, 1 failed, 00:30 so far, about 01:10 left"


def test_folders_are_found_from_wherever_the_notebook_runs(project, monkeypatch):
    monkeypatch.chdir(project)
    write_shop(project / "other")
    (point,) = make_points(project / "nbs/experiments/benchmark.ipynb", [{"model": "flare_pushed", "dataset": "shop", "before": ["other"]}])
    assert (point.values["dataset"], point.values["before"]) == (str(project / "shop"), [str(project / "other")])
    assert set(point.fingerprints) == {"shop", "other"}


def test_points_travel_to_other_processes(project):
    values = {"dataset": str(project / "shop"), "model": "lir"}
    (point,) = make_points(project / "nbs/experiments/benchmark.ipynb", [values])
    assert pickle.loads(pickle.dumps((grid.execute, point)))[1] == point


# what is in the project

def test_the_benchmark_declares_and_passes_every_parameter():
    notebook = NOTEBOOKS / "benchmark.ipynb"
    declared = declared_parameters(notebook)
    assert {name: value for name, value in declared.items() if name not in WHICH} == EVERY
    assert set(WHICH) <= set(declared)
    sources = ["".join(c["source"]) for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    call = next(node for node in ast.walk(ast.parse(next(s for s in sources if "run(" in s)))
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "dict")
    assert {k.arg: k.value.id for k in call.keywords} == {name: name for name in EVERY}


@pytest.mark.parametrize("file", sorted(NOTEBOOKS.glob("*.yml")), ids=lambda p: p.name)
def test_every_grid_can_be_run(file, monkeypatch):
    class Stand:
        def __init__(self, name): self.name, self.fingerprint = name, "0" * 12
    monkeypatch.setattr(grid, "load_dataset", Stand)
    described = Grid.read(file)
    points = make_points(NOTEBOOKS / f"{described.notebook}.ipynb", described.expand())
    assert points and {p.values["model"] for p in points} <= set(MODELS)


def test_the_large_catalogue_is_asked_for_in_the_three_sizes_of_the_paper():
    points = [p for name in ("large", "large_gpu") for p in Grid.read(NOTEBOOKS / f"{name}.yml").expand()]
    sizes = {(p["model"], *(asked_of(p)[1][name] for name in ("layers", "heads", "hidden_size", "ffn_size")))
             for p in points if p["model"] in ("bert4rec", "flare")}
    assert {(model, *size) for model in ("bert4rec", "flare")
            for size in ((2, 2, 64, 256), (8, 16, 768, 3072), (32, 32, 768, 3072))} <= sizes
    assert {"popularity", "repeat_last", "lir"} <= {p["model"] for p in points}
    assert any(p.get("encoder") == "google/mt5-base" for p in Grid.read(NOTEBOOKS / "ablations.yml").expand())


@pytest.mark.parametrize("folder", ["experiments", "results"])
def test_a_bare_nbdev_test_skips(folder):
    notebooks = sorted((HOME / "nbs" / folder).glob("*.ipynb"))
    assert notebooks and not any(_keep_file(path, ".notest") for path in notebooks)
