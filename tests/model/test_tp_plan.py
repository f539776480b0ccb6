"""The split rule: what each rank holds of every tensor, checked as arithmetic over whole heads and whole tensors."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puna.errors import UserError
from puna.model.config import ModelConfig
from puna.model.presets import PRESETS
from puna.model.tp_plan import TP_PLAN, check_tp, chunk, dtensor_chunk, dtensor_slice, kv_heads_per_rank, tp_slice

SMALL = ModelConfig(
    vocab_size=131,
    hidden_size=24,
    intermediate_size=50,
    num_hidden_layers=1,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=6,
    attention_bias=True,
    mlp_bias=True,
)


@given(total=st.integers(0, 300), size=st.integers(1, 16))
def test_parts_are_neighbours_that_differ_by_one_at_most(total, size):
    parts = [chunk(total, rank, size) for rank in range(size)]
    assert [at for part in parts for at in range(total)[part]] == list(range(total))
    lengths = [part.stop - part.start for part in parts]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] - lengths[-1] <= 1


@given(total=st.integers(1, 300), size=st.integers(1, 16))
def test_dtensors_parts_are_those_of_torch_chunk(total, size):
    """torch.chunk gives fewer parts than asked where the last ones would be empty."""
    expected = [part.tolist() for part in torch.arange(total).chunk(size)]
    expected += [[]] * (size - len(expected))
    assert [list(range(total)[dtensor_chunk(total, rank, size)]) for rank in range(size)] == expected
    if total % size == 0:
        assert all(dtensor_chunk(total, rank, size) == chunk(total, rank, size) for rank in range(size))


@given(shape=st.tuples(st.integers(1, 40), st.integers(1, 40)), data=st.data())
def test_dtensors_cuts_follow_one_another(shape, data):
    """Cut after cut, as torch.chunk does it: tp first, then fsdp."""
    tensor = torch.arange(shape[0] * shape[1]).view(shape)
    expected, cuts = tensor, []
    for size in data.draw(st.lists(st.integers(1, 4), max_size=3)):
        dimension, rank = data.draw(st.integers(0, 1)), data.draw(st.integers(0, size - 1))
        cuts.append((dimension, rank, size))
        parts = expected.chunk(size, dimension)
        expected = parts[rank] if rank < len(parts) else expected.narrow(dimension, 0, 0)
    assert torch.equal(tensor[dtensor_slice(shape, cuts)], expected)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_heads_of_a_rank_are_those_of_its_key_projection(size):
    for kv in (1, 2, 4, 8):
        config = replace(SMALL, num_key_value_heads=kv)
        name = "model.layers.0.self_attn.k_proj.weight"
        rows = tp_slice(name, config.tensors()[name], config, size - 1, size)[0]
        assert (rows.stop - rows.start) == kv_heads_per_rank(config, size) * config.head_dim


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_every_element_is_held_as_often_as_its_kind_says(size):
    for name, shape in SMALL.tensors().items():
        held = torch.zeros(shape)
        for rank in range(size):
            held[tp_slice(name, shape, SMALL, rank, size)] += 1
        how = TP_PLAN.get(name.split(".")[-2])
        times = 1
        if how is None or (how == "row" and name.endswith("bias")):
            times = size  # norms, and biases that are added to the sum
        elif ".k_proj" in name or ".v_proj" in name:
            times = max(1, size // SMALL.num_key_value_heads)  # heads are repeated, never split
        assert held.min() == held.max() == times, name


def test_only_the_dimension_that_the_plan_names_is_cut():
    for name, shape in SMALL.tensors().items():
        index = tp_slice(name, shape, SMALL, 1, 2)
        cut = [d for d, part in enumerate(index) if range(shape[d])[part] != range(shape[d])]
        how = TP_PLAN.get(name.split(".")[-2])
        expected = {"col": [0], "vocab": [0], "row": [] if name.endswith("bias") else [1], None: []}[how]
        assert cut == expected, name


@pytest.mark.parametrize("kv", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_each_query_head_meets_its_own_key_head(kv, size):
    config = replace(SMALL, num_key_value_heads=kv)
    shapes, group = config.tensors(), config.num_attention_heads // kv

    def heads(module, rank):
        name = f"model.layers.0.self_attn.{module}.weight"
        part = tp_slice(name, shapes[name], config, rank, size)[0]
        assert part.start % config.head_dim == part.stop % config.head_dim == 0, "a head is cut"
        return range(part.start // config.head_dim, part.stop // config.head_dim)

    for rank in range(size):
        queries, keys = heads("q_proj", rank), heads("k_proj", rank)
        assert keys == heads("v_proj", rank)
        # On a rank, grouped attention gives its query heads to its key heads in equal runs.
        local = len(queries) // len(keys)
        assert [keys[i // local] for i in range(len(queries))] == [query // group for query in queries]


@pytest.mark.parametrize(
    ("changes", "size", "says"),
    [
        (
            {"num_attention_heads": 9, "num_key_value_heads": 3},
            2,
            "9 attention heads .* over 2 ranks; use one of 1, 3, 9.",
        ),
        ({"num_attention_heads": 24, "num_key_value_heads": 6}, 4, "over 4 ranks; use one of 1, 2, 3, 6, 12, 24."),
        ({}, 3, "use one of 1, 2, 4, 8."),
        ({}, 16, "use one of 1, 2, 4, 8."),
        ({"vocab_size": 3}, 4, "too small for 4 ranks"),
        ({"intermediate_size": 3}, 4, "too small for 4 ranks"),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_sizes_that_can(changes, size, says):
    with pytest.raises(UserError, match=says):
        check_tp(replace(SMALL, **changes), size)


def test_the_published_models_split_over_a_machine_of_eight():
    for name, config in PRESETS.items():
        if config.num_attention_heads % 8 == 0:
            check_tp(config, 8)
            assert all(part.start < part.stop for tensor, shape in config.tensors().items()
                       for part in tp_slice(tensor, shape, config, 7, 8)), name  # fmt: skip


def test_one_rank_holds_everything():
    for name, shape in SMALL.tensors().items():
        assert tp_slice(name, shape, SMALL, 0, 1) == tuple(slice(0, n) for n in shape)
