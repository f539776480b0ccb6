"""Files of torch.save (.pth, .bin): tensors alone, mapped where the file allows it, no pickled code."""

from __future__ import annotations

import errno
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.errors import UserError


def save_file(state: Mapping[str, Any], path: Path) -> None:
    """Writes a dictionary of tensors. Raises `OSError` when the disk is full, where torch hides it behind an error of
    its own."""
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_file(path: Path) -> dict[str, Tensor]:
    """The state dict in the file. Its tensors are views of the mapped file, except in torch's old, unzipped format,
    which is read whole.

    Raises `UserError` for a damaged file, and for one whose pickle wants anything but tensors: that could run code.
    """
    zipped = zipfile.is_zipfile(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a pickle of another protocol, which is read or refused below
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        if found := re.search(r"\bGLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path} was not loaded: its pickle asks for {found[1]}, not only for tensors, and could run code;"
                " get the checkpoint as safetensors"
            ) from None
        raise UserError(f"{path} is damaged or no file of torch.save; fetch it again") from None
    except OSError as error:
        if error.errno != errno.EINVAL:  # torch seeks to before the beginning of what is left
            raise
        raise UserError(f"{path} is cut off or damaged; fetch it again") from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        if "Cannot allocate memory" in str(error):  # torch's mappings reserve memory
            raise UserError(f"{path} is larger than this machine's memory; get the checkpoint as safetensors") from None
        raise UserError(f"{path} is cut off or damaged; fetch it again") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no dictionary of tensors")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise UserError(f"{path} holds {name!r}, which is not a plain tensor; puna reads state dicts alone")
    return state
