"""The record that a dataset handler declares, and how fields of a row are read.

A handler is a function from a row to samples. It knows field names and markers, but neither tokenizer nor template.
Everything else (detection, help, errors, docs, storage) reads the record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from puna.data.samples import MissingField, Row, RowError, Sample
from puna.data.sources import BadRow, Documents


@dataclass(frozen=True)
class Handler:
    """A dataset format.

    name: the value of `--handler`.
    convert: the samples of a row; a `BadRow` among them is a rejected sample. Raises RowError for an unusable row.
    kind: how samples are stored: "text" as token ids, "instruction" as ids and labels, "preference" as two of these.
    fields: the required fields of a row; `optional`: further fields that are read.
    sample: the description of a sample, for the table in docs/data.md.
    detect: whether the first rows of a source are of this format; by default, whether the first has all `fields`.
    auto: False for a handler that is only chosen by name.
    documents: the unit that text files are split into, overriding `--documents`.
    needs_template: samples are rendered with the tokenizer's chat template.
    uses_text_field: `convert` takes a keyword `field`, the value of `--text-field`.
    """

    name: str
    convert: Callable[..., list[Sample | BadRow]]
    kind: Literal["text", "instruction", "preference"]
    fields: tuple[str, ...]
    sample: str
    optional: tuple[str, ...] = ()
    detect: Callable[[Sequence[Row]], bool] | None = None
    auto: bool = True
    documents: Documents | None = None
    needs_template: bool = True
    uses_text_field: bool = False

    def accepts(self, rows: Sequence[Row]) -> bool:
        """Whether `--handler auto` chooses this handler for the first rows of a source."""
        if not self.auto:
            return False
        return self.detect(rows) if self.detect else all(name in rows[0] for name in self.fields)


def require(row: Row, name: str) -> Any:
    """A field of a row; MissingField when it is absent or null."""
    if row.get(name) is None:
        raise MissingField(f"no field {name!r}")
    return row[name]


def require_text(row: Row, name: str) -> str:
    """A field that is a text with more than white space; RowError otherwise."""
    value = require(row, name)
    if not isinstance(value, str):
        raise RowError(f"{name} is not text")
    if not value.strip():
        raise RowError(f"an empty {name}")
    return valid_unicode(value)


def require_objects(row: Row, name: str) -> list[Row]:
    """A field that is a list of objects, at least one; RowError otherwise."""
    value = require(row, name)
    if not isinstance(value, list) or not value or not all(isinstance(entry, dict) for entry in value):
        raise RowError(f"{name} is not a list of objects")
    return value


def valid_unicode(text: str) -> str:
    """The text; RowError when it holds half of a surrogate pair, which UTF-8 can't encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError("half of a surrogate pair") from None
    return text
