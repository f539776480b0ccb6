"""Resuming from a checkpoint: what must be the same, and what may change and is reported.

A checkpoint holds the tensors that are trained and the optimizer's state. Another model, base, adapter, precision or
optimizer would load without an error and compute something else, so these are compared. Everything else (learning
rate, batch size, steps, mesh ...) may change from here on.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from puna.errors import UserError
from puna.model.config import ModelConfig
from puna.model.lora_options import LoraOptions
from puna.train.options import TrainOptions

FIXED_LORA = tuple(entry.name for entry in fields(LoraOptions) if entry.name != "dropout")
UNREPORTED = ("out", "resume")


def fixed_facts(options: TrainOptions, config: ModelConfig, base: str | None) -> dict[str, Any]:
    """The facts that must not change over a run, as JSON values. `base`: fingerprint of the frozen weights."""
    lora = flatten(asdict(options.lora))
    return {
        "model": config.to_hf(),
        "base": base,
        "lora": {name: lora[name] for name in FIXED_LORA} if options.lora.rank else None,
        "precision": options.precision,
        "optimizer": options.optim.name,
        "optimizer state": options.optim.state,
    }


def check_fixed(path: Path, saved: dict[str, Any], mine: dict[str, Any]) -> None:
    """Raises UserError, naming the first difference, for a checkpoint of another run than `mine` describes.

    A fact that an earlier version did not save is not compared.
    """
    for name, value in mine.items():
        theirs = saved.get(name, value)
        if isinstance(theirs, dict) and isinstance(value, dict):
            theirs = {key: theirs.get(key, value[key]) for key in value} | theirs
        if theirs != value:
            difference = "belongs to other weights" if name == "base" else _difference(theirs, value)
            raise UserError(
                f"{path} is a checkpoint of another run: its {name} {difference};"
                " choose another --out, or give the options of that run."
            )


def changes(saved: dict[str, Any], options: TrainOptions) -> list[str]:
    """The options that differ from those of the checkpoint, as "optim.lr 0.001 -> 0.01"."""
    before, now = saved.get("options"), all_options(options)
    if not isinstance(before, dict):  # of an earlier version
        return []
    return [
        f"{name} {before[name]} -> {value}"
        for name, value in now.items()
        if name in before and before[name] != value and name not in UNREPORTED
    ]


def all_options(options: TrainOptions) -> dict[str, Any]:
    """The options by their names on the command line, as JSON values."""
    return flatten(asdict(options))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and not name.endswith("_pattern"):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = (
                list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
            )
    return flat


def _difference(theirs: Any, mine: Any) -> str:
    """The first key in which two mappings differ, or the two values."""
    if not isinstance(theirs, dict) or not isinstance(mine, dict):
        return f"is {theirs}, not {mine}"
    key = next(key for key in {**theirs, **mine} if theirs.get(key) != mine.get(key))
    return f"has {key} {theirs.get(key)}, not {mine.get(key)}"
