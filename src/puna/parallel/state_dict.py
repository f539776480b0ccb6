"""The state of a run for torch.distributed.checkpoint: saved by one layout, loaded by any other.

    dcp.save(get_state(parts, optimizer), checkpoint_id=folder)
    state = get_state(parts, optimizer); dcp.load(state, checkpoint_id=folder); set_state(parts, optimizer, state)

Every tensor has its checkpoint name, whatever stage holds it, and is a DTensor, which knows the part it is. The
optimizer's state is flat, one entry per parameter: its parameter groups then may differ between ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

from puna.parallel.model_part import ModelPart, combine_parts


def get_state(parts: Iterable[ModelPart], optimizer: Optimizer) -> dict[str, Any]:
    """{"model": trained parameters, "optimizer": their state} of this rank; to be called between steps.

    Frozen parameters (LoRA's base) are left out. An optimizer that has made no step yet gets its state.
    """
    model, state = get_state_dict(combine_parts(parts), optimizer, options=_options())
    return {"model": model, "optimizer": state}


def set_state(parts: Iterable[ModelPart], optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Put a state of `get_state`, into which a checkpoint of any layout was loaded, back into parts and optimizer."""
    set_state_dict(
        combine_parts(parts),
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=_options(),
    )


def _options() -> StateDictOptions:
    return StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=True, strict=False)
