"""The chunked loss against F.cross_entropy on whole logits: value, gradients, z-loss, masks, split vocabularies."""

import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from launching import launch
from puna.train import loss as loss_module
from puna.train.loss import IGNORED, VocabPart, chunked_loss


def make(tokens, hidden, vocab, masked, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, hidden, generator=generator) * 0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < masked] = IGNORED
    return x, weight, labels


def whole(x, weight, labels, z_loss=0.0):
    """(loss, z, gradients) from whole logits by torch's own functions."""
    logits = (x @ weight.t()).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    z = logits.logsumexp(-1)[labels != IGNORED].square().sum()
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") + z_loss * z
    return loss, z, torch.autograd.grad(loss, (x, weight))


@settings(max_examples=40)
@given(
    tokens=st.integers(1, 40),
    vocab=st.integers(2, 60),
    chunk=st.integers(1, 50),
    masked=st.sampled_from([0.0, 0.5, 1.0]),
    z_loss=st.sampled_from([0.0, 1e-2]),
    cached=st.sampled_from([1, 100, 1 << 19]),
    seed=st.integers(0, 1000),
)
def test_equals_cross_entropy_on_whole_logits(tokens, vocab, chunk, masked, z_loss, cached, seed):
    x, weight, labels = make(tokens, 8, vocab, masked, torch.float64, seed)
    expected, z, gradients = whole(x, weight, labels, z_loss)
    before, loss_module.CACHED = loss_module.CACHED, cached
    try:
        got, count, got_z = chunked_loss(x, labels, weight, chunk=chunk, z_loss=z_loss)
    finally:
        loss_module.CACHED = before
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_z, z, rtol=1e-12, atol=1e-12)
    assert count == (labels != IGNORED).sum() and not got_z.requires_grad
    for mine, reference in zip(torch.autograd.grad(got, (x, weight)), gradients, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_types(dtype, close):
    x, weight, labels = make(64, 32, 500, 0.3, dtype)
    expected, _, gradients = whole(x, weight, labels)
    got, _, _ = chunked_loss(x, labels, weight, chunk=17)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=close, atol=close)
    for mine, reference in zip(torch.autograd.grad(got, (x, weight)), gradients, strict=True):
        assert mine.dtype == dtype
        assert (mine - reference).float().norm() <= close * reference.float().norm()


def test_large_logits_do_not_overflow():
    x, weight, labels = make(8, 16, 100, 0, torch.float32)
    with torch.no_grad():
        x *= 1e4
    expected, _, _ = whole(x, weight, labels)
    torch.testing.assert_close(chunked_loss(x, labels, weight)[0], expected)


def test_leading_dimensions_and_a_scaled_loss():
    x, weight, labels = make(24, 8, 30, 0.2, torch.float64)
    loss, _, _ = chunked_loss(x.view(2, 12, 8), labels.view(2, 12), weight)
    _, _, gradients = whole(x, weight, labels)
    for mine, reference in zip(torch.autograd.grad(loss * 3.0, (x, weight)), gradients, strict=True):
        torch.testing.assert_close(mine, reference * 3)


def test_bfloat16_hidden_and_float32_weight():
    x, weight, labels = make(64, 32, 500, 0.0, torch.bfloat16)
    master = weight.detach().float().requires_grad_()
    loss, _, _ = chunked_loss(x, labels, master)
    loss.backward()
    _, _, (d_hidden, d_weight) = whole(x, weight, labels)
    assert master.grad.dtype == torch.float32 and x.grad.dtype == torch.bfloat16
    assert (master.grad - d_weight.float()).norm() <= 1e-2 * d_weight.float().norm()
    assert (x.grad - d_hidden).float().norm() <= 1e-2 * d_hidden.float().norm()


def test_all_masked_is_zero_with_zero_gradients():
    x, weight, labels = make(5, 8, 30, 1.0, torch.float32)
    loss, count, _ = chunked_loss(x, labels, weight)
    loss.backward()
    assert loss == 0 and count == 0 and not x.grad.any() and not weight.grad.any()


def test_a_frozen_output_layer_and_validation():
    x, weight, labels = make(9, 8, 30, 0.2, torch.float64)
    expected, _, (d_hidden, _) = whole(x, weight, labels)
    loss, _, _ = chunked_loss(x, labels, weight.detach())
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], d_hidden)
    with torch.no_grad():
        torch.testing.assert_close(chunked_loss(x, labels, weight)[0], expected.detach())


def test_whole_logits_never_exist():
    x, weight, labels = make(512, 8, 3000, 0, torch.float32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    with Watch():
        chunked_loss(x, labels, weight, chunk=64)[0].backward()
    assert largest <= 64 * 3000 * 4


@pytest.mark.slow
def test_a_vocabulary_over_two_ranks():
    for rank in launch(2, __file__):
        assert rank.code == 0, rank.err


def over_two_ranks():
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    x, weight, labels = make(20, 8, 31, 0.3, torch.float64)
    expected, z, (d_hidden, d_weight) = whole(x, weight, labels, 1e-2)
    mine = slice(0, 16) if rank == 0 else slice(16, 31)
    part = weight.detach()[mine].requires_grad_()
    got, _, got_z = chunked_loss(x, labels, part, chunk=6, z_loss=1e-2, tp=VocabPart(dist.group.WORLD, mine.start))
    share, mine_weight = torch.autograd.grad(got, (x, part))
    dist.all_reduce(share)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got_z, z)
    torch.testing.assert_close(share, d_hidden)
    torch.testing.assert_close(mine_weight, d_weight[mine])
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(over_two_ranks())
