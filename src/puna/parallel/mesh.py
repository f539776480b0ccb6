"""How the ranks of a training run are laid out: pipeline x replicas x shards x context x tensor, outermost first.

The innermost ranks communicate most: torchrun numbers the ranks of one machine consecutively.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from puna.errors import UserError
from puna.model.config import ModelConfig
from puna.model.tp_plan import check_tp, dtensor_chunk
from puna.options import option

PpSchedule = Literal["1f1b", "gpipe", "interleaved"]
CpMethod = Literal["allgather", "ring"]
SCHEDULES, METHODS = get_args(PpSchedule), get_args(CpMethod)


@dataclass(frozen=True)
class MeshOptions:
    """Number of ranks along each axis of the device mesh; `dp_shard` -1 takes what the others leave.

    `dp_replicate` holds copies of all weights, `dp_shard` cuts weights, gradients and optimizer state (FSDP2), `cp`
    cuts each sequence, `tp` each layer (`sequence_parallel`: the residual stream too), `pp` the stack of layers, in
    `virtual_stages` pieces a rank for the interleaved schedule.
    """

    dp_replicate: int = option(1, "replicas of all weights", minimum=1)
    dp_shard: int = option(-1, "ranks that weights, gradients and optimizer state are sharded over (FSDP2)", minimum=-1)
    tp: int = option(1, "tensor-parallel ranks", minimum=1)
    sequence_parallel: bool = option(False, "with tp: norms and residuals are split over the sequence")
    pp: int = option(1, "pipeline stages", minimum=1)
    pp_schedule: PpSchedule = option("1f1b", "order of a pipeline's microbatches")
    virtual_stages: int = option(1, "interleaved: stages of each rank", minimum=1)
    cp: int = option(1, "ranks that each sequence is split over (context parallelism)", minimum=1)
    cp_method: CpMethod = option("allgather", "how attention gets the keys and values of other ranks")

    @property
    def stages(self) -> int:
        return self.pp * self.virtual_stages

    @property
    def data_size(self) -> int:
        """Ranks that load different rows (data-parallel size)."""
        return self.dp_replicate * self.dp_shard


def resolve(options: MeshOptions, ranks: int) -> MeshOptions:
    """The options with `dp_shard` filled in. Raises UserError where `ranks` ranks cannot make this mesh."""
    for axis in ("dp_replicate", "tp", "pp", "virtual_stages", "cp"):
        if getattr(options, axis) < 1:
            raise UserError(f"mesh: {axis} must be at least 1, not {getattr(options, axis)}.")
    if options.dp_shard < 1 and options.dp_shard != -1:
        raise UserError(f"mesh: dp_shard must be at least 1, or -1 for what the others leave, not {options.dp_shard}.")
    axes = {"pp": options.pp, "dp_replicate": options.dp_replicate, "cp": options.cp, "tp": options.tp}
    others = math.prod(axes.values())
    axes_text = " x ".join(f"{axis} {size}" for axis, size in axes.items() if size > 1) or "a mesh of 1"
    if options.dp_shard == -1:
        if ranks % others:
            raise UserError(
                f"mesh: {axes_text} needs a multiple of {others} ranks, not {ranks}; start as many or change it."
            )
        options = replace(options, dp_shard=ranks // others)
    elif others * options.dp_shard != ranks:
        needed = others * options.dp_shard
        raise UserError(
            f"mesh: {axes_text} x dp_shard {options.dp_shard} is {needed} ranks, and there {_are(ranks)};"
            f" start {needed} or set dp_shard to -1."
        )
    if options.pp_schedule not in SCHEDULES:
        raise UserError(f"mesh: pp_schedule must be one of {', '.join(SCHEDULES)}, not {options.pp_schedule!r}.")
    if options.cp_method not in METHODS:
        raise UserError(f"mesh: cp_method must be one of {', '.join(METHODS)}, not {options.cp_method!r}.")
    if options.virtual_stages > 1 and options.pp_schedule != "interleaved":
        raise UserError(f"mesh: virtual_stages {options.virtual_stages} needs pp_schedule interleaved.")
    if options.pp_schedule == "interleaved" and (options.pp == 1 or options.virtual_stages == 1):
        raise UserError("mesh: pp_schedule interleaved needs pp and virtual_stages of 2 or more.")
    if options.sequence_parallel and options.tp == 1:
        raise UserError("mesh: sequence_parallel needs tp of 2 or more.")
    return options


def check_model(config: ModelConfig, options: MeshOptions) -> None:
    """Raises UserError where the model cannot be cut this way."""
    check_tp(config, options.tp)
    if config.intermediate_size % options.tp:
        raise UserError(
            f"An MLP of {config.intermediate_size} cannot be split over tp {options.tp}; use a divisor of it."
        )
    last = dtensor_chunk(config.vocab_size, options.tp - 1, options.tp)
    if last.start == last.stop:
        raise UserError(f"A vocabulary of {config.vocab_size} is too small for tp {options.tp}; use fewer.")
    if options.cp > 1 and (config.rope_scaling or {}).get("rope_type") == "dynamic":
        raise UserError("Dynamic RoPE scaling depends on the length of a whole sequence, which cp cuts; set cp to 1.")
    if config.num_hidden_layers < options.stages:
        raise UserError(
            f"{config.num_hidden_layers} layers cannot be cut into {options.stages} pipeline stages; use fewer."
        )


def check_batch(options: MeshOptions, batch_size: int, micro_batch_size: int, seq_len: int) -> int:
    """The microbatches that each rank computes in a step of `batch_size` rows of `seq_len` tokens.

    Raises UserError where the layout does not divide them, naming what works.
    """
    rows = options.data_size * micro_batch_size
    if batch_size % rows:
        near = max(rows, batch_size // rows * rows)
        raise UserError(
            f"a batch of {batch_size} rows cannot be dealt out to {options.data_size} data ranks in microbatches of"
            f" {micro_batch_size}; use a multiple of {rows}, such as {near}."
        )
    microbatches = batch_size // rows
    check_microbatches(options, microbatches)
    check_length(options, seq_len)
    return microbatches


def check_microbatches(options: MeshOptions, microbatches: int) -> None:
    if options.pp > 1 and options.pp_schedule == "1f1b" and microbatches < options.pp:
        raise UserError(
            f"pp_schedule 1f1b needs at least as many microbatches as stages, {options.pp}, not {microbatches};"
            " raise the batch, lower the microbatch, or use gpipe."
        )
    if options.pp_schedule == "interleaved" and microbatches % options.pp:
        raise UserError(
            f"pp_schedule interleaved needs a multiple of pp {options.pp} microbatches, not {microbatches};"
            " change the batch or the microbatch."
        )


def check_length(options: MeshOptions, seq_len: int) -> None:
    parts = (2 * options.cp if options.cp > 1 else 1) * (options.tp if options.sequence_parallel else 1)
    if seq_len % parts:
        raise UserError(f"sequences of {seq_len} tokens cannot be cut by this mesh; use a multiple of {parts}.")


def _are(count: int) -> str:
    return "is 1" if count == 1 else f"are {count}"
