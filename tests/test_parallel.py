"Two processes against one, and a process that dies."
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from flare import parallel
from flare.data import leave_one_out, load_dataset
from flare.losses import masked_item_loss
from flare.masking import TrainingBatches
from flare.models import FlareConfig, FlareModel
from flare.parallel import Team, assemble, clip, like, put_together, share_table, shard_rows, whole
from flare.text import TokenStates
from flare.trainer import TrainConfig, Trainer
from processes import LAUNCHED, ended, start

class Ended(NamedTuple):
    "What became of a process."
    code: int
    said: str


def port() -> str:
    "One that nobody listens at."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def team(folder: Path, size: int, work: Callable, *arguments) -> list[Ended]:
    "Processes that do the same work."
    folder.mkdir(exist_ok=True)
    at = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port(), "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": str(size)} if size > 1 else {}
    each = [at | ({"RANK": str(i), "LOCAL_RANK": str(i)} if at else {}) for i in range(size)]
    running = [start(work, *arguments, environment=environment, said=folder / f"said-{i}") for i, environment in enumerate(each)]
    return [Ended(ended(process), (folder / f"said-{i}").read_text()) for i, process in enumerate(running)]


def succeeds(folder: Path, size: int, work: Callable, *arguments):
    "The same, and all goes well."
    for i, (code, said) in enumerate(team(folder, size, work, *arguments)): assert code == 0, f"process {i}: {said[-3000:]}"


def texts(n_items: int) -> TokenStates:
    "Random tokens; every fourth item has none."
    counts = np.where(np.arange(n_items) % 4, 2, 0)
    return TokenStates(np.random.default_rng(0).standard_normal((counts.sum(), 8)).astype(np.float16), np.cumsum(counts) - counts, counts)


READING = dict(modalities=("text",), text_width=8, perceiver_size=8, perceiver_heads=2, perceiver_layers=1, latents=2)


def trains(out: str, folder: str, kind: str, dies: str = "no"):
    "An epoch of a small model, whose weights and ranks are written down by the first process; another one may die in the middle."
    split = leave_one_out(load_dataset("ml-100k"))
    text = texts(split.n_items) if "flare" in kind else None
    torch.manual_seed(0)
    model = FlareModel(FlareConfig(n_items=split.n_items, max_len=20, hidden_size=16, heads=2, ffn_size=32, dropout=0.0, embedding_dropout=0.0,
                                   **(READING | {"alpha": 0.0} if text else {})))
    if "parts" in kind and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        assemble()
        size = model.item_embedding.weight.numel()
        shard_rows(model)
        assert abs(2 * model.item_embedding.weight.to_local().numel() - size) <= 32
    config = TrainConfig(epochs=1, max_len=20, batch_size=256, learning_rate=3e-3, precision="fp32", checkpoint_every=2, read_share=1.0)
    trainer = Trainer(model, split, config, folder, progress=False, text=text)
    step = trainer.step
    def fragile(batch):
        if dies == "dies" and trainer.at.step == 5 and trainer.team.rank == 1: os._exit(9)
        return step(batch)
    trainer.step = fragile
    result = trainer.fit()
    assert len(result.validation) == len(split.validation.targets)
    weights = torch.cat([whole(p.detach()).flatten() for p in model.parameters()])
    if assemble().is_main_process:
        save_file({"weights": weights, "ranks": torch.from_numpy(result.validation.rank.copy()),
                   "loss": torch.tensor(result.history["loss"].to_numpy(dtype=float)), "processes": torch.tensor(trainer.team.size)}, out)


@pytest.mark.parametrize("kind", ["bert4rec", "flare", "bert4rec in parts", "flare in parts"])
def test_two_processes_train_as_one_does(tmp_path, kind):
    for name, size in (("one", 1), ("two", 2)):
        succeeds(tmp_path / f"{name}-says", size, trains, str(tmp_path / name), str(tmp_path / f"{name}-checkpoints"), kind)
    one, two = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    assert (one["processes"], two["processes"]) == (1, 2)
    torch.testing.assert_close(two["loss"], one["loss"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(two["weights"], one["weights"], rtol=0, atol=2e-4)
    assert (one["ranks"] - two["ranks"]).abs().float().mean() < 0.5


def test_when_a_process_dies_the_other_says_so_and_the_checkpoint_is_whole(tmp_path):
    given = trains, str(tmp_path / "out"), str(tmp_path / "checkpoints"), "bert4rec in parts"
    left, dead = team(tmp_path / "says", 2, *given, "dies")
    assert (left.code, dead.code) == (1, 9)
    assert "RuntimeError: process 0 of 2 has lost another one" in left.said and "start all processes again" in left.said
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["epoch-00000-step-00000004"]
    succeeds(tmp_path / "says", 1, *given)  # one process, with the whole table, can go on as well
    assert (tmp_path / "out").exists()


def test_when_a_process_dies_under_a_launcher_training_ends(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port()]  # accelerate's own starts several processes on GPUs only
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHED} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, __file__, str(tmp_path / "out"), str(tmp_path / "checkpoints"), "bert4rec", "dies"],
                          env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode and ("start all processes again" in done.stderr or "exitcode  : 9" in done.stderr), done.stderr[-3000:]  # ours, or the launcher's
    (left,) = (tmp_path / "checkpoints").glob("epoch-*")
    assert left.name == "epoch-00000-step-00000004" and json.loads((left / "state.json").read_text())["progress"]["step"] == 4


