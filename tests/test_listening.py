"What is said counts as much as it is likely to be said of an item; and the hearing test counts as by hand."
import copy
from dataclasses import replace
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from flare import experiments
from flare.critiquing import DEPTH, FORMS, silenced
from flare.experiments import run
from flare.hearing import RULES, STRENGTHS, WEAR, WORDING, HearingTest, Remembering, hearing_voice, listening_voice, singular, synonymous, traces, wear
from flare.listening import VARIED, ListenConfig, Listening, Speakers, calibrate, hear, own_words, read_strings, sayings, teach, together
from flare.masking import evaluation_batches
from flare.metrics import cat_ndcg, evaluate
from flare.models import FlareConfig, FlareModel
from flare.records import code_digest, read_record, staleness
from flare.results import read_beside
from flare.sequences import Catalogue, Dataset, Sequences, leave_one_out
from flare.text import Encoder, TextConfig, item_texts, token_states
from tiny_encoder import write_encoder

ITEMS = 60
SHELVES = ["staplers", "printers", "binders", "pens"]
WORDS = [*SHELVES, "office", "room0", "room1", "acme", "blue", "red", "thing"]
QUICK = ListenConfig(listener_steps=150, listener_sayings=120, listener_width=32, listener_critiques=60)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    "A catalogue, an encoder with random weights, and an untrained model that reads with it."
    encoder = TextConfig(encoder=str(write_encoder(tmp_path_factory.mktemp("encoder") / "tiny", words=WORDS)))
    paths = [("office", "room" + str(i % 2), SHELVES[i % 4]) for i in range(ITEMS - 2)] + [(), ()]
    catalogue = Catalogue(pd.DataFrame({"item": map(str, range(ITEMS)), "title": [f"{'blue' if i % 3 else 'red'} thing {i}" for i in range(ITEMS)],
                                        "brand": ["acme" if i % 5 else "" for i in range(ITEMS)], "category": paths}))
    rng = np.random.default_rng(0)
    dataset = Dataset("made", catalogue, Sequences.from_lists([rng.permutation(ITEMS)[:6] for _ in range(90)]),
                      np.arange(90).astype(str), {})
    text = token_states(item_texts(catalogue), encoder, folder=tmp_path_factory.mktemp("store"), progress=False)
    torch.manual_seed(0)
    model = FlareModel(FlareConfig(n_items=ITEMS, max_len=10, hidden_size=16, heads=2, ffn_size=32, layers=1, text_width=text.width, modalities=("text",),
                                   latents=2, perceiver_size=32, perceiver_heads=2, perceiver_layers=1)).eval()
    with torch.no_grad():
        model.whiten(text.chunks())
        model.refresh(text.chunks())
    return dataset, model, Encoder(encoder)


@pytest.fixture(scope="module")
def listener(shop):
    dataset, model, encoder = shop
    return teach(model, dataset.catalogue, encoder, QUICK)


def batch(asked):
    "A user for each wish."
    n = len(asked)
    (made,) = evaluation_batches(Sequences.from_lists([[i, i + 1] for i in range(n)]), np.arange(n), ITEMS, 10, critiques=np.array(asked))
    return made


def test_strings_are_read_as_texts_are(shop):
    dataset, model, encoder = shop
    texts = item_texts(dataset.catalogue)
    read, meant = read_strings(model, texts + ["", "  "], encoder, block=7)
    torch.testing.assert_close(read[:ITEMS], model.context_table.rows, atol=2e-2, rtol=0)  # bfloat16 in batches of other lengths
    for i in (0, 7):
        torch.testing.assert_close(meant[i], F.normalize(encoder.states(encoder.tokens([texts[i]])).float().mean(0), dim=0),
                                   atol=2e-2, rtol=0)
    assert (read[ITEMS:] == 0).all() and (meant[ITEMS:] == 0).all()


