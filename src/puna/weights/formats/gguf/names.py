"""A LLaMA's tensor names and config in GGUF, read and written.

Metadata is read as llama.cpp reads it (src/llama-model.cpp, `load_hparams`): its defaults for absent keys, its old
names of keys. Llama 3's RoPE scaling has no metadata: it is the tensor `rope_freqs.weight`, the divisor of each
frequency. Rows of q and k are interleaved; read in the wrong order, SmolLM2 has perplexity 245 instead of 15.
Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the formula: llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from puna.errors import UserError
from puna.model.config import ModelConfig

OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER_GGUF = {hf: gguf for gguf, hf in OUTER.items()}
LAYER_GGUF = {hf: gguf for gguf, hf in LAYER.items()}

# Metadata llama.* that changes the computation, with the value at which it doesn't. (Without YaRN, its settings don't.)
NEUTRAL: dict[str, Any] = {
    "expert_count": 0,
    "attention.sliding_window": 0,
    "attention.clamp_kqv": 0.0,
    "attention.scale": 0.0,
    "attention.causal": True,
    "logit_scale": 0.0,
    "embedding_scale": 0.0,
    "residual_scale": 0.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}
ROPE_KEYS = {"dimension_count", "freq_base", "freq_base_swa", "scale_linear", "scaling.type", "scaling.factor",
             "scaling.original_context_length", "scaling.finetuned", "scaling.attn_factor", "scaling.yarn_attn_factor",
             "scaling.yarn_ext_factor", "scaling.yarn_log_multiplier", "scaling.yarn_beta_fast",
             "scaling.yarn_beta_slow"}  # fmt: skip
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
UNUSED = 5  # token type
SCALING_KEY = "puna.rope_scaling"  # puna's own: the settings behind `rope_freqs.weight`, as JSON


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; a name that no LLaMA has is returned as it is."""
    stem, _, kind = name.rpartition(".")
    if stem in OUTER:
        return f"{OUTER[stem]}.{kind}"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if match and match[2] in LAYER:
        return f"model.layers.{match[1]}.{LAYER[match[2]]}.{kind}"
    return name


def gguf_name(name: str) -> str:
    """The GGUF name of a Hugging Face tensor of a LLaMA."""
    stem, _, kind = name.rpartition(".")
    if stem in OUTER_GGUF:
        return f"{OUTER_GGUF[stem]}.{kind}"
    _, _, layer, module = stem.split(".", 3)
    return f"blk.{layer}.{LAYER_GGUF[module]}.{kind}"


