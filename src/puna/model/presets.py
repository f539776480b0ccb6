"""The shapes of published LLaMA models, by name, so that any size can be built and timed without a checkpoint.

From the models' config.json files; LLaMA 1 from arXiv 2302.13971, table 2.
"""

from __future__ import annotations

from puna.errors import UserError, nearest
from puna.model.config import ModelConfig

_LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA32_ROPE = {**_LLAMA31_ROPE, "factor": 32.0}


def _config(vocab: int, hidden: int, ffn: int, layers: int, heads: int, kv: int, **rest: object) -> ModelConfig:
    rest.setdefault("head_dim", hidden // heads)
    return ModelConfig(vocab, hidden, ffn, layers, heads, kv, **rest)  # type: ignore[arg-type]


def _llama1(hidden: int, ffn: int, layers: int, heads: int, eps: float = 1e-6) -> ModelConfig:
    return _config(32000, hidden, ffn, layers, heads, heads, rms_norm_eps=eps, max_position_embeddings=2048)


def _llama2(hidden: int, ffn: int, layers: int, heads: int, kv: int) -> ModelConfig:
    return _config(32000, hidden, ffn, layers, heads, kv, max_position_embeddings=4096)


def _codellama(vocab: int, hidden: int, ffn: int, layers: int, heads: int, kv: int) -> ModelConfig:
    return _config(vocab, hidden, ffn, layers, heads, kv, max_position_embeddings=16384, rope_theta=1e6)


def _llama3(hidden: int, ffn: int, layers: int, heads: int, context: int = 8192, **rest: object) -> ModelConfig:
    return _config(128256, hidden, ffn, layers, heads, 8, max_position_embeddings=context, rope_theta=500000.0, **rest)


PRESETS: dict[str, ModelConfig] = {
    "llama-7b": _llama1(4096, 11008, 32, 32),
    "llama-13b": _llama1(5120, 13824, 40, 40),
    "llama-30b": _llama1(6656, 17920, 60, 52),
    "llama-33b": _llama1(6656, 17920, 60, 52),  # the paper's name of the model that the files call 30B
    "llama-65b": _llama1(8192, 22016, 80, 64, 1e-5),
    "llama2-7b": _llama2(4096, 11008, 32, 32, 32),
    "llama2-13b": _llama2(5120, 13824, 40, 40, 40),
    "llama2-70b": _llama2(8192, 28672, 80, 64, 8),
    "codellama-7b": _codellama(32016, 4096, 11008, 32, 32, 32),
    "codellama-13b": _codellama(32016, 5120, 13824, 40, 40, 40),
    "codellama-34b": _codellama(32000, 8192, 22016, 48, 64, 8),
    "llama3-8b": _llama3(4096, 14336, 32, 32),
    "llama3-70b": _llama3(8192, 28672, 80, 64),
    "llama3.1-8b": _llama3(4096, 14336, 32, 32, 131072, rope_scaling=_LLAMA31_ROPE),
    "llama3.1-70b": _llama3(8192, 28672, 80, 64, 131072, rope_scaling=_LLAMA31_ROPE),
    "llama3.1-405b": _llama3(16384, 53248, 126, 128, 131072, rope_scaling=_LLAMA31_ROPE),
    "llama3.2-1b": _llama3(
        2048, 8192, 16, 32, 131072, head_dim=64, rope_scaling=_LLAMA32_ROPE, tie_word_embeddings=True
    ),
    "llama3.2-3b": _llama3(
        3072, 8192, 28, 24, 131072, head_dim=128, rope_scaling=_LLAMA32_ROPE, tie_word_embeddings=True
    ),
    "smollm2-135m": _config(
        49152, 576, 1536, 30, 9, 3, max_position_embeddings=8192, rope_theta=1e5, tie_word_embeddings=True
    ),
    "smollm2-360m": _config(
        49152, 960, 2560, 32, 15, 5, max_position_embeddings=8192, rope_theta=1e5, tie_word_embeddings=True
    ),
    "smollm2-1.7b": _config(
        49152, 2048, 8192, 24, 32, 32, max_position_embeddings=8192, rope_theta=1.3e5, tie_word_embeddings=True
    ),
    "tiny": _config(128, 64, 128, 2, 4, 4, max_position_embeddings=256),
    "tiny-gqa": _config(128, 64, 128, 2, 8, 2, max_position_embeddings=256, tie_word_embeddings=True),
}


def preset(name: str) -> ModelConfig:
    """The preset of that name. Raises UserError, naming the nearest one."""
    if name not in PRESETS:
        raise UserError(f"no preset {name!r}{nearest(name, PRESETS)}; known: {', '.join(PRESETS)}.")
    return PRESETS[name]
