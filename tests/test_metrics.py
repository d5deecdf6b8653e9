"""The metrics against independent implementations (torchmetrics, a full sort), and what must hold for any scores."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR, RetrievalNormalizedDCG

from flare.data import Holdout, Sequences
from flare.metrics import METRICS, Ranks, block_on, evaluate, target_ranks
from flare.models import FlareConfig, FlareModel
from watch import Watch

THEIRS = {"recall@1": RetrievalHitRate(top_k=1), "recall@5": RetrievalHitRate(top_k=5), "recall@10": RetrievalHitRate(top_k=10),
          "ndcg@10": RetrievalNormalizedDCG(top_k=10), "mrr": RetrievalMRR()}


def tied_scores(seed: int, users: int = 200, items: int = 60, levels: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    "Random scores of few levels, so that most targets tie."
    draw = torch.Generator().manual_seed(seed)
    return (torch.randint(levels, (users, items), generator=draw).float() / 8,
            torch.randint(items, (users,), generator=draw))


def ranks_of(scores: torch.Tensor, targets: torch.Tensor) -> Ranks:
    rank, pessimistic = target_ranks(scores, targets)
    return Ranks(np.arange(len(targets)), rank.numpy(), pessimistic.numpy())


def by_torchmetrics(scores: torch.Tensor, targets: torch.Tensor, target_first: bool) -> dict[str, float]:
    "It averages over ties, so the target is moved up or down by less than the distance of two levels; and counts positive scores only."
    moved = scores + 1
    moved[torch.arange(len(targets)), targets] += 1e-3 if target_first else -1e-3
    relevant = torch.zeros_like(scores, dtype=torch.long).scatter_(1, targets[:, None], 1)
    users = torch.arange(len(targets))[:, None].expand_as(scores)
    return {name: float(metric(moved.flatten(), relevant.flatten(), indexes=users.flatten())) for name, metric in THEIRS.items()}


@pytest.mark.parametrize("seed", range(3))
def test_equal_to_torchmetrics_with_ties(seed):
    scores, targets = tied_scores(seed)
    ranks = ranks_of(scores, targets)
    assert ranks.tied > 0.5
    ours = ranks.metrics()
    for target_first, ending in ((True, ""), (False, "_pessimistic")):
        theirs = by_torchmetrics(scores, targets, target_first)
        for name in METRICS:
            assert ours[name + ending] == pytest.approx(theirs[name], abs=1e-6), name + ending  # theirs are single precision


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 25), st.integers(1, 6))
def test_ranks_equal_a_full_sort(seed, users, items, levels):
    scores, targets = tied_scores(seed, users, items, levels)
    rank, pessimistic = target_ranks(scores, targets)
    for u, target in enumerate(targets.tolist()):
        order = sorted(scores[u].tolist(), reverse=True)
        own = float(scores[u, target])
        assert rank[u] == 1 + order.index(own)
        assert pessimistic[u] == items - order[::-1].index(own)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 10), st.integers(2, 20))
def test_any_rising_function_of_the_scores_has_the_same_ranks(seed, users, items):
    scores, targets = tied_scores(seed, users, items)
    order = torch.randperm(items, generator=torch.Generator().manual_seed(seed))
    plain = target_ranks(scores, targets)
    shuffled = target_ranks(scores[:, order], order.argsort()[targets])
    for other in (target_ranks(scores.exp() * 3 - 1, targets), shuffled):
        assert all(torch.equal(a, b) for a, b in zip(plain, other))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 500), st.integers(0, 50)), min_size=1, max_size=40))
def test_pessimism_never_helps(pairs):
    rank, more = np.array(pairs, np.int64).T
    found = Ranks(np.arange(len(pairs)), rank, rank + more).metrics()
    for name in METRICS:
        assert 0 <= found[f"{name}_pessimistic"] <= found[name] <= 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_raise(bad):
    scores, targets = tied_scores(0, users=5, items=7)
    scores[3, 2] = bad
    with pytest.raises(ValueError, match="1 of 7 scores of user row 3 are NaN or infinite"):
        target_ranks(scores, targets)


class FromTable(torch.nn.Module):
    "Scores users by their last item, from a fixed table with ties."

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.table, self.widest = torch.nn.Parameter(table), 0

    def score(self, batch, item_slice=slice(None)):
        assert not self.training and not torch.is_grad_enabled()
        self.widest = max(self.widest, batch.n_sequences)
        last = batch.items.flatten()[batch.masked - 1]
        return self.table[last][:, item_slice]


@pytest.mark.parametrize("row_length, budget, batch_size, piece", [(None, 2**25, 512, 30), (16, 2**25, 7, 20), (64, 100, 512, 30),
                                                                   (64, None, 512, 7), (64, 9, 5, 1), (None, 40, 3, 16)])
def test_evaluate_equals_ranks_of_the_whole_matrix(row_length, budget, batch_size, piece):
    rng, items = np.random.default_rng(0), 30
    history = Sequences.from_lists([rng.integers(items, size=n).tolist() for n in rng.integers(1, 12, size=40)])
    holdout = Holdout(rng.permutation(40) + 100, history, rng.integers(items, size=40))
    model = FromTable(tied_scores(1, items, items)[0]).train()
    ranks = evaluate(model, holdout, items, max_len=5, row_length=row_length, budget=budget, batch_size=batch_size,
                     piece=piece, top=4)
    whole = ranks_of(model.table.detach()[history.last], torch.from_numpy(holdout.targets))
    assert np.array_equal(ranks.users, holdout.users)
    assert np.array_equal(ranks.rank, whole.rank) and np.array_equal(ranks.pessimistic, whole.pessimistic)
    assert model.training and model.widest <= max(1, min(batch_size, (budget or 2**22) // -(-items // max(1, round(items / piece)))))
    best = model.table.detach()[history.last].sort(1, descending=True)[0][:, :4]
    assert torch.equal(model.table.detach()[history.last].gather(1, torch.from_numpy(ranks.top)), best)  # equals may change places
    assert all(len(set(row)) == 4 for row in ranks.top.tolist())
    assert evaluate(model, holdout, items, max_len=5, top=99).top.shape == (40, 30)
    assert evaluate(model, holdout, items, max_len=5).top is None


@pytest.mark.parametrize("text", [False, True])
def test_a_model_that_scores_piece_by_piece_makes_its_states_once_and_no_whole_matrix(text):
    torch.manual_seed(0)
    rng, items = np.random.default_rng(0), 3000
    holdout = Holdout(np.arange(90), Sequences.from_lists([rng.integers(items, size=n).tolist() for n in rng.integers(1, 9, size=90)]),
                      rng.integers(items, size=90))
    model = FlareModel(FlareConfig(n_items=items, max_len=10, hidden_size=8, heads=2, ffn_size=16,
                                   **(dict(modalities=("text",), text_width=6, reader="mean") if text else {})))
    model.item_embedding.weight.data[1000:] = model.item_embedding.weight.data[:2000].clone()  # every item has an equal elsewhere
    encoded, encode = [], model.encode
    model.encode = lambda batch, *given: encoded.append(batch.n_sequences) or encode(batch, *given)
    whole = evaluate(model, holdout, items, max_len=10, piece=items)
    encoded.clear()
    with Watch() as seen: pieces = evaluate(model, holdout, items, max_len=10, piece=250)
    assert pieces.equal(whole) and whole.tied > 0.6 and sum(encoded) == 90
    assert seen.sizes()[0] <= max(items * 8, 90 * 250)


class Questions(TorchDispatchMode):
    "Counts how often a number is asked for, which on a GPU has to be waited for."
    asked = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.asked += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def test_whether_scores_are_finite_is_asked_once_a_batch():
    history = Sequences.from_lists([[0], [1], [2], [3], [4]])
    model, holdout, asked = FromTable(torch.rand(5, 5)), Holdout(np.arange(5), history, np.zeros(5, np.int64)), []
    for piece in (5, 1):
        with Questions() as questions: evaluate(model, holdout, 5, piece=piece)
        asked.append(questions.asked)
    assert asked[0] == asked[1] == 1
    big = torch.full((5, 5), 3e38)  # finite, but not their sum
    assert evaluate(FromTable(big), holdout, 5, piece=2).pessimistic.tolist() == [5] * 5


def test_a_gpu_is_given_larger_blocks():
    assert block_on("cpu") == (256, 4096, 2**22) and block_on(torch.device("cuda", 1)) == block_on("cuda") == (4096, 2**16, 2**28)


def test_evaluate_names_the_user_of_a_later_batch():
    history = Sequences.from_lists([[0], [1], [2], [3], [4]])
    table = torch.zeros(5, 5)
    table[3, 1] = torch.nan
    holdout = Holdout(np.array([10, 11, 12, 13, 14]), history, np.zeros(5, np.int64))
    model = FromTable(table).train()
    with pytest.raises(ValueError, match="user row 13 "):
        evaluate(model, holdout, 5, batch_size=2)
    assert model.training


def test_ranks_survive_parquet_and_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    ranks, path = ranks_of(*tied_scores(2)), tmp_path / "deep" / "key.ranks.parquet"
    ranks.to_parquet(path)
    before = path.read_bytes()
    monkeypatch.setattr("flare.files.os.replace", lambda *a: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        ranks.subset(slice(0, 3)).to_parquet(path)
    assert path.read_bytes() == before
    again = Ranks.from_parquet(path)
    assert all(np.array_equal(getattr(again, f), getattr(ranks, f)) for f in ("users", "rank", "pessimistic"))
    assert again.rank.dtype == np.int64
