"Comparisons of two models against what chance does, and the draws of users against a plain loop."
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flare.comparison import BLOCK, by_popularity, drawn, paired_bootstrap, popularity_deciles, resampled_means
from flare.metrics import Ranks


def test_bootstrap_interval_covers_and_p_is_uniform_without_a_difference():
    "200 comparisons of two equally good models: 5 % false alarms, give or take."
    rng = np.random.default_rng(0)
    false_alarms, covered = 0, 0
    for trial in range(200):
        a, b = (Ranks(np.arange(150), r, r) for r in rng.integers(1, 30, size=(2, 150)))
        found = paired_bootstrap(a, b, "mrr", samples=300, seed=trial)
        false_alarms += found.p_value <= 0.05
        covered += found.low <= 0 <= found.high
    assert 2 <= false_alarms <= 20 and 180 <= covered <= 198


@pytest.mark.parametrize("users", [1, 2, 255, 4001])
def test_draws_are_those_of_a_loop_over_users(users):
    "As many users in each draw as there are, drawn evenly, and the mean of those."
    values = np.random.default_rng(0).normal(size=users)
    rows = max(1, BLOCK // users)
    means = resampled_means(values, 300, seed=7)
    plain = [np.repeat(values, times).mean() for at in range(0, 300, rows) for times in drawn(users, min(rows, 300 - at), (7, at))]
    assert len(means) == 300 and means == pytest.approx(plain, abs=1e-5)
    times = np.concatenate([drawn(users, min(rows, 300 - at), (7, at)) for at in range(0, 300, rows)])
    assert (times.sum(1, dtype=np.int64) == users).all()
    assert times.var() == pytest.approx(1 - 1 / users, abs=0.05)  # binomial: n draws with probability 1/n each
    assert len(np.unique(means)) > 1 or users == 1


def test_bootstrap_sees_a_difference_that_is_there():
    worse = np.random.default_rng(0).integers(2, 40, size=2000)
    users, better = np.arange(2000), np.where(worse % 3 == 0, worse - 1, worse)
    found = paired_bootstrap(Ranks(users, better, better), Ranks(users, worse, worse), "mrr")
    assert found.p_value < 0.01 and 0 < found.low < found.difference < found.high


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=80))
def test_deciles_rise_with_popularity_and_keep_equal_counts_together(counts):
    counts = np.array(counts)
    deciles = popularity_deciles(counts)
    assert deciles.min() >= 1 and deciles.max() <= 10
    order = np.argsort(counts, kind="stable")
    assert (np.diff(deciles[order]) >= 0).all()
    assert all(len(set(deciles[counts == c])) == 1 for c in counts)


def test_deciles_add_up():
    rank = np.random.default_rng(2).integers(1, 60, size=200)
    ranks = Ranks(np.arange(200), rank, rank + 3)
    targets, counts = np.random.default_rng(0).integers(50, size=200), np.random.default_rng(1).permutation(50)
    table = by_popularity(ranks, targets, counts)
    assert table["items"].tolist() == [5] * 10 and table["users"].sum() == len(ranks)
    assert (table["mrr"] * table["users"]).sum() / len(ranks) == pytest.approx(ranks.metrics()["mrr_pessimistic"])
