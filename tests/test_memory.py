"The plan of a training's memory against what a training takes."
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from flare import memory
from flare.benchmark import generated_events, random_states
from flare.data import leave_one_out
from flare.memory import free_memory, plan_memory
from flare.models import FlareConfig, FlareModel
from flare.tables import to_catalogue, to_events
from flare.trainer import TrainConfig, Trainer
from processes import ended, start

def resident() -> int:
    "Bytes of this process that are in memory."
    return next(2**10 * int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))


def trains(model: str, out: Path):
    "A few steps and an evaluation; what was planned for them, and what they took."
    items, text = 60_000, random_states("random:32:4", 60_000) if model == "flare" else None
    events = generated_events(9_000, items).astype({"user": str, "item": str})
    split = leave_one_out(to_events(Path("x"), "x", events,
                                    to_catalogue(pd.DataFrame({"item": pd.unique(events["item"]), "title": ""})), {}))
    reading = dict(modalities=("text",), text_width=32, perceiver_size=32, latents=2) if text else {}
    config = FlareConfig(n_items=items, hidden_size=128, heads=2, ffn_size=256, **reading)
    training = TrainConfig(epochs=1, batch_size=64, precision="fp32")
    plan, before = plan_memory(config, training, text, float(split.train.lengths.mean())), resident()
    trainer = Trainer(FlareModel(config), split, training, progress=False, text=text)
    trainer.model.train()
    for step in range(4): trainer.step(trainer.batches.batch(0, step))
    trainer.validate()
    out.write_text(json.dumps([plan.total - plan.parts["the heap"], resident() - before]))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("model", ["bert4rec", "flare"])
def test_a_plan_is_near_what_a_training_takes(tmp_path, model):
    "Less the heap, in which so few steps leave no holes."
    assert ended(start(trains, model, tmp_path / "bytes")) == 0
    planned, taken = json.loads((tmp_path / "bytes").read_text())
    assert 0.6 * taken < planned < 1.7 * taken, (planned / 2**20, taken / 2**20)


def test_what_cannot_fit_is_refused_with_a_remedy_and_what_fits_is_not():
    plan = plan_memory(FlareConfig(n_items=5_000, hidden_size=64, heads=2), TrainConfig())
    replace(plan, free=plan.total).check()
    replace(plan, free=None).check()
    with pytest.raises(MemoryError, match="5,000 items are 64 wide: lower hidden_size"): replace(plan, free=plan.total - 1).check()


def test_texts_and_steps_are_in_the_plan():
    config, reading = (FlareConfig(n_items=5_000, hidden_size=64, heads=2, **more) for more in ({}, {"modalities": ("text",)}))
    plain, wide = (plan_memory(config, TrainConfig(batch_size=size)) for size in (64, 640))
    heard = plan_memory(reading, TrainConfig(batch_size=64), strings=20_000, compared=512)
    size = FlareModel(reading).reader.size
    assert heard.parts["learning to listen"] == 4 * (size * (40_000 + 20_000) + 512 * 25_000
                                                     + reading.text_width * 55_000) > heard.parts["a step"]
    assert plan_memory(reading, TrainConfig(), strings=20, compared=512, fitted=2**23).parts["learning to listen"] == 4 * 29 * 2**23
    assert heard.total - heard.parts["learning to listen"] == (silent := plan_memory(reading, TrainConfig(batch_size=64))).total - max(silent.parts[part] for part in ("a step", "an evaluation"))
    assert (averaged := plan_memory(reading, TrainConfig(batch_size=64),
                                    averaged=True)).total - silent.total == 2 * silent.parts["weights"] == averaged.parts["averages"]
    weights = 4 * sum(p.numel() for p in FlareModel(config).parameters())
    assert {name: plain.parts[name] for name in ("weights", "gradients", "moments", "best weights")} == {
        "weights": weights, "gradients": weights, "moments": 2 * weights, "best weights": weights}
    assert wide.parts["a step"] > 5 * plain.parts["a step"] and wide.parts["weights"] == plain.parts["weights"]
    assert plan_memory(reading, TrainConfig()).parts["context table"] == 4 * 5_000 * 4 * 256 and plain.parts["context table"] == 0


def test_an_evaluation_on_a_gpu_is_planned_as_it_is_done(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device="cpu": None)
    config = FlareConfig(n_items=400_000, hidden_size=64, heads=2)
    here, there = (plan_memory(config, TrainConfig(), device=device).parts["an evaluation"] for device in ("cpu", "cuda"))
    assert here == 4 * (3 * 2**20 + 256 * 50 * (8 * 64 + 2 * 1024)) and there == 4 * (3 * 2**28 + 4096 * 50 * (8 * 64 + 2 * 1024))


@pytest.mark.parametrize("files, free", [({"meminfo": "MemTotal: 9 kB\nMemAvailable: 7 kB\n"}, 7 * 1024),
    ({"meminfo": "MemAvailable: 7 kB\n", "memory.max": "5000\n", "memory.current": "3000\n", "memory.stat": "inactive_file 500\n"}, 2500),
    ({"meminfo": "MemAvailable: 7 kB\n", "memory.max": "max\n", "memory.current": "3000\n"}, 7 * 1024), ({}, None)])
def test_a_container_has_what_is_left_to_its_limit(monkeypatch, tmp_path, files, free):
    for name, content in files.items(): (tmp_path / name).write_text(content)
    monkeypatch.setattr(memory, "Path", lambda path: tmp_path / "meminfo" if "meminfo" in path else tmp_path)
    assert free_memory() == free


def test_a_sample_of_rivals_has_gradients_of_a_few_rows_and_texts_stay_on_disk(tmp_path):
    whole, sampled = (plan_memory(FlareConfig(n_items=50_000, hidden_size=64, heads=2, rivals=n), TrainConfig()) for n in (0, 100))
    assert whole.parts["gradients"] - sampled.parts["gradients"] == 4 * 50_000 * 64 and sampled.parts["a step"] < whole.parts["a step"]
    texts, config = random_states("random:8:3", 500), FlareConfig(n_items=500, modalities=("text",), text_width=8)
    held = plan_memory(config, TrainConfig(), texts)
    mapped = np.memmap(tmp_path / "states", np.float16, "w+", shape=texts.states.shape)
    plan = plan_memory(config, TrainConfig(), replace(texts, states=mapped))
    assert plan.store == 2 * 500 * 3 * 8 and "texts' 0 MiB are read from disk" in str(plan) and "disk" not in str(whole)
    assert held.parts["texts"] == 2 * 500 * 3 * 8 == held.total - plan.total and held.store == plan.parts["texts"] == 0
    on_gpu = plan_memory(config, TrainConfig(), texts, device="meta")  # not the memory of the machine
    assert on_gpu.beside == 2 * 500 * 3 * 8 and on_gpu.parts["texts"] == on_gpu.parts["the heap"] == 0
    replace(on_gpu, host=on_gpu.beside).check()
    with pytest.raises(MemoryError, match="the texts need"): replace(on_gpu, host=on_gpu.beside - 1).check()


def test_the_heap_keeps_what_is_small():
    "Tables of 32 MiB go back to the system, smaller ones do not; and it does not grow without end."
    small, large = (plan_memory(FlareConfig(n_items=n, hidden_size=64, heads=2), TrainConfig(batch_size=16)) for n in (100_000, 200_000))
    assert small.parts["the heap"] == small.parts["a step"] + small.parts["gradients"] and large.parts["the heap"] == large.parts["a step"]
    assert plan_memory(FlareConfig(n_items=100_000), TrainConfig(batch_size=4096)).parts["the heap"] == 2**28
