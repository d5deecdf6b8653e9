"The loss of a large catalogue: the plain one in all but memory."
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from flare.losses import cut_cross_entropy, cut_kernel, masked_item_loss, sampled_item_loss
from watch import Watch


def problem(m, v, tables, biased, learned=True, seed=0):
    "States, tables (the last of several is data), bias and targets."
    rng = torch.Generator().manual_seed(seed)
    pairs = [(torch.randn(m, d, generator=rng), torch.randn(v, d, generator=rng) / 4) for d in tables]
    for i, (h, e) in enumerate(pairs):
        h.requires_grad_(), e.requires_grad_(learned and (i == 0 or len(pairs) == 1))
    bias = torch.randn(v, generator=rng).requires_grad_() if biased else None
    return pairs, torch.randint(v, (m,), generator=rng), bias


def torchs(pairs, targets, bias):
    "The plain twin: torch's own cross-entropy of all logits."
    logits = sum(F.linear(h, table) for h, table in pairs)
    return F.cross_entropy((logits if bias is None else logits + bias).float(), targets, reduction="sum"), len(targets)


def run(problem, scale=0.37, autocast=False, loss=masked_item_loss, **how):
    "The loss and all gradients."
    pairs, targets, bias = problem
    leaves = [x for x in [*(x for pair in pairs for x in pair), bias] if x is not None and x.requires_grad]
    for x in leaves: x.grad = None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total, count = loss(pairs, targets, bias, **how)
    (total * scale).backward()
    assert total.dtype == torch.float32 and count == len(targets)
    return [total.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("m, v, chunk", [(1, 1, 1), (7, 10, 3), (7, 10, 10), (7, 10, 99), (40, 1001, 64), (3, 50, None)])
@pytest.mark.parametrize("tables", [(8,), (8, 12)])
@pytest.mark.parametrize("biased", [True, False])
def test_with_and_without_chunks_it_is_the_plain_loss(m, v, chunk, tables, biased):
    given = problem(m, v, tables, biased)
    ways = {}, {"most_logits": 0, "chunk_size": chunk}, {"most_logits": m * v // 2, "chunk_size": chunk}  # in the last some chunks are kept
    for a, *others in zip(run(given, loss=torchs), *(run(given, **how) for how in ways)):
        for b in others: torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


def test_large_logits_do_not_overflow():
    given = problem(9, 200, (8,), True)
    given = ([((h * 100).detach().requires_grad_(), e) for h, e in given[0]], *given[1:])
    for a, b, c in zip(run(given, loss=torchs), run(given), run(given, most_logits=0, chunk_size=16)):
        assert b.isfinite().all() and c.isfinite().all()
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(c, a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", [{}, {"most_logits": 0, "chunk_size": 100}])
@pytest.mark.parametrize("bias", [torch.full((200,), -300.0), torch.full((200,), 300.0), torch.where(torch.arange(200) < 100, -300.0, 0.0)])
def test_logits_whose_exponentials_are_no_numbers(how, bias):
    pairs, targets, _ = problem(5, 200, (8,), False)
    given = (pairs, targets, bias.clone().requires_grad_())
    for a, b in zip(run(given, loss=torchs), run(given, **how)): torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


def test_half_precision_is_as_near_as_the_plain_one():
    given = problem(60, 900, (32, 16), True)
    exact, plain = run(given, loss=torchs), run(given, loss=torchs, autocast=True)
    for how in ({}, {"most_logits": 0, "chunk_size": 100}):
        for a, b, c in zip(exact, plain, run(given, autocast=True, **how)):
            assert (c - a).norm() / a.norm() < max(2 * (b - a).norm() / a.norm(), 1e-3)
            assert b.dtype == c.dtype == torch.float32


def test_no_array_of_masks_times_items_is_made():
    m, v, d, chunk = 64, 4096, 8, 256
    for how, most in (({"most_logits": 0, "chunk_size": chunk}, max(v * d, m * chunk)), ({}, m * v)):  # m: a round number
        with Watch() as seen: run(problem(m, v, (d,), True), **how)
        assert seen.sizes()[0] == most


def pretend_kernel(e, c, targets, reduction, filter_eps, accum_e_fp32, accum_c_fp32):
    "What cut-cross-entropy's kernel computes, by its interface."
    assert accum_e_fp32 and accum_c_fp32 and e.shape[1] == c.shape[1] and e.shape[1] % 16 == 0 and e.dtype == c.dtype == torch.bfloat16 and filter_eps is None
    return F.cross_entropy((e @ c.T).float(), targets, reduction=reduction)


@pytest.mark.parametrize("tables", [(8,), (8, 12), (15,)])
@pytest.mark.parametrize("biased", [True, False])
def test_what_a_kernel_for_one_table_is_given_is_the_same_loss(tables, biased):
    given = problem(40, 900, tables, biased)
    cut = run(given, loss=lambda pairs, targets, bias: (cut_cross_entropy(pairs, targets, bias, torch.bfloat16, pretend_kernel),
                                                        len(targets)))
    for a, b, c in zip(run(given), run(given, autocast=True), cut):
        assert (c - a).norm() / a.norm() < max(2 * (b - a).norm() / a.norm(), 1e-2)


@pytest.mark.parametrize("takes", ["e, c, targets, reduction, filter_eps",
                                   "e, c, targets, reduction, filter_eps, accum_e_fp32=False, accum_c_fp32=False"])
def test_a_release_that_cannot_add_up_in_float32_is_passed_over(monkeypatch, takes):
    release = SimpleNamespace(linear_cross_entropy=eval(f"lambda {takes}: None"))
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", release)
    assert cut_kernel.__wrapped__() is (release.linear_cross_entropy if "accum" in takes else None)


@pytest.mark.skipif(not torch.cuda.is_available() or cut_kernel() is None,
                    reason="needs a GPU and cut-cross-entropy that adds up in float32")
def test_the_kernel_of_a_gpu_is_the_plain_loss():
    pairs, targets, bias = problem(400, 300_000, (64, 32), True)
    pairs, targets, bias = [tuple(x.detach().cuda().requires_grad_() for x in pair)
                            for pair in pairs], targets.cuda(), bias.detach().cuda().requires_grad_()
    found = []
    for how, half in (({}, True), ({"chunk_size": 4096}, False)):  # the kernel, and our walk in float32
        for x in (bias, *pairs[0], *pairs[1]): x.grad = None
        with torch.autocast("cuda", torch.bfloat16, enabled=half): total, _ = masked_item_loss(pairs, targets, bias, most_logits=0, **how)
        total.backward()
        found.append([total.detach(), bias.grad, *(x.grad for pair in pairs for x in pair)])
    for a, b in zip(*found): assert (a - b).norm() / b.norm() < 2e-2


@pytest.mark.parametrize("tables", [(8,), (8, 12)])
@pytest.mark.parametrize("biased", [True, False])
def test_a_sample_of_everything_is_everything(tables, biased):
    given = problem(9, 60, tables, biased)
    rivals = torch.arange(60).repeat(3)  # each item three times
    whole, sample = run(given), run(given, loss=lambda pairs, targets, bias: sampled_item_loss(pairs, targets, rivals, bias=bias))
    for a, b in zip(whole, sample): torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tables", [(8,), (8, 12)])
def test_a_sparse_gradient_is_the_dense_one(tables):
    given, rivals = problem(9, 600, tables, True), torch.arange(30).repeat(2)
    dense, sparse = (run(given, loss=lambda pairs, targets, bias: sampled_item_loss(pairs, targets, rivals, bias=bias, sparse=sparse)) for sparse in (False, True))
    assert sparse[2].is_sparse and not dense[2].is_sparse and len(sparse[2].coalesce().values()) <= 39
    for a, b in zip(dense, sparse): torch.testing.assert_close(b.to_dense(), a)


def test_the_sampled_softmax_is_right_on_average_however_items_are_drawn():
    pairs, targets, _ = problem(4, 50, (8,), False, learned=False)
    exact = torch.cat([masked_item_loss([(pairs[0][0][i : i + 1], pairs[0][1])], targets[i : i + 1])[0].exp()[None] for i in range(4)])
    log_q = torch.linspace(0, 3, 50).log_softmax(0)
    torch.manual_seed(0)
    for q in (None, log_q):
        draws = [torch.randint(50, (30,)) if q is None else torch.multinomial(q.exp(), 30, replacement=True) for _ in range(3000)]
        found = torch.stack([torch.stack([sampled_item_loss([(pairs[0][0][i : i + 1], pairs[0][1])], targets[i : i + 1], d, q)[0].exp()
                                          for i in range(4)]) for d in draws])
        torch.testing.assert_close(found.mean(0), exact, rtol=0.05, atol=0)
