"""Megatron-LM, and AscendSpeed after it: files per tensor- and pipeline-parallel rank."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.weights.formats.format import Format
from puna.weights.formats.megatron.write_options import TRACKER, MegatronOptions

if TYPE_CHECKING:
    from puna.weights.checkpoint import Checkpoint


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
