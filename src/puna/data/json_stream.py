"""A stream of the elements of a JSON file of any size; the standard library reads only whole files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO

READ = 1 << 20  # characters
DECODER = json.JSONDecoder()


def json_texts(file: IO[str], limit: int) -> Iterator[str]:
    """The text of each row: the elements of an array, or of the array under "data" in an object, or value after value.

    A malformed or truncated value is yielded as the beginning of its text and ends the stream. At most one element, up
    to `limit` characters, and one block are in memory.
    """
    window = _Window(file, limit)
    if window.peek() == "[":
        window.take()
        yield from _elements(window)
    elif window.peek() == "{" and window.enter("data"):
        yield from _elements(window)
    else:
        while window.peek():
            text = window.value()
            if text is None:
                yield window.broken()
                return
            yield text


def _elements(window: _Window) -> Iterator[str]:
    while (sign := window.peek()) != "]":
        if sign == ",":
            window.take()
            continue
        text = window.value()
        if text is None:
            yield window.broken()
            return
        yield text


class _Window:
    """The part of the text that is being parsed."""

    def __init__(self, file: IO[str], limit: int) -> None:
        self.file, self.limit = file, limit
        self.text, self.at, self.ended = "", 0, False
        self.held: int | None = None  # where the text begins that must stay, when that is before `at`

    def peek(self) -> str:
        """The next character that isn't white space, "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def take(self) -> None:
        self.at += 1

    def value(self) -> str | None:
        """The text of the next value, None when it is incomplete."""
        self.peek()
        while True:
            try:
                _, end = DECODER.raw_decode(self.text, self.at)
            except (json.JSONDecodeError, RecursionError):
                if not self._more():
                    return None
                continue
            text, self.at = self.text[self.at : end], end
            return text

    def enter(self, wanted: str) -> bool:
        """Advance over the members of an object into the array `wanted`; don't move when there is none."""
        self.held = self.at
        self.take()
        found = False
        while not found and self.peek() == '"':
            key = self.value()
            if self.peek() != ":":
                break
            self.take()
            if key == f'"{wanted}"' and self.peek() == "[":
                self.take()
                found = True
            elif self.value() is None:
                break
            elif self.peek() == ",":
                self.take()
        if not found:
            self.at = self.held
        self.held = None
        return found

    def broken(self) -> str:
        return self.text[self.at : self.at + 200] or "{"

    def _more(self) -> bool:
        """Read a block and drop the consumed text; False at the end of the file or beyond the limit."""
        first = self.at if self.held is None else self.held
        if self.ended or len(self.text) - first > self.limit:
            return False
        block = self.file.read(max(READ, len(self.text) - first))
        self.ended = not block
        self.text, self.at = self.text[first:] + block, self.at - first
        self.held = None if self.held is None else 0
        return not self.ended
