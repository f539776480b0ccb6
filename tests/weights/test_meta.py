"""Meta's layout: shards merged and cut as fairscale does, rows between the two RoPE orders, params.json both ways."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from puna.errors import UserError
from puna.model.attention import causal
from puna.model.config import ModelConfig
from puna.model.presets import PRESETS
from puna.model_loader import load_model
from puna.weights.convert import convert
from puna.weights.formats.meta import write_meta
from puna.weights.formats.meta_params import config_from, params_from
from puna.weights.formats.presharded import ShardOptions
from puna.weights.open import open_checkpoint
from puna.weights.rope_permute import permute, unpermute

PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": -1, "multiple_of": 32,
          "ffn_dim_multiplier": 0.5, "norm_eps": 1e-5}  # fmt: skip
FFN = 96  # what these params give: int(0.5 * 170) rounded up to 32
NAMES = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
         "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
         "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
         "model.layers": "layers", "model.norm": "norm", "model.embed_tokens": "tok_embeddings",
         "lm_head": "output"}  # fmt: skip
ROWS, COLUMNS = ("wq", "wk", "wv", "w1", "w3", "output"), ("wo", "w2")


def hf_unpermute(w: Tensor, heads: int) -> Tensor:
    """transformers' convert_llama_weights_to_hf.permute, read backwards."""
    rows, columns = w.shape
    return w.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def as_meta(state: dict[str, Tensor], folder: Path, shards: int, *, embedding_dim: int = 1, **params) -> Path:
    """Meta's files for a Hugging Face state dict, made after fairscale's layers, with no code of puna."""
    folder.mkdir()
    said = PARAMS | params
    whole = {}
    for name, tensor in state.items():
        if "q_proj" in name or "k_proj" in name:
            tensor = hf_unpermute(tensor, said["n_heads"] if "q_proj" in name else said["n_kv_heads"])
        for hf, meta in NAMES.items():
            name = name.replace(hf, meta)
        whole[name] = tensor
    for rank in range(shards):
        shard = {"rope.freqs": torch.ones(8)}
        for name, tensor in whole.items():
            kind = name.split(".")[-2]
            dim = 0 if kind in ROWS else 1 if kind in COLUMNS else embedding_dim if kind == "tok_embeddings" else None
            shard[name] = tensor.clone() if dim is None else tensor.chunk(shards, dim)[rank].clone()
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(said))
    return folder


def state_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def assert_holds(folder: Path, state: dict[str, Tensor]) -> None:
    with open_checkpoint(folder) as source:
        assert source.tensors.keys() == state.keys()
        for name, tensor in state.items():
            assert torch.equal(source.read(name), tensor), name


def test_row_orders_are_inverse_and_transformers_own() -> None:
    rows = torch.randn(48, 5)
    assert torch.equal(permute(rows, 16), hf_unpermute(rows, 3))
    assert torch.equal(unpermute(permute(rows, 16), 16), rows)
    assert torch.equal(permute(rows[:, 0], 16), permute(rows, 16)[:, 0])  # a bias


@pytest.mark.parametrize("embedding_dim", [0, 1], ids=["llama3", "llama2"])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("kv", [2, 4], ids=["gqa", "mha"])
def test_imports_metas_files(tiny_checkpoint, tmp_path, kv, shards, embedding_dim) -> None:
    from transformers import LlamaForCausalLM

    folder = tiny_checkpoint(num_key_value_heads=kv, intermediate_size=FFN)
    meta = as_meta(state_of(folder), tmp_path / "meta", shards, embedding_dim=embedding_dim, n_kv_heads=kv)
    assert_holds(meta, state_of(folder))
    ids = torch.randint(384, (2, 12))
    with open_checkpoint(meta) as source, torch.inference_mode():
        assert source.format == "meta" and source.config.vocab_size == 384
        model = load_model(source, torch.float32)
        logits = model.logits(model(ids, torch.arange(12).expand(2, 12), causal))
        assert (logits - LlamaForCausalLM.from_pretrained(folder)(ids).logits).abs().max() < 2e-5


