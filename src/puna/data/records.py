"""Text files split into records, and into spans of whole records, without reading more than a record at a time."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from puna.errors import UserError

CHUNK_BYTES = 1 << 20
MAX_ROW = 256 << 20  # bytes of a row or document
TITLE = re.compile(r"= (?!= ).+(?<! =) =")  # WikiText's heading of an article; those of sections begin with "= ="


# Where a record of a text begins: (line before, line) -> bool
BEGINS: dict[str, Callable[[bytes, bytes], bool]] = {
    "line": lambda before, line: True,
    "paragraph": lambda before, line: not before.strip() and bool(line.strip()),
    "article": lambda before, line: not before.strip() and bool(TITLE.fullmatch(line.decode(errors="replace").strip())),
    "file": lambda before, line: False,
}


@dataclass(frozen=True)
class Span:
    """Bytes `start` to `end` of a file, read lazily."""

    path: str
    start: int
    end: int


def spans(path: str, begins: Callable[[bytes, bytes], bool]) -> Iterator[Span]:
    """Spans of about CHUNK_BYTES that begin where a record does."""
    with open(path, "rb") as file:
        size = file.seek(0, io.SEEK_END)
        start = 0
        while start < size:
            file.seek(min(start + CHUNK_BYTES, size))
            file.readline(MAX_ROW)  # the rest of a line; the next one is complete
            end = file.tell()
            before = file.readline(MAX_ROW) if begins is not BEGINS["line"] else b""
            while begins is not BEGINS["line"] and end < size:
                end = file.tell()
                line = file.readline(MAX_ROW)
                if begins(before, line):
                    break
                before = line
                if begins is BEGINS["file"]:
                    end = size
            if end - start >= MAX_ROW:
                raise UserError(
                    f"{path} has a document of more than {MAX_ROW >> 20} MiB: split it, or choose --documents."
                )
            yield Span(path, start, end)
            start = end


def records(lines: Iterable[bytes], begins: Callable[[bytes, bytes], bool]) -> Iterator[bytes]:
    """Lines joined into records."""
    held: list[bytes] = []
    size, before = 0, b""
    for line in lines:
        if held and begins(before, line):
            yield b"".join(held)
            held, size = [], 0
        held.append(line)
        size, before = size + len(line), line
        if size >= MAX_ROW:
            raise UserError(f"A document has more than {MAX_ROW >> 20} MiB: split it, or choose --documents.")
    if held:
        yield b"".join(held)


def grouped(lines: Iterable[bytes], begins: Callable[[bytes, bytes], bool]) -> Iterator[list[bytes]]:
    """Records in lists of about CHUNK_BYTES."""
    return batches(records(lines, begins), len, CHUNK_BYTES)


def batches(items: Iterable[Any], weight: Callable[[Any], int], limit: int) -> Iterator[list[Any]]:
    held: list[Any] = []
    size = 0
    for item in items:
        held.append(item)
        size += weight(item)
        if size >= limit:
            yield held
            held, size = [], 0
    if held:
        yield held


def raw_lines(file: IO[bytes]) -> Iterator[bytes]:
    first = True
    while line := file.readline(MAX_ROW):
        yield line.removeprefix(b"\xef\xbb\xbf") if first else line
        first = False
