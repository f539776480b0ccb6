"""How a model is loaded into an engine: the arguments of `LLM` and `create_engine`, and options of the command line."""

from __future__ import annotations

from dataclasses import dataclass, fields
from operator import index
from pathlib import Path
from typing import Any, Literal

from puna.errors import UserError
from puna.options import CHECKPOINT, argument, option

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]


@dataclass(kw_only=True)
class EngineOptions:
    """How the model is loaded."""

    model: str = argument(CHECKPOINT)
    revision: str | None = option(None, "branch, tag or commit of a Hugging Face id")
    device: str = option("auto", "cpu, cuda, cuda:1 ...; auto takes a GPU when there is one")
    dtype: Dtype = option("auto", "data type of the weights in memory; auto is the checkpoint's own")
    load_format: Literal["auto", "dummy"] = option(
        "auto",
        "dummy: random weights, to time a model of any size",
        aliases=("weights",),
        old_values={"random": "dummy"},
    )
    adapter: Path | None = option(None, "directory of a LoRA adapter in peft's layout, merged into the weights at load")
    quantization: str | None = option(None, "int8: store the linear layers' weights as int8, packed while they load")
    template: str | None = option(
        None, "chat template: a built-in (chatml, llama2, llama3, alpaca, vicuna) or a Jinja file"
    )
    add_bos: bool | None = option(
        None, "begin texts with BOS (conversations: as the template does); the checkpoint's rule when not given"
    )
    max_model_len: int | None = option(
        None, "longest prompt plus answer, in tokens; the config's own when not given", minimum=2
    )
    kv_cache_tokens: int | None = option(
        None,
        "capacity of the KV cache in tokens; sized from free memory when not given",
        aliases=("kv_tokens",),
        minimum=1,
    )
    max_num_batched_tokens: int = option(
        2048, "tokens computed in one step, prompts and answers together", aliases=("max_batch_tokens",), minimum=1
    )
    max_num_seqs: int = option(256, "sequences that run at once", minimum=1)

    def __post_init__(self) -> None:
        for name in ("max_model_len", "kv_cache_tokens", "max_num_batched_tokens", "max_num_seqs"):
            value = getattr(self, name)
            try:
                index(0 if value is None else value)
            except TypeError:
                raise UserError(f"{name} must be a whole number, not {value!r:.60}.") from None

    def arguments(self) -> dict[str, Any]:
        """The arguments of `LLM`, for a verb whose options extend these."""
        return {entry.name: getattr(self, entry.name) for entry in fields(EngineOptions)}
