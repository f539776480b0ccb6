"""The shape of a LLaMA model; from and to Hugging Face's config.json (keys of transformers 4 and 5).

Keys without effect on the computation are ignored; others that aren't implemented are refused by name. Imports no
torch, so that the command line can describe a checkpoint at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from puna.errors import UserError
from puna.progress import note

# rope_type -> the keys it needs beside rope_theta, and those it may carry (transformers' modeling_rope_utils).
ROPE_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, {"original_max_position_embeddings"}),
    "yarn": (
        {"factor"},
        {
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
            "finetuned",
        },
    ),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
}
NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Keys that change the computation, with the values at which it is LLaMA's.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", None),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False, None),
    "num_local_experts": (None,),
    "qk_layernorm": (False, None),
    "use_qk_norm": (False, None),
    "logit_scale": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "attention_multiplier": (None,),
    "no_rope_layers": (None, []),
    "no_rope_layer_interval": (None,),
}
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias")
MAX_LAYERS = 4096  # far above any model; a config is untrusted, and `tensors` lists what it asks for


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a LLaMA model. Lengths are in tokens, sizes in elements.

    `rope_scaling` is None (plain RoPE) or a dict of `rope_type` (linear, dynamic, yarn, llama3) and that type's keys.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        for key in (*NEEDED, "num_key_value_heads", "head_dim", "max_position_embeddings"):
            _check_count(key, getattr(self, key))
        for key in ("rms_norm_eps", "rope_theta"):
            _check_number(key, getattr(self, key))
        if self.num_hidden_layers > MAX_LAYERS:
            raise UserError(
                f"config: {self.num_hidden_layers} layers are more than any LLaMA has; correct num_hidden_layers."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"config: num_attention_heads {self.num_attention_heads} is not a multiple of"
                f" num_key_value_heads {self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise UserError(f"config: head_dim {self.head_dim} is odd, rotary embeddings need pairs.")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read a config.json. Raises UserError, naming the key, for what is missing or not implemented."""
        model_type = config.get("model_type")
        if model_type != "llama":
            architecture = (
                f"model_type {model_type!r}" if model_type else f"architectures {config.get('architectures')}"
            )
            raise UserError(f"config.json has {architecture}; puna implements model_type 'llama' only.")
        for key in NEEDED:
            if config.get(key) is None:
                raise UserError(f"config.json lacks {key!r}, which every LLaMA needs; take it from the model's source.")
            _check_count(key, config[key])
        for key in FLAGS:
            if not isinstance(config.get(key), bool | None):
                raise UserError(f"config: {key} must be true or false, not {config[key]!r}.")
        for key, allowed in FIXED.items():
            if config.get(key) not in allowed:
                raise UserError(f"config.json asks for {key}={config[key]!r}, which puna does not implement.")
        _check_window(config)
        heads = config["num_attention_heads"]
        if config.get("head_dim") is None and config["hidden_size"] % heads:
            raise UserError(
                f"config.json: hidden_size {config['hidden_size']} is not a multiple of num_attention_heads {heads};"
                " set head_dim."
            )
        eps = config.get("rms_norm_eps", 1e-6)  # transformers' default, LLaMA 1's value
        _check_number("rms_norm_eps", eps)
        theta, scaling = _rope(config)
        return cls(
            **{key: config[key] for key in NEEDED},
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            rms_norm_eps=float(eps),
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
        )

    def to_hf(self) -> dict[str, Any]:
        """The config.json of this shape in transformers 4's keys, which versions 4 and 5 both read.

        The caller adds what the shape does not hold: `torch_dtype` and the token ids.
        """
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope_theta,
            "rope_scaling": dict(self.rope_scaling) if self.rope_scaling else None,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that a checkpoint of this shape holds: Hugging Face name -> shape, in model order."""
        d, ffn = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        linears = {
            "self_attn.q_proj": (q, d, self.attention_bias),
            "self_attn.k_proj": (kv, d, self.attention_bias),
            "self_attn.v_proj": (kv, d, self.attention_bias),
            "self_attn.o_proj": (d, q, self.attention_bias),
            "mlp.gate_proj": (ffn, d, self.mlp_bias),
            "mlp.up_proj": (ffn, d, self.mlp_bias),
            "mlp.down_proj": (d, ffn, self.mlp_bias),
        }
        out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, d)}
        for i in range(self.num_hidden_layers):
            layer = f"model.layers.{i}"
            out[f"{layer}.input_layernorm.weight"] = (d,)
            for name, (rows, columns, bias) in linears.items():
                if name == "mlp.gate_proj":
                    out[f"{layer}.post_attention_layernorm.weight"] = (d,)
                out[f"{layer}.{name}.weight"] = (rows, columns)
                if bias:
                    out[f"{layer}.{name}.bias"] = (rows,)
        out["model.norm.weight"] = (d,)
        if not self.tie_word_embeddings:
            out["lm_head.weight"] = (self.vocab_size, d)
        return out

    def num_parameters(self) -> int:
        """Stored parameters (a tied output layer counts once)."""
        total = 0
        for shape in self.tensors().values():
            total += shape[0] * (shape[1] if len(shape) > 1 else 1)
        return total

    def kv_bytes_per_token(self, itemsize: int, kv_heads: int | None = None) -> int:
        """Bytes of the keys and values of one position in all layers. `kv_heads`: of this rank; None for all."""
        heads = self.num_key_value_heads if kv_heads is None else kv_heads
        return 2 * self.num_hidden_layers * heads * self.head_dim * itemsize


def end_ids(settings: Mapping[str, Any], vocab_size: int, name: str) -> tuple[int, ...]:
    """`eos_token_id` of a config.json or generation_config.json, one or a list. UserError for what isn't a token id."""
    value = settings.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for index in ids:
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < vocab_size:
            raise UserError(f"{name}: eos_token_id must be ids below vocab_size {vocab_size}, not {index!r}.")
    return tuple(ids)


