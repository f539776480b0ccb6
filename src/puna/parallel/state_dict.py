"""The state of a run for torch.distributed.checkpoint: saved by one layout, loaded by any other.

    dcp.save(get_state(parts, optimizer), checkpoint_id=folder)
    state = get_state(parts, optimizer); dcp.load(state, checkpoint_id=folder); set_state(parts, optimizer, state)

Every tensor goes by its checkpoint name, whatever stage holds it, and as a DTensor that says which part it is. The
optimizer's state is flat, one entry for each parameter: its groups then need not be the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

from puna.parallel.model_part import ModelPart, whole


def get_state(parts: Iterable[ModelPart], optimizer: Optimizer) -> dict[str, Any]:
    """{"model": trained parameters, "optimizer": their state}, this rank's parts; call it between steps.

    What a run doesn't train, LoRA's base, is not of its state. An optimizer that has made no step yet gets its state.
    """
    model, state = get_state_dict(whole(parts), optimizer, options=_options())
    return {"model": model, "optimizer": state}


def set_state(parts: Iterable[ModelPart], optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Take over what `get_state` of any layout gave, once it was loaded into this layout's."""
    set_state_dict(
        whole(parts),
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=_options(),
    )


def _options() -> StateDictOptions:
    return StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=True, strict=False)
