"Masks and packing over random ragged batches; what the chapter shows on examples."
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flare.masking import TrainingBatches, cloze_mask, collate, evaluation_batches, pack, windows
from flare.sequences import Sequences
from flare.text import TokenStates

ragged = st.lists(st.integers(1, 30), min_size=1, max_size=80).map(np.array)


@settings(deadline=None)
@given(ragged, st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_every_sequence_hides_something(lengths, probability, share, seed):
    hidden = cloze_mask(lengths, probability, np.random.default_rng(seed).random(len(lengths)) < share, np.random.default_rng(seed))
    assert hidden.shape == (lengths.sum(),)
    assert (np.add.reduceat(hidden, np.cumsum(lengths) - lengths, dtype=int) >= 1).all()


@settings(deadline=None)
@given(ragged, st.integers(30, 200))
def test_packing_places_every_cell_once(lengths, row_length):
    row, column, rows, width = pack(lengths, row_length)
    assert width <= row_length
    taken = np.zeros((rows, width), int)
    for r, c, n in zip(row, column, lengths): taken[r, c : c + n] += 1
    assert taken.max() == 1 and taken.sum() == lengths.sum()


@settings(deadline=None)
@given(ragged, st.integers(0, 99))
def test_a_batch_holds_what_went_in(lengths, seed):
    rng = np.random.default_rng(seed)
    items, critiques = rng.integers(0, 50, lengths.sum()), rng.integers(-1, 4, lengths.sum())
    hidden = cloze_mask(lengths, 0.3, rng.random(len(lengths)) < 0.3, rng)
    for row_length in (40, None):
        batch = collate(items, lengths, hidden, 50, row_length, critiques)
        cells, order = batch.segment.flatten() >= 0, np.lexsort((batch.position.flatten(), batch.segment.flatten()))
        order = order[cells.numpy()[order]]  # by sequence, then position: the order the events came in
        assert (batch.items.flatten()[order].numpy() == np.where(hidden, 50, items)).all()
        assert (batch.targets.numpy() == items[hidden]).all()
        assert (batch.items.flatten()[batch.masked] == 50).all()
        context = batch.contexts[batch.context_index.flatten()[order]].numpy()
        assert (context == np.stack([np.where(hidden, 50, items), critiques], 1)).all()
        assert len(np.unique(batch.contexts.numpy(), axis=0)) == len(batch.contexts)
        assert (batch.items.flatten()[~cells] == 51).all()


@settings(deadline=None)
@given(ragged, st.integers(0, 99))
def test_gaps_are_between_neighbours_that_are_both_seen(lengths, seed):
    rng = np.random.default_rng(seed)
    times = np.concatenate([np.sort(rng.integers(0, 10**9, n)) for n in lengths])
    hidden = cloze_mask(lengths, 0.3, rng.random(len(lengths)) < 0.3, rng)
    made = [collate(rng.integers(0, 50, lengths.sum()), lengths, hidden, 50, 40, times=when)
            for when in (times, np.where(hidden, 5, times), None)]
    assert made[2].gaps is None and made[0].gaps.equal(made[1].gaps)  # the time of what is hidden is not told
    expected = []
    for first, n in zip(np.cumsum(lengths) - lengths, lengths):
        expected += [times[i] - times[i - 1] if i > first and not hidden[i] and not hidden[i - 1] else -1 for i in range(first, first + n)]
    cells = made[0].segment.flatten() >= 0
    order = np.lexsort((made[0].position.flatten(), made[0].segment.flatten()))
    assert made[0].gaps.flatten()[order[cells.numpy()[order]]].tolist() == expected and (made[0].gaps.flatten()[~cells] == -1).all()


def test_times_travel_with_training_and_evaluation_batches():
    times = [[5, 7, 17, 18], [100, 160]]
    history = Sequences.from_lists([[1, 2, 3, 4], [5, 6]])
    timed = Sequences(history.items, history.offsets, np.concatenate(times))
    (batch,) = evaluation_batches(timed, np.array([8, 9]), 10, max_len=3)
    assert sorted(batch.gaps[batch.gaps >= 0].tolist()) == [1, 10, 60]  # the first user's oldest item fell off
    seen = [gap for epoch in range(30)
            for gap in TrainingBatches(timed, 10, 2, 8, last_mask_share=1.0).batch(epoch, 0).gaps.flatten().tolist()]
    assert {*seen} == {-1, 2, 10}  # the last item of each is hidden
    assert TrainingBatches(history, 10, 2, 8).batch(0, 0).gaps is None


def test_windows_cover_every_event_and_keep_order():
    rng = np.random.default_rng(0)
    lists = [list(part) for part in np.split(rng.permutation(42), np.cumsum([0, 1, 5, 6, 7])[:5])]  # the last has 23
    for stride in (None, 2, 5):
        cut = windows(Sequences.from_lists(lists), 5, stride)
        assert max(cut.lengths) <= 5 and min(cut.lengths) >= 1
        pieces = [list(cut[i]) for i in range(len(cut))]
        assert pieces[0] == lists[1] and pieces[1] == lists[2]  # short ones stay whole
        assert lists[-1][-5:] in pieces and lists[-1][:5] in pieces
        assert set(cut.items) == set(range(42))


def test_evaluation_keeps_the_order_of_users_and_the_most_recent_items():
    rng = np.random.default_rng(0)
    lists = [list(rng.integers(0, 40, n)) for n in rng.integers(0, 12, 70)]
    targets = rng.integers(0, 40, 70)
    batches = list(evaluation_batches(Sequences.from_lists(lists), targets, 40, max_len=6, row_length=16, batch_size=16))
    assert (torch.cat([b.targets for b in batches]).numpy() == targets).all()
    last = torch.cat([torch.where(b.position.flatten()[b.masked] > 0, b.items.flatten()[b.masked - 1], -1) for b in batches])
    assert last.tolist() == [row[-1] if row else -1 for row in lists]
    assert all((b.position.max() <= 6) and b.items.shape[1] <= 16 for b in batches)


def test_a_share_of_the_contexts_is_read_and_the_masks_stay():
    rng = np.random.default_rng(0)
    sequences, counts = Sequences.from_lists([rng.integers(0, 900, 8) for _ in range(300)]), np.full(900, 2)
    text = TokenStates(np.zeros((1800, 3), np.float16), 2 * np.arange(900), counts)
    whole, part, again = (TrainingBatches(sequences, 900, 100, 8, text=text, read_share=share).batch(1, 2) for share in (1.0, 0.25, 0.25))
    assert torch.equal(whole.read, torch.arange(len(whole.contexts))) and len(whole.states) == int(whole.counts.sum())
    assert abs(len(part.read) / len(part.contexts) - 0.25) < 0.08 and torch.equal(part.read, again.read)
    assert part.counts[:, 0].tolist() == [2 * (item < 900)
                                          for item in part.contexts[part.read, 0]] and len(part.states) == int(part.counts.sum())
    assert torch.equal(part.masked, whole.masked) and torch.equal(part.targets, whole.targets)