def test_a_slice_is_the_slice_of_the_merged_tensor(tiny_checkpoint, tmp_path) -> None:
    folder = tiny_checkpoint()
    with open_checkpoint(as_meta(state_of(folder), tmp_path / "meta", 2)) as source:
        for name, tensor in state_of(folder).items():
            for _ in range(4):
                index = tuple(slice(*sorted(torch.randint(n + 1, (2,)).tolist())) for n in tensor.shape)
                assert torch.equal(source.read(name, index), tensor[index]), (name, index)
                assert torch.equal(source.read(name, index[:1]), tensor[index[:1]])


SHAPES = {
    "gqa": {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8},
    "mha": {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 4},
    "tied": {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8, "tie_word_embeddings": True},
    "bfloat16": {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8, "torch_dtype": "bfloat16"},
}


@pytest.mark.parametrize("shards", [1, 2, 8])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_hf_to_meta_to_hf_is_bit_equal(tiny_checkpoint, tmp_path, shape, shards) -> None:
    folder = tiny_checkpoint(**shape, rope_theta=500000.0)
    convert(folder, tmp_path / "meta", "meta", ranks=shards, verify=False)
    assert len(list((tmp_path / "meta").glob("consolidated.*.pth"))) == shards
    convert(tmp_path / "meta", tmp_path / "back", "hf", verify=False)
    assert_holds(tmp_path / "back", state_of(folder))
    with open_checkpoint(folder) as before, open_checkpoint(tmp_path / "back") as after:
        assert before.hf_config == after.hf_config
        assert before.tokenizer().fingerprint() == after.tokenizer().fingerprint()


def test_writes_what_metas_code_loads(tiny_checkpoint, tmp_path) -> None:
    folder = tiny_checkpoint(tie_word_embeddings=True)
    expected = state_of(folder) | {"lm_head.weight": state_of(folder)["model.embed_tokens.weight"]}
    as_meta(expected, tmp_path / "theirs", 2)
    with open_checkpoint(folder) as source:
        write_meta(source, tmp_path / "ours", options=ShardOptions(2))
    for file in ("consolidated.00.pth", "consolidated.01.pth"):
        theirs, ours = (torch.load(tmp_path / who / file, weights_only=True) for who in ("theirs", "ours"))
        theirs.pop("rope.freqs")  # which Meta's code computes and doesn't load
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert (tmp_path / "ours" / file).stat().st_size < 1.2 * sum(t.nbytes for t in ours.values()) + 20_000
    params = json.loads((tmp_path / "ours/params.json").read_text())
    assert params.keys() == {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of",
                             "ffn_dim_multiplier", "norm_eps"}  # fmt: skip


def test_the_embedding_is_split_as_that_generations_code_wants_it(tiny_checkpoint, tmp_path) -> None:
    for vocab, shape in ((384, (384, 32)), (128256, (64128, 64))):
        folder = tiny_checkpoint(vocab_size=vocab, num_hidden_layers=1)
        with open_checkpoint(folder) as source:
            write_meta(source, tmp_path / str(vocab), options=ShardOptions(2))
        shard = torch.load(tmp_path / str(vocab) / "consolidated.01.pth", weights_only=True)
        assert shard["tok_embeddings.weight"].shape == shape and shard["output.weight"].shape == (vocab // 2, 64)
        assert_holds(tmp_path / str(vocab), state_of(folder))


def test_files_without_our_config_take_the_published_models_values(tiny_checkpoint, tmp_path) -> None:
    folder = tiny_checkpoint()
    with open_checkpoint(as_meta(state_of(folder), tmp_path / "plain", 1)) as source:
        assert source.config.max_position_embeddings == 4096 and not source.config.tie_word_embeddings
        assert source.hf_config["eos_token_id"] == 2 and source.tokenizer() is None
    state = state_of(folder)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    scaled = as_meta(state, tmp_path / "tied", 2, use_scaled_rope=True, rope_theta=500000.0)
    with open_checkpoint(scaled) as source:
        assert source.config.tie_word_embeddings and "lm_head.weight" not in source.tensors
        assert source.config.rope_scaling["factor"] == 32.0 and source.config.max_position_embeddings == 131072


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith(("llama", "codellama"))])
def test_params_of_the_published_models(name) -> None:
    config = PRESETS[name]
    params = params_from(config)
    back = ModelConfig.from_hf(config_from(params, vocab_size=config.vocab_size, tied=config.tie_word_embeddings))
    if name in ("llama-65b",):  # LLaMA 1 with Llama 2's epsilon: the context can't be told from params.json
        assert (back.max_position_embeddings, config.max_position_embeddings) == (4096, 2048)
    else:
        assert back == config