def test_what_can_be_said_comes_in_the_versions_asked_for(shop):
    strings, codes, form = sayings(shop[0].catalogue, ListenConfig(listener_forms=("leaf", "words", "worn"), listener_sayings=120))
    assert np.bincount(form).tolist() == [1, 2, 30]  # 60 titles twice, 4 paths thirty times
    assert strings[codes[0][0]] == "staplers" and (codes[0][-2:] == -1).all() and len(set(strings)) == len(strings)
    assert (codes[form == 1] >= 0).all()


def test_an_item_is_found_by_what_is_said_of_it(shop, listener):
    dataset, model, encoder = shop
    said = ["staplers", "office - room1 - printers", "room0 - office", "red"]
    fits = [lambda i: i % 4 == 0, lambda i: i % 4 == 1, lambda i: i % 2 == 0, lambda i: i % 3 == 0]
    asked, wishes = hear(model, listener, said, encoder)
    likely = wishes.vectors[asked] @ listener.items.T
    for row, fit, least in zip(likely, fits, (0.75, 0.75, 0.75, 0.5)):
        good = np.array([fit(i) for i in range(ITEMS - 2)])
        found = row[: ITEMS - 2].topk(8)[1].numpy()
        assert good[found].mean() >= least > good.mean()


def test_listening_is_the_silent_model_and_a_likelihood(shop, listener):
    _, model, encoder = shop
    asked, wishes = hear(model, listener, ["red", "", "acme"], encoder)
    assert wishes.known.tolist() == [-1, listener.known["acme"]]
    made, everything = batch(asked), slice(0, ITEMS)
    with torch.no_grad():
        likely = listener.likelihood(wishes, torch.arange(2), everything)
        torch.testing.assert_close(likely[0], listener.speakers(listener.alike(wishes, torch.zeros(1, dtype=int), everything))[0])  # words of its own are guessed
        silent = model.scorer(silenced(made))(everything)
        for strength in (0.0, 1.0, 2.5):
            scores = Listening(model, listener, wishes, strength).scorer(made)(everything)
            for user, wish in enumerate(asked):
                expected = silent[user] + (strength * likely[wish] if wish >= 0 else 0)
                torch.testing.assert_close(scores[user], expected, atol=1e-5, rtol=1e-5)
        parts = torch.cat([Listening(model, listener, wishes).scorer(made)(part) for part in (slice(0, 20), slice(20, ITEMS))], 1)
        torch.testing.assert_close(parts, Listening(model, listener, wishes).scorer(made)(everything), atol=1e-6, rtol=1e-6)


def test_the_catalogues_own_words_are_known(shop, listener):
    _, model, encoder = shop
    said = {"office - room1 - printers": lambda i: i % 4 == 1, "acme": lambda i: i % 5, "printers": lambda i: i % 4 == 1,
            "office": lambda i: True, "room0": lambda i: i % 2 == 0}
    _, wishes = hear(model, listener, [*said, "offices"], encoder)
    assert (wishes.known >= 0).tolist() == [True] * 5 + [False]
    assert hear(model, listener, ["PRINTERS"], encoder)[1].known[0] == wishes.known[2]
    each, everything = torch.arange(6), slice(0, ITEMS)
    with torch.no_grad():
        likely, contrary = (listener.likelihood(some, each, everything)
                            for some in (wishes, wishes._replace(vectors=-wishes.vectors)))  # all others are nearer to this than those that fit
    for row, other, (words, fit) in zip(likely, contrary, said.items()):
        fits = np.array([bool(fit(i)) and (words == "acme" or i < ITEMS - 2) for i in range(ITEMS)])
        assert row[fits].unique().numel() == 1 and row[fits][0] > np.log(0.009)  # all alike
        assert all((some[~fits] <= np.log(1e-4)).all() for some in (row, other))
        assert words == "office" or row[~fits].unique().numel() > 3  # the others by what they are like


