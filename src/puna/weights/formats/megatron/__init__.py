"""Megatron-LM, and AscendSpeed after it: files per tensor- and pipeline-parallel rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from puna.errors import UserError
from puna.options import option
from puna.weights.formats.format import Format

if TYPE_CHECKING:
    from puna.weights.checkpoint import Checkpoint

TRACKER = "latest_checkpointed_iteration.txt"


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


def _detect(path: Path) -> bool:
    """Whether `path` is a directory with latest_checkpointed_iteration.txt, or with mp_rank_00 or mp_rank_00_000."""
    return path.is_dir() and ((path / TRACKER).exists() or any(path.glob("mp_rank_00*")))


def _open(path: Path) -> Checkpoint:
    from puna.weights.formats.megatron.checkpoint import open_megatron

    return open_megatron(path)


def _check(source: Checkpoint, dtype: Any, options: MegatronOptions) -> None:
    from puna.weights.formats.megatron.checkpoint import check_megatron

    check_megatron(source, dtype, options)


def _write(source: Checkpoint, dst: Path, dtype: Any, options: MegatronOptions) -> None:
    from puna.weights.formats.megatron.checkpoint import write_megatron

    write_megatron(source, dst, dtype, options)


FORMAT = Format(
    name="megatron",
    summary="a Megatron directory of mp_rank_TT[_PPP]/model_optim_rng.pt (--ckpt-format torch)",
    rope_order="rotate-half",
    detect=_detect,
    open=_open,
    write=_write,
    check=_check,
    options=MegatronOptions,
)
