"What is tried beyond the paper does what it says, and nothing while it is off."
import copy
import inspect

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from flare.data import load_dataset
from flare.experiments import run
from flare.masking import TrainingBatches, evaluation_batches
from flare.metrics import evaluating
from flare.models import FlareConfig, FlareModel
from flare.pushing import OF_ITEMS, PushConfig, PushedFlare, carry_over, gap_kinds, guess_words, hide_tokens, others_before, trained_before, tuned
from flare.records import code_digest, read_record, resolve, staleness
from flare.sequences import Catalogue, Dataset, Sequences, leave_one_out
from flare.text import Encoder, TextConfig, encoder_folder, item_texts, token_states
from flare.trainer import TrainConfig, train
from tiny_encoder import write_encoder

ITEMS, WORDS = 40, ["red", "blue", "round", "square", "thing", "box"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    "A dataset, who reads its texts, and these."
    reading = TextConfig(encoder=str(write_encoder(tmp_path_factory.mktemp("encoder") / "tiny", words=WORDS)))
    titles = [f"{'red' if i % 2 else 'blue'} {'round' if i % 3 else 'square'} {'thing' if i % 5 else 'box'}"
              for i in range(ITEMS - 1)] + [""]
    catalogue = Catalogue(pd.DataFrame({"item": map(str, range(ITEMS)), "title": titles, "category": [()] * ITEMS}))
    rng = np.random.default_rng(0)
    dataset = Dataset("made", catalogue, Sequences.from_lists([rng.permutation(ITEMS)[:7] for _ in range(60)]),
                      np.arange(60).astype(str), {})
    return dataset, reading, token_states(item_texts(catalogue), reading, folder=tmp_path_factory.mktemp("store"), progress=False)


def config(shop, **more):
    "Of a small Flare."
    return FlareConfig(**dict(n_items=ITEMS, max_len=10, hidden_size=16, heads=2, ffn_size=32, layers=1, text_width=shop[2].width, modalities=("text",), latents=2,
                              perceiver_size=32, perceiver_heads=2, perceiver_layers=1, alpha=0.2) | more)


def made(shop, pushed=PushConfig(), **more):
    "An untrained model, the same every time."
    torch.manual_seed(0)
    return PushedFlare(config(shop, **more), pushed)


SCHEDULE = TrainConfig(epochs=2, max_len=10, batch_size=16, learning_rate=3e-3, precision="fp32")


def test_switched_off_it_is_flare(shop):
    torch.manual_seed(0)
    plain, off = FlareModel(config(shop)), made(shop)
    for model in (plain, off): train(model, leave_one_out(shop[0]), SCHEDULE, progress=False, text=shop[2])
    assert all(value.equal(off.state_dict()[name]) for name, value in plain.state_dict().items())


def test_the_average_is_judged_and_the_weights_are_trained(shop):
    model, steps = made(shop, PushConfig(average=0.5)), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    batches = TrainingBatches(leave_one_out(shop[0]).train, ITEMS, 16, 10, text=shop[2])
    expected = None
    for step, batch in enumerate(batches.epoch(0)):
        now, decay = {name: weight.detach().clone() for name, weight in model.named_parameters()}, min(0.5, step / (10 + step))
        expected = {name: weight if expected is None else decay * expected[name] + (1 - decay) * weight for name, weight in now.items()}
        sum(total / count for total, count in model.loss(batch).values()).backward()
        optimizer.step(), optimizer.zero_grad()
        steps.append(now)
    assert len(steps) > 2 and model.averaged == len(steps)
    torch.testing.assert_close({name: getattr(model, model.average_of(name)) for name in expected}, expected)
    judged = FlareModel(config(shop)).eval()
    judged.load_state_dict({name: expected.get(name, value) for name, value in model.state_dict().items() if name in judged.state_dict()})
    (batch,) = evaluation_batches(Sequences.from_lists([[1, 2, 3]]), np.array([4]), ITEMS, 10)
    before = copy.deepcopy(model.state_dict())
    with evaluating(model):
        model.refresh(shop[2].chunks()), judged.refresh(shop[2].chunks())
        torch.testing.assert_close(model.scorer(batch)(slice(3, 20)), judged.scorer(batch)(slice(3, 20)))
        with pytest.raises(RuntimeError), model.as_average(): raise RuntimeError  # whatever happens, the weights come back
    read = ("context_table.rows", "average_rows", "has_text")
    torch.testing.assert_close({name: value for name, value in model.state_dict().items() if name not in read},
                               {name: value for name, value in before.items() if name not in read})
    torch.testing.assert_close(model.average_rows, judged.context_table.rows)
    plain = FlareModel(config(shop)).eval()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if name in plain.state_dict()})
    with torch.no_grad(): plain.refresh(shop[2].chunks())
    torch.testing.assert_close(model.context_table.rows, plain.context_table.rows)  # training goes on from what its own weights read
    assert not torch.allclose(model.item_embedding.weight, expected["item_embedding.weight"])