def config_from(
    path: Path, metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]], divisors: np.ndarray | None
) -> dict[str, Any]:
    """The config.json, in transformers 4's keys, that metadata and tensors of a GGUF file describe.

    `shapes` are the tensors' by GGUF name, `divisors` the content of `rope_freqs.weight`. Raises `UserError`, by name,
    for what is missing or not implemented.
    """
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UserError(
            f"{path} is of architecture {architecture!r}, which puna doesn't implement: it reads llama alone."
        )
    for key, neutral in NEUTRAL.items():
        if (value := metadata.get(f"llama.{key}", neutral)) != neutral:
            raise UserError(f"{path} asks for llama.{key} = {value!r}, which puna doesn't implement.")
    if len(shapes.get("token_embd.weight", ())) != 2:
        raise UserError(f"{path} has no matrix token_embd.weight: it holds no whole model.")

    def number(key: str, default: float | None = None) -> Any:
        return _number(path, f"llama.{key}", metadata.get(f"llama.{key}", default))

    hidden, heads, layers = number("embedding_length"), number("attention.head_count"), number("block_count")
    if layers > len(shapes):  # a damaged number must not make us list a billion tensors to say that they are missing
        raise UserError(f"{path} says that it has {layers:,} layers and holds {len(shapes)} tensors: fetch it again.")
    head_dim = number("attention.key_length", max(1, hidden // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if (size := number(key, head_dim)) != head_dim:
            raise UserError(f"{path} has llama.{key} = {size} with heads of {head_dim}, which puna doesn't implement.")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": number("context_length"),
        "rope_theta": number("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_gate.bias" in shapes,
    }
    for key in metadata:
        if key.startswith("llama.rope.") and key.removeprefix("llama.rope.") not in ROPE_KEYS:
            raise UserError(f"{path} has {key} = {metadata[key]!r}, which puna doesn't implement.")
    kind, factor = _scaling(path, metadata)
    if divisors is not None:
        if len(divisors) != head_dim // 2 or not np.isfinite(divisors).all() or divisors.min() <= 0:
            raise UserError(f"{path} is damaged, its rope_freqs.weight is not {head_dim // 2} positive numbers.")
        if factor != 1:
            raise UserError(
                f"{path} has both rope_freqs.weight and a {kind} RoPE scaling, which puna doesn't implement."
            )
        scaling = _llama3_scaling(path, divisors, config["rope_theta"], metadata.get(SCALING_KEY))
        config["rope_scaling"] = {"rope_type": "llama3", **scaling}
    elif factor != 1:
        config["rope_scaling"] = {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            if "llama.rope.scaling.original_context_length" in metadata:
                original = number("rope.scaling.original_context_length")
                config["rope_scaling"]["original_max_position_embeddings"] = original
            for beta in ("beta_fast", "beta_slow"):
                if f"llama.rope.scaling.yarn_{beta}" in metadata:
                    config["rope_scaling"][beta] = float(number(f"rope.scaling.yarn_{beta}"))
    return config


def _scaling(path: Path, metadata: dict[str, Any]) -> tuple[str, float]:
    """Type and factor of the RoPE scaling. llama.cpp's rules: the type defaults to linear; a factor that is absent or 0
    is 1; files of 2023 name it `rope.scale_linear`; under type none it is ignored."""
    kind = metadata.get("llama.rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise UserError(f"{path} asks for RoPE scaling {kind!r}, which puna doesn't implement.")
    key = "llama.rope.scaling.factor" if "llama.rope.scaling.factor" in metadata else "llama.rope.scale_linear"
    factor = metadata.get(key) or 1.0
    return kind, 1.0 if kind == "none" else float(_number(path, key, factor))


def metadata_from(config: ModelConfig) -> dict[str, Any]:
    """The metadata llama.* of a config: what `config_from` reads and llama.cpp needs. Python floats are float32, ints
    uint32. Raises `UserError` for a RoPE scaling that GGUF has no keys for."""
    metadata: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        "vocab_size": config.vocab_size,
    }
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type")
    if kind in ("linear", "yarn"):
        metadata |= {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
    if kind == "yarn":
        if "original_max_position_embeddings" in scaling:
            metadata["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
        for key in sorted(scaling.keys() - {"rope_type", "factor", "original_max_position_embeddings"}):
            if key in ("beta_fast", "beta_slow"):
                metadata[f"rope.scaling.yarn_{key}"] = float(scaling[key])
            else:
                raise UserError(f"GGUF can't carry {key} of yarn RoPE scaling, which this model sets: keep it as hf.")
    elif kind not in (None, "linear", "llama3"):
        raise UserError(f"GGUF can't carry {kind} RoPE scaling, which this model uses: keep it as hf.")
    named = {f"llama.{key}": value for key, value in metadata.items()}
    return named | ({SCALING_KEY: json.dumps(scaling)} if kind == "llama3" else {})


def padded(fields: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """Tokenizer fields with as many tokens as the embedding has rows, which llama.cpp insists on.

    Tokens beyond the last row, which the model can't use, are left out.
    """
    names = [f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "scores")]
    fields = fields | {name: fields[name][:vocab_size] for name in names if name in fields}
    beyond = [key for key, value in fields.items() if key.endswith("_token_id") and value >= vocab_size]
    fields = {key: value for key, value in fields.items() if key not in beyond}
    tokens, extra = fields["tokenizer.ggml.tokens"], range(len(fields["tokenizer.ggml.tokens"]), vocab_size)
    lists = {
        "tokens": [f"[PAD{i}]" for i in extra],
        "token_type": [UNUSED] * len(extra),
        "scores": [-1000.0] * len(extra),
    }
    more = dict(zip(names, lists.values(), strict=True))
    return fields | {name: fields[name] + more[name] for name in names if name in fields and tokens}


def unpadded(fields: dict[str, Any]) -> dict[str, Any]:
    """Tokenizer fields without the tokens that `padded`, or llama.cpp's converter, put at the end."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields.get("tokenizer.ggml.token_type", [])
    size = len(tokens)
    while len(kinds) == len(tokens) and size and kinds[size - 1] == UNUSED and tokens[size - 1] == f"[PAD{size - 1}]":
        size -= 1
    names = [f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "scores")]
    return fields | {name: fields[name][:size] for name in names if name in fields}


def llama3_divisors(theta: float, head_dim: int, scaling: dict[str, Any]) -> np.ndarray:
    """The divisors of RoPE frequencies under llama3 scaling, float32 [head_dim / 2]: 1 for short waves, `factor` for
    long ones, interpolated between."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * _turns_per_token(theta, head_dim)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / scaling["factor"] + smooth)).astype(np.float32)


def _llama3_scaling(path: Path, divisors: np.ndarray, theta: float, named: str | None) -> dict[str, Any]:
    """The settings that give `divisors`: those that the file names, else the published ones, else solved for.

    Scaling low, high and the original length by one factor changes nothing, so what is solved for has `low` 1.
    """
    head_dim, factor = 2 * len(divisors), float(divisors.max())
    candidates: list[tuple] = [(factor, 1.0, 4.0, 8192)]
    if factor > 1:
        smooth = (1 / divisors - 1 / factor) / (1 - 1 / factor)
        between = (smooth > 1e-4) & (smooth < 1 - 1e-4)
        if between.sum() >= 2:
            slope, start = np.polyfit(_turns_per_token(theta, head_dim)[between], smooth[between], 1)
            candidates.append((factor, 1.0, float(1 - 1 / start), max(1, round(-slope / start))))
    settings = [dict(zip(LLAMA3_KEYS, candidate, strict=True)) for candidate in candidates]
    try:
        if named is not None:
            stored = json.loads(named)
            settings.insert(0, {key: type(value)(stored[key]) for key, value in settings[0].items()})
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged, its {SCALING_KEY} does not hold the settings of a RoPE scaling.") from None
    for setting in settings:
        if setting["high_freq_factor"] > setting["low_freq_factor"] and np.allclose(
            llama3_divisors(theta, head_dim, setting), divisors, rtol=1e-4
        ):
            return setting
    raise UserError(
        f"{path} scales RoPE frequencies (rope_freqs.weight) otherwise than Llama 3 does, which puna doesn't implement."
    )


def _turns_per_token(theta: float, head_dim: int) -> np.ndarray:
    return theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim) / (2 * math.pi)


def _number(path: Path, key: str, value: Any) -> Any:
    """A positive number of the metadata; a float32 as the shortest decimal that names it (1e-05, not 9.9999e-06)."""
    if isinstance(value, list):
        raise UserError(f"{path} has {key} per layer, which puna doesn't implement.")
    if value is None:
        raise UserError(f"{path} lacks {key}: convert it again.")
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f"{path} has {key} = {value!r}, which must be a number above 0: convert it again.")
    return float(str(np.float32(value))) if isinstance(value, float) else value
