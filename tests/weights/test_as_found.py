"""Checkpoints as they are found: several sets of weights, wrapped names, idle keys, files that hold no data."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from puna.errors import UserError
from puna.model.config import ModelConfig
from puna.weights.open import open_checkpoint

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def copy(folder: Path, dst: Path, **config) -> Path:
    """A copy of a checkpoint with other keys in config.json."""
    shutil.copytree(folder, dst)
    settings = json.loads((dst / "config.json").read_text()) | config
    (dst / "config.json").write_text(json.dumps(settings))
    return dst


def write_shards(folder: Path, state: dict[str, torch.Tensor]) -> None:
    names = sorted(state)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    for file, half in zip(SHARDS, halves, strict=True):
        save_file({name: state[name] for name in half}, folder / file)
    places = {name: file for file, half in zip(SHARDS, halves, strict=True) for name in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def read_by_transformers(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model.norm.weight.detach()


def read_by_puna(folder: Path) -> torch.Tensor:
    with open_checkpoint(folder) as source:
        return source.read("model.norm.weight").clone()


def test_of_two_sets_of_weights_the_one_of_transformers_is_read(tiny_checkpoint, tmp_path, capsys) -> None:
    folder = copy(tiny_checkpoint(), tmp_path / "both")
    state = load_file(folder / "model.safetensors")
    write_shards(folder, {name: tensor + 1 for name, tensor in state.items()})
    assert torch.equal(read_by_puna(folder), read_by_transformers(folder))
    assert "model.safetensors is read" in capsys.readouterr().err
    torch.save({name: tensor + 2 for name, tensor in state.items()}, folder / "pytorch_model.bin")
    assert torch.equal(read_by_puna(folder), read_by_transformers(folder))
    (folder / "model.safetensors").unlink()
    assert torch.equal(read_by_puna(folder), read_by_transformers(folder))


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_a_stale_index_is_ignored(index, tiny_checkpoint, tmp_path) -> None:
    folder = copy(tiny_checkpoint(), tmp_path / "stale")
    expected = read_by_puna(folder)
    (folder / index).write_text(json.dumps({"weight_map": {"model.norm.weight": "gone" + Path(index[:-11]).suffix}}))
    assert torch.equal(read_by_puna(folder), expected)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert torch.equal(read_by_puna(folder), expected)


@pytest.mark.parametrize(
    "wrapped",
    ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "base_model.model.{}", "_orig_mod.base_model.model.{}"],
)
def test_names_of_wrappers_are_stripped(wrapped, tiny_checkpoint, tmp_path) -> None:
    folder = copy(tiny_checkpoint(), tmp_path / "wrapped")
    state = load_file(folder / "model.safetensors")
    save_file({wrapped.format(name): tensor for name, tensor in state.items()}, folder / "model.safetensors")
    with open_checkpoint(folder) as source:
        assert all(torch.equal(source.read(name), tensor) for name, tensor in state.items())


def test_a_model_without_its_output_layer_is_read_where_it_is_tied(tiny_checkpoint, tmp_path) -> None:
    folder = copy(tiny_checkpoint(tie_word_embeddings=True), tmp_path / "base")
    state = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    save_file(bare, folder / "model.safetensors")
    with open_checkpoint(folder) as source:
        assert torch.equal(source.read("model.norm.weight"), state["model.norm.weight"])
    save_file(bare | {"module.norm.weight": bare["norm.weight"].clone()}, folder / "model.safetensors")
    with pytest.raises(UserError, match="holds norm.weight twice"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "keys",
    [
        {"sliding_window": 16, "use_sliding_window": False},
        {"sliding_window": 512},
        {"sliding_window": 16, "layer_types": ["full_attention", "full_attention"]},
        {"rope_scaling": {"type": "linear", "factor": 2.0, "original_max_position_embeddings": 64, "beta_fast": 8}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale_all_dim": 1.0, "finetuned": True}},
    ],
    ids=str,
)
def test_keys_that_change_no_number_are_ignored(keys, tiny_checkpoint, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    from puna.weights.layerwise import trace

    folder = copy(tiny_checkpoint(), tmp_path / "keys", **keys)
    ids = torch.randint(300, (1, 40), generator=torch.Generator().manual_seed(1))
    with open_checkpoint(folder) as source:
        ours = dict(trace(source, ids))["lm_head"]
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize(
    "keys",
    [
        {"sliding_window": 16},
        {"sliding_window": 16, "use_sliding_window": True},
        {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]},
        {"layer_types": ["linear_attention", "full_attention"]},
    ],
    ids=str,
)
def test_windows_that_hide_tokens_are_refused(keys, tiny_checkpoint) -> None:
    config = json.loads((tiny_checkpoint() / "config.json").read_text())
    with pytest.raises(UserError, match="which puna does not implement"):
        ModelConfig.from_hf(config | keys)


def test_quantization_config_counts_only_for_quantised_weights(tiny_checkpoint, tmp_path, capsys) -> None:
    settings = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    folder = copy(tiny_checkpoint(), tmp_path / "left", **settings)
    open_checkpoint(folder).close()
    assert "all weights are plain floats" in capsys.readouterr().err
    state = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(state | {name: torch.zeros(96, 8, dtype=torch.uint32)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="is quantised .quantization_config, bitsandbytes."):
        open_checkpoint(folder)
    plain = copy(tiny_checkpoint(), tmp_path / "mlx")
    shutil.copy(folder / "model.safetensors", plain)
    with pytest.raises(UserError, match=f"quantised in a way that puna doesn't read: {name} is torch.uint32"):
        open_checkpoint(plain)


@pytest.mark.parametrize("key", ["pad_token_id", "bos_token_id", "eos_token_id"])
@pytest.mark.parametrize("value", [2**70, -5, "2", 1.5, True], ids=str)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_ids_that_are_none_are_refused(file, key, value, tiny_checkpoint, tmp_path) -> None:
    folder = copy(tiny_checkpoint(), tmp_path / "ids")
    content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(content | {key: value}))
    with pytest.raises(UserError, match=f"{file}: {key} must be"):
        open_checkpoint(folder)


@pytest.mark.parametrize("value", [-1, 384])
def test_a_padding_id_outside_the_vocabulary_is_carried(value, tiny_checkpoint, tmp_path) -> None:
    with open_checkpoint(copy(tiny_checkpoint(), tmp_path / "pad", pad_token_id=value)) as source:
        assert source.hf_config["pad_token_id"] == value


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors", "x.gguf", "x.bin"])
def test_a_pipe_is_refused_and_not_waited_for(name, tiny_checkpoint, tmp_path) -> None:
    folder = copy(tiny_checkpoint(), tmp_path / "pipe")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match="is not a regular file|is not a checkpoint"):
        open_checkpoint(folder / name if name[0] == "x" else folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "pytorch_model.bin", "x.gguf"])
def test_a_git_lfs_pointer_is_named(name, tiny_checkpoint, tmp_path) -> None:
    folder = copy(tiny_checkpoint(), tmp_path / "pointer")
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 5\n"
    (folder / name).write_text(pointer)
    with pytest.raises(UserError, match=f"{name} is a Git LFS pointer .* git lfs pull"):
        open_checkpoint(folder / name if name[0] == "x" else folder)


def test_an_unmerged_adapter_and_empty_tensors_are_named(tiny_checkpoint, tmp_path) -> None:
    folder = copy(tiny_checkpoint(), tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(state | {name: torch.zeros(0)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=f"empty tensors .{name}.*ZeRO-3"):
        open_checkpoint(folder)
    updates = {"base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight": torch.zeros(4, 64)}
    save_file(state | updates, folder / "model.safetensors")
    with pytest.raises(UserError, match="adapter unmerged.*merge_and_unload"):
        open_checkpoint(folder)
