"What a user says is heard where it was said, and nowhere else; and a list is judged as by hand."
import re
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flare.critiquing import DEPTH, FORMS, Categories, CritiqueConfig, Filtered, Guided, matching, misspelt, mutate, silenced
from flare.masking import Critiques, TrainingBatches, collate, evaluation_batches
from flare.metrics import cat_ndcg, evaluate
from flare.models import FlareConfig, FlareModel
from flare.sequences import Catalogue, Dataset, Sequences, leave_one_out
from flare.text import TokenStates
from flare.trainer import TrainConfig, Trainer

ITEMS, WIDTH = 40, 12
SIZES = dict(n_items=ITEMS, max_len=10, hidden_size=32, heads=4, ffn_size=64, dropout=0.0, embedding_dropout=0.0, text_width=WIDTH,
             latents=2, perceiver_size=16, perceiver_heads=2, perceiver_layers=1)


def states(n, seed):
    "Random token states of n strings."
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 5, n)
    return TokenStates(rng.standard_normal((counts.sum(), WIDTH)).astype(np.float16), np.cumsum(counts) - counts, counts)


TEXT, STRINGS = states(ITEMS, 0), states(6, 1)


def critiques(silence=0.0, masked_text="embedding"):
    "Item i can be asked for with string i % 6, or with none."
    return Critiques(STRINGS, np.stack([np.arange(ITEMS) % 6, np.full(ITEMS, -1)], 1)[:, : 1 if silence == 0.0 else 2], silence,
                     masked_text)


def model(**fields):
    "One that listens."
    torch.manual_seed(0)
    made = FlareModel(FlareConfig(**SIZES | dict(modalities=("text", "critique")) | fields)).eval()
    if made.reader.types is not None: torch.nn.init.normal_(made.reader.types)
    with torch.no_grad(): made.refresh(TEXT.chunks())
    return made


def batch(said, masked_text="embedding", row_length=32, critique=2):
    "Three histories; the second asks for something."
    (made,) = evaluation_batches(Sequences.from_lists([[1, 2, 3], [4, 5], [6]]), np.array([7, 8, 9]), ITEMS, 10, row_length,
                                 critiques=np.array([-1, critique, -1]) if said else None, said=critiques(masked_text=masked_text) if said else None)
    return made


def split_of(sequences):
    "A split of plain sequences."
    catalogue = Catalogue(pd.DataFrame({"item": map(str, range(ITEMS)), "title": "x", "category": [()] * ITEMS}))
    return leave_one_out(Dataset("made", catalogue, sequences, np.arange(len(sequences)).astype(str), {}))


@pytest.mark.parametrize("masked_text", ["embedding", "drop"])
def test_a_critique_is_heard_by_who_said_it_and_by_nobody_else(masked_text):
    listens = model()
    with torch.no_grad():
        silent, heard, other = listens(batch(False)), listens(batch(True, masked_text)), listens(batch(True, masked_text, critique=3))
        torch.testing.assert_close(silent[[0, 2]], heard[[0, 2]], rtol=0, atol=1e-6)
        assert (silent[1] - heard[1]).abs().max() > 1e-3 and (heard[1] - other[1]).abs().max() > 1e-3
        torch.testing.assert_close(listens(silenced(batch(True, masked_text))), silent, rtol=0, atol=1e-6)
        torch.testing.assert_close(listens(batch(True, masked_text, row_length=None)), heard, rtol=0, atol=1e-5)


def test_where_the_text_is_hidden_a_learned_token_stands_or_none():
    for masked_text, learns in (("embedding", True), ("drop", False)):
        listens = model().train()
        batches = TrainingBatches(Sequences.from_lists([[1, 2, 3, 4, 5]] * 8), ITEMS, 8, 10, text=TEXT,
                                  critiques=critiques(masked_text=masked_text))
        sum(total / count for total, count in listens.loss(batches.batch(0, 0)).values()).backward()
        grad = listens.reader.types.grad
        assert grad[:2].abs().min(1)[0].max() > 0 and bool(grad[2].abs().max() > 0) is learns


