"""Checkpoints cut for ranks: the older cut by torch.chunk is read, ours follows the plan, both merge back exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from puna.errors import UserError
from puna.model.tp_plan import tp_slice
from puna.weights.convert import convert
from puna.weights.open import open_checkpoint

ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
COLUMNS = ("o_proj", "down_proj")
SHAPES = {
    "gqa": {},  # 2 key/value heads: fewer than 4 ranks
    "mha": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "odd vocabulary": {"vocab_size": 389},
    "bfloat16": {"torch_dtype": "bfloat16"},
}


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def chunked(folder: Path, out: Path, world_size: int, *, pickled: bool = False) -> Path:
    """The older inference scripts' cut: torch.chunk by module name, whole otherwise, tokenizer beside the parts."""
    config = json.loads((folder / "config.json").read_text()) | {"world_size": world_size}
    for rank in range(world_size):
        part = out / "part_model" / str(rank)
        part.mkdir(parents=True)
        state = {}
        for name, tensor in state_of(folder).items():
            module = name.split(".")[-2]
            dim = 0 if module in ROWS else 1 if module in COLUMNS else None
            state[name] = tensor if dim is None else tensor.chunk(world_size, dim)[rank].contiguous()
        if pickled:
            torch.save(state, part / "pytorch_model.bin")
        else:
            save_file(state, part / "model.safetensors")
        (part / "config.json").write_text(json.dumps(config))
    (out / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, out / "tokenizer")
    return out


def assert_holds(folder: Path, state: dict[str, torch.Tensor]) -> None:
    with open_checkpoint(folder) as source:
        assert source.tensors.keys() == state.keys()
        for name, tensor in state.items():
            assert torch.equal(source.read(name), tensor), name
            for _ in range(3):
                index = tuple(slice(*sorted(torch.randint(n + 1, (2,)).tolist())) for n in tensor.shape)
                assert torch.equal(source.read(name, index), tensor[index]), (name, index)


@pytest.mark.parametrize("pickled", [True, False], ids=["bin", "safetensors"])
@pytest.mark.parametrize("world_size", [1, 2, 4])  # at 4 half a key/value head lies on each rank
def test_merges_the_older_cut(tiny_checkpoint, tmp_path, world_size, pickled) -> None:
    folder = tiny_checkpoint()
    cut = chunked(folder, tmp_path / "cut", world_size, pickled=pickled)
    assert_holds(cut, state_of(folder))
    with open_checkpoint(cut / "part_model") as source:
        assert source.format == "presharded" and source.details["ranks"] == world_size
        assert source.tokenizer().encode("Hello, llama") == open_checkpoint(folder).tokenizer().encode("Hello, llama")


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_hf_to_ranks_to_hf_is_bit_equal(tiny_checkpoint, tmp_path, shape, ranks) -> None:
    folder = tiny_checkpoint(**shape)
    convert(folder, tmp_path / "cut", "presharded", ranks=ranks, verify=False)
    assert_holds(tmp_path / "cut", state_of(folder))
    convert(tmp_path / "cut", tmp_path / "back", "hf", verify=False)
    assert_holds(tmp_path / "back", state_of(folder))
    with open_checkpoint(folder) as before, open_checkpoint(tmp_path / "back") as after:
        assert before.hf_config == after.hf_config
        assert before.tokenizer().fingerprint() == after.tokenizer().fingerprint()


def test_each_rank_holds_its_part_by_the_plan(tiny_checkpoint, tmp_path) -> None:
    folder = tiny_checkpoint()
    convert(folder, tmp_path / "cut", "presharded", "bfloat16", ranks=4)
    with open_checkpoint(folder) as source:
        for rank in range(4):
            part = tmp_path / "cut/part_model" / str(rank)
            for name, tensor in state_of(part).items():
                place = tp_slice(name, source.tensors[name].shape, source.config, rank, 4)
                assert torch.equal(tensor, source.read(name)[place].bfloat16())
            config = json.loads((part / "config.json").read_text())
            assert config["world_size"] == 4 and config["hidden_size"] == 64 and config["torch_dtype"] == "bfloat16"


def test_end_tokens_go_along(tiny_checkpoint, tmp_path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint(), folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7, 9], "temperature": 0.5}')
    convert(folder, tmp_path / "cut", "presharded", ranks=2)
    with open_checkpoint(tmp_path / "cut") as source:
        assert source.generation == {"eos_token_id": [2, 7, 9], "temperature": 0.5}
        assert set(source.tokenizer().stop_ids) >= {2, 7, 9}


def test_a_model_that_cannot_be_cut_so_is_refused(tiny_checkpoint, tmp_path) -> None:
    with pytest.raises(UserError, match="cannot be split over 3 ranks; use one of 1, 2, 4"):
        convert(tiny_checkpoint(), tmp_path / "x", "presharded", ranks=3)
    with pytest.raises(UserError, match="--ranks must be at least 1"):
        convert(tiny_checkpoint(), tmp_path / "x", "presharded", ranks=0)
    assert not list(tmp_path.iterdir())


def test_missing_ranks_and_differing_copies_are_refused(tiny_checkpoint, tmp_path) -> None:
    folder = tiny_checkpoint()
    cut = chunked(folder, tmp_path / "cut", 2)
    second = cut / "part_model/1"
    state = state_of(second)

    def refused(said: str) -> None:
        with pytest.raises(UserError, match=said):
            open_checkpoint(cut)

    save_file(state | {"model.norm.weight": torch.zeros(64)}, second / "model.safetensors")
    refused("copies of model.norm.weight differ, rank 1")
    save_file({n: t for n, t in state.items() if "norm" not in n}, second / "model.safetensors")
    refused("rank 0 don't hold the same tensors")
    save_file(state | {"model.layers.0.mlp.up_proj.weight": torch.ones(48, 63)}, second / "model.safetensors")
    refused("shards of model.layers.0.mlp.up_proj.weight don't fit together")
    save_file(state | {"model.layers.0.mlp.up_proj.weight": torch.ones(47, 64)}, second / "model.safetensors")
    refused(r"up_proj.weight has shape \[95, 64\], the config says \[96, 64\]")
    shutil.rmtree(second)
    refused("has the parts 0 of 2 ranks")