def test_what_an_item_is_called_in_several_ways_is_said_of_it_more_often(shop, listener):
    catalogue = Catalogue(shop[0].catalogue.table.assign(category=[("office", "room0"), *shop[0].catalogue.table["category"][1:]]))
    words, codes, above = own_words(catalogue)
    assert len(set(words)) == len(words) and codes.shape == (len(above), ITEMS)
    taught = copy.deepcopy(listener)
    taught.remember(words, codes, above)
    below = [*range(2, ITEMS - 2, 2)]
    for said, here, there in (("office - room0", 3.02, 1.01), ("room0", 1.01, 0.01), ("office", 0.01, 0.01)):  # the precise path, the broad one, its last two levels, and down to levels 2 and 3; ...
        row = taught.remembered(torch.zeros(1, taught.items.shape[1]), torch.tensor([taught.known[said]]), slice(0, ITEMS))[0].exp()
        assert row[0] == pytest.approx(here) and row[below].tolist() == pytest.approx([there] * len(below))
    typical = taught.items[below * 2 + [0] * 5].mean(0)
    torch.testing.assert_close(taught.typical[taught.known["office - room0"]], typical)
    assert {"own", "typical", "items"} <= set(dict(taught.named_buffers()))  # they move with it


def test_names_are_compared_by_the_cosine_however_few_items_are_asked_for(shop, listener):
    dataset, model, encoder = shop
    _, meant = read_strings(model, ["printer", "a red pen"], encoder)
    for way, name in (("path", lambda row: " - ".join(row.category)),
                      ("last level", lambda row: row.category[-1] if row.category else ""), ("title", lambda row: row.title)):
        _, names = read_strings(model, [name(row) for row in dataset.catalogue.table.itertuples()], encoder)
        torch.testing.assert_close(listener.names[way].alike(meant, slice(0, ITEMS)), meant @ names.T, atol=2e-2, rtol=0)
        for part in (slice(0, 2), slice(ITEMS - 3, ITEMS)):
            torch.testing.assert_close(listener.names[way].alike(meant, part), listener.names[way].alike(meant, slice(0, ITEMS))[:, part])
    assert (listener.names["path"].alike(meant, slice(ITEMS - 2, ITEMS)) == 0).all()  # they have no category


def test_either_kind_of_speaker_may_have_spoken():
    speakers, alike = Speakers(), torch.rand(4, 2, 3)
    with torch.no_grad():
        category, text = -5 + 0.5 * alike[0] + 20 * alike[1] + 4 * alike[2], 0.5 * alike[0] + 16 * alike[3]
        torch.testing.assert_close(speakers(alike), torch.logaddexp(category, text))
    assert speakers.named()["category: path"] == 20 and speakers.named()["text: often"] == 0 and "text: path" not in speakers.named()


def test_speakers_are_fitted_to_what_validation_users_bear_out(shop, listener):
    dataset, model, encoder = shop
    users, hasty = leave_one_out(dataset).validation, copy.deepcopy(listener)
    hasty.items = 3 * listener.items  # three times as sure
    calibrate(hasty, model, dataset.catalogue, users, encoder)
    found = hasty.speakers.named()
    calibrate(modest := copy.deepcopy(listener), model, dataset.catalogue, users, encoder)
    assert 0 < found["text: towers"] < modest.speakers.named()["text: towers"]
    assert listener.speakers.named() == Speakers().named()
    spoken = []
    for form in VARIED:
        said = FORMS[form](dataset.catalogue, 1000)
        strange = np.array([bool(said[target].strip()) and said[target].casefold() not in listener.known for target in users.targets])
        asked, wishes = hear(model, hasty, [said[target] for target in users.targets[strange]], encoder)
        spoken.append((wishes, *evaluation_batches(users.history.take(strange), users.targets[strange], ITEMS, 10, critiques=asked)))
    def unlikely() -> float:
        with torch.no_grad():
            scores = [(Listening(model, hasty, wishes).scorer(made)(slice(0, ITEMS)), made.targets) for wishes, made in spoken]
            return sum(F.cross_entropy(*some).item()
                       for some in scores) / 2 + hasty.speakers.unlike_before().item() / sum(len(targets) for _, targets in scores)
    best = unlikely()
    for parameter in hasty.speakers.parameters():
        for index in range(parameter.numel()):
            for step in (-0.3, 0.3):
                with torch.no_grad(): parameter.view(-1)[index] += step
                assert unlikely() > best - 1e-6
                with torch.no_grad(): parameter.view(-1)[index] -= step
    calibrate(hasty, model, dataset.catalogue, users.__class__(users.users[:0], users.history.take(slice(0, 0)), users.targets[:0]), encoder)
    assert hasty.speakers.named() == pytest.approx(found, abs=1e-5)  # nobody was there: as it was


