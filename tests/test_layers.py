"""Which precision a machine is given."""
import pytest
import torch

from flare import layers


@pytest.mark.parametrize("half, faster", [(1.0, False), (0.9, False), (0.5, True), (20.0, False)])
def test_bfloat16_has_to_save_a_quarter_of_the_time(half, faster, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    times = iter([[3.0, 1.0, 2.0], [half * 3, half]])
    monkeypatch.setattr(layers, "repeat", lambda *args, **how: next(times))
    layers.bf16_is_faster.cache_clear()
    assert layers.bf16_is_faster() is layers.bf16_is_faster() is faster  # timed once
    layers.bf16_is_faster.cache_clear()
