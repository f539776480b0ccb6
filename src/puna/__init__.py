"""puna: a LLaMA checkpoint through its whole life, in one package. The public names are imported when they are used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from puna.engine.outputs import Completion, RequestOutput
    from puna.engine.sampling_params import SamplingParams
    from puna.errors import UserError
    from puna.llm import LLM, pipeline
    from puna.loading import load
    from puna.model.config import ModelConfig
    from puna.tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "Completion",
    "ModelConfig",
    "RequestOutput",
    "SamplingParams",
    "Tokenizer",
    "UserError",
    "load",
    "pipeline",
]

_HOMES = {
    "LLM": "puna.llm",
    "load": "puna.loading",
    "pipeline": "puna.llm",
    "Completion": "puna.engine.outputs",
    "RequestOutput": "puna.engine.outputs",
    "SamplingParams": "puna.engine.sampling_params",
    "UserError": "puna.errors",
    "ModelConfig": "puna.model.config",
    "Tokenizer": "puna.tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'puna' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