def test_an_averaged_run_that_was_killed_ends_the_same(shop, tmp_path):
    class Killed(Exception): pass
    def trained(folder, epochs=None):
        model, how = made(shop, PushConfig(average=0.9)), SCHEDULE
        if epochs:
            original = model.keep_average
            def keep_average():
                if model.averaged >= epochs: raise Killed
                original()
            model.keep_average = keep_average
        result = train(model, leave_one_out(shop[0]), how, folder, progress=False, text=shop[2])
        return model, result
    straight, result = trained(tmp_path / "one")
    with pytest.raises(Killed): trained(tmp_path / "two", result.steps // 2 + 1)
    resumed, again = trained(tmp_path / "two")
    assert all(value.equal(resumed.state_dict()[name]) for name, value in straight.state_dict().items())
    assert again.validation.equal(result.validation)


def test_the_contrast_with_the_catalogue_is_that_of_its_formula(shop):
    model = made(shop, PushConfig(negatives="catalogue"))
    assert model.config.alpha == 0 and model.alpha == 0.2
    with torch.no_grad(): model.refresh(shop[2].chunks())
    batch = next(TrainingBatches(leave_one_out(shop[0]).train, ITEMS, 16, 10, text=shop[2]).epoch(0))
    losses = model.loss(batch)
    items, fresh = model.of_items(batch, model.contexts(batch)[1])
    keep = items < ITEMS - 1  # the last one has no text, and is nobody's rival
    ids, texts = (F.normalize(x[: ITEMS - 1], dim=-1) for x in (model.item_embedding.weight, model.project(model.context_table.rows)))
    near = F.normalize(model.project(fresh[keep]), dim=-1)
    expected = (F.cross_entropy(ids[items[keep]] @ texts.T / 0.1, items[keep], reduction="sum")
                + F.cross_entropy(near @ ids.T / 0.1, items[keep], reduction="sum")) / 2
    total, count = losses["contrastive"]
    assert count == keep.sum() < len(items)
    torch.testing.assert_close(total, 0.2 * expected, rtol=2e-2, atol=0)
    total.backward()
    batch.counts.zero_()
    model.has_text.zero_()
    assert "contrastive" not in model.loss(batch)  # a catalogue without texts
    assert all(weight.grad.abs().sum() > 0 for weight in (model.item_embedding.weight, model.project.weight,
                                                          next(model.reader.parameters())))


def timed(histories, times):
    "An evaluation batch of histories with times."
    plain = Sequences.from_lists(histories)
    (batch,) = evaluation_batches(Sequences(plain.items, plain.offsets, np.concatenate(times)), np.zeros(len(histories), int), ITEMS, 10)
    return batch


def test_gaps_are_heard_where_they_are_known(shop):
    model, off = made(shop, PushConfig(time_gaps=True)).eval(), made(shop).eval()
    two = ([[1, 2, 3], [4, 5]], [[0, 10, 20], [0, 50]])
    batch, later, stretched = timed(*two), timed(two[0], [[7, 17, 27], [9, 59]]), timed(two[0], [[0, 10, 5000], [0, 50]])
    with torch.no_grad():
        assert model.score(batch).equal(model.score(later))  # when it was is not told, only how long after
        assert not torch.allclose(model.score(batch)[0], model.score(stretched)[0])
        assert model.score(batch)[1].equal(model.score(stretched)[1])
        assert off.score(batch).equal(off.score(stretched))
        model.gap_embedding.weight.zero_()
        torch.testing.assert_close(model.score(batch), off.score(batch))
    model.train().loss(batch)["mlm"][0].backward()
    kinds = gap_kinds(batch.gaps)[batch.segment >= 0]
    moved = model.gap_embedding.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert set(moved) == {*kinds.tolist()}
    assert gap_kinds(torch.tensor([-1, 0] + [2**k for k in range(40)])).tolist() == [0, 1, *range(2, 32)] + [31] * 10


def test_hidden_words_are_guessed_better_and_the_encoder_is_kept(shop, tmp_path, monkeypatch):
    monkeypatch.setenv("FLARE_CACHE", str(tmp_path))
    dataset, reading, _ = shop
    texts, pushed = item_texts(dataset.catalogue), PushConfig(tuning_epochs=150, tuning_rate=1e-2)
    from transformers import AutoModelForMaskedLM
    encoder = Encoder(reading)
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_pretrained(encoder_folder(reading.encoder))
    losses = guess_words(model, encoder, sorted(set(texts) - {""}), pushed, 0, 4, False)
    assert np.mean(losses[-20:]) < 0.6 * np.mean(losses[:5])
    state = torch.random.get_rng_state()
    found, seconds = tuned(texts, reading, pushed)
    assert seconds > 0
    assert torch.equal(torch.random.get_rng_state(), state)
    assert found.encoder != reading.encoder and Encoder(found).fingerprint != encoder.fingerprint
    def never(*arguments): raise TypeError
    source = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda function: source(guess_words if function is never else function))
    monkeypatch.setattr("flare.pushing.guess_words", never)  # it is there already
    assert tuned(texts, reading, pushed) == (found, seconds)
    with pytest.raises(TypeError): tuned(texts, reading, pushed, seed=1)
    assert not list((tmp_path / "encoders").glob("*.part"))
    with pytest.raises(ValueError, match="cannot be tuned, it has no head or no token for hidden words"):
        tuned(texts, TextConfig(encoder=str(write_encoder(tmp_path / "t5", "mt5"))), pushed)


