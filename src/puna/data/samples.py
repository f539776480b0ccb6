"""Samples, the form of a dataset's rows before tokenisation: document, conversation, completion or pair.

Handlers make samples and the encoder reads them, so that neither knows the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
# Dicts with "role" and "content"; `"train": False` excludes an answer from the loss.
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Text:
    """A document of running text."""

    text: str


@dataclass(frozen=True)
class Chat:
    """A conversation. `last`: only the last answer is trained, regardless of `--loss`."""

    messages: Messages
    tools: list[dict[str, Any]] | None = None
    last: bool = False


@dataclass(frozen=True)
class Completion:
    """A prompt that is encoded verbatim, without a chat template, and the answer to it."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Pair:
    """Two conversations that differ in the last answer."""

    chosen: Chat
    rejected: Chat


@dataclass(frozen=True)
class Sample:
    """`key`: samples with the same key go to the same split."""

    content: Text | Chat | Completion | Pair
    key: str = ""


class RowError(Exception):
    """The reason for rejecting a row: a noun phrase, equal for all rows with that fault, to be counted."""


class MissingField(RowError):
    """A row lacks a field that its handler needs."""
