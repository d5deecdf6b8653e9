"The model is the same whatever the layout, and never sees what it is asked for."
from dataclasses import replace

import numpy as np
import pytest
import torch

from flare import models
from flare.masking import cloze_mask, collate, evaluation_batches
from flare.models import AddContexts, ByDistance, FlareConfig, FlareModel, attention_bias, starting_bias
from flare.sequences import Sequences
from flare.text import TokenStates
from watch import Watch

SMALL = dict(n_items=60, max_len=30, hidden_size=32, heads=4, ffn_size=64, dropout=0.0, embedding_dropout=0.0)
FLARE = SMALL | dict(modalities=("text",), text_width=12, latents=3, perceiver_size=16, perceiver_heads=2, perceiver_layers=1)


def random_text(seed=0, n_items=60):
    "Token states of a catalogue; every fifth item has no text."
    rng = np.random.default_rng(seed)
    counts = np.where(np.arange(n_items) % 5 == 4, 0, rng.integers(1, 12, n_items))
    return TokenStates(rng.standard_normal((counts.sum(), 12)).astype(np.float16), np.cumsum(counts) - counts, counts)


def random_batch(seed, row_length, text=None, other_targets=False, sequences=40, read=None):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 30, sequences)
    items, hidden = rng.integers(0, 60, lengths.sum()), cloze_mask(lengths, 0.3, rng.random(len(lengths)) < 0.3, rng)
    if other_targets: items = np.where(hidden, (items + 7) % 60, items)
    return collate(items, lengths, hidden, 60, row_length, text=text, read=read)


def make(seed=0, **fields):
    "A model; one that reads texts has an exact context table."
    torch.manual_seed(seed)
    model = FlareModel(FlareConfig(**fields)).eval()
    if model.config.modalities: model.refresh(random_text().chunks())
    return model


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = sum(total / count for total, count in model.loss(batch).values())
    loss.backward()
    return loss.detach(), {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("fields", [SMALL | {"norm": "post"}, SMALL | {"distance_bias": 0.0}, SMALL, FLARE, FLARE | {"output_tie": "id"}, FLARE | {"reader": "mean"}],
                         ids=["post-norm", "no distances", "pre-norm", "flare", "tied to ids", "mean"])
@pytest.mark.parametrize("seed", range(3))
def test_packed_equals_padded(fields, seed):
    model, text = make(seed, **fields).train(), random_text() if "modalities" in fields else None
    packed, packed_gradients = loss_and_gradients(model, random_batch(seed, 64, text))
    padded, padded_gradients = loss_and_gradients(model, random_batch(seed, None, text))
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-5)
    for name, gradient in packed_gradients.items(): torch.testing.assert_close(gradient, padded_gradients[name], rtol=0, atol=1e-5)


def test_a_batch_without_a_text_has_no_contrast():
    model = make(**FLARE).train()
    silent = collate(np.array([4, 9, 14]), np.array([3]), np.array([False, False, True]), 60, 64, text=random_text())
    losses = model.loss(silent)  # items 4, 9 and 14 have none
    assert set(losses) == {"mlm"} and losses["mlm"][0].isfinite()


def test_states_are_normalised_at_last_where_norms_come_before_branches():
    h = make(**SMALL).encode(batch := random_batch(0, 64), 3 * torch.randn(*batch.items.shape, 32), None)
    torch.testing.assert_close(h.mean(1), torch.zeros(len(h)), rtol=0, atol=1e-5)
    torch.testing.assert_close(h.std(1, correction=0), torch.ones(len(h)), rtol=0, atol=0.05)


