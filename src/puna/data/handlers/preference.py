"""Preference pairs: a chosen and a rejected answer, in the layouts of TRL, LLaMA-Factory and HH-RLHF."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from puna.data.handlers.handler import Handler, require, require_text
from puna.data.handlers.messages import conversation, has_messages, message, messages_of, system_of, tools_of
from puna.data.samples import Messages, Pair, Row, RowError, Sample
from puna.data.sources import BadRow


def preference(row: Row) -> list[Sample | BadRow]:
    sides = [(require(row, name), name) for name in ("chosen", "rejected")]
    before: Messages = system_of(row)
    if has_messages(row, "conversations"):
        before += messages_of(row, "conversations")
    elif has_messages(row, "prompt"):
        before += messages_of(row, "prompt")
    elif "instruction" in row:
        before.append(message("user", require_text(row, "instruction")))
        if row.get("input"):
            before[-1]["input"] = require_text(row, "input")
    elif isinstance(row.get("prompt", row.get("question")), str) and not has_messages(row, "chosen"):
        before.append(message("user", row.get("prompt", row.get("question"))))
    tools = tools_of(row)
    pair = Pair(*(conversation([*before, *_answer(side, name)], tools=tools, last=True) for side, name in sides))
    if min(len(pair.chosen.messages), len(pair.rejected.messages)) < 2:
        raise RowError("chosen and rejected without a prompt")
    return [Sample(pair, key=json.dumps(pair.chosen.messages[:-1]))]


def _answer(side: Any, name: str) -> Messages:
    """The messages that one side of a preference adds."""
    if isinstance(side, Mapping) or has_messages({name: side}, name):
        return messages_of({name: side}, name)
    if not isinstance(side, str):
        raise RowError(f"{name} is neither text nor messages")
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", side)  # Anthropic's HH-RLHF holds the whole dialogue
    if len(parts) < 3 or parts[0].strip():
        return [message("assistant", side)]
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return [message("user" if role == "Human" else "assistant", content.strip()) for role, content in turns]


PREFERENCE = Handler(
    "preference",
    preference,
    "preference",
    fields=("chosen", "rejected"),
    optional=("prompt", "instruction", "input", "conversations", "question", "system", "tools"),
    sample="a pair of conversations, its last answers trained",
)
