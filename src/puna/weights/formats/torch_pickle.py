"""Files of torch.save (.pth, .bin, .pt), read without running anything in them.

Tensors are views of the mapped file where its format allows it. A pickle may only name tensors and the harmless classes
that the caller lists; those become placeholders. Its size and its number of opcodes are bounded before it is unpickled,
so that a small file can't fill the memory.
"""

from __future__ import annotations

import errno
import io
import pickle
import pickletools
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from puna.errors import UserError
from puna.files import open_file

# A state dict takes about 300 bytes and 40 opcodes per tensor; an opcode can allocate some hundred bytes.
MAX_PICKLE, MAX_OPCODES = 32 << 20, 1 << 20
OLD_PICKLES = (
    5  # that torch's format from before version 1.6 begins with: magic, version, system, objects, storage keys
)
INSTEAD = "get the checkpoint as safetensors"


class Placeholder:
    """Replaces an object that isn't needed: takes any arguments and state, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Placeholder:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


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
    """The state dict in the file: names and tensors, nothing else. Raises `UserError` as `load_objects`."""
    state = load_objects(path)
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise UserError(f"{path} holds {name!r}, which is not a plain tensor; puna reads state dicts alone.")
    return state


def load_objects(
    path: Path, *, classes: tuple[type, ...] = (), placeholders: re.Pattern | None = None, instead: str = INSTEAD
) -> dict[str, Any]:
    """The dictionary in the file. Its tensors are views of the mapped file, except in torch's old, unzipped format,
    which is read whole.

    Beside tensors and plain values it may hold instances of `classes`, and of classes whose full names match
    `placeholders`, which become a `Placeholder`. Raises `UserError` for a damaged file, and for one whose pickle names
    anything else: that could run code. `instead`: what the user can do then.
    """
    _check_size(path)
    zipped = zipfile.is_zipfile(path)
    try:
        allowed: list[Any] = list(classes)
        if zipped and placeholders is not None:
            found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            allowed += [(Placeholder, name) for name in found if placeholders.fullmatch(name)]
        with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
            warnings.simplefilter("ignore", UserWarning)  # a pickle of another protocol, which is read or refused below
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        if match := re.search(r"\b(?:GLOBAL|module) (\S+)", str(error)):
            raise UserError(
                f"{path} was not loaded: its pickle asks for {match[1]}, not only for tensors, and could run code;"
                f" {instead}."
            ) from None
        raise UserError(f"{path} is damaged or not a file of torch.save; fetch it again.") from None
    except OSError as error:
        if error.errno != errno.EINVAL:  # torch seeks to before the beginning of what is left
            raise
        raise UserError(f"{path} is cut off or damaged; fetch it again.") from None
    except (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError) as error:
        if "Cannot allocate memory" in str(error):  # torch's mappings reserve memory
            raise UserError(f"{path} is larger than this machine's memory; {instead}.") from None
        raise UserError(f"{path} is cut off or damaged; fetch it again.") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no dictionary of tensors.")
    return state


def _check_size(path: Path) -> None:
    """Raises `UserError` when the file's pickles are larger than those of any checkpoint."""
    with open_file(path) as file:
        if zipfile.is_zipfile(file):
            pickles, count = _zipped_pickles(path, file), 1
        else:
            file.seek(0)
            pickles, count = [file.read(MAX_PICKLE + 1)], OLD_PICKLES
    left = MAX_OPCODES
    for content in pickles:
        stream = io.BytesIO(content)
        try:
            for _ in range(count):
                for _ in pickletools.genops(stream):
                    left -= 1
                    if left < 0:
                        raise _too_large(path)
        except (ValueError, IndexError, KeyError, OverflowError):  # not a pickle, or cut off: torch says so
            if stream.tell() > MAX_PICKLE:
                raise _too_large(path) from None


def _zipped_pickles(path: Path, file: IO[bytes]) -> list[bytes]:
    contents = []
    try:
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith(".pkl"):
                    if entry.file_size > MAX_PICKLE:
                        raise _too_large(path)
                    with archive.open(entry) as opened:
                        opened._expected_crc = None  # type: ignore[attr-defined]  # torch can be told to write none
                        contents.append(opened.read())
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError, OSError):
        raise UserError(f"{path} is cut off or damaged; fetch it again.") from None
    return contents


def _too_large(path: Path) -> UserError:
    return UserError(f"{path} was not loaded: its pickle is larger than that of any checkpoint; {INSTEAD}.")
