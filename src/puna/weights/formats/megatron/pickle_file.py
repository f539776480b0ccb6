"""A rank's file of a Megatron checkpoint, read without running anything in it.

Beside tensors it holds the run's arguments, an `argparse.Namespace` of numbers, names and enums of Megatron's own. The
namespace is read; whatever else a pickle of Megatron names (its enums, random states) becomes an empty placeholder.
"""

from __future__ import annotations

import argparse
import errno
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from puna.errors import UserError

# Modules whose classes Megatron's checkpoints hold beside tensors; any other name in a file is refused.
HARMLESS = re.compile(
    r"(megatron|ascendspeed|modellink|mindspeed\w*|numpy|signal|pathlib)\..+|_codecs\.encode|_io\.BytesIO"
)


class Placeholder:
    """Stands for an object that is not needed: takes whatever it is given and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Placeholder:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def load(path: Path) -> dict[str, Any]:
    """What the file holds; tensors are views of the mapped file. Raises `UserError` for a damaged or unsafe one."""
    zipped = zipfile.is_zipfile(path)
    try:
        allowed: list[Any] = [argparse.Namespace]
        if zipped:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            allowed += [(Placeholder, name) for name in names if HARMLESS.fullmatch(name)]
        with torch.serialization.safe_globals(allowed):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        if found := re.search(r"(?:GLOBAL|module) (\S+)", str(error)):
            raise UserError(
                f"{path} was not loaded: its pickle asks for {found[1]}, which is none of Megatron's and could run code"
            ) from None
        raise UserError(f"{path} is damaged or no file of torch.save; fetch it again") from None
    except OSError as error:
        if error.errno != errno.EINVAL:  # torch seeks to before the beginning of what is left
            raise
        raise UserError(f"{path} is cut off or damaged; fetch it again") from None
    except (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError) as error:
        if "Cannot allocate memory" in str(error):
            raise UserError(f"{path} is larger than this machine's memory; convert it where it fits") from None
        raise UserError(f"{path} is cut off or damaged; fetch it again") from None
    if not isinstance(state, dict) or not any(name == "model" or name == "model0" for name in state):
        raise UserError(f"{path} is no checkpoint of Megatron: it holds no 'model'")
    return state


def arguments(state: dict[str, Any]) -> dict[str, Any]:
    """The run's arguments that the file carries, {} when it carries none."""
    said = state.get("args")
    return vars(said) if isinstance(said, argparse.Namespace) else {}