def check_token_ids(settings: Mapping[str, Any], vocab_size: int, name: str) -> None:
    """Raises UserError, naming the file `name`, for values of a config.json or generation_config.json that aren't token
    ids. BOS and padding ids may lie outside the vocabulary: published models have -1, or the next free id."""
    end_ids(settings, vocab_size, name)
    for key in ("bos_token_id", "pad_token_id"):
        index = settings.get(key)
        if index is not None and (not isinstance(index, int) or isinstance(index, bool) or not -1 <= index < 1 << 31):
            raise UserError(f"{name}: {key} must be a token id, not {index!r}.")


def _check_count(key: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
        raise UserError(f"config: {key} must be a whole number above 0 and below 2**31, not {value!r}.")


def _check_number(key: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e300:  # NaN is not above 0
        raise UserError(f"config: {key} must be a finite number above 0, not {value!r}.")


def _check_window(config: Mapping[str, Any]) -> None:
    """Raises `UserError` for a sliding window that hides tokens: switched on and shorter than the context."""
    window, layers = config.get("sliding_window"), config.get("layer_types")
    if isinstance(layers, list) and any(layer != "full_attention" for layer in layers):
        others = sorted({str(layer) for layer in layers if layer != "full_attention"})
        if others != ["sliding_attention"] or window is None:
            raise UserError(f"config.json asks for layer_types {', '.join(others)}, which puna does not implement.")
    elif isinstance(layers, list) or config.get("use_sliding_window") is False:
        return
    if window is not None:
        _check_count("sliding_window", window)
        if window < config.get("max_position_embeddings", 2048):
            raise UserError(f"config.json asks for sliding_window={window!r}, which puna does not implement.")


def _rope(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling) from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4)."""
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(key), Mapping | None):
            raise UserError(f"config: {key} must be a mapping with a rope_type, not {config[key]!r}.")
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    given = (scaling.pop("rope_theta", None), config.get("rope_theta"), 10000.0)
    theta = next(value for value in given if value is not None)
    _check_number("rope_theta", theta)
    rope_type = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    if scaling.pop("partial_rotary_factor", 1.0) not in (1.0, None):
        raise UserError("config.json asks for partial_rotary_factor, which puna does not implement.")
    scaling = {key: value for key, value in scaling.items() if value is not None}
    if rope_type == "default":
        return float(theta), None
    if not isinstance(rope_type, str) or rope_type not in ROPE_KEYS:
        known = ", ".join(["default", *ROPE_KEYS])
        raise UserError(f"config.json asks for RoPE type {rope_type!r}, which puna does not implement; it has {known}.")
    needed, optional = ROPE_KEYS[rope_type]
    if missing := needed - scaling.keys():
        raise UserError(f"config.json: RoPE type {rope_type!r} lacks {', '.join(sorted(missing))}.")
    if unused := scaling.keys() - needed - optional:  # transformers ignores them too
        note(f"config.json has keys that RoPE type {rope_type!r} doesn't use, ignored: {', '.join(sorted(unused))}.")
    scaling = {key: value for key, value in scaling.items() if key not in unused}
    if not (scaling.get("mscale") and scaling.get("mscale_all_dim")):  # the attention factor takes both or neither
        scaling = {key: value for key, value in scaling.items() if key not in ("mscale", "mscale_all_dim")}
    if scaling.get("truncate") is True:  # the default
        del scaling["truncate"]
    scaling.pop("finetuned", None)  # about the weights, not about the computation
    for key, value in scaling.items():
        if key == "original_max_position_embeddings":
            _check_count(key, value)
        elif key not in ("truncate", "finetuned"):
            _check_number(f"{key} of RoPE type {rope_type!r}", value)
    if rope_type == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError("config: low_freq_factor of RoPE type 'llama3' must be below high_freq_factor.")
    return float(theta), {"rope_type": rope_type, **scaling}
