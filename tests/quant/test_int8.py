"""int8: its formula in float64, its kernel against it, and whole models: fused, beside LoRA, at its stated price."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import int8_ranks
from launching import launch
from puna.kernels.int8_linear import int8_linear, int8_linear_works
from puna.kernels.packed_linear import packed_works
from puna.model.attention import causal
from puna.model.linear import Linear
from puna.model.lora import LoRA
from puna.model.presets import PRESETS
from puna.model_loader import load_model, random_model
from puna.quant.int8 import INT8, pack, unpack
from puna.weights.open import open_checkpoint


def quantised(out_features: int, in_features: int, dtype=torch.float64) -> tuple[Linear, torch.Tensor]:
    """A layer, and the weight that it was packed from: one row is a hundred times larger, one is zero."""
    weight = torch.randn(out_features, in_features, dtype=dtype)
    weight[3] *= 100
    weight[5] = 0
    linear = Linear(in_features, out_features)
    for name, tensor in pack(weight).items():
        setattr(linear, name, torch.nn.Parameter(tensor, requires_grad=False))
    linear.scheme, linear.kernel = INT8, INT8.matmul
    return linear, weight


def logits(model, ids):
    return model.logits(model(ids, torch.arange(ids.shape[1]).expand_as(ids), causal))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_pack_follows_the_formula(dtype):
    linear, weight = quantised(48, 80, dtype)
    q, scale, exact = linear.weight, linear.weight_scale, weight.double()
    assert q.dtype == torch.int8 and scale.dtype == torch.float32 and q.shape == weight.shape and scale.shape == (48, 1)
    ideal = exact.abs().amax(1, keepdim=True) / 127
    ideal[5] = 1
    assert (scale >= ideal.float() * (1 - 1e-7)).all() and (scale <= ideal * (1 + 2**-7)).all()
    assert torch.equal(scale, scale.bfloat16().float()), "the scale is the same number in bfloat16"
    # Round to nearest: an element is at most half a step from its integer.
    assert ((q * scale.double() - exact).abs() <= scale.double() / 2 * (1 + 1e-6)).all()
    assert q.abs().max() <= 127 and not q[5].any()
    assert torch.equal(unpack(INT8.tensors(linear), torch.float64), q.double() * scale.double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_product_is_that_of_the_unpacked_weight(dtype):
    linear, _ = quantised(48, 80)
    x = torch.randn(2, 7, 80, dtype=torch.float64).to(dtype)
    weight = unpack(INT8.tensors(linear), torch.float64)
    exact, summed = F.linear(x.double(), weight), F.linear(x.double().abs(), weight.abs())
    error = (linear(x).double() - exact).abs()
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    assert linear(x).dtype == dtype
    assert (error <= torch.finfo(dtype).eps * exact.abs() + 8 * torch.finfo(sums).eps * summed).all()


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_the_kernel_equals_its_twin(rows):
    if not int8_linear_works(torch.device("cpu"), torch.bfloat16):
        pytest.skip("this torch has no fused int8 product for this CPU")
    linear, _ = quantised(96, 160)
    x = torch.randn(rows, 160).bfloat16()
    weight = unpack(INT8.tensors(linear), torch.float64)
    exact, summed = F.linear(x.double(), weight), F.linear(x.double().abs(), weight.abs())
    error = (int8_linear(x, linear.weight, linear.weight_scale).double() - exact).abs()
    assert (error <= 2**-8 * exact.abs() + 2**-18 * summed).all()


def test_gradients_pass_through():
    linear, _ = quantised(48, 80)
    x = torch.randn(3, 80, dtype=torch.float64, requires_grad=True)
    linear(x).square().sum().backward()
    weight = unpack(INT8.tensors(linear), torch.float64)
    assert torch.allclose(x.grad, 2 * F.linear(x.detach(), weight) @ weight)
    assert INT8.differentiable


@torch.inference_mode()
@pytest.mark.parametrize("name", ["tiny", "tiny-gqa"])
def test_a_model_equals_the_model_of_the_unpacked_weights(name):
    """Fused and unfused, in float64: what is quantised are the seven projections of each layer, nothing else."""
    config = PRESETS[name]
    ids = torch.randint(0, config.vocab_size, (2, 33))
    plain = random_model(config, torch.float64, seed=3)
    for module in plain.modules():
        if isinstance(module, Linear) and module is not plain.lm_head:
            module.weight.data = unpack(pack(module.weight.data), torch.float64)
    for fast in (False, True):
        model = random_model(config, torch.float64, seed=3, quantization="int8", fast=fast)
        packed = [m for m in model.modules() if isinstance(m, Linear) and m.scheme is INT8]
        assert len(packed) == (4 if fast else 7) * config.num_hidden_layers and model.lm_head.scheme is None
        assert all(layer.weight.dtype == torch.int8 for layer in packed)
        assert (logits(plain, ids) - logits(model, ids)).abs().max() < 1e-12


@torch.inference_mode()
def test_lora_beside_it():
    """The update is added to the product of the quantised weight, and its layer stays unfused."""
    config = PRESETS["tiny-gqa"]
    ids = torch.randint(0, config.vocab_size, (2, 9))
    model, twin = (random_model(config, torch.float64, seed=1, quantization="int8") for _ in range(2))
    for layer, other in zip(model.layers.values(), twin.layers.values(), strict=True):
        linear, merged = layer.self_attn.q_proj, other.self_attn.q_proj
        rows, columns = linear.weight.shape
        a, b = torch.randn(4, columns, dtype=torch.float64), torch.randn(rows, 4, dtype=torch.float64)
        linear.adapter = LoRA(a, b, 0.1)
        weight = unpack(INT8.tensors(merged), torch.float64) + 0.1 * b @ a
        merged.scheme, merged.kernel = None, lambda x, linear, weight=weight: F.linear(x, weight)
    assert (logits(model, ids) - logits(twin, ids)).abs().max() < 1e-12


@pytest.mark.slow
def test_smollm2_over_three_ranks(smollm2, tmp_path):
    """Nine heads over three ranks: the logits of one process, but for the order of float32 sums."""
    for rank in launch(3, Path(__file__).parents[1] / "int8_ranks.py", smollm2, tmp_path):
        assert rank.code == 0, rank.err
    with open_checkpoint(smollm2) as checkpoint:
        expected = int8_ranks.logits(checkpoint)
    for rank in range(3):
        assert (torch.load(tmp_path / f"{rank}.pt") - expected).abs().max() < 1e-3


@pytest.mark.slow
@torch.inference_mode()
def test_its_price_on_real_weights(smollm2, shared_data):
    """Log-perplexity of SmolLM2 on the first 4,096 tokens of WikiText-2 valid, within 0.5 % of bfloat16's.

    On a CPU that would emulate bfloat16, which takes many minutes, both compute in float32.
    """
    dtype = torch.bfloat16 if packed_works(torch.bfloat16) else torch.float32
    with open_checkpoint(smollm2) as source:
        text = (shared_data / "wikitext2/valid.txt").read_text(encoding="utf-8")
        ids = torch.tensor(source.tokenizer().encode(text[:40_000])[:4096]).view(-1, 512)
        losses = []
        for quantization in (None, "int8"):
            model = load_model(source, dtype, quantization=quantization, fast=True)
            predicted = torch.cat([logits(model, row[None])[0, :-1].float() for row in ids])
            losses.append(F.cross_entropy(predicted, ids[:, 1:].flatten()).item())
    print(losses)
    assert abs(losses[1] / losses[0] - 1) <= 0.005, losses