def test_a_model_thinks_once_of_the_same_histories(shop, listener):
    _, model, encoder = shop
    class Counting(torch.nn.Module):
        asked = 0
        def scorer(self, batch):
            Counting.asked += 1
            return model.scorer(batch)
    once, everything = Remembering(Counting(), most=2), slice(0, ITEMS)
    asked, wishes = hear(model, listener, ["pens", "", "red"], encoder)
    with torch.no_grad():
        for strength in (1.0, 2.0):
            torch.testing.assert_close(Listening(once, listener, wishes, strength).scorer(batch(asked))(everything),
                                       Listening(model, listener, wishes, strength).scorer(batch(asked))(everything))
        assert Counting.asked == 1
        torch.testing.assert_close(once.scorer(batch([-1, -1]))(everything), model.scorer(batch([-1, -1]))(everything))
        once.scorer(batch([-1])), once.scorer(silenced(batch(asked)))
        assert Counting.asked == 4 and len(once.kept) == 2  # the oldest was forgotten
        for made in (batch([0]), batch([-1]), *[replace(batch([-1]), states=torch.full((1, 2), float(what))) for what in (0, 0, 1)]):
            once.scorer(made)
    assert Counting.asked == 8  # what is asked for counts, and so does what there is to read


def test_two_wishes_add_up_for_who_has_both(shop, listener):
    _, model, encoder = shop
    first, second = (hear(model, listener, said, encoder) for said in (["pens", "", "pens", ""], ["red", "red", "", ""]))
    asked, wishes = together(first, second)
    assert asked[3] == -1
    made, everything = batch(asked), slice(0, ITEMS)
    with torch.no_grad():
        silent, both = model.scorer(silenced(made))(everything), Listening(model, listener, wishes, 1.5).scorer(made)(everything)
        alone = [Listening(model, listener, one[1],
                           1.5).scorer(batch(one[0]))(everything) - model.scorer(silenced(batch(one[0])))(everything)
                 for one in (first, second)]
    torch.testing.assert_close(both - silent, alone[0] + alone[1], atol=1e-4, rtol=1e-4)
    assert (alone[0][0] != 0).any() and (alone[1][0] != 0).any() and (alone[0][1] == 0).all()


def test_teaching_is_repeatable_and_leaves_everything_else_alone(shop, listener):
    dataset, model, encoder = shop
    torch.manual_seed(123)  # teaching has a generator of its own
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.random.get_rng_state()
    again = teach(model, dataset.catalogue, encoder, QUICK)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(again.items, listener.items)
    assert not torch.allclose(teach(model, dataset.catalogue, encoder, QUICK, seed=1).items, listener.items)


@pytest.mark.parametrize("said", ["дорога домой", "🖇️🖇️", "pens " * 2000, "no such shelf", "\n", "'; drop table items; --"])
def test_anything_can_be_said(shop, listener, said):
    _, model, encoder = shop
    asked, wishes = hear(model, listener, [said], encoder)
    with torch.no_grad(): assert torch.isfinite(Listening(model, listener, wishes).scorer(batch(asked))(slice(0, ITEMS))).all()
    assert (asked == -1).all() == (said == "\n")


