"""MOSS-003: turns named chat.turn_k, with markers in their texts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from puna.data.handlers.handler import Handler, require, require_text
from puna.data.handlers.messages import chat, message
from puna.data.samples import Messages, Row, RowError, Sample
from puna.data.sources import BadRow


def turns_of(row: Row) -> list[Messages]:
    """(question, answer) of each turn, without MOSS's markers."""
    turns = require(row, "chat")
    if not isinstance(turns, Mapping):
        raise RowError("chat is not an object of turns")
    pairs = []
    for name in sorted(turns, key=lambda name: int(re.sub(r"\D", "", name) or 0)):
        if turn := turns[name]:
            if not isinstance(turn, Mapping):
                raise RowError("a turn that is not an object")
            question = require_text(turn, "Human").replace("<eoh>", "").replace("<|Human|>:", "").strip()
            answer = require_text(turn, "MOSS").replace("<eom>", "").replace("<|MOSS|>:", "").strip()
            pairs.append([message("user", question), message("assistant", answer)])
    if not pairs:
        raise RowError("no question with an answer")
    return pairs


def moss(row: Row) -> list[Sample | BadRow]:
    return [chat([entry for turn in turns_of(row) for entry in turn])]


def moss_turns(row: Row) -> list[Sample | BadRow]:
    turns = turns_of(row)
    key = turns[0][0]["content"]
    ends = range(1, len(turns) + 1)
    return [chat([entry for turn in turns[:end] for entry in turn], last=True, key=key) for end in ends]


def is_moss(rows: Sequence[Row]) -> bool:
    return isinstance(rows[0].get("chat"), Mapping)


MOSS = Handler(
    "moss",
    moss,
    "instruction",
    fields=("chat",),
    sample="MOSS-003: a conversation of all turns",
    detect=is_moss,
)
MOSS_TURNS = replace(
    MOSS,
    name="moss-turns",
    convert=moss_turns,
    sample="MOSS-003: one for each turn, with all before it; its last answer is trained",
    auto=False,
)