def test_packed_equals_padded_when_scoring():
    model = make(**SMALL)
    with torch.inference_mode():
        torch.testing.assert_close(model.score(random_batch(0, 64)), model.score(random_batch(0, None)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("fields", [SMALL, FLARE, FLARE | {"output_tie": "none"}], ids=["ids", "flare", "untied"])
def test_hidden_items_have_no_path_to_their_scores(fields):
    model = make(**fields)
    assert torch.equal(model.score(random_batch(3, 64)), model.score(random_batch(3, 64, other_targets=True)))


@pytest.mark.parametrize("fields", [SMALL, FLARE], ids=["ids", "flare"])
def test_a_mask_is_the_mask_embedding_and_nothing_else(fields):
    model, batch = make(**fields), random_batch(3, 64, sequences=4)
    away = sorted(set(range(60)) - set(batch.items.flatten().tolist()))
    assert 59 in away

    def states():
        "At the masks."
        return model.encode(batch, model.ids(batch)[1], model.contexts(batch)[0])

    before = states()
    with torch.no_grad():  # items that are not there, the last one of the catalogue too
        model.item_embedding.weight[away] += torch.randn(len(away), 32)
        if fields is FLARE: model.context_table.rows[away] += 1
    assert torch.equal(states(), before)
    with torch.no_grad(): model.mask_embedding += torch.randn(32)
    assert not torch.allclose(states(), before, atol=1e-3)


def test_attention_begins_where_the_chapter_says(monkeypatch):
    given = []
    monkeypatch.setattr(models, "attention_bias", lambda batch, by_distance: given.append(by_distance)
                        or attention_bias(batch, by_distance))
    model = make(**SMALL)
    model.score(random_batch(0, 64))
    torch.testing.assert_close(given[0], starting_bias(4, 30, slope=2.0))
    assert given[0].argmax(0).tolist() == [29, 28, 30, 30]  # one back, two back, and the place itself twice


def test_attention_tells_distances_apart_and_before_from_after():
    model = make(**SMALL | {"layers": 1})
    (batch,) = evaluation_batches(Sequences.from_lists([[1, 2, 3, 4], [5, 6]]), np.array([7, 8]), 60, max_len=30)

    def states(distance):
        "At the masks, when all heads see more of what is so far away (below 0: before)."
        with torch.no_grad(): model.distance_bias[30 + distance] += 1.0
        after = model.encode(batch, model.ids(batch)[1], None)
        with torch.no_grad(): model.distance_bias[30 + distance] -= 1.0
        return after

    usual = states(-30)  # nothing is so far away
    moved = {distance: (states(distance) - usual).abs().amax(1) > 1e-4 for distance in (-4, -2, 2, 4)}
    assert {distance: m.tolist() for distance, m in moved.items()} == {
        -4: [True, False], -2: [True, True], 2: [False, False], 4: [False, False]}


def test_the_text_of_hidden_items_is_not_looked_at():
    "A training batch has the tokens of its targets, for the contrast; other tokens in their place change no state at a mask."
    model, batch = make(**FLARE), random_batch(3, 64, random_text(), sequences=4)
    seen = set(batch.items.flatten().tolist())
    owner = torch.arange(len(batch.counts)).repeat_interleave(batch.counts[:, 0])
    only_hidden = torch.tensor([int(item) not in seen for item in batch.contexts[:, 0]])[owner]
    assert only_hidden.any()
    others = replace(batch, states=torch.where(only_hidden[:, None], torch.randn_like(batch.states), batch.states))
    states = [model.encode(b, model.ids(b)[1], model.contexts(b)[0]) for b in (batch, others)]
    assert torch.equal(*states)
    everything = replace(batch, states=torch.randn_like(batch.states))
    assert not torch.equal(states[0], model.encode(everything, model.ids(everything)[1], model.contexts(everything)[0]))


@pytest.mark.parametrize("fields", [FLARE, FLARE | {"reader": "mean"}, FLARE | {"reader": "last"}], ids=["perceiver", "mean", "last"])
def test_whitened_texts_have_less_in_common(fields):
    model, text = make(**fields), random_text()
    text = replace(text, states=(text.states + 3 * np.cos(np.arange(12))).astype(np.float16))  # they have much in common

    def likeness():
        "Mean cosine of what is read for any two items that have a text."
        model.refresh(text.chunks())
        rows = torch.nn.functional.normalize(model.context_table.rows[text.counts > 0], dim=1)
        return (rows @ rows.T).mean()

    before = likeness()
    model.whiten(text.chunks())
    assert before > 0.5 and likeness() < 0.1


@pytest.mark.parametrize("reader", ["perceiver", "mean"])
def test_a_catalogue_whose_texts_are_all_alike_is_read_all_the_same(reader):
    model, text = make(**FLARE | {"reader": reader}), random_text()
    text = replace(text, states=np.repeat(text.states[:1], len(text.states), 0))
    model.whiten(text.chunks())
    model.refresh(text.chunks())
    assert model.context_table.rows.isfinite().all()


def test_whitening_is_of_the_texts_that_there_are():
    model, text = make(**FLARE | {"reader": "mean"}), random_text()
    text = replace(text, states=(text.states * np.arange(1, 13) + 1).astype(np.float16))  # the last direction varies most
    model.whiten(text.chunks())
    means = np.stack([text.states[a : a + n].astype(np.float32).mean(0) for a, n in zip(text.starts, text.counts) if n])
    white = means @ model.reader.matrix.numpy().T + model.reader.offset.numpy()
    variance = np.linalg.eigvalsh(np.cov(means.T, bias=True))[::-1]  # leading components first
    np.testing.assert_allclose(white.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(np.cov(white.T, bias=True), np.diag(variance / (variance + 0.01 * variance.mean())), atol=1e-3)


def test_the_table_scores_as_the_tokens_do():
    model = make(**FLARE)
    torch.testing.assert_close(model.score(random_batch(1, 64, random_text())), model.score(random_batch(1, 64)), rtol=0, atol=1e-5)


def test_what_is_not_read_anew_is_as_remembered():
    model, text = make(**FLARE), random_text()
    batch, whole = (random_batch(4, 64, text, sequences=6, read=read) for read in (lambda n: np.arange(1, n, 3), None))
    assert len(batch.counts) < len(batch.contexts) == len(whole.counts)
    with torch.no_grad(): model.reader.latents.add_(torch.randn_like(model.reader.latents))  # now the table is out of date
    (mixed, fresh), (exact, _) = model.contexts(batch), model.contexts(whole)
    anew = torch.zeros(len(batch.contexts), dtype=bool).index_fill(0, batch.read, True)
    torch.testing.assert_close(mixed[anew], exact[anew], rtol=0, atol=1e-6)
    torch.testing.assert_close(fresh, exact[anew], rtol=0, atol=1e-6)
    items = batch.contexts[~anew, 0]
    assert torch.equal(mixed[~anew], model.context_table.rows[items.clamp(max=59)]) and not torch.allclose(mixed[~anew], exact[~anew], atol=0.1)


def test_what_is_not_read_anew_is_in_no_contrast_and_not_written_to_the_table():
    model, text = make(**FLARE).train(), random_text()
    batch = random_batch(4, 64, text, sequences=6, read=lambda n: np.arange(1, n, 3))
    items = batch.contexts[batch.read, 0]
    model.context_table.rows.fill_(7.0)
    count = model.loss(batch)["contrastive"][1]
    assert count == sum(text.counts[i] > 0 for i in items.tolist() if i < 60)
    written = (model.context_table.rows != 7.0).any(1).nonzero().flatten()
    assert written.tolist() == sorted(i for i in items.tolist() if i < 60)


def test_a_batch_of_which_nothing_is_read_trains_on_the_table_alone():
    model, text = make(**FLARE).train(), random_text()
    loss, gradients = loss_and_gradients(model, random_batch(4, 64, text, read=lambda n: np.arange(0)))
    without, _ = loss_and_gradients(model, random_batch(4, 64))
    torch.testing.assert_close(loss, without)
    assert all(g.isfinite().all() for g in gradients.values()) and not gradients["reader.latents"].any()


def test_a_text_is_read_the_same_whatever_is_read_with_it():
    model, text = make(**FLARE), random_text()

    def read(items):
        states, counts = text.gather(np.array(items))
        return model.read(states, counts[:, None])

    together = read(range(60))
    for items in ([7], [3, 8], [4]):
        torch.testing.assert_close(read(items), together[items], rtol=0, atol=1e-5)


def test_biases_by_distance_are_a_lookup():
    table, place = torch.randn(21, 3, requires_grad=True), torch.randint(21, (4, 6, 6))
    ours = ByDistance.apply(table, place)
    theirs = torch.nn.functional.embedding(place, table).permute(0, 3, 1, 2)
    weight = torch.randn(ours.shape)
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad((x * weight).sum(), table)[0] for x in (ours, theirs)))


def test_rivals_are_for_training_only():
    model, batch = make(**SMALL, rivals=10).train(), random_batch(1, 64)
    torch.manual_seed(0)
    sampled = [model.loss(batch)["mlm"][0].item() for _ in range(3)]
    assert len(set(sampled)) == 3  # other rivals each time
    whole = make(**SMALL).train().loss(batch)["mlm"][0].item()
    assert abs(sum(sampled) / 3 - whole) < 0.1 * whole and model.eval().loss(batch)["mlm"][0].item() == pytest.approx(whole)
    with pytest.raises(ValueError, match="rivals is -1"): FlareConfig(**SMALL, rivals=-1)


@pytest.mark.parametrize("fields, sequences, arrays", [(SMALL, 40, 1), (FLARE, 40, 2), (FLARE, 8, 1), (FLARE | {"output_tie": "id"}, 40, 1)],
                         ids=["ids", "many masks", "few masks", "tied to ids"])
def test_a_step_has_the_gradient_of_the_table_and_where_it_pays_its_sum_with_the_contexts(fields, sequences, arrays):
    fields = fields | {"n_items": 400_000, "output_bias": False}  # so many that the loss walks through them
    model = FlareModel(FlareConfig(**fields)).train()
    batch = random_batch(0, 64, random_text() if model.config.modalities else None, sequences=sequences)
    for sparse in (False, True):
        if sparse: model.config.rivals = 40
        model.zero_grad()
        with Watch() as seen: sum(total for total, _ in model.loss(batch).values()).backward()
        assert [n for n in seen.sizes() if n == model.item_embedding.weight.numel()] == ([] if sparse else [400_000 * 32] * arrays)
        assert model.item_embedding.weight.grad.is_sparse == sparse


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_where_states_and_texts_meet_makes_no_difference(half, monkeypatch):
    monkeypatch.setattr(AddContexts, "piece", 16)
    model, h, made = make(**FLARE), torch.randn(200, 32, requires_grad=True), []
    with torch.no_grad(): model.project.weight.mul_(20)  # as much as the ids
    for parts in ([h], h.split(40)):
        model.zero_grad()
        h.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            pairs = [model.logits(part, model.item_embedding.weight) for part in parts]
            logits = torch.cat([sum(states @ table.T for states, table in some) for some in pairs])
        logits.float().square().sum().backward()
        made.append([len(pairs[0]), logits.float(), h.grad, model.item_embedding.weight.grad, model.project.weight.grad])
    assert [some[0] for some in made] == [1, 2]
    for one, other in zip(*(some[1:] for some in made)):
        torch.testing.assert_close(one, other, rtol=0, atol=float(other.detach().abs().max()) * (3e-2 if half else 1e-5))


def test_dropped_ids_have_a_say_in_every_row():
    model = make(**FLARE | {"rivals": 20, "id_dropout": 0.5}).train()
    assert model.sparse_weights() == []
    sum(total for total, _ in model.loss(random_batch(0, 64, random_text())).values()).backward()
    assert not model.item_embedding.weight.grad.is_sparse


@pytest.mark.parametrize("tie", ["id", "item", "none"])
def test_sparse_gradients_are_the_dense_ones(tie):
    grads, batch = [], random_batch(0, 64, random_text())
    for sparse in (False, True):
        model = make(**FLARE | {"output_tie": tie, "rivals": 20}).train()
        expected = model.sparse_weights()
        assert expected and all(any(p is q for q in model.parameters()) for p in expected)
        if not sparse: model.sparse_weights = list
        torch.manual_seed(3)
        sum(total for total, _ in model.loss(batch).values()).backward()
        assert {id(p) for p in model.parameters() if p.grad is not None and p.grad.is_sparse} == {id(p) for p in expected if sparse}
        grads.append({name: p.grad.to_dense() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]: torch.testing.assert_close(grads[1][name], grads[0][name], msg=lambda m: f"{name} {m}")


def test_logits_are_those_of_id_plus_context():
    model, batch = make(**FLARE), random_batch(1, 64)
    h = model.encode(batch, model.ids(batch)[1], model.contexts(batch)[0])
    table = model.item_embedding.weight + model.project(model.context_table.rows)  # W = e + c
    torch.testing.assert_close(model.score(batch), h @ table.T + model.output_bias, rtol=0, atol=1e-5)


def test_training_keeps_the_rows_of_a_batch_fresh():
    model, text = make(**FLARE).train(), random_text()
    batch = random_batch(2, 64, text, sequences=4)
    with torch.no_grad():
        for p in model.reader.parameters(): p.add_(0.05 * torch.randn_like(p))  # as a step of training would
    old = model.context_table.rows.clone()
    model.loss(batch)
    now = model.context_table.rows.clone()
    model.eval().refresh(text.chunks())
    exact, here = model.context_table.rows, torch.zeros(60, dtype=bool)
    here[batch.contexts[:-1, 0]] = True  # the last context is the mask's
    assert 10 < here.sum() < 50 and not torch.allclose(exact, old, atol=1e-3)
    torch.testing.assert_close(now[here], exact[here])
    assert torch.equal(now[~here], old[~here])


def test_items_without_text_share_a_context():
    model = make(**FLARE)
    rows = model.context_table.rows
    assert torch.equal(rows[4::5], model.no_text.expand(12, -1)) and not torch.equal(rows[0], rows[1])


def test_dropped_ids_are_left_out_at_input_and_output():
    model = make(**FLARE | {"id_dropout": 0.5}).train()
    torch.manual_seed(1)
    batch = random_batch(0, 64)
    e, x = model.ids(batch)
    gone = (e == 0).all(1)
    assert 15 < gone.sum() < 45 and torch.equal(e[~gone], model.item_embedding.weight[~gone])
    assert torch.equal(x, e[batch.items.clamp(max=59)])
    assert torch.equal(model.eval().ids(batch)[0], model.item_embedding.weight)


@pytest.mark.parametrize("tie, learns", [("id", {"item_embedding"}), ("item", {"item_embedding", "project"}),
                                         ("none", {"output_embedding"})])
def test_what_the_output_table_is_made_of(tie, learns):
    model, batch = make(**FLARE | {"output_tie": tie}), random_batch(0, 64)
    h = torch.randn(len(batch.masked), 32)
    logits = sum(h @ table.T for h, table in model.logits(h, model.item_embedding.weight))
    model.zero_grad()
    logits.square().sum().backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0} == learns


def test_bad_configurations():
    for fields, message in (({"modalities": ("image",)}, "choose one of"), ({"reader": "max"}, "choose one of"), ({"output_tie": "c"}, "choose one of"),
                            ({"alfa": 1}, "has no field alfa")):
        with pytest.raises(ValueError, match=message): FlareConfig(**fields)
    with pytest.raises(ValueError, match="perceiver_size=10 is not a multiple"):
        make(**FLARE | {"perceiver_size": 10, "perceiver_heads": 4})


def test_a_slice_scores_as_the_whole():
    for fields in (SMALL, FLARE):
        model, batch = make(**fields), random_batch(1, 64)
        torch.testing.assert_close(model.score(batch, slice(10, 30)), model.score(batch)[:, 10:30])


def test_what_is_saved_is_what_is_loaded(tmp_path):
    for name, fields in {"ids": SMALL, "flare": FLARE}.items():
        model = make(**fields)
        model.save_pretrained(tmp_path / name)
        assert not list((tmp_path / name).glob("*.bin")) and list((tmp_path / name).glob("*.safetensors"))
        again = FlareModel.from_pretrained(tmp_path / name).eval()  # with its context table: no text is needed
        assert torch.equal(model.score(random_batch(0, 64)), again.score(random_batch(0, 64)))