def test_what_cannot_be_is_refused(shop, listener):
    dataset, model, encoder = shop
    _, wishes = hear(model, listener, ["red"], encoder)
    for strength in (float("nan"), float("inf"), 1e9):
        with pytest.raises(ValueError, match="give a number between -100 and 100"): Listening(model, listener, wishes, strength)
    with pytest.raises(ValueError, match="the model reads no texts"):
        teach(FlareModel(FlareConfig(n_items=ITEMS)), dataset.catalogue, encoder)
    with pytest.raises(ValueError, match="no form of critique louder"): ListenConfig(listener_forms=("louder",))
    with pytest.raises(ValueError, match="listener_steps is 0"): ListenConfig(listener_steps=0)
    with pytest.raises(ValueError, match="listener_slips is 0"): ListenConfig(listener_slips=0)
    with pytest.raises(ValueError, match="listener_above is 1e-05; it must be at least listener_slips"): ListenConfig(listener_above=1e-5)
    with pytest.raises(ValueError, match="listener_above is 1"): ListenConfig(listener_above=1.0)
    with pytest.raises(ValueError, match="listener_rate is nan"): ListenConfig(listener_rate=float("nan"))
    bare = Catalogue(pd.DataFrame({"item": ["a"], "title": [""], "category": [()]}))
    with pytest.raises(ValueError, match="nothing can be said about these items"): sayings(bare, ListenConfig())


def test_wishes_wear_by_rule():
    path, rng = ("Office", "Paper Goods", "Writing Pads", "Notebooks"), np.random.default_rng(0)
    said = {rule: made(path, rng) for rule, made in WEAR.items()}
    assert said["second level left out"] == "Office - Writing Pads - Notebooks" and said["last level alone"] == "Notebooks"
    assert sorted(said["levels in another order"].split(" - ")) == sorted(path)
    assert said["last level in the singular"] == "Notebook" and said["last level, synonyms"] == "jotters" and said["another shop's wording"] == ""
    assert said["last level, a letter wrong"] != "Notebooks"
    items = Catalogue(pd.DataFrame({"item": list("abc"), "title": "x", "category": [path, ("Office", "Glass"), ()]}))
    assert wear(items, "second level left out") == [said["second level left out"], "", ""]
    assert wear(items, "last level in the singular") == ["Notebook", "", ""]
    assert [singular(word) for word in ("Boxes", "Batteries", "Brushes", "Glasses", "Glass", "Mice", "Bus")] == ["Box", "Battery", "Brush", "Glass", "Glass", "Mice", "Bus"]
    assert synonymous("Laser Printer Toner") == "Laser Printer printing powder"


def test_the_rules_are_well_formed():
    import re
    assert all(re.compile(rule) for rules in RULES.values() for rule in rules.values())
    assert all(len(end.split(" - ")) == 2 and said for end, said in WORDING.items())


