"""Operations for training in 16 bits on a CPU, against their plain twins: results and every gradient."""

import pytest
import torch
import torch.nn.functional as F

from puna.kernels import cpu_bf16
from puna.model import attention, llama
from puna.model.linear import Linear


def both(function, twin, *inputs, dtype):
    """(relative error of the result and of each gradient) of a function in `dtype` from its twin in float64."""
    inputs = [x.to(dtype) for x in inputs]
    mine = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    result, expected = function(*mine), twin(*exact)
    gradient = torch.randn_like(expected).to(dtype)
    result.backward(gradient)
    expected.backward(gradient.double())
    for x, before in zip(mine, inputs, strict=True):
        assert torch.equal(x, before) and x.grad.dtype == dtype  # nothing was computed in its memory
    pairs = [(result.detach(), expected.detach()), *((x.grad, y.grad) for x, y in zip(mine, exact, strict=True))]
    return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def close(dtype):
    return 1e-6 if dtype == torch.float32 else 1e-2


@pytest.mark.parametrize("shape", [(3, 300, 24), (1, 7), (256, 8), (513, 5)])
def test_rms_norm(dtype, close, shape):
    errors = both(
        lambda x, w: cpu_bf16.rms_norm(x, w, 1e-5),
        lambda x, w: llama.rms_norm(x, w, 1e-5),
        torch.randn(shape),
        torch.randn(shape[-1:]),
        dtype=dtype,
    )
    assert max(errors) < close


def test_a_norm_of_a_wider_residual_stream_has_the_type_of_its_weight():
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(8).bfloat16().requires_grad_()
    y = cpu_bf16.rms_norm(x, weight, 1e-5)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32 and weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16], ids=str)
def test_residual_add(wide):
    x, update = torch.randn(3, 5, dtype=wide, requires_grad=True), torch.randn(3, 5).bfloat16().requires_grad_()
    before = x.detach().clone(), update.detach().clone()
    for function in (cpu_bf16.residual_add, llama.residual_add):
        y = function(x, update)
        assert y.dtype == wide and torch.equal(y, before[0] + before[1])
        gradients = torch.autograd.grad(y, (x, update), torch.full_like(y, 1.001))
        assert [g.dtype for g in gradients] == [wide, torch.bfloat16]
        assert torch.equal(gradients[0].bfloat16(), gradients[1])
    assert torch.equal(x, before[0]) and torch.equal(update, before[1])


def test_swiglu(dtype, close):
    errors = both(cpu_bf16.swiglu, llama.swiglu, torch.randn(2, 9, 24), torch.randn(2, 9, 24), dtype=dtype)
    assert max(errors) < close


@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (5, 1)])
@pytest.mark.parametrize("length", [1, 100, 128, 300])
def test_causal_attention(dtype, close, heads, length):
    q, kv = heads
    inputs = torch.randn(2, length, q, 16), torch.randn(2, length, kv, 16), torch.randn(2, length, kv, 16)
    errors = both(lambda *x: cpu_bf16.causal(0, *x), lambda *x: attention.causal(0, *x), *inputs, dtype=dtype)
    if length == 1:
        errors = errors[:1] + errors[3:]  # one key has all the weight, whatever q and k are
    assert max(errors) < close


@pytest.mark.parametrize("frozen", [False, True])
def test_mixed_products_cast_a_weight_and_keep_its_gradient_wide(frozen):
    linear = Linear(24, 16)
    torch.nn.init.normal_(linear.weight)
    linear.kernel = cpu_bf16.mixed_precision_linear(torch.bfloat16)
    linear.requires_grad_(not frozen)
    x = torch.randn(2, 5, 24).bfloat16().requires_grad_()
    y = linear(x)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    inputs = x.detach().clone().requires_grad_(), linear.weight.detach().bfloat16().requires_grad_()
    F.linear(*inputs).backward(gradient)
    torch.testing.assert_close(x.grad, inputs[0].grad)
    if frozen:
        assert linear.weight.grad is None
    else:
        assert linear.weight.grad.dtype == torch.float32
        torch.testing.assert_close(linear.weight.grad.bfloat16(), inputs[1].grad)