def test_the_tokenizer_file_goes_along(tiny_checkpoint, shared_data, tmp_path) -> None:
    folder = tiny_checkpoint(vocab_size=32000, num_hidden_layers=1)
    meta = as_meta(state_of(folder), tmp_path / "meta", 1, n_layers=1, vocab_size=32000)
    shutil.copy(shared_data / "tokenizers/llama2/tokenizer.model", meta)
    with open_checkpoint(meta) as source:
        assert source.tokenizer().encode("Hello") == [1, 15043]
    convert(meta, tmp_path / "hf", "hf", verify=False)
    convert(tmp_path / "hf", tmp_path / "back", "meta", verify=False)
    assert (meta / "tokenizer.model").read_bytes() == (tmp_path / "back/tokenizer.model").read_bytes()


@pytest.mark.slow
def test_llama3s_tokenizer_file_is_told_from_llama2s(tiny_checkpoint, shared_data, tmp_path) -> None:
    folder = tiny_checkpoint(vocab_size=128256, num_hidden_layers=1)
    meta = as_meta(state_of(folder), tmp_path / "meta", 1, n_layers=1, vocab_size=128256)
    shutil.copy(shared_data / "tokenizers/llama3/tokenizer.model", meta)
    with open_checkpoint(meta) as source:
        assert source.tokenizer().encode("Hello") == [128000, 9906]
        assert set(source.tokenizer().stop_ids) >= {128001, 128009}


def test_what_the_layout_cannot_hold_is_refused_by_name(tiny_checkpoint, tmp_path) -> None:
    linear = {"rope_type": "linear", "factor": 2.0}
    for config, said in (
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"head_dim": 8}, "head_dim is 8"),
        ({"rope_scaling": linear}, "linear"),
    ):
        with pytest.raises(UserError, match=said):
            convert(tiny_checkpoint(**config), tmp_path / "x", "meta")
    with pytest.raises(UserError, match="2 key/value heads can't be split over 4"):
        convert(tiny_checkpoint(), tmp_path / "x", "meta", ranks=4)
    assert not list(tmp_path.iterdir())


def test_bad_files_are_refused(tiny_checkpoint, tmp_path) -> None:
    state = state_of(tiny_checkpoint())
    folder = as_meta(state, tmp_path / "meta", 2)
    first, second, params = (folder / name for name in ("consolidated.00.pth", "consolidated.01.pth", "params.json"))

    def refused(said: str) -> None:
        with pytest.raises(UserError, match=said):
            open_checkpoint(folder)

    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    refused("consolidated.01.pth is cut off or damaged")
    shard = torch.load(first, weights_only=True)
    torch.save({**shard, "norm.weight": torch.zeros(64)}, second)
    refused("aren't shards of one model, model.norm.weight differs")
    torch.save({name: tensor for name, tensor in shard.items() if "w2" not in name}, second)
    refused("don't hold the same tensors")
    second.unlink()
    refused(r"self_attn.q_proj.weight has shape \[32, 64\], the config says \[64, 64\]")
    second.write_bytes(whole)
    first.rename(folder / "consolidated.02.pth")
    refused("lacks consolidated.00.pth")
    (folder / "consolidated.02.pth").rename(first)

    torch.save({**shard, "layers.0.attention.gate": torch.ones(1)}, first)
    torch.save({**torch.load(second, weights_only=True), "layers.0.attention.gate": torch.ones(1)}, second)
    refused("doesn't: layers.0.attention.gate")
    torch.save(shard, first)
    second.write_bytes(whole)
    changes = (({"dim": None}, "has no dim"), ({"n_heads": "4"}, "n_heads = '4'"), ({"multiple_of": 0}, "= 0"))
    for change, said in changes:
        params.write_text(json.dumps({k: v for k, v in (PARAMS | change).items() if v is not None}))
        refused(said)
    params.write_text(json.dumps(PARAMS))
    said = json.loads((tiny_checkpoint() / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said))
    open_checkpoint(folder).close()
    for key, value in (("rope_theta", 1e6), ("tie_word_embeddings", True)):
        (folder / "config.json").write_text(json.dumps(said | {key: value}))
        refused(f"disagree on {key}")
