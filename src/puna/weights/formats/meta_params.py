"""Meta's params.json and config.json, converted into each other.

The keys are those of `ModelArgs` in Meta's code. Constants and command-line options of that code are not in the file:
the factor of RoPE's scaling, the context length, the token ids. The published models' values are here.
"""

from __future__ import annotations

from typing import Any

from puna.errors import UserError
from puna.model.config import ModelConfig

LLAMA3_VOCAB = 128_000  # tokens of Llama 3's tokenizer; the vocabularies before it have 32 thousand
# Key -> whether every params.json has it. All are numbers above 0, but for a vocabulary of -1.
NUMBERS = {
    "dim": True,
    "n_layers": True,
    "n_heads": True,
    "n_kv_heads": False,
    "vocab_size": False,
    "multiple_of": True,
    "ffn_dim_multiplier": False,
    "norm_eps": True,
    "rope_theta": False,
    "max_seq_len": False,
}


def config_from(params: dict[str, Any], *, vocab_size: int, tied: bool) -> dict[str, Any]:
    """The config.json for `params`. `vocab_size` is the embedding's, for Llama 1 and 2, whose params say -1."""
    for key, needed in NUMBERS.items():
        value = params.get(key)
        if value is None and not needed:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or (value <= 0 and key != "vocab_size"):
            problem = f"says {key} = {value!r}" if key in params else f"has no {key}"
            raise UserError(f"params.json {problem}; take the right value from the model's source")
    said_vocab = params.get("vocab_size") or -1
    return {
        "model_type": "llama",
        "vocab_size": said_vocab if said_vocab > 0 else vocab_size,
        "hidden_size": params["dim"],
        "intermediate_size": ffn_size(params["dim"], params["multiple_of"], params.get("ffn_dim_multiplier")),
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "rms_norm_eps": params["norm_eps"],
        "max_position_embeddings": _context(params),
        "rope_theta": params.get("rope_theta") or 10000.0,
        "rope_scaling": _scaling(params),
        "tie_word_embeddings": tied,
        **_token_ids(params),
    }


def params_from(config: ModelConfig) -> dict[str, Any]:
    """params.json for `config`. Raises `UserError` for what Meta's code can't compute."""
    for key in ("attention_bias", "mlp_bias"):
        if getattr(config, key):
            raise UserError(f"Meta's layout has no place for the biases of this model ({key}); convert to hf or gguf")
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise UserError(
            f"Meta's layout has heads of hidden size / heads, this model's head_dim is {config.head_dim};"
            " convert to hf or gguf"
        )
    params: dict[str, Any] = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "vocab_size": config.vocab_size,
        **_ffn_rule(config.hidden_size, config.intermediate_size),
        "norm_eps": config.rms_norm_eps,
    }
    # Each of these is unknown to the code of some generation: written only where it isn't the older default.
    if config.num_key_value_heads != config.num_attention_heads:
        params["n_kv_heads"] = config.num_key_value_heads
    if config.rope_theta != 10000.0:
        params["rope_theta"] = config.rope_theta
    if config.rope_scaling:
        params["use_scaled_rope"] = True
    if config.rope_scaling != _scaling(params):
        raise UserError(
            f"Meta's code can't scale RoPE by {config.rope_scaling}, only as Llama 3.1 and 3.2; convert to hf or gguf"
        )
    return params


def ffn_size(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """The MLP's width by the rule of Meta's code: two thirds of 4 dim, times `multiplier`, rounded up."""
    size = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        size = int(multiplier * size)
    return -(-size // multiple_of) * multiple_of


def _ffn_rule(dim: int, size: int) -> dict[str, Any]:
    """The keys that make `ffn_size` give `size`: as the published models have them, else exact."""
    for multiplier in (None, 1.3, 1.5, 1.2, 1.0):
        for multiple_of in (256, 1024, 4096):
            if ffn_size(dim, multiple_of, multiplier) == size:
                return {"multiple_of": multiple_of} | ({"ffn_dim_multiplier": multiplier} if multiplier else {})
    return {"multiple_of": 1, "ffn_dim_multiplier": (size + 0.5) / int(2 * (4 * dim) / 3)}


def _context(params: dict[str, Any]) -> int:
    """The context length of the published model with such parameters, in tokens."""
    if params.get("max_seq_len"):
        return int(params["max_seq_len"])
    if params.get("use_scaled_rope"):
        return 131072
    if (params.get("vocab_size") or -1) >= LLAMA3_VOCAB:
        return 8192
    if params.get("rope_theta") == 1e6:
        return 16384  # CodeLlama
    return 2048 if params["norm_eps"] == 1e-6 else 4096  # LLaMA 1, Llama 2


def _scaling(params: dict[str, Any]) -> dict[str, Any] | None:
    """RoPE scaling of Llama 3.1, and of the small models of 3.2, which have a larger factor."""
    if not params.get("use_scaled_rope"):
        return None
    return {
        "rope_type": "llama3",
        "factor": 32.0 if params["dim"] < 4096 else 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _token_ids(params: dict[str, Any]) -> dict[str, Any]:
    """Begin and end ids of Meta's tokenizers. A chat model's ends of turn are among them: a base model makes none."""
    if (params.get("vocab_size") or -1) < LLAMA3_VOCAB:
        return {"bos_token_id": 1, "eos_token_id": 2}
    ends = [128001, 128008, 128009] if params.get("use_scaled_rope") else [128001, 128009]
    return {"bos_token_id": 128000, "eos_token_id": ends}
