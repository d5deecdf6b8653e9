"A run that is killed in the middle of an epoch ends as one that never was."
import json
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from flare.data import leave_one_out, load_dataset
from flare.models import FlareConfig, FlareModel
from flare.text import TokenStates
from flare.trainer import TrainConfig, Trainer
from processes import ended, start


def trains(folder, rivals):
    movies = load_dataset("ml-100k")
    split = leave_one_out(replace(movies, users=movies.users[:250], sequences=movies.sequences.take(np.arange(250))))
    torch.manual_seed(0)
    model = FlareModel(FlareConfig(n_items=split.n_items, max_len=20, hidden_size=32, heads=2, ffn_size=64, rivals=rivals))
    Trainer(model, split, TrainConfig(epochs=2, max_len=20, batch_size=64, checkpoint_every=3), folder, progress=False).fit()


def newest(folder):
    "The only whole checkpoint of a finished run, or the newest of a running one; its name ends with the step."
    return max(folder.glob("epoch-*"), default=None)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("rivals", [0, 50])  # with rivals the table has an optimizer of its own
def test_killed_and_resumed_is_bit_for_bit_the_same(tmp_path, rivals):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert ended(start(trains, straight, rivals)) == 0
    last = int(newest(straight).name[-8:])

    process, deadline = start(trains, killed, rivals), time.time() + 120
    while newest(killed) is None or not last // 2 < int(newest(killed).name[-8:]) < last:
        assert time.time() < deadline and process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)  # in the middle of the second epoch
    assert ended(process) == -signal.SIGKILL and int(newest(killed).name[-8:]) < last

    assert ended(start(trains, killed, rivals)) == 0
    assert newest(straight).name == newest(killed).name
    for name in ("weights", "optimizer", "best"):  # `best` alone could be of the epoch before the kill
        one, two = (load_file(newest(folder) / f"{name}.safetensors") for folder in (straight, killed))
        assert one.keys() == two.keys()
        for key in one: assert torch.equal(one[key], two[key]), f"{name}: {key}"
    one, two = (json.loads((newest(folder) / "state.json").read_text())["progress"] for folder in (straight, killed))
    assert one["history"] == two["history"]


@pytest.fixture(scope="module")
def split():
    return leave_one_out(load_dataset("ml-100k"))


def trainer(split, folder, size=16, rivals=0, **changes):
    torch.manual_seed(0)
    model = FlareModel(FlareConfig(n_items=split.n_items, max_len=10, hidden_size=size, heads=2, ffn_size=16, rivals=rivals))
    return Trainer(model, split, TrainConfig(**{"epochs": 1, "max_len": 10, "batch_size": 512, **changes}), folder, progress=False)


def test_against_rivals_the_rows_that_were_looked_at_move_and_no_others(split):
    sampling = trainer(split, None, rivals=40, batch_size=8)
    table, seen = sampling.model.item_embedding.weight, set()
    before = table.detach().clone()
    for step in range(3):
        sampling.step(sampling.batches.batch(0, step))
        assert table.grad.is_sparse
        seen |= set(table.grad.coalesce().indices()[0].tolist())
    seen.discard(len(table) - 1)  # looked up in place of masks and padding, and not looked at
    moved = set(torch.nonzero((table != before).any(1))[:, 0].tolist()) - {len(table) - 1}
    assert moved == seen and 40 < len(seen) < len(table) // 2


def test_checkpoint_of_another_config_is_refused(split, tmp_path):
    trainer(split, tmp_path).fit()
    with pytest.raises(ValueError, match="learning_rate is 0.0005 there and 0.1 here.*another folder"):
        trainer(split, tmp_path, learning_rate=0.1).fit()
    with pytest.raises(ValueError, match="model.hidden_size is 16 there and 32 here"):
        trainer(split, tmp_path, size=32).fit()


@pytest.mark.parametrize("name", ["state.json", "weights.safetensors"])
def test_damaged_checkpoint_is_named(split, tmp_path, name):
    trainer(split, tmp_path).fit()
    (checkpoint,) = tmp_path.glob("epoch-*")
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{checkpoint.name} is damaged.*delete this folder"):
        trainer(split, tmp_path).fit()


def test_a_finished_run_is_not_trained_again(split, tmp_path):
    first = trainer(split, tmp_path)
    result = first.fit()
    again = trainer(split, tmp_path)
    again.step = lambda batch: pytest.fail("trained again")
    repeated = again.fit()
    assert repeated.steps == result.steps and repeated.validation.equal(result.validation)  # ranked again, or remembered
    for a, b in zip(first.model.parameters(), again.model.parameters()): assert torch.equal(a, b)


