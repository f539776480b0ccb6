"""The checkpoint formats, in the order in which they are tried. A new format is one file and one line here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, fields, make_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from puna.errors import UserError, nearest
from puna.options import option
from puna.weights.formats import gguf, hf, llama2c, megatron, meta, presharded
from puna.weights.formats.format import Format

FORMATS: tuple[Format, ...] = (
    hf.FORMAT,
    presharded.FORMAT,
    megatron.FORMAT,
    meta.FORMAT,
    gguf.FORMAT,
    llama2c.FORMAT,
)


def detect(path: Path) -> Format | None:
    """The format of a file or directory, None when it is in none that puna reads."""
    return next((fmt for fmt in FORMATS if fmt.detect(path)), None)


def find(name: str) -> Format:
    """The format of that name or alias. Raises `UserError`, with the nearest name, when there is none."""
    known = {word: fmt for fmt in FORMATS for word in (fmt.name, *fmt.aliases)}
    if name not in known:
        raise UserError(f"There is no format {name!r}; puna knows {names(FORMATS)}{nearest(name, known)}.")
    return known[name]


def writable() -> list[Format]:
    """The formats that puna writes."""
    return [fmt for fmt in FORMATS if fmt.write is not None]


def names(formats: tuple[Format, ...] | list[Format]) -> str:
    """Names for a sentence: "hf, gguf and meta"."""
    *most, last = (fmt.name for fmt in formats)
    return f"{', '.join(most)} and {last}" if most else last


def dtypes() -> dict[str, list[Format]]:
    """Each data type that can be written, with the formats that hold it."""
    found: dict[str, list[Format]] = {}
    for fmt in writable():
        for name in fmt.dtypes:
            found.setdefault(name, []).append(fmt)
    return found


def write_options() -> Iterator[tuple[Field, list[Format]]]:
    """Each write option, a dataclass field, with the formats that take it."""
    found: dict[str, tuple[Field, list[Format]]] = {}
    for fmt in writable():
        for entry in fields(fmt.options):
            found.setdefault(entry.name, (entry, []))[1].append(fmt)
    yield from found.values()


def chosen(options: Any) -> dict[str, Any]:
    """The values of the write options in a verb's options, by name."""
    return {entry.name: getattr(options, entry.name) for entry, _ in write_options()}


def _settings(entry: Field) -> dict[str, Any]:
    """The arguments of `option` beside default and help."""
    return {name: value for name, value in entry.metadata.items() if name != "help"}


def _write_options_class() -> type:
    """A dataclass of all formats' write options, the help of each opening with the formats that take it."""
    hints = {name: hint for fmt in writable() for name, hint in get_type_hints(fmt.options).items()}
    entries = []
    for entry, formats in write_options():
        text = f"{names(formats)}: {entry.metadata['help']}"
        entries.append((entry.name, hints[entry.name], option(entry.default, text, **_settings(entry))))
    doc = {"__doc__": "Options of the written format.", "__module__": __name__}
    return make_dataclass("WriteOptions", entries, kw_only=True, namespace=doc)


WriteOptions: Any = _write_options_class()
OLD_NAMES = {alias: fmt.name for fmt in writable() for alias in fmt.aliases}
TO = f"format to write: {', '.join(fmt.name for fmt in writable())}"
DTYPE = "data type to write: " + ", ".join(
    name if len(formats) == len(writable()) else f"{name} ({names(formats)})" for name, formats in dtypes().items()
)