def remembers():
    "All processes know of the texts that any of them has read; some of them read none in a step."
    assemble()
    found = leave_one_out(load_dataset("ml-100k"))
    split = replace(found, train=found.train.take(np.arange(129)).tail(21))  # the last step of an epoch has one sequence
    for parts in (False, True):
        torch.manual_seed(0)
        model = FlareModel(FlareConfig(n_items=split.n_items, max_len=20, hidden_size=16, heads=2, ffn_size=32, **READING))
        if parts: shard_rows(model)
        few = dict(batch_size=8, read_share=0.02) if parts else dict(batch_size=64)  # with few, some shares read no text in a step; else as usual
        trainer = Trainer(model, split, TrainConfig(epochs=2, max_len=20, precision="fp32", **few), progress=False,
                          text=texts(split.n_items))
        model.train()
        trainer.refresh()
        before = model.context_table.rows.clone()
        for i, batch in enumerate(trainer.batches.epoch(0)):
            trainer.step(batch)
            mine, theirs = Team().gather(model.context_table.rows.numpy())
            assert np.array_equal(mine, theirs), f"parts {parts}, step {i}: {(mine != theirs).any(1).sum()} rows differ"
        assert i == len(trainer.batches) - 1 and batch.n_sequences == 1
        assert not torch.equal(before, model.context_table.rows)
        for name, value in trainer.weights().items():
            mine, theirs = Team().gather(value.numpy())
            assert np.array_equal(mine, theirs), name


def test_all_processes_remember_what_all_have_read(tmp_path):
    succeeds(tmp_path, 2, remembers)


class Tables(nn.Module):
    "As a model has them, of 23 items."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.item_embedding, self.output_bias, self.mix = nn.Embedding(23, 4), nn.Parameter(torch.randn(23)), nn.Linear(4, 4)


def divides():
    "Rows, losses, gradients and their norms, of tables in parts and of whole ones."
    dist.init_process_group("gloo")
    rank = Team().rank
    def loss(model, mine):
        "Of rows looked up, mixed, and compared with the whole catalogue; each process has other rows, and another number of them."
        items, targets = torch.arange(23).repeat(2)[mine], torch.arange(46).mul(5).remainder(23)[mine]
        table, rows = share_table(model.item_embedding.weight, items)
        return masked_item_loss([(model.mix(rows), table)], targets, model.output_bias, **how)[0]

    for how in ({}, {"most_logits": 0, "chunk_size": 5}):
        plain, parts = Tables(), shard_rows(Tables())
        mine = slice(0, 30) if rank == 0 else slice(30, 46)
        expected, ours = loss(plain, slice(None)), loss(parts, mine)
        assert abs(sum(Team().gather(ours.item())) / expected.item() - 1) < 1e-5, (ours, expected)
        expected.backward(), ours.backward()
        Team().add_gradients(list(parts.parameters()))
        for clipped in (False, True):
            if clipped:
                nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
                clip(list(parts.parameters()), 0.5)
            for (name, a), b in zip(plain.named_parameters(), parts.parameters()):
                torch.testing.assert_close(whole(b.grad), a.grad, rtol=1e-5, atol=1e-5, msg=lambda m: f"{name} {how} {clipped} {m}")
    dense, sparse = (torch.arange(12.0).view(6, 2).requires_grad_() for _ in range(2))  # a weight, and one whose gradient is sparse by rows
    for weight, by_rows in ((dense, False), (sparse, True)):
        if rank == 0: (nn.functional.embedding(torch.tensor([1, 4, 1]), weight, sparse=by_rows) ** 2).sum().backward()
        else: (nn.functional.embedding(torch.tensor([4, 0, 5, 5]), weight, sparse=by_rows) ** 2).sum().backward()
    nobody = torch.ones(2, requires_grad=True)
    Team().add_gradients([dense, sparse, nobody])
    assert sparse.grad.is_sparse and torch.equal(sparse.grad.to_dense(), dense.grad) and dense.grad[1, 0] == 8 and nobody.grad is None
    nn.utils.clip_grad_norm_([dense], 0.5)
    clip([sparse, nobody], 0.5)
    torch.testing.assert_close(sparse.grad.to_dense(), dense.grad)
    late = torch.ones(3, 1, requires_grad=True)
    if rank == 0: nn.functional.embedding(torch.tensor([2]), late, sparse=True).sum().backward()
    Team().add_gradients([late])  # the other process had no batch
    assert late.grad.to_dense().flatten().tolist() == [0, 0, 1]
    with put_together(parts): assert torch.equal(parts.item_embedding.weight, plain.item_embedding.weight)
    assert parts.item_embedding.weight.to_local().shape == (12 - rank, 4)
    assert torch.equal(whole(like(plain.output_bias.detach(), parts.output_bias)), plain.output_bias.detach())