def test_the_hearing_test_counts_as_by_hand(shop, listener):
    dataset, model, encoder = shop
    split = leave_one_out(dataset)
    found = HearingTest(model, listening_voice(model, listener, encoder), dataset, split, users=70).run()
    targets, codes = found.test.targets, dataset.catalogue.category_codes(DEPTH)
    who = targets < ITEMS - 2
    assert found.results["precise|silent"]["users"] == who.sum() < 70 == found.results["nothing|silent"]["users"]
    part = type(found.test)(found.test.users[who], found.test.history.take(np.flatnonzero(who)), targets[who])
    ranks = evaluate(model, part, ITEMS, 50, top=10)
    assert found.results["precise|silent"]["recall@10"] == pytest.approx(ranks.metrics()["recall@10_pessimistic"])
    assert found.results["precise|silent"]["cat_ndcg@10"] == pytest.approx(cat_ndcg(ranks.top, codes[targets[who]], codes).mean())
    assert found.results["precise|filter, silent"]["cat_ndcg@10"] == 1  # fourteen items a shelf
    assert found.results["broad|filter, silent"]["cat_ndcg@10"] == 1 > found.results["broad|silent"]["cat_ndcg@10"]  # of two levels
    assert found.results["precise|listens 1"]["recall@10"] > 2 * found.results["precise|silent"]["recall@10"]
    assert found.results["broad|filter, popularity"]["recall@10"] < found.results["precise|filter, popularity"]["recall@10"]
    assert found.results["level 3|filter, silent"]["cat_ndcg@10"] == 1 > found.results["level 3|silent"]["cat_ndcg@10"]
    assert "level 4|silent" not in found.results  # paths have three levels
    assert found.results["last level alone|exact filter, silent"] == found.results["last level alone|silent"]  # it holds nothing
    by_words = found.results["last level alone|bm25 filter, silent"]  # the last level stands in one path each
    assert by_words == {name: found.results["precise|filter, silent"][name] for name in by_words}
    found.choose("words")
    asked, wishes = hear(model, listener, [FORMS["words"](dataset.catalogue, 0)[target] for target in found.validation.targets], encoder)
    worth = {s: evaluate(Listening(model, listener, wishes, s), found.validation, ITEMS, 50,
                         critiques=asked).metrics()["ndcg@10_pessimistic"] for s in STRENGTHS}
    assert min(worth.values()) < worth[found.results["words|chosen on validation"]["strength"]] == pytest.approx(max(worth.values()))
    assert found.results["precise|chosen on validation"]["strength"] == 1  # all are equal for words that are known
    kept = pd.read_parquet(BytesIO(found.to_parquet()))
    assert kept["user"].tolist() == found.test.users.tolist() and (kept.loc[~who, "precise|silent"] == 0).all()
    assert kept.loc[who, "precise|silent"].tolist() == ranks.pessimistic.tolist()


def test_nobody_needs_to_want_what_has_a_category(shop, listener):
    dataset, model, encoder = shop
    def tested(*lists):
        "Asked exactly, by users with these histories."
        small = replace(dataset, sequences=Sequences.from_lists(list(lists)), users=np.arange(len(lists)).astype(str))
        test = HearingTest(model, listening_voice(model, listener, encoder), small, leave_one_out(small))
        test.exact()
        return test.results
    results = tested([0, 1, 2, 3, ITEMS - 1, 4], [1, 2, 3, 4, ITEMS - 2, 5])  # not on validation
    assert results["precise|chosen on validation"]["strength"] == 1 and results["precise|listens 1"]["users"] == 2
    assert tested([0, 1, 2, 3, 4, ITEMS - 1]) == {}  # nowhere


def test_lists_to_be_read_are_those_of_the_model(shop, listener):
    dataset, model, encoder = shop
    split, voice = leave_one_out(dataset), listening_voice(model, listener, encoder)
    found = traces(model, voice, dataset, split, users=3, recent=4, top=5)
    titles, own = dataset.catalogue.table["title"], np.array(dataset.catalogue.category_path(DEPTH))
    for user, lists in found.groupby("user"):
        of = {kind: part for kind, part in lists.groupby("kind")}
        history = split.test.history[user][-4:]
        assert of["history"]["title"].tolist() == titles[history].tolist() and of["next"]["title"].tolist() == [titles[split.test.targets[user]]]
        said = {kind: part["said"].iloc[0] for kind, part in of.items()}
        assert said["what comes next"] == own[split.test.targets[user]] not in own[history]
        assert said["not in the history"] in ({*own} - {*own[history], said["what comes next"], ""} or {said["in the history"]})
        assert said["in the history"] == [path for path in own[history]
                                          if path][-1] and said["broadened"] == said["in the history"].rsplit(" - ", 1)[0]
        at, asked, _ = voice([said["broadened"]])
        part = type(split.test)(split.test.users[[user]], split.test.history.take(np.array([user])), split.test.targets[[user]])
        assert of["broadened"]["title"].tolist() == titles[evaluate(at(1.0), part, ITEMS, 50, top=5, critiques=asked).top[0]].tolist()
        assert of["nothing"]["title"].tolist() == titles[evaluate(model, part, ITEMS, 50, top=5).top[0]].tolist()
    assert found["user"].nunique() == 3 and set(traces(model, None, dataset, split)["kind"]) == {"history", "next", "nothing"}
    assert len(traces(model, voice, replace(dataset, catalogue=Catalogue(dataset.catalogue.table.assign(category=[()] * ITEMS))),
                      split)) == 0


