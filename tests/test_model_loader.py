"""What `build` makes for inference: fused and packed equal to plain, and more exact in half precision."""

import pytest
import torch
import torch.nn.functional as F

from puna.kernels.packed_linear import PackedWeight, packed_works
from puna.model import llama
from puna.model.attention import causal
from puna.model.presets import PRESETS
from puna.model.rope import rope_frequencies
from puna.model_loader import random_model


def logits(model, ids):
    return model.logits(model(ids, torch.arange(ids.shape[1]).expand_as(ids), causal))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["tiny", "tiny-gqa"])
def test_fused_and_packed_equals_plain(name, dtype):
    ids = torch.randint(0, 128, (2, 33))
    plain, fast = (random_model(PRESETS[name], dtype, seed=3, fast=fast) for fast in (False, True))
    assert (logits(plain, ids) - logits(fast, ids)).abs().max() < (1e-12 if dtype == torch.float64 else 1e-5)


@torch.inference_mode()
def test_a_float32_residual_stream_makes_bfloat16_more_exact(monkeypatch):
    kept = {"float32": llama.residual_dtype, "bfloat16": lambda dtype: dtype}
    errors = dict.fromkeys(kept, 0.0)
    for seed in range(8):
        ids = torch.randint(0, 128, (2, 33))
        exact = logits(random_model(PRESETS["tiny"], torch.float32, seed=seed), ids)
        half = random_model(PRESETS["tiny"], torch.bfloat16, seed=seed)
        for name, rule in kept.items():
            monkeypatch.setattr(llama, "residual_dtype", rule)
            errors[name] += (logits(half, ids).float() - exact).abs().mean().item()
    assert errors["float32"] < 0.9 * errors["bfloat16"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 64])
@torch.inference_mode()
def test_packed_product_equals_the_plain_one(dtype, rows):
    if not packed_works(dtype):
        pytest.skip(f"this CPU has no packed {dtype} products")
    weight, x = torch.randn(96, 160, dtype=torch.float64), torch.randn(rows, 160, dtype=torch.float64)
    weight, x = weight.to(dtype), x.to(dtype)
    exact = F.linear(x.double(), weight.double())
    error = (PackedWeight(weight)(x, torch.nn.Linear(160, 96)).double() - exact).abs()
    # One rounding of the result, and float32 sums on the way to it.
    summed = F.linear(x.double().abs(), weight.double().abs())
    assert (error <= torch.finfo(dtype).eps * exact.abs() + 8 * torch.finfo(torch.float32).eps * summed).all()


def test_packed_is_refused_where_it_cannot_be_right():
    assert not packed_works(torch.float64)


def test_llama3_frequencies_are_those_of_the_published_formula():
    """Llama 3.1's reference code, in float64, entry by entry."""
    import math

    config = PRESETS["llama3.1-8b"]
    got, factor = rope_frequencies(config)
    assert factor == 1.0
    for i, value in enumerate(got.tolist()):
        freq = config.rope_theta ** (-2 * i / config.head_dim)
        wave = 2 * math.pi / freq
        if wave > 8192 / 1.0:
            freq /= 8.0
        elif wave > 8192 / 4.0:
            smooth = (8192 / wave - 1.0) / (4.0 - 1.0)
            freq = (1 - smooth) * freq / 8.0 + smooth * freq
        assert value == pytest.approx(freq, rel=1e-6)