def test_training_speaks_at_masks_only_and_is_silent_for_a_share():
    said = replace(critiques(), silence=0.25)
    batches = TrainingBatches(Sequences.from_lists([list(range(10))] * 400), ITEMS, 400, 10, text=TEXT, read_share=0.3, critiques=said)
    made = batches.batch(0, 0)
    contexts = made.contexts[made.context_index]
    spoken, hidden = contexts[..., 1] >= 0, made.items == ITEMS
    assert not (spoken & ~hidden).any()
    assert abs(spoken[hidden].float().mean() - 0.75) < 0.05
    asked = contexts.flatten(0, 1)[made.masked][:, 1]
    assert torch.equal(asked[asked >= 0], made.targets[asked >= 0] % 6)
    read = made.contexts[made.read]
    assert set(made.contexts[made.contexts[:, 1] >= 0][:, 1].tolist()) == set(read[read[:, 1] >= 0][:, 1].tolist())  # all that is said is read
    assert torch.equal(batches.batch(0, 0).contexts, made.contexts)


def test_a_model_learns_to_listen():
    rng = np.random.default_rng(0)
    sequences = Sequences.from_lists([rng.integers(0, ITEMS, 8) for _ in range(300)])  # nothing to learn from a history
    listens = model()
    split = split_of(sequences)
    trainer = Trainer(listens, split, TrainConfig(epochs=20, max_len=10, row_length=32, batch_size=32, learning_rate=3e-3),
                      progress=False, text=TEXT, critiques=critiques())
    trainer.fit()
    deaf = evaluate(listens, split.test, ITEMS, 10, 32).metrics()["recall@10"]
    heard = evaluate(listens, split.test, ITEMS, 10, 32, critiques=split.test.targets % 6, said=critiques()).metrics()["recall@10"]
    assert deaf < 0.4 and heard > 0.9  # seven of forty items answer to a string


def test_what_does_not_fit_is_refused():
    split = split_of(Sequences.from_lists([[1, 2, 3, 4]] * 4))
    config = TrainConfig(max_len=10, row_length=32)
    with pytest.raises(ValueError, match="the model listens to critiques"): Trainer(model(), split, config, text=TEXT)
    with pytest.raises(ValueError, match="does not listen"):
        Trainer(model(modalities=("text",)), split, config, text=TEXT, critiques=critiques())
    with pytest.raises(ValueError, match="critiques of 3 items and 40 items"):
        Trainer(model(), split, config, text=TEXT, critiques=Critiques(STRINGS, np.zeros((3, 1), int)))
    with pytest.raises(ValueError, match="give collate the texts"):
        collate(np.array([1, 2]), np.array([2]), np.array([False, True]), ITEMS, 8, critiques=np.array([0, 1]), said=critiques())
    for strength in (float("nan"), 1e9, float("inf")):
        with pytest.raises(ValueError, match="give a number between -100 and 100"): Guided(model(), strength)


def test_strength_goes_from_silence_to_the_critique_and_beyond():
    listens = model()
    with torch.no_grad():
        silent, heard = listens(batch(False)), listens(batch(True))
        for strength, expected in ((0, silent), (1, heard), (3, silent + 3 * (heard - silent))):
            torch.testing.assert_close(Guided(listens, strength).scorer(batch(True))(slice(None)), expected, rtol=1e-5, atol=1e-5)


def test_a_filter_puts_what_it_lets_through_first_and_keeps_the_order():
    listens, allowed = model(), torch.zeros(6, ITEMS, dtype=torch.bool)
    allowed[2, [5, 9, 20]] = True
    with torch.no_grad(): silent, filtered = listens(batch(False)), Filtered(listens, allowed).scorer(batch(True))(slice(None))
    torch.testing.assert_close(silent[[0, 2]], filtered[[0, 2]], rtol=0, atol=1e-6)
    order, before = filtered[1].argsort(descending=True), silent[1].argsort(descending=True)
    assert set(order[:3].tolist()) == {5, 9, 20}
    assert order[:3].tolist() == [i for i in before.tolist() if i in (5, 9, 20)] and order[3:13].tolist() == [i for i in before.tolist() if i not in (5, 9, 20)][:10]


