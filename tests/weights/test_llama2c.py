"""llama2.c's files: both versions, read bit for bit; the real stories260K talks as its author's program does."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from puna.errors import UserError
from puna.model.attention import causal
from puna.model.config import ModelConfig
from puna.model_loader import load_model
from puna.weights.convert import convert
from puna.weights.open import open_checkpoint

SHAPES = {"gqa": {}, "mha": {"num_key_value_heads": 4}, "tied": {"tie_word_embeddings": True}}


def unpermute(w: Tensor, heads: int) -> Tensor:
    rows, columns = w.shape
    return w.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_llama2c(path: Path, state: dict[str, Tensor], config: ModelConfig, version: int) -> Path:
    """export.py of llama2.c, legacy (0) and version 1, over Hugging Face's names."""

    def layers(module: str) -> list[Tensor]:
        tensors = [state[f"model.layers.{i}.{module}.weight"] for i in range(config.num_hidden_layers)]
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(module.split(".")[-1])
        return [unpermute(t, heads) for t in tensors] if heads else tensors

    c, tied = config, config.tie_word_embeddings
    numbers = [c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads,
               c.vocab_size if tied or version else -c.vocab_size, c.max_position_embeddings]  # fmt: skip
    attention = [t for x in "qkvo" for t in layers(f"self_attn.{x}_proj")]
    mlp = [t for x in ("gate", "down", "up") for t in layers(f"mlp.{x}_proj")]
    first, second = layers("input_layernorm"), layers("post_attention_layernorm")
    embedding, norm = state["model.embed_tokens.weight"], state["model.norm.weight"]
    output = [] if tied else [state["lm_head.weight"]]
    if version == 0:
        head = struct.pack("<7i", *numbers)
        tables = torch.zeros(2, c.max_position_embeddings, c.head_dim // 2)
        tensors = [embedding, *first, *attention, *second, *mlp, norm, tables, *output]
    else:
        head = struct.pack("<Ii7iB", 0x616B3432, version, *numbers, tied).ljust(256, b"\0")
        tensors = [*first, *second, norm, embedding, *attention, *mlp, *output]
    path.write_bytes(head + b"".join(t.contiguous().numpy().tobytes() for t in tensors))
    return path


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_reads_both_versions(tiny_checkpoint, tmp_path, shape, version) -> None:
    folder = tiny_checkpoint(**shape)
    state = load_file(folder / "model.safetensors")
    with open_checkpoint(folder) as source:
        config = source.config
    with open_checkpoint(write_llama2c(tmp_path / "model.bin", state, config, version)) as source:
        assert source.format == "llama2c" and source.config == config and source.tokenizer() is None
        assert source.tensors.keys() == state.keys()
        for name, tensor in state.items():
            assert torch.equal(source.read(name), tensor), name
            for _ in range(3):
                index = tuple(slice(*sorted(torch.randint(n + 1, (2,)).tolist())) for n in tensor.shape)
                assert torch.equal(source.read(name, index), tensor[index]), (name, index)


@pytest.mark.parametrize("version", [0, 1])
def test_damaged_and_quantised_files_are_refused(tiny_checkpoint, tmp_path, version) -> None:
    folder = tiny_checkpoint()
    with open_checkpoint(folder) as source:
        config = source.config
    file = write_llama2c(tmp_path / "model.bin", load_file(folder / "model.safetensors"), config, version)
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:60] if version == 0 else whole[:300], whole + b"\0"):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="cut off"):
            open_checkpoint(file)
    file.write_bytes(struct.pack("<Ii", 0x616B3432, 2) + whole[8:])
    with pytest.raises(UserError, match="version 2"):
        open_checkpoint(file)
    for other in (b"", b"hello", bytes(1000), struct.pack("<7i", 64, 96, 2, 3, 2, 100, 10) + bytes(100)):
        file.write_bytes(other)
        with pytest.raises(UserError, match="not a checkpoint in a format that puna reads"):
            open_checkpoint(file)


def greedy(folder: Path, tokens: int) -> str:
    with open_checkpoint(folder) as source, torch.inference_mode():
        model, tokenizer = load_model(source, torch.float32), source.tokenizer()
        ids = tokenizer.encode("", bos=True)
        for _ in range(tokens):
            positions = torch.arange(len(ids)).unsqueeze(0)
            hidden = model(torch.tensor([ids]), positions, causal)
            ids.append(int(model.logits(hidden[0, -1]).argmax()))
        return tokenizer.decode(ids)


def test_stories260k_tells_its_authors_story(shared_data, tmp_path) -> None:
    stories = shared_data / "stories260K"
    expected = (stories / "expected_greedy_200.txt").read_text().strip()
    assert greedy(stories / "stories260K.bin", 200).strip() == expected
    done = convert(stories / "stories260K.bin", tmp_path / "hf")
    assert done.manifest["source"]["files"].keys() == {"stories260K.bin", "tok512.bin"}
    assert greedy(tmp_path / "hf", 200).strip() == expected
