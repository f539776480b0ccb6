"""What follows from a scheme's declaration: shapes, bytes, the cut of every rank, fused layers, and its refusals."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puna.errors import UserError
from puna.model.presets import PRESETS
from puna.model.tp_plan import TP_PLAN, tp_slice
from puna.model_loader import random_model
from puna.quant import registry
from puna.quant.registry import SCHEMES, choose_scheme
from puna.quant.scheme import QuantScheme, StoredTensor

# Groups as a later scheme has them: a byte for two values, a scale and a minimum for each 8 input features.
GROUPS = StoredTensor(torch.float32, ("out", "in/8"))
GROUPED = QuantScheme(
    name="grouped",
    summary="for this test",
    stored={"weight_packed": StoredTensor(torch.uint8, ("out", "in/2")), "weight_scale": GROUPS, "weight_min": GROUPS},
    pack=lambda weight: {
        "weight_packed": (weight[:, ::2] * 1e3).long().remainder(256).to(torch.uint8),
        "weight_scale": weight.unflatten(1, (-1, 8)).amax(-1).float(),
        "weight_min": weight.unflatten(1, (-1, 8)).amin(-1).float(),
    },
    unpack=lambda stored, dtype: stored["weight_scale"].repeat_interleave(8, 1).to(dtype),
    matmul=lambda x, linear: x @ linear.weight_scale.repeat_interleave(8, 1).to(x.dtype).t(),
)
ALL = pytest.mark.parametrize("scheme", [*SCHEMES.values(), GROUPED], ids=lambda scheme: scheme.name)


@ALL
def test_what_it_declares_is_what_it_packs(scheme):
    stored = scheme.pack(torch.randn(24, 32))
    assert {n: tuple(t.shape) for n, t in stored.items()} == scheme.shapes(24, 32)
    assert {n: t.dtype for n, t in stored.items()} == {n: s.dtype for n, s in scheme.stored.items()}
    assert scheme.nbytes(24, 32) == sum(t.nbytes for t in stored.values())
    assert scheme.unpack(stored, torch.float32).shape == (24, 32)


@ALL
@given(rows=st.integers(2, 5), groups=st.integers(2, 6), data=st.data())
def test_packing_some_rows_is_cutting_the_whole(scheme, rows, groups, data):
    weight = torch.randn(8 * rows, 8 * groups)
    every, columns = slice(0, 8 * rows), slice(0, 8 * groups)
    whole = scheme.pack(weight)
    start = 8 * data.draw(st.integers(0, groups - 1))
    stop = 8 * data.draw(st.integers(start // 8 + 1, groups))
    part = scheme.cut(whole, (every, slice(start, stop)))
    assert {n: tuple(t.shape) for n, t in part.items()} == scheme.shapes(8 * rows, stop - start)
    middle = data.draw(st.integers(1, 8 * rows - 1))
    parts = [(slice(0, middle), columns), (slice(middle, 8 * rows), columns)]
    for index in parts:
        packed, cut = scheme.pack(weight[index[0]]), scheme.cut(whole, index)
        assert all(torch.equal(packed[n], cut[n]) for n in whole)
    assert all(torch.equal(t, whole[n]) for n, t in scheme.fuse([scheme.cut(whole, index) for index in parts]).items())


@ALL
@pytest.mark.parametrize("size", [2, 4])
def test_the_ranks_of_a_model_hold_the_whole_once(scheme, size):
    config = dataclasses.replace(
        PRESETS["tiny-gqa"], num_attention_heads=12, num_key_value_heads=4, hidden_size=192, head_dim=16
    )
    shapes = config.tensors()
    for name in [name for name in shapes if name.endswith("_proj.weight")]:
        whole = scheme.pack(torch.randn(shapes[name]))
        feature = {"col": "out", "row": "in"}[TP_PLAN[name.split(".")[-2]]]
        parts = [scheme.cut(whole, tp_slice(name, shapes[name], config, rank, size)) for rank in range(size)]
        for stored, tensor in whole.items():
            follows = [dim.partition("/")[0] for dim in scheme.stored[stored].dims]
            if feature in follows:
                assert torch.equal(torch.cat([part[stored] for part in parts], follows.index(feature)), tensor)
            else:
                assert all(torch.equal(part[stored], tensor) for part in parts)


def test_what_does_not_fit_is_refused(monkeypatch):
    with pytest.raises(UserError, match="groups of 8"):
        GROUPED.shapes(24, 36)
    with pytest.raises(UserError, match="can't be split at 0 and 12"):
        GROUPED.cut(GROUPED.pack(torch.randn(8, 24)), (slice(0, 8), slice(0, 12)))
    with pytest.raises(UserError, match="There is no quantization 'int9' .did you mean 'int8'"):
        choose_scheme("int9")
    monkeypatch.setitem(registry.SCHEMES, "grouped", GROUPED)
    config = dataclasses.replace(PRESETS["tiny"], intermediate_size=90)
    with pytest.raises(UserError, match="The scheme grouped doesn't fit layers.0.mlp.down_proj"):
        random_model(config, torch.float32, quantization="grouped")


def test_memory_is_counted_as_stored(monkeypatch):
    monkeypatch.setitem(registry.SCHEMES, "grouped", GROUPED)
    for name, dtype in (("int8", torch.float32), ("grouped", torch.bfloat16)):
        model = random_model(PRESETS["tiny-gqa"], dtype, quantization=name)
        needed = sum(p.numel() * p.dtype.itemsize for p in model.parameters())
        random_model(PRESETS["tiny-gqa"], dtype, quantization=name, available=needed)
        with pytest.raises(UserError, match="bytes free"):
            random_model(PRESETS["tiny-gqa"], dtype, quantization=name, available=needed - 1)


@torch.inference_mode()
def test_a_scheme_without_a_tensor_called_weight_fuses_too(monkeypatch):
    monkeypatch.setitem(registry.SCHEMES, "grouped", GROUPED)
    ids, positions = torch.randint(0, 100, (1, 5)), torch.arange(5)[None]
    plain, fused = (
        random_model(PRESETS["tiny-gqa"], torch.float64, quantization="grouped", fast=fast)(
            ids, positions, lambda layer, q, k, v: q
        )
        for fast in (False, True)
    )
    assert (plain - fused).abs().max() < 1e-12
