"""Optimizers against their formulas, and which weights decay."""

import copy
import sys

import pytest
import torch
from torch import nn

from puna.errors import UserError
from puna.model.llama import Llama
from puna.model.presets import PRESETS
from puna.train.optim import check_optim, decay_groups, make_optimizer
from puna.train.options import OptimOptions


def tiny(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8))
    return model


def by_the_formula(p, gradients, options):
    """Decoupled weight decay and Adam (arXiv 1711.05101), in float64."""
    p, m, v = p.double(), 0.0, 0.0
    decay = options.weight_decay if p.dim() > 1 else 0.0
    b1, b2 = options.betas
    for t, g in enumerate(gradients, 1):
        g = g.double()
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        p = p * (1 - options.lr * decay)
        p = p - options.lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + options.eps)
    return p


def run(options, steps=5):
    """(model, what each parameter was, its gradients) after `steps` of random gradients."""
    model = tiny()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = make_optimizer(dict(model.named_parameters()), options)
    generator = torch.Generator().manual_seed(1)
    gradients = []
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        gradients.append([p.grad for p in model.parameters()])
        optimizer.step()
    return model, start, list(zip(*gradients, strict=True)), optimizer


@pytest.mark.parametrize(("state", "close"), [("fp32", 1e-6), ("bf16", 5e-4)])
def test_adamw_is_its_formula(state, close):
    options = OptimOptions(lr=1e-2, state=state, weight_decay=0.3)
    model, start, gradients, optimizer = run(options)
    for p, before, seen in zip(model.parameters(), start, gradients, strict=True):
        torch.testing.assert_close(p.detach().double(), by_the_formula(before, seen, options), atol=close, rtol=close)
        kept = torch.float32 if state == "fp32" else torch.bfloat16
        assert optimizer.state[p]["exp_avg"].dtype == optimizer.state[p]["exp_avg_sq"].dtype == kept


def test_a_bfloat16_state_survives_saving_and_loading():
    options = OptimOptions(lr=1e-2, state="bf16")
    model, _, _, optimizer = run(options)
    twin = tiny()
    twin.load_state_dict(model.state_dict())
    other = make_optimizer(dict(twin.named_parameters()), options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        p.grad = q.grad = torch.ones_like(p)
    optimizer.step()
    other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q) and other.state[q]["exp_avg"].dtype == torch.bfloat16


def test_float32_averages_of_bfloat16_weights():
    weight = nn.Parameter(torch.randn(8, 8).bfloat16())
    before, gradient = weight.detach().clone(), torch.randn(8, 8).bfloat16()
    optimizer = make_optimizer({"w": weight}, OptimOptions(lr=1e-2))
    weight.grad = gradient
    optimizer.step()
    assert optimizer.state[weight]["exp_avg"].dtype == torch.float32 and weight.dtype == torch.bfloat16
    expected = by_the_formula(before, [gradient], OptimOptions(lr=1e-2)).bfloat16()
    torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("name", ["adafactor", "adamw8bit"])
def test_kept_libraries_lower_a_loss(name):
    if name == "adamw8bit":
        pytest.importorskip("torchao", reason="needs torchao")
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64))
    optimizer = make_optimizer(dict(model.named_parameters()), OptimOptions(name=name, lr=1e-2))
    x = torch.randn(32, 64)
    losses = []
    for _ in range(15):
        loss = (model(x) - x).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] * 0.8


@pytest.mark.parametrize("embeddings", [True, False])
@pytest.mark.parametrize("preset", ["tiny", "tiny-gqa"])
def test_norms_and_biases_do_not_decay(preset, embeddings):
    model = Llama(PRESETS[preset])
    options = OptimOptions(decay_embeddings=embeddings)
    decayed, kept = decay_groups(model.named_parameters(), options)
    names = {id(p): name for name, p in model.named_parameters()}
    assert kept["weight_decay"] == 0 and decayed["weight_decay"] == options.weight_decay
    quiet = {names[id(p)] for p in kept["params"]}
    assert quiet == {
        name
        for name in names.values()
        if "norm" in name or (not embeddings and name.startswith(("embed_tokens", "lm_head")))
    }
    assert len(decayed["params"]) + len(quiet) == len(names)


def test_only_what_is_trained_and_never_nothing():
    model = tiny()
    model[0].requires_grad_(False)
    optimizer = make_optimizer(dict(model.named_parameters()), OptimOptions())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2
    with pytest.raises(UserError, match="Nothing is trained"):
        make_optimizer(dict(model.requires_grad_(False).named_parameters()), OptimOptions())


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match="torchao"):
        make_optimizer(dict(tiny().named_parameters()), OptimOptions(name="adamw8bit"))


def test_8_bit_averages_are_of_one_process():
    with pytest.raises(UserError, match="adamw8bit keeps its state in blocks"):
        check_optim(OptimOptions(name="adamw8bit"), ranks=2)


@pytest.mark.parametrize(
    "wrong", [{"betas": (0.9,)}, {"betas": (0.9, 1.0)}, {"lr": 0.0}, {"eps": 0.0}, {"clip": -1.0},
              {"state": "bf16", "name": "adafactor"}],
)  # fmt: skip
def test_impossible_values_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        check_optim(OptimOptions(**wrong))