def test_who_hears_can_be_told_nothing(shop):
    _, model, encoder = shop
    at, asked, said = hearing_voice(model, TextConfig(encoder=encoder.name), "embedding")(["", " "])
    assert asked.tolist() == [-1, -1] and said is None


@pytest.fixture
def folder(tmp_path):
    "The folder of a small made-up shop."
    shop = tmp_path / "shop"
    shop.mkdir()
    rng = np.random.default_rng(0)
    rows = [(f"u{u}", f"i{i}", t) for u in range(30) for t, i in enumerate(rng.permutation(20)[:6])]
    pd.DataFrame(rows, columns=["user", "item", "timestamp"]).to_csv(shop / "interactions.csv", index=False)
    pd.DataFrame({"item": [f"i{i}" for i in range(20)], "title": [f"thing {i}" for i in range(20)],
                  "category": [f"office > {SHELVES[i % 4]}" for i in range(20)]}).to_csv(shop / "items.csv", index=False)
    return shop


def test_checkpoints_survive_a_change_of_what_is_taught_and_of_nothing_else(folder, tmp_path, monkeypatch):
    def stopped(*arguments): raise InterruptedError
    digest, changed = code_digest, set()
    monkeypatch.setattr(experiments, "build", stopped)
    monkeypatch.setattr(experiments, "code_digest", lambda model: digest(model) | {"changed": "yes"} if model in changed else digest(model))
    def checkpoint(*models):
        "That of a run which is stopped, after the code of some models has changed."
        changed.update(models)
        with pytest.raises(InterruptedError): run("told", "flare_listens", str(folder), root=tmp_path, progress=False)
        (there,) = (part for part in (tmp_path / "runs/told").iterdir() if part.is_dir())
        return there / "checkpoint"
    checkpoint().touch()
    assert checkpoint("flare_listens").exists() and not checkpoint("flare").exists()


@pytest.mark.parametrize("model", ["flare_listens", "flare_hears"])
def test_a_model_that_is_told_things_has_a_record(folder, tmp_path, model):
    small = dict(hidden_size=16, heads=2, ffn_size=32, layers=1, perceiver_size=32, perceiver_heads=2, perceiver_layers=1, epochs=1, evaluate_every=1,
                 encoder=str(write_encoder(tmp_path / "encoder", words=WORDS)), listener_steps=5, listener_sayings=20, listener_width=16)
    record = run("told", model, str(folder), parameters=small, root=tmp_path / "paper", progress=False)
    assert read_beside("told", "traces", tmp_path / "paper")[["model", "dataset",
                                                              "seed"]].drop_duplicates().values.tolist() == [[model, "shop", 0]]
    history = read_beside("told", "history", tmp_path / "paper")
    assert history["epoch"].tolist() == [1] and history["ndcg@10_pessimistic"].notna().all() and (history["loss"] > 0).all()
    path = record.path(tmp_path / "paper")
    assert read_record(path) == record and staleness(record) == "" and path.with_suffix(".heard.parquet").exists()
    assert record.metrics["precise|listens 1"]["users"] == 30 and record.metrics["precise|chosen on validation"]["strength"] > 0
    assert {"flare.hearing", "flare.listening",
            "flare.critiquing"} <= set(code_digest(model)) and "flare.hearing" not in code_digest("flare")
    assert record.metrics["listener"]["category: path"] > 0 if model == "flare_listens" else "listener" not in record.metrics
    assert ("listener_steps" in record.parameters) == (model == "flare_listens") and "teach_seconds" in record.cost