def test_special_tokens_are_never_hidden_and_the_shares_are_right():
    able = torch.arange(50).expand(2000, -1) > 0
    given, hidden = hide_tokens(torch.full((2000, 50), 5), able, 99, 90, torch.Generator().manual_seed(0))
    assert not hidden[:, 0].any() and (given[~hidden] == 5).all() and hidden[:, 1:].float().mean() == pytest.approx(0.15, abs=0.005)
    assert (given[hidden] == 99).float().mean() == pytest.approx(0.8, abs=0.02) and (given[hidden] == 5).float().mean() == pytest.approx(0.1, abs=0.02)


def test_all_but_what_belongs_to_items_is_carried_over(shop):
    source = made(shop, PushConfig(average=0.9))
    with torch.no_grad():
        for weight in source.parameters(): weight.add_(1)
    target = made(shop, PushConfig(average=0.9), n_items=ITEMS + 5)
    before = copy.deepcopy(target.state_dict())
    carry_over(source, target)
    for name, value in target.state_dict().items():
        assert value.equal(before[name] if name.startswith(OF_ITEMS) else source.state_dict()[name])
    assert target.config.whiten is False and source.config.whiten is True


@pytest.fixture
def shops(tmp_path):
    "Three shops in folders: two without an item in common, and a copy of the first."
    def write(name, prefix):
        rng, folder = np.random.default_rng(len(prefix)), tmp_path / name
        folder.mkdir()
        pd.DataFrame([(f"u{u}", f"{prefix}{i}", t) for u in range(30) for t, i in enumerate(rng.permutation(20)[:6])],
                     columns=["user", "item", "timestamp"]).to_csv(folder / "interactions.csv", index=False)
        pd.DataFrame({"item": [f"{prefix}{i}" for i in range(20)],
                      "title": [f"{WORDS[i % 6]} thing {prefix}" for i in range(20)]}).to_csv(folder / "items.csv", index=False)
        return str(folder)
    return write("one", "a"), write("two", "bb"), write("copy", "a")