PATHS = st.lists(st.lists(st.sampled_from("abc"), min_size=0, max_size=4), min_size=3, max_size=30)


def catalogue(paths):
    "Items of these category paths."
    return Catalogue(pd.DataFrame({"item": map(str, range(len(paths))), "title": "thing", "category": list(map(tuple, paths))}))


def by_hand(top, path, paths):
    "Eq. (8), item by item."
    def gain(own):
        levels = [a == b for a, b in zip(own, path)]
        return levels.index(False) if False in levels else len(levels)
    dcg = lambda gains: sum(g / np.log2(i + 2) for i, g in enumerate(gains))
    return dcg([gain(paths[i]) for i in top]) / dcg(sorted(map(gain, paths), reverse=True)[: len(top)])


@given(PATHS, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_cat_ndcg_is_its_formula(paths, random):
    codes, k = catalogue(paths).category_codes(4), min(5, len(paths))
    users = [i for i in range(len(paths)) if paths[i]]
    if not users: return
    top = np.array([random.sample(range(len(paths)), k) for _ in users])
    found = cat_ndcg(top, codes[users], codes)
    np.testing.assert_allclose(found, [by_hand(items, paths[user], paths) for items, user in zip(top, users)])
    for row, (user, value) in enumerate(zip(users, found)):
        gains = (codes[top[row]] == codes[user]).__and__(codes[user] >= 0).sum(1)
        best = top[row][np.argsort(-gains, kind="stable")]  # improving swaps
        equals = np.concatenate([random.sample(list(best[gains[np.argsort(-gains, kind="stable")] == g]),
                                               int((gains == g).sum())) for g in sorted(set(gains), reverse=True)])
        better, same = (float(cat_ndcg(np.array([items]), codes[[user]], codes)[0]) for items in (best, equals))
        assert better >= value - 1e-12 and abs(better - same) < 1e-12


@given(PATHS, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_one_swap_that_brings_a_higher_gain_forward_never_lowers_cat_ndcg(paths, random):
    codes, k = catalogue(paths).category_codes(4), min(5, len(paths))
    users = [i for i in range(len(paths)) if paths[i]]
    if not users or k < 2: return
    top = random.sample(range(len(paths)), k)
    for user in users:
        gains = ((codes[top] == codes[user]) & (codes[user] >= 0)).sum(1)
        swaps = [(i, j) for i, j in combinations(range(k), 2) if gains[j] >= gains[i]]
        lists = np.array([top, *([top[{i: j, j: i}.get(place, place)] for place in range(k)] for i, j in swaps)])
        value, *swapped = cat_ndcg(lists, codes[[user] * len(lists)], codes)
        for (i, j), better in zip(swaps, swapped): assert better > value if gains[j] > gains[i] else abs(better - value) < 1e-12


def test_a_perfect_list_has_one_and_nothing_asked_has_none():
    codes = catalogue(["ab", "ab", "ac", "bd"]).category_codes(4)
    assert cat_ndcg(np.array([[1, 0, 2]]), codes[[0]], codes)[0] == 1
    assert np.isnan(cat_ndcg(np.array([[1, 0]]), np.full((1, 4), -1), codes)[0])
    with pytest.raises(ValueError, match="do not fit"): cat_ndcg(np.array([[1, 0]]), codes[:2], codes)


@given(PATHS, st.integers(1, 4), st.integers(1, 3))
@settings(deadline=None)
def test_a_mutation_keeps_what_is_above_and_changes_the_level(paths, level, least):
    items = catalogue(paths)
    if not items.has_category.any(): return
    categories = Categories.of(items)
    of_items = categories.of_items
    assert [bool(path)
            for path in paths] == (of_items >= 0).tolist() and np.bincount(of_items[of_items >= 0]).tolist() == categories.sizes.tolist()
    assert categories.spread(["".join(path) for path in categories.paths]) == ["".join(path[:DEPTH]) for path in paths]
    changed = mutate(of_items, categories, level, np.random.default_rng(0), least)
    full = [tuple(path[:DEPTH]) for path in paths]
    for path, category in zip(full, changed):
        could = {other for other in full if len(path) >= level <= len(other) and other[: level - 1] == path[: level - 1] and other[level - 1] != path[level - 1]
                 and full.count(other) >= least}
        assert (category >= 0) == bool(could)
        if category >= 0: assert full[int(np.flatnonzero(of_items == category)[0])] in could


def test_mutations_are_drawn_evenly():
    items = catalogue([tuple("ab")] + [tuple("a" + x) for x in "cde"] * 5)
    categories = Categories.of(items)
    found = mutate(np.full(30_000, categories.of_items[0]), categories, 2, np.random.default_rng(0))
    assert np.allclose(np.unique(found, return_counts=True)[1] / 30_000, 1 / 3, atol=0.02)
    with pytest.raises(ValueError, match="level is 5"): mutate(categories.of_items, categories, 5, np.random.default_rng(0))


def test_filters_match_beginnings_or_words():
    items = catalogue([("Office", "Desk Chairs"), ("Office", "Staplers", "Heavy Duty"), ("Garden", "Chairs")])
    assert matching(["Office", "Office - Staplers", "none such"], items).tolist() == [[True, True, False], [False, True, False], [True] * 3]
    assert matching(["staplers, heavy", "garden", "garden chairs"], items, "bm25").tolist() == [[False, True, False], [False, False, True], [False, False, True]]


def test_forms_say_what_the_catalogue_says():
    items = catalogue([tuple("abcde"), tuple("ab"), ()])
    said = {name: form(items, 0) for name, form in FORMS.items()}
    assert said["precise"] == ["a - b - c - d", "a - b", ""] and said["broad"] == ["a - b", "a - b", ""]
    assert said["leaf"] == ["d", "b", ""] and said["brand"] == ["", "", ""] and said["words"] == ["thing"] * 3


def test_a_worn_category_is_one_for_all_its_items_and_another_in_every_version():
    items = catalogue([("Office", "Staplers", "Heavy Duty")] * 3 + [()])
    versions = [FORMS["worn"](items, version) for version in range(200)]
    assert all(len(set(said[:3])) == 1 and said[3] == "" for said in versions)
    assert len({said[0] for said in versions}) > 60 and FORMS["worn"](items, 7) == versions[7]
    assert {"Heavy Duty", "Office - Staplers", "office staplers heavy duty"} <= {said[0] for said in versions}


@given(st.text(alphabet="abcd -", max_size=30), st.integers(0, 9))
def test_one_letter_is_wrong_in_a_word_that_is_long_enough(text, seed):
    wrong = misspelt(text, np.random.default_rng(seed))
    before, after = text.split(" "), wrong.split(" ")
    assert len(before) == len(after) and sum(a != b for a, b in zip(before, after)) <= 1
    assert (wrong != text) == any(len(part) >= 4 for part in re.findall(r"\w+", text))
    assert abs(len(wrong) - len(text)) <= 1


def test_every_word_and_every_kind_of_mistake_has_its_turn():
    first, second = zip(*(misspelt("abcd efgh", np.random.default_rng(seed)).split() for seed in range(400)))
    assert {"acbd", "abdc", "acd", "abd", "abbcd", "abccd"} <= set(first) and {"egfh", "egh", "effgh"} <= set(second)
    assert any(len(word) == 4 and set(word) - set("abcd") for word in first)


def test_an_exact_match_can_be_told_how_deep_it_goes():
    items = catalogue([("Office", "Chairs"), ("Office", "Chairs", "Oak"), ("Office",)])
    said = ["Office - Chairs", "Office"]
    assert matching(said, items).tolist() == [[True, True, False], [True] * 3]
    assert matching(said, items, depth=DEPTH).tolist() == [[True, False, False], [False, False, True]]
    assert matching(said, items, depth=2).tolist() == [[True, True, False], [False, False, True]]


def test_settings_of_critiques_are_checked():
    for wrong, message in ((dict(critiques=()), "is empty"), (dict(critiques=("louder",)), "no form of critique louder"),
                           (dict(silence=1.5), "between 0 and 1"), (dict(masked_text="noise"), "choose one of")):
        with pytest.raises(ValueError, match=message): CritiqueConfig(**wrong)