def test_patience_stops_and_the_best_weights_stay(split):
    worsening = trainer(split, None, epochs=20, patience=2, learning_rate=0.5, warmup=0.0)
    result = worsening.fit()
    assert result.epochs == min(20, result.best_epoch + 2)
    assert result.validation.metrics()["ndcg@10_pessimistic"] == pytest.approx(result.history["ndcg@10_pessimistic"].max())


def test_killed_between_an_epoch_and_its_validation(split, tmp_path):
    "The newest checkpoint is then that of the epoch's last step: no batch is left of it."
    straight = trainer(split, None, checkpoint_every=1).fit()
    killed = trainer(split, tmp_path, checkpoint_every=1)
    killed.validate = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError): killed.fit()
    resumed = trainer(split, tmp_path, checkpoint_every=1).fit()
    pd.testing.assert_frame_equal(resumed.history, straight.history)


@pytest.mark.parametrize("changes, message", [
    ({"patience": 2, "evaluate_every": 3}, "patience is 2; it must be at least evaluate_every = 3"),
    ({"max_len": 64}, "row_length is 64; a row must hold max_len"),
    ({"window_stride": -3}, "window_stride is -3"), ({"refresh_every": 2.5}, "refresh_every is 2.5"),
    ({"read_share": 0.0}, "read_share is 0.0"), ({"read_share": 1.5}, "read_share is 1.5"),
    ({"learning_rate": -1.0}, "learning_rate is -1.0"), ({"clip_norm": 0.0}, "clip_norm is 0.0")])
def test_what_would_fail_or_mislead_later_is_refused_at_once(changes, message):
    with pytest.raises(ValueError, match=message): TrainConfig(**changes)


def states(n_items, width=8):
    "Two token states an item."
    rng, counts = np.random.default_rng(0), np.full(n_items, 2)
    return TokenStates(rng.standard_normal((counts.sum(), width)).astype(np.float16), np.cumsum(counts) - counts, counts)


@pytest.mark.parametrize("model, text, message", [
    ({"modalities": ("text",), "text_width": 8}, None, "the model reads texts: give the trainer"),
    ({}, 0, "does not read the texts that came with it"),
    ({"modalities": ("text",), "text_width": 8}, -1, "there are texts of 1681 items and 1682 items"),
    ({"max_len": 8}, None, "TrainConfig.max_len is 10, more than the model's 8"),
    ({"n_items": 9}, None, "the model has 9 items and the data 1682")])
def test_a_model_that_does_not_fit_is_refused(split, model, text, message):
    config = FlareConfig(**{"n_items": split.n_items, "max_len": 10, "hidden_size": 16, "heads": 2, "ffn_size": 16} | model)
    with pytest.raises(ValueError, match=message):
        Trainer(FlareModel(config), split, TrainConfig(max_len=10), text=None if text is None else states(split.n_items + text))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_precision_is_that_of_the_products_and_not_of_the_weights(split, precision):
    run, seen = trainer(split, None, precision=precision), []
    run.model.layers[0].feed_forward[0].register_forward_hook(lambda module, given, made: seen.append(made.dtype))
    run.step(run.batches.batch(0, 0))
    assert seen == [torch.bfloat16 if precision == "bf16" else torch.float32]
    assert {p.dtype for p in run.model.parameters()} | {p.grad.dtype for p in run.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("whiten", [True, False])
def test_a_reader_starts_whitened_unless_told_not_to(split, monkeypatch, whiten):
    text = states(split.n_items)
    model = FlareModel(FlareConfig(n_items=split.n_items, max_len=10, hidden_size=16, heads=2, ffn_size=16, modalities=("text",),
                                   text_width=8, reader="mean", whiten=whiten))
    seen = []
    monkeypatch.setattr(Trainer, "step", lambda self, batch: seen.append(model.reader.offset.abs().sum().item()) or 1 / 0)
    with pytest.raises(ZeroDivisionError): Trainer(model, split, TrainConfig(max_len=10), progress=False, text=text).fit()
    assert (seen[0] > 0) == whiten  # before the first step


def test_sums_are_divided_by_counts():
    "The gradient of two losses is that of the sum of their means."
    class Two(torch.nn.Linear):
        def loss(self, batch): return {"a": (self.weight.sum() * 6, 3), "b": (self.weight.sum() * 5, 5)}
    split = leave_one_out(load_dataset("ml-100k"))
    run = Trainer(Two(1, 1, bias=False), split, TrainConfig(clip_norm=1e9), progress=False)
    run.step(run.batches.batch(0, 0))
    assert run.model.weight.grad.item() == pytest.approx(6 / 3 + 5 / 5)
