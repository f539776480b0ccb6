"""How a Megatron checkpoint is written. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from puna.errors import UserError
from puna.options import option

TRACKER = "latest_checkpointed_iteration.txt"  # names the folder of the newest iteration


@dataclass(frozen=True)
class MegatronOptions:
    """Write options of a Megatron checkpoint."""

    tp: int = option(1, "tensor-parallel size")
    pp: int = option(1, "pipeline-parallel size")
    names: Literal["ascendspeed", "legacy", "core"] = option(
        "ascendspeed", "names of the tensors; legacy is Megatron-LM's former GPT model, core is Megatron-core"
    )
    merge_mlp: bool = option(False, "gate and up as one matrix, as legacy and core always have them")
    make_vocab_size_divisible_by: int = option(128, "pad the vocabulary to a multiple of this times --tp")

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "make_vocab_size_divisible_by"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}.")
