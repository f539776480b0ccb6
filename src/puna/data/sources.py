"""Rows out of files and Hub datasets, at constant memory, in pieces that any process can read.

`find` names the sources, `chunks` cuts one into pieces of about a megabyte, `rows` reads a piece. Line formats that are
not compressed are cut without being read; of all others the calling process reads the bytes, and leaves the parsing to
whoever calls `rows`. The chunks of a source are always the same, so a stopped job can go on at the n-th.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from puna.data import records
from puna.data.json_stream import json_texts
from puna.data.records import BEGINS, MAX_ROW, Span, batches, grouped, raw_lines, spans
from puna.errors import UserError

Documents = Literal["line", "paragraph", "file", "article"]
FORMATS = {
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    **dict.fromkeys((".txt", ".text", ".tokens", ".raw"), "txt"),
    **{f".{name}": name for name in ("json", "parquet", "arrow", "csv", "tsv")},
}
PACKED = (".gz", ".zst")
CHUNK_ROWS = 512
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """A file, or a dataset of the Hugging Face Hub (format "hub"). `packed` is "", ".gz" or ".zst"."""

    name: str
    format: str
    packed: str = ""
    subset: str | None = None
    split: str = "train"
    revision: str | None = None


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
class Bad:
    """A row that could not be read, and why."""

    reason: str


def find(
    names: Sequence[str], *, subset: str | None = None, split: str = "train", revision: str | None = None
) -> list[Source]:
    """The sources behind files, folders, globs and Hub names (org/name). Of a folder the most frequent format is taken.

    Raises UserError when nothing is there or a format is unknown.
    """
    found: dict[str, Source] = {}
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            inside = [_file(str(file)) for file in sorted(path.rglob("*")) if _visible(file, path)]
            known = [file for file in inside if file is not None]
            if not known:
                raise UserError(f"the folder {name} holds no file that puna can read: {_known()}")
            most = Counter(file.format for file in known).most_common(1)[0][0]
            chosen = [file for file in known if file.format == most]
        elif path.exists() or any(sign in name for sign in "*?["):
            files = [str(path)] if path.exists() else sorted(glob.glob(str(path), recursive=True))
            if not files:
                raise UserError(f"no file matches {name}")
            chosen = []
            for file in files:
                if Path(file).is_file():
                    source = _file(file)
                    if source is None:
                        raise UserError(f"puna does not know the format of {file}: {_known()}")
                    chosen.append(source)
        elif HUB_NAME.fullmatch(name) and not Path(name).suffix:
            chosen = [Source(name, "hub", subset=subset, split=split, revision=revision)]
        else:
            raise UserError(f"there is no file {name}")
        found |= {source.name: source for source in chosen}
    return list(found.values())


def chunks(source: Source, documents: Documents = "line") -> Iterator[Chunk]:
    """The pieces of a source, in order. `documents` says what makes a row of a text file.

    "line": every line that isn't blank; "paragraph": lines up to a blank one; "article": WikiText's articles; "file":
    all of it. Raises UserError when the file is damaged, or a package to read it is missing.
    """
    with _errors(source):
        if source.format in ("jsonl", "txt"):
            begins = BEGINS["line" if source.format == "jsonl" else documents]
            kind: Literal["json", "text"] = "json" if source.format == "jsonl" else "text"
            if source.packed:
                with _open(source) as file:
                    for texts in grouped(raw_lines(file), begins):
                        yield Chunk(source.name, kind, texts, documents)
            else:
                for span in spans(source.name, begins):
                    yield Chunk(source.name, kind, span, documents)
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


def rows(chunk: Chunk) -> Iterator[dict[str, Any] | Bad]:
    """The rows of a chunk: dicts, {"text": ...} for text files; `Bad` for one that can't be read."""
    content = chunk.content
    if chunk.format == "rows":
        for row in content if isinstance(content, list) else content.to_pylist():
            yield row if None not in row else Bad("more fields than the header names")
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
            yield Bad("not UTF-8")
            continue
        if "\0" in text:
            yield Bad("holds a zero byte, as UTF-16 does")
        elif chunk.format == "text":
            if text.strip():
                yield {"text": text if chunk.documents in ("file", "article") else text.strip("\r\n")}
        elif text.strip():
            yield _row(text)


def _row(text: str) -> dict[str, Any] | Bad:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return Bad("malformed JSON")
    return value if isinstance(value, dict) else Bad("not a JSON object")


def _tables(source: Source) -> Iterator[Chunk]:
    """Chunks of the formats that are no plain lines."""
    if source.format == "json":
        with _open(source) as file:
            values = json_texts(io.TextIOWrapper(file, "utf-8-sig", "surrogateescape"), MAX_ROW)
            for texts in batches(values, len, records.CHUNK_BYTES):
                yield Chunk(source.name, "json", [text.encode(errors="surrogateescape") for text in texts])
    elif source.format in ("csv", "tsv"):
        csv.field_size_limit(MAX_ROW)
        with _open(source) as file:
            table = csv.DictReader(
                io.TextIOWrapper(file, "utf-8-sig", newline=""), delimiter="," if source.format == "csv" else "\t"
            )
            for batch in batches(table, lambda row: 1, CHUNK_ROWS):
                yield Chunk(source.name, "rows", batch)
    elif source.format == "hub":
        for batch in batches(_hub(source), lambda row: 1, CHUNK_ROWS):
            yield Chunk(source.name, "rows", batch)
    else:
        for batch in _arrow(source):
            yield Chunk(source.name, "rows", batch)


def _arrow(source: Source) -> Iterator[Any]:
    """Record batches of a parquet or arrow file."""
    pyarrow = _need("pyarrow", f"reading {source.name}")
    if source.packed:
        raise UserError(f"{source.name} is packed twice: unpack it, {source.format} files are compressed inside")
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
    datasets = _need("datasets", f"{source.name} is no file here, and reading it from the Hugging Face Hub")
    try:
        return datasets.load_dataset(
            source.name, source.subset, split=source.split, revision=source.revision, streaming=True
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"cannot read {source.name}, neither as a file nor from the Hub: {reason}") from error


def _text(row: dict[str, Any] | Bad, source: Source) -> str:
    if isinstance(row, Bad) or not isinstance(row.get("text"), str):
        raise UserError(f"{source.name} has a row without a text, so it holds no WikiText lines")
    return row["text"]


@contextmanager
def _open(source: Source) -> Iterator[IO[bytes]]:
    if source.packed == ".zst":
        zstandard = _need("zstandard", f"reading {source.name}")
        with open(source.name, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
            yield io.BufferedReader(stream)
    elif source.packed == ".gz":
        with gzip.open(source.name, "rb") as stream:
            yield stream  # type: ignore[misc]
    else:
        with open(source.name, "rb") as file:
            yield file


@contextmanager
def _errors(source: Source) -> Iterator[None]:
    """Whatever a damaged file raises becomes one sentence."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{source.name} is damaged or cut short: {error}") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("pyarrow", "zstandard", "zstd"):
            raise UserError(f"{source.name} is damaged: {str(error).splitlines()[0]}") from error
        raise


def _need(package: str, task: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.partition(".")[0]
        raise UserError(f"{task} needs the package {name}: pip install 'puna[data]'") from None


def _file(name: str) -> Source | None:
    path = Path(name)
    packed = path.suffix if path.suffix in PACKED else ""
    kind = FORMATS.get((path.with_suffix("") if packed else path).suffix.lower())
    return Source(name, kind, packed) if kind else None


def _visible(file: Path, folder: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)


def _known() -> str:
    return f"known endings are {', '.join(FORMATS)}, each also with .gz or .zst"