def test_what_was_learned_before_is_what_training_starts_from(shops, tmp_path, monkeypatch):
    monkeypatch.setenv("FLARE_CACHE", str(tmp_path / "cache"))
    reading, target = TextConfig(encoder=str(write_encoder(tmp_path / "encoder", words=WORDS))), load_dataset(shops[0])
    text = token_states(item_texts(target.catalogue), reading, progress=False)
    size = FlareConfig(n_items=20, max_len=10, hidden_size=16, heads=2, ffn_size=32, layers=1, text_width=text.width,
                       modalities=("text",), latents=2, perceiver_size=32, perceiver_heads=2, perceiver_layers=1)
    others = others_before(target, PushConfig(before=(shops[1], shops[1])))
    model, seconds = trained_before(others, size, SCHEDULE, reading, PushConfig(), tmp_path / "runs")
    checkpoint = max((tmp_path / "runs/before-1").glob("epoch-*"))
    last = load_file(checkpoint / "best.safetensors")
    assert all(value.equal(last[name]) for name, value in model.state_dict().items() if not name.startswith(OF_ITEMS)) and seconds > 0
    assert not model.config.whiten and not model.item_embedding.weight.equal(last["item_embedding.weight"])
    again, spent = trained_before(others, size, SCHEDULE, reading, PushConfig(), tmp_path / "runs")  # nothing is trained twice
    assert spent == pytest.approx(seconds, rel=0.5)
    assert max((tmp_path / "runs/before-1").glob("epoch-*")).stat().st_mtime == checkpoint.stat().st_mtime
    assert all(value.equal(again.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_pushed_model_has_a_record_and_no_other_model_depends_on_it(shops, tmp_path, monkeypatch):
    monkeypatch.setenv("FLARE_CACHE", str(tmp_path / "cache"))
    small = dict(hidden_size=16, heads=2, ffn_size=32, layers=1, perceiver_size=32, perceiver_heads=2, perceiver_layers=1, epochs=1, evaluate_every=1,
                 encoder=str(write_encoder(tmp_path / "encoder", words=WORDS)), average=0.9, negatives="catalogue", tuning_epochs=1, before=[shops[1]])
    record = run("pushed", "flare_pushed", shops[0], parameters=small, root=tmp_path / "paper", progress=False)
    assert read_record(record.path(tmp_path / "paper")) == record and staleness(record) == "" and record.cost["before_seconds"] > record.cost["train_seconds"] / 10
    assert record.parameters["before"] == [shops[1]] and list(record.dataset["before"]) == ["two"] and "flare.pushing" in code_digest("flare_pushed")
    assert not any("flare.pushing" in code_digest(model) for model in ("flare", "bert4rec", "flare_listens", "flare_hears"))
    assert staleness(record, record.dataset["before"] | {"one": record.dataset["fingerprint"]}) == "" and staleness(record, {"two": "0" * 12}) == "data changed: two"
    again = run("pushed", "flare_pushed", shops[0],
                parameters={name: value for name, value in small.items() if name not in ("before", "tuning_epochs")}
                | {"time_gaps": True}, root=tmp_path / "paper", progress=False)
    assert again.parameters["time_gaps"] is True and again.cost["before_seconds"] == 0.0
    with pytest.raises(ValueError, match="shares 6 titles with one"):
        run("pushed", "flare_pushed", shops[0], parameters=small | {"before": [shops[2]]}, root=tmp_path / "paper", progress=False)


def test_what_makes_no_sense_is_refused(shop):
    for wrong, message in (({"average": 1.0}, "average is 1.0"), ({"negatives": "all"}, "choose one of"),
                           ({"tuning_epochs": -1}, "tuning_epochs is -1"), ({"tuning_rate": 0.0}, "tuning_rate is 0.0")):
        with pytest.raises(ValueError, match=message): PushConfig(**wrong)
    for name in ("rivals", "margin"):
        with pytest.raises(ValueError, match=f"{name} and negatives='catalogue' do not go together"):
            made(shop, PushConfig(negatives="catalogue"), **{name: 1})
        with pytest.raises(ValueError, match="do not go together"): resolve("flare_pushed", {"negatives": "catalogue", name: 1})
