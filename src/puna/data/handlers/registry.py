"""The registry of dataset handlers. Adding one is a record in a file of this package and its name in this list.

Detection takes the first handler that accepts the rows, so special formats come before general ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from puna.data.handlers import conversations, documents, instructions, moss, preference, squad
from puna.data.handlers.handler import Handler
from puna.data.samples import Row
from puna.errors import UserError, nearest

HANDLERS: dict[str, Handler] = {
    handler.name: handler
    for handler in (
        preference.PREFERENCE,
        conversations.OPENAI,
        conversations.SHAREGPT,
        conversations.VICUNA,
        moss.MOSS,
        moss.MOSS_TURNS,
        squad.SQUAD,
        squad.SQUAD_FIRST,
        instructions.LEETCODE,
        instructions.BELLE,
        instructions.ALPACA,
        documents.WIKITEXT,
        documents.WIKITEXT_CLEAN,
        documents.TEXT,
    )
}


def detect(rows: Sequence[Row], text_field: str = "text") -> str:
    """The name of the handler for the first rows of a source. UserError when none reads their fields."""
    if text_field != "text" and text_field in rows[0]:
        return "text"
    for handler in HANDLERS.values():
        if handler.accepts(rows):
            return handler.name
    raise UserError(
        f"No handler reads rows with the fields {', '.join(map(str, rows[0]))}: choose one with --handler "
        f"({', '.join(HANDLERS)}), or name the field of running text with --text-field."
    )


def get_handler(name: str, text_field: str = "text") -> Handler:
    """The handler of this name; UserError names the nearest. `text_field`: the field where `text` finds documents."""
    if name not in HANDLERS:
        raise UserError(f"Unknown handler {name!r}{nearest(name, HANDLERS)}; known are auto, {', '.join(HANDLERS)}.")
    handler = HANDLERS[name]
    return replace(handler, convert=partial(handler.convert, field=text_field)) if handler.uses_text_field else handler


def markdown_table() -> str:
    """The table of handlers in docs/data.md."""
    lines = ["| handler | fields | a sample is |", "|---|---|---|"]
    for handler in HANDLERS.values():
        fields = ", ".join(f"`{name}`" for name in handler.fields)
        optional = "; also " + ", ".join(f"`{name}`" for name in handler.optional) if handler.optional else ""
        lines.append(f"| `{handler.name}` | {fields}{optional} | {handler.sample} |")
    return "\n".join(lines)
