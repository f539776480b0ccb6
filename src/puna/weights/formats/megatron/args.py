"""Megatron's arguments and config.json of a LLaMA, converted into each other."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puna.errors import UserError
from puna.model.config import ModelConfig

NEEDED = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size")
SIZES = (*NEEDED, "num_query_groups", "kv_channels", "max_position_embeddings", "seq_length", "vocab_size")
# Arguments that must have these values, when they are there, for the model to be a LLaMA.
FIXED: dict[str, tuple[Any, ...]] = {
    "swiglu": (True,),
    "normalization": ("RMSNorm",),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0, None),
    "rotary_interleaved": (False, None),
    "num_experts": (None,),
    "qk_layernorm": (False, None),
    "multi_latent_attention": (False, None),
    "apply_layernorm_1p": (False, None),
}
LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def config_from(path: Path, arguments: Mapping[str, Any], *, rows: int, tokens: int | None) -> dict[str, Any]:
    """The config.json for the arguments. Raises `UserError` for missing ones, and if the model isn't a LLaMA.

    `rows` of the embedding, padding included; `tokens` of the tokenizer, where there is one.
    """
    if missing := [name for name in NEEDED if not arguments.get(name)]:
        raise UserError(
            f"{path} doesn't say what model it is: there is no config.json beside it, and its files"
            f" {'lack ' + ', '.join(missing) if arguments else 'carry no arguments'}; put the model's config.json"
            " (and tokenizer files) into that directory"
        )
    for name, allowed in FIXED.items():
        if name in arguments and arguments[name] not in allowed:
            raise UserError(
                f"{path} was trained with {name}={arguments[name]!r}, which is no LLaMA that puna implements"
            )
    for name in SIZES:
        if not isinstance(arguments.get(name) or 1, int):
            raise UserError(f"{path} says {name}={arguments[name]!r}, which is no number of anything")
    heads = arguments["num_attention_heads"]
    groups = arguments.get("num_query_groups") if arguments.get("group_query_attention") else heads
    scaling = None
    if arguments.get("use_rope_scaling"):
        scaling = {
            "rope_type": "llama3",
            "factor": float(arguments.get("rope_scaling_factor") or 8.0),
            **LLAMA3_SCALING,
        }
    elif arguments.get("rotary_seq_len_interpolation_factor"):
        scaling = {"rope_type": "linear", "factor": float(arguments["rotary_seq_len_interpolation_factor"])}
    bias = bool(arguments.get("add_bias_linear"))
    if arguments.get("add_qkv_bias") and not bias:
        raise UserError(f"{path} was trained with add_qkv_bias alone; a LLaMA has biases on all of attention or none")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": min(arguments.get("vocab_size") or tokens or rows, rows),
        "hidden_size": arguments["hidden_size"],
        "intermediate_size": arguments["ffn_hidden_size"],
        "num_hidden_layers": arguments["num_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": arguments.get("kv_channels") or arguments["hidden_size"] // heads,
        "rms_norm_eps": float(arguments.get("norm_epsilon") or arguments.get("layernorm_epsilon") or 1e-5),
        "max_position_embeddings": arguments.get("max_position_embeddings") or arguments.get("seq_length") or 2048,
        "rope_theta": float(arguments.get("rotary_base") or 10000.0),
        "rope_scaling": scaling,
        "tie_word_embeddings": not arguments.get("untie_embeddings_and_output_weights", False),
        "attention_bias": bias,
        "mlp_bias": bias,
    }


def args_from(config: ModelConfig, *, tp: int, pp: int, multiple: int, vocab: int, dtype: Any) -> argparse.Namespace:
    """The arguments that Megatron-LM compares with its own, and `--use-checkpoint-args` reads. Raises `UserError` for
    a model that they can't express."""
    scaling = dict(config.rope_scaling or {})
    kind = scaling.pop("rope_type", None)
    factor = scaling.pop("factor", None)
    if kind not in (None, "linear", "llama3") or (kind == "llama3" and scaling != LLAMA3_SCALING):
        raise UserError(f"Megatron-LM's arguments have no word for this model's RoPE scaling {config.rope_scaling}")
    if config.attention_bias != config.mlp_bias:
        raise UserError("Megatron-LM's arguments have no word for biases in only one of attention and MLP")
    return argparse.Namespace(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        kv_channels=config.head_dim,
        group_query_attention=config.num_key_value_heads != config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        seq_length=config.max_position_embeddings,
        max_position_embeddings=config.max_position_embeddings,
        norm_epsilon=config.rms_norm_eps,
        normalization="RMSNorm",
        swiglu=True,
        add_bias_linear=config.mlp_bias,
        add_qkv_bias=config.attention_bias,
        position_embedding_type="rope",
        add_position_embedding=False,
        rotary_base=config.rope_theta,
        rotary_percent=1.0,
        rotary_interleaved=False,
        rotary_seq_len_interpolation_factor=factor if kind == "linear" else None,
        use_rope_scaling=kind == "llama3",
        rope_scaling_factor=factor if kind == "llama3" else 8.0,
        untie_embeddings_and_output_weights=not config.tie_word_embeddings,
        vocab_size=config.vocab_size,
        padded_vocab_size=vocab,
        make_vocab_size_divisible_by=multiple,
        tokenizer_type="HuggingFaceTokenizer",
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        data_parallel_random_init=False,
        params_dtype=dtype,
        iteration=0,
    )
