"""The input of `puna generate`: prompts as arguments, lines of text, or rows of JSONL. A bad one fails alone."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

from puna.engine.sampling_params import SamplingParams
from puna.errors import UserError
from puna.options import convert_all

if TYPE_CHECKING:
    from puna.engine.outputs import RequestOutput

BOM = b"\xef\xbb\xbf"  # which editors of Windows put before UTF-8 text
MAX_LINE = 64 << 20  # bytes of a line of input
ALIASES = {"max_completion_tokens": "max_tokens", "max_new_tokens": "max_tokens"}
Line = tuple[str, bytes]  # where it is, and its bytes
Record = dict[str, Any]


@dataclass
class Row:
    """One request; `error` says why it has no answer, `output` is its answer once there is one."""

    index: int
    prompt: Any = None  # text, token ids, or messages
    options: Record = field(default_factory=dict)
    carried: Record = field(default_factory=dict)  # "id" and "metadata", copied to the record
    error: str | None = None
    output: RequestOutput | None = None
    fingerprint: str | None = None  # of all that the answer depends on, where an output file keeps it


@dataclass(frozen=True)
class RowReader:
    """Makes requests of lines. `jsonl`: rows rather than prompts. `chat`: a prompt is a user's message."""

    jsonl: bool
    chat: bool
    system: str | None
    run_fingerprint: str | None = None  # of the model and the options of the run; rows get fingerprints then

    def rows(self, lines: Iterator[Line]) -> Iterator[Row]:
        """A row per line. One that cannot be read has an error."""
        for index, line in enumerate(lines):
            row = Row(index)
            try:
                text = _decode(*line)
                if self.jsonl:
                    self._fill(row, text)
                else:
                    row.prompt = self._ask(text)
            except UserError as error:
                row.error = str(error)
            except RecursionError:
                row.error = "Lists or objects are nested too deeply."
            if self.run_fingerprint is not None:
                content = json.dumps([self.run_fingerprint, row.prompt, row.options, row.error])
                row.fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]
            yield row

    def _fill(self, row: Row, line: str) -> None:
        """Read a JSON line into `row`."""
        try:
            data = json.loads(line)
        except ValueError as error:
            raise UserError(f"The row is not JSON: {error}.") from None
        if not isinstance(data, dict):
            raise UserError('The row is not a JSON object with "prompt" or "messages".')
        row.carried = {key: data.pop(key) for key in ("id", "metadata") if key in data}
        prompt, messages = data.pop("prompt", None), data.pop("messages", None)
        if (prompt is None) == (messages is None):
            raise UserError('A row needs "prompt" or "messages", one of the two.')
        if messages is not None:
            row.prompt = self._with_system(_messages(messages))
        elif isinstance(prompt, str):
            row.prompt = self._ask(prompt)
        elif isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt) and not self.chat:
            row.prompt = prompt
        else:
            raise UserError('"prompt" is text, or without --chat a list of token ids.')
        given = {ALIASES.get(key, key): value for key, value in data.items() if value is not None}
        row.options = convert_all(SamplingParams, given, "the row")

    def _ask(self, prompt: str) -> Any:
        return self._with_system([{"role": "user", "content": prompt}]) if self.chat else prompt

    def _with_system(self, messages: list[Record]) -> list[Record]:
        if self.system is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system}, *messages]


@contextmanager
def open_lines(prompts: Sequence[str], file: str | None) -> Iterator[Iterator[Line]]:
    """The prompts, one after the other: arguments, lines of a file (`-` is stdin), or all of stdin as one."""
    if prompts:
        yield (("The prompt", prompt.encode(errors="surrogateescape")) for prompt in prompts)
    elif not file:
        yield iter([("stdin", sys.stdin.buffer.read().removeprefix(BOM).replace(b"\r\n", b"\n").removesuffix(b"\n"))])
    elif file == "-":
        yield _lines(sys.stdin.buffer, "stdin")
    else:
        with open(file, "rb") as opened:
            yield _lines(opened, file)


def _lines(file: BinaryIO, name: str) -> Iterator[Line]:
    """The lines that are not blank. A line that is too long is cut where that shows, and its rest is skipped."""
    number = 0
    while line := file.readline(MAX_LINE):
        number += 1
        content = line.removeprefix(BOM) if number == 1 else line
        if content.strip():
            yield f"line {number} of {name}", content.rstrip(b"\r\n")
        while not line.endswith(b"\n") and (line := file.readline(MAX_LINE)):
            pass


def _decode(where: str, line: bytes) -> str:
    if len(line) >= MAX_LINE:
        raise UserError(f"{where} is longer than {MAX_LINE >> 20} MiB.")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text ({error.reason}); convert it first.") from None


def _messages(messages: Any) -> list[Record]:
    if isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages):
        return messages
    raise UserError('"messages" is a list of {"role": "...", "content": "..."}.')
