"""Conversations: ShareGPT's and the OpenAI API's layout, which LLaMA-Factory, axolotl and TRL write too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from puna.data.handlers.handler import Handler
from puna.data.handlers.messages import chat, has_messages, messages_of, system_of, tools_of
from puna.data.samples import Row, RowError, Sample
from puna.data.sources import BadRow


def sharegpt(row: Row) -> list[Sample | BadRow]:
    turns = messages_of(row, "conversations")
    messages = system_of(row)
    while turns and turns[0]["role"] == "system":
        messages.append(turns.pop(0))
    # As FastChat does: an export may begin in the middle, with an answer, or end with a question.
    if turns and turns[0]["role"] == "assistant":
        turns.pop(0)
    if turns and turns[-1]["role"] == "user":
        turns.pop()
    if not turns:
        raise RowError("no question with an answer")
    return [chat([*messages, *turns], tools=tools_of(row))]


def openai(row: Row) -> list[Sample | BadRow]:
    return [chat(messages_of(row, "messages"), tools=tools_of(row))]


def is_openai(rows: Sequence[Row]) -> bool:
    return has_messages(rows[0], "messages")


SHAREGPT = Handler(
    "sharegpt",
    sharegpt,
    "instruction",
    fields=("conversations",),
    optional=("system", "tools"),
    sample="a conversation of `{from, value}` or `{role, content}`",
)
VICUNA = replace(SHAREGPT, name="vicuna", sample="the same as `sharegpt`", auto=False)
OPENAI = Handler(
    "openai",
    openai,
    "instruction",
    fields=("messages",),
    optional=("tools",),
    sample="a conversation of `{role, content}`",
    detect=is_openai,
)
