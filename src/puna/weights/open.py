"""Opening a checkpoint by path, Hub id or alias, in whatever format it is."""

from __future__ import annotations

from pathlib import Path

from puna.errors import UserError
from puna.weights import hub
from puna.weights.checkpoint import Checkpoint, check_tensors
from puna.weights.formats import registry


def open_checkpoint(ref: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Opens a checkpoint by path, Hub id or alias, in whatever format it is, and checks its tensors.

    Raises `UserError` when it doesn't exist, its format isn't known, it isn't a LLaMA, or a tensor is
    missing, unmapped or misshapen.
    """
    path = hub.resolve(ref, revision)
    if fmt := registry.detect(path):
        checkpoint = fmt.open(path)
        check_tensors(checkpoint)
        return checkpoint
    if (path / "config.json").exists():
        raise UserError(f"{path} has a config.json and no weights that puna reads: no .safetensors or .bin files.")
    known = "; ".join(fmt.summary for fmt in registry.FORMATS)
    raise UserError(f"{path} is not a checkpoint in a format that puna reads: {known}.")
