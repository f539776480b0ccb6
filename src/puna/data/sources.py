"""Rows of files and Hub datasets at constant memory, in chunks that any process can read.

`chunks` splits a source into chunks of about a megabyte, `rows` parses a chunk. Uncompressed line formats are split
without being read; of all others the calling process reads the bytes and leaves the parsing to the caller of `rows`.
The chunks of a source are deterministic, so a stopped job can resume at the n-th.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Literal

from puna.data import records
from puna.data.json_stream import json_texts
from puna.data.records import BEGINS, MAX_ROW, Span, batches, grouped, raw_lines, spans
from puna.data.source_files import Source
from puna.errors import UserError

Documents = Literal["line", "paragraph", "file", "article"]
CHUNK_ROWS = 512
ZSTD_READ = 1 << 10  # bytes that are decompressed at a time; zstd turns 4 into at most 128 KiB


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a source.

    `content`: a `Span` or a list of bytes to be parsed as `format`, or for "rows" a list of dicts or a pyarrow batch.
    """

    source: str
    format: Literal["json", "text", "rows"]
    content: Any
    documents: Documents = "line"


@dataclass(frozen=True)
class BadRow:
    """A row that could not be read, and why."""

    reason: str


MALFORMED = BadRow("malformed JSON")


def chunks(source: Source, documents: Documents = "line") -> Iterator[Chunk]:
    """The chunks of a source, in order. `documents` is what makes a row of a text file.

    "line": every line that isn't blank; "paragraph": lines up to a blank one; "article": WikiText's articles; "file":
    all of it. Raises UserError for a damaged or truncated file, and for a missing package.
    """
    with _errors(source):
        if source.format in ("jsonl", "txt"):
            begins = BEGINS["line" if source.format == "jsonl" else documents]
            format: Literal["json", "text"] = "json" if source.format == "jsonl" else "text"
            if source.packed:
                with _open(source) as file:
                    for texts in grouped(raw_lines(file), begins):
                        yield Chunk(source.name, format, texts, documents)
            else:
                for span in spans(source.name, begins):
                    yield Chunk(source.name, format, span, documents)
        elif documents == "article":
            lines = (
                line.encode() + b"\n"
                for chunk in _tables(source)
                for row in rows(chunk)
                for line in _text(row, source).removesuffix("\n").split("\n")
            )
            for texts in grouped(lines, BEGINS["article"]):
                yield Chunk(source.name, "text", texts, "article")
        else:
            yield from _tables(source)


def rows(chunk: Chunk) -> Iterator[dict[str, Any] | BadRow]:
    """The rows of a chunk: dicts, {"text": ...} for text files; `BadRow` for one that can't be read."""
    content = chunk.content
    if chunk.format == "rows":
        for row in content if isinstance(content, list) else content.to_pylist():
            yield row if None not in row else BadRow("more fields than the header names")
        return
    if isinstance(content, Span):
        with open(content.path, "rb") as file:
            file.seek(content.start)
            data = file.read(content.end - content.start)
        if content.start == 0:
            data = data.removeprefix(b"\xef\xbb\xbf")
        begins = BEGINS["line" if chunk.format == "json" else chunk.documents]
        content = list(records.records(io.BytesIO(data), begins))
    for raw in content:
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            yield BadRow("not UTF-8")
            continue
        if "\0" in text:
            yield BadRow("holds a zero byte, as UTF-16 does")
        elif chunk.format == "text":
            if text.strip():
                yield {"text": text if chunk.documents in ("file", "article") else text.strip("\r\n")}
        elif text.strip():
            yield _row(text)


def _row(text: str) -> dict[str, Any] | BadRow:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return MALFORMED
    return value if isinstance(value, dict) else BadRow("not a JSON object")


def _tables(source: Source) -> Iterator[Chunk]:
    """Chunks of the formats that aren't plain lines."""
    if source.format == "json":
        with _open(source) as file:
            values = json_texts(io.TextIOWrapper(file, "utf-8-sig", "surrogateescape"), MAX_ROW)
            for texts in batches(values, len, records.CHUNK_BYTES):
                if _row(texts[-1]) == MALFORMED:  # the stream ends with what it can't parse
                    raise UserError(f"{source.name} is damaged or cut short: its JSON is malformed or has no end.")
                yield Chunk(source.name, "json", [text.encode(errors="surrogateescape") for text in texts])
    elif source.format in ("csv", "tsv"):
        with _open(source) as file:
            lines = io.TextIOWrapper(file, "utf-8-sig", newline="")
            table = _csv_rows(lines, "," if source.format == "csv" else "\t")
            for batch in batches(table, lambda row: 1, CHUNK_ROWS):
                yield Chunk(source.name, "rows", batch)
    elif source.format == "hub":
        for batch in batches(_hub(source), lambda row: 1, CHUNK_ROWS):
            yield Chunk(source.name, "rows", batch)
    else:
        for batch in _arrow(source):
            yield Chunk(source.name, "rows", batch)