def test_tables_in_parts_give_the_rows_losses_and_gradients_of_whole_ones(tmp_path):
    succeeds(tmp_path, 2, divides)


@pytest.mark.parametrize("parts", [2, 3])
def test_the_shares_of_a_step_are_the_step(parts):
    sequences = leave_one_out(load_dataset("ml-100k")).train
    whole = TrainingBatches(sequences, 1682, 100, 20).batch(1, 3)
    shares = [TrainingBatches(sequences, 1682, 100, 20, share=(i, parts)).batch(1, 3) for i in range(parts)]
    assert sorted(torch.cat([b.targets for b in shares]).tolist()) == sorted(whole.targets.tolist())
    assert sum(b.n_sequences for b in shares) == whole.n_sequences
    counts = [np.bincount(torch.cat([b.items.flatten() for b in batches]), minlength=1684)[:1683] for batches in (shares, [whole])]
    assert np.array_equal(*counts)


def test_a_step_of_fewer_sequences_than_processes_is_everybodys():
    sequences = leave_one_out(load_dataset("ml-100k")).train.take(np.arange(2))
    for batch_size, parts in ((1, 2), (2, 3)):
        whole, *shares = (TrainingBatches(sequences, 1682, batch_size, 300, row_length=None, share=share).batch(0, 0)
                          for share in ((0, 1), *((i, parts) for i in range(parts))))
        assert whole.n_sequences == batch_size and all(torch.equal(whole.items, share.items)
                                                       and torch.equal(whole.masked, share.masked) for share in shares)


@pytest.mark.parametrize("gpu, asked, found", [(True, "false", (False, ["cpu:gloo,cuda:nccl"])), (True, "true", (True, [])),
                                               (False, "false", (True, []))])
def test_on_gpus_gloo_stands_beside_nccl(monkeypatch, gpu, asked, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    for name, value in {"ACCELERATE_USE_CPU": asked, "WORLD_SIZE": "2"}.items(): monkeypatch.setenv(name, value)
    monkeypatch.setattr(parallel, "Accelerator",
                        lambda cpu, kwargs_handlers: (cpu, [handler.to_kwargs()["backend"] for handler in kwargs_handlers]))
    assert parallel.assemble() == found


@pytest.mark.parametrize("backend, kind", [("nccl", "meta"), ("cpu:gloo,cuda:nccl", "meta"), ("gloo", "cpu")])
def test_a_table_is_brought_to_the_gpu_before_it_is_taken_apart(monkeypatch, backend, kind):
    class Asked(Exception): "The mesh was."
    def mesh(device, shape): raise Asked(device, shape)
    monkeypatch.setattr(parallel, "Team", lambda: SimpleNamespace(size=2))
    monkeypatch.setattr(parallel, "init_device_mesh", mesh)
    monkeypatch.setattr(parallel.dist, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "meta")  # in place of a GPU
    with pytest.raises(Asked, match=rf"'{kind}', \(2,\)"): parallel.shard_rows(torch.nn.Embedding(4, 2), ("weight",))


def loses():
    "The second process is gone; the first notices, whatever it wants of the table."
    dist.init_process_group("gloo")
    table = shard_rows(nn.Embedding(6, 2), ("weight",))
    if dist.get_rank(): os._exit(9)
    for call in (lambda: whole(table.weight), lambda: like(torch.ones(6, 2), table.weight), lambda: put_together(table).__enter__()):
        with pytest.raises(RuntimeError, match="^process 0 of 2 has lost another one"): call()
    os._exit(0)


def test_a_table_whose_other_part_is_gone_says_so(tmp_path):
    left, dead = team(tmp_path, 2, loses)
    assert (left.code, dead.code) == (0, 9), left.said[-3000:]


if __name__ == "__main__": trains(*sys.argv[1:])  # for a launcher
