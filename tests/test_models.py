"The model is the same whatever the layout, and never sees what it is asked for."
import numpy as np
import pytest
import torch

from flare.masking import cloze_mask, collate
from flare.models import FlareConfig, FlareModel

SMALL = dict(n_items=60, max_len=30, hidden_size=32, heads=4, ffn_size=64, dropout=0.0, embedding_dropout=0.0)


def random_batch(seed, row_length, **changes):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 30, 40)
    items, hidden = rng.integers(0, 60, lengths.sum()), cloze_mask(lengths, 0.3, rng.random(len(lengths)) < 0.3, rng)
    if changes.get("other_targets"): items = np.where(hidden, (items + 7) % 60, items)
    return collate(items, lengths, hidden, 60, row_length)


def loss_and_gradients(model, batch):
    model.zero_grad()
    total, count = model.loss(batch)["mlm"]
    (total / count).backward()
    return (total / count).detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("seed", range(4))
def test_packed_equals_padded(norm, seed):
    torch.manual_seed(seed)
    model = FlareModel(FlareConfig(**SMALL, norm=norm))
    packed, packed_gradients = loss_and_gradients(model, random_batch(seed, 64))
    padded, padded_gradients = loss_and_gradients(model, random_batch(seed, None))
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-5)
    for a, b in zip(packed_gradients, padded_gradients): torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_packed_equals_padded_when_scoring():
    torch.manual_seed(0)
    model = FlareModel(FlareConfig(**SMALL)).eval()
    with torch.inference_mode():
        torch.testing.assert_close(model.score(random_batch(0, 64)), model.score(random_batch(0, None)), rtol=0, atol=1e-5)


def test_hidden_items_have_no_path_to_their_scores():
    torch.manual_seed(0)
    model = FlareModel(FlareConfig(**SMALL)).eval()
    assert torch.equal(model.score(random_batch(3, 64)), model.score(random_batch(3, 64, other_targets=True)))


def test_a_slice_scores_as_the_whole():
    torch.manual_seed(0)
    model, batch = FlareModel(FlareConfig(**SMALL)).eval(), random_batch(1, 64)
    torch.testing.assert_close(model.score(batch, slice(10, 30)), model.score(batch)[:, 10:30])


def test_what_is_saved_is_what_is_loaded(tmp_path):
    model = FlareModel(FlareConfig(**SMALL)).eval()
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin")) and list(tmp_path.glob("*.safetensors"))
    assert torch.equal(model.score(random_batch(0, 64)), FlareModel.from_pretrained(tmp_path).eval().score(random_batch(0, 64)))