def _csv_rows(lines: Iterable[str], delimiter: str) -> Iterator[dict[Any, Any]]:
    """Rows under a header; csv.Error where the file ends within quotes, which the csv module alone accepts."""
    csv.field_size_limit(MAX_ROW)
    record: list[str] = []  # lines of the row that is being read

    def read() -> Iterator[str]:
        for line in lines:
            record.append(line)
            yield line

    last: list[str] = []
    for row in csv.DictReader(read(), delimiter=delimiter):
        last = record[:]
        record.clear()
        yield row
    try:
        list(csv.reader(last, delimiter=delimiter, strict=True))
    except csv.Error as error:
        if "end of data" in str(error):
            raise


def _arrow(source: Source) -> Iterator[Any]:
    """Record batches of a parquet or arrow file."""
    pyarrow = _need("pyarrow", f"reading {source.name}")
    if source.packed:
        raise UserError(
            f"{source.name} is compressed twice: unpack it, since {source.format} files are compressed inside."
        )
    if source.format == "parquet":
        with _need("pyarrow.parquet", source.name).ParquetFile(source.name) as file:
            yield from file.iter_batches(CHUNK_ROWS)
        return
    with pyarrow.memory_map(source.name) as mapped:
        ipc = _need("pyarrow.ipc", source.name)
        try:
            reader = ipc.open_stream(mapped)  # what `datasets` writes
        except pyarrow.ArrowInvalid:
            file = ipc.open_file(mapped)
            reader = (file.get_batch(index) for index in range(file.num_record_batches))
        for batch in reader:
            for start in range(0, batch.num_rows, CHUNK_ROWS):
                yield batch.slice(start, CHUNK_ROWS)


def _hub(source: Source) -> Iterable[dict[str, Any]]:
    datasets = _need("datasets", f"{source.name} is not a local file, and reading it from the Hugging Face Hub")
    try:
        return datasets.load_dataset(
            source.name, source.subset, split=source.split, revision=source.revision, streaming=True
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{source.name} is not a local file and can't be read from the Hub: {reason}.") from error


def _text(row: dict[str, Any] | BadRow, source: Source) -> str:
    if isinstance(row, BadRow) or not isinstance(row.get("text"), str):
        raise UserError(f"{source.name} has a row without text, so it isn't WikiText: choose another --handler.")
    return row["text"]


@contextmanager
def _open(source: Source) -> Iterator[IO[bytes]]:
    if source.packed == ".zst":
        zstandard = _need("zstandard", f"reading {source.name}")
        with open(source.name, "rb") as file:
            yield io.BufferedReader(_ZstdFile(file, zstandard.ZstdDecompressor()))
    elif source.packed == ".gz":
        with gzip.open(source.name, "rb") as stream:
            yield stream  # type: ignore[misc]
    else:
        with open(source.name, "rb") as file:
            yield file


class _ZstdFile(io.RawIOBase):
    """The decompressed bytes of zstd frames. EOFError when the last is incomplete, which `stream_reader` accepts."""

    def __init__(self, file: IO[bytes], decompressor: Any) -> None:
        self._file, self._decompressor = file, decompressor
        self._frame = decompressor.decompressobj()
        self._started = False  # whether the frame has any bytes
        self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._started = self._decompressor.decompressobj(), False
            data = data or self._file.read(ZSTD_READ)
            if not data:
                if self._started:
                    raise EOFError("the compressed stream has no end")
                return 0
            self._started = True
            self._output = self._frame.decompress(data)
        size = min(len(buffer), len(self._output))
        buffer[:size], self._output = self._output[:size], self._output[size:]
        return size


@contextmanager
def _errors(source: Source) -> Iterator[None]:
    """Turns what a damaged file raises into a UserError."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{source.name} is damaged or cut short: {str(error).rstrip('.')}.") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("pyarrow", "zstandard", "zstd"):
            raise UserError(f"{source.name} is damaged: {str(error).splitlines()[0].rstrip('.')}.") from error
        raise


def _need(package: str, task: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.partition(".")[0]
        raise UserError(f"{task[:1].upper()}{task[1:]} needs the package {name}: pip install 'puna[data]'.") from None
