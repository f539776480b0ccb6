"""The files and Hub datasets behind the names that a user gives."""

from __future__ import annotations

import glob
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from puna.errors import UserError

FORMATS = {
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    **dict.fromkeys((".txt", ".text", ".tokens", ".raw"), "txt"),
    **{f".{name}": name for name in ("json", "parquet", "arrow", "csv", "tsv")},
}
PACKED = (".gz", ".zst")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
SPLIT_NAME = re.compile(r"(?<![a-z])(train|test|valid|val|dev|eval)(ing|ation)?(?![a-z])")
DATASETS_METADATA = ("state.json", "dataset_info.json", "dataset_dict.json")  # what datasets.save_to_disk writes
MAX_STATE = 1 << 20  # bytes of a state.json


@dataclass(frozen=True)
class Source:
    """A file, or a dataset of the Hugging Face Hub (format "hub"). `packed` is "", ".gz" or ".zst"."""

    name: str
    format: str
    packed: str = ""
    subset: str | None = None
    split: str = "train"
    revision: str | None = None


def find(
    names: Sequence[str], *, subset: str | None = None, split: str = "train", revision: str | None = None
) -> list[Source]:
    """The sources behind files, folders, globs and Hub names (org/name).

    Of a folder the format with the most bytes is taken; a note on stderr says what is skipped. Raises UserError for a
    name without files and for an unknown format.
    """
    sources: dict[str, Source] = {}
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            chosen = _folder(path)
        elif path.exists() or any(sign in name for sign in "*?["):
            files = [str(path)] if path.exists() else sorted(glob.glob(str(path), recursive=True))
            if not files:
                raise UserError(f"No file matches {name}.")
            chosen = []
            for file in files:
                if Path(file).is_file():
                    source = _file(file)
                    if source is None:
                        raise UserError(f"The format of {file} is unknown; {_endings()}.")
                    chosen.append(source)
        elif HUB_NAME.fullmatch(name) and not Path(name).suffix:
            chosen = [Source(name, "hub", subset=subset, split=split, revision=revision)]
        else:
            raise UserError(f"There is no file {name}.")
        sources |= {source.name: source for source in chosen}
    return list(sources.values())


def _folder(folder: Path) -> list[Source]:
    """The files of a folder that are read, with notes on stderr about the others and about several splits."""
    files = _data_files([file for file in sorted(folder.rglob("*")) if _visible(file, folder)])
    readable = [(file, source) for file in files if (source := _file(str(file)))]
    if not readable:
        raise UserError(f"The folder {folder} holds no file that puna reads; {_endings()}.")
    sizes: Counter[str] = Counter()
    for file, source in readable:
        sizes[source.format] += file.stat().st_size
    taken = max(sizes, key=lambda format: sizes[format])
    chosen = [(file, source) for file, source in readable if source.format == taken]
    skipped = [str(file.relative_to(folder)) for file in files if file not in dict(chosen) and file.suffix != ".md"]
    if skipped:
        names = ", ".join(skipped[:3]) + (", ..." if len(skipped) > 3 else "")
        print(f"note: of {folder} the {len(chosen)} {taken} files are read, {names} skipped", file=sys.stderr)
    splits = Counter(m[1] for file, _ in chosen for m in SPLIT_NAME.finditer(str(file.relative_to(folder)).lower()))
    if len(splits) > 1:
        print(
            f"note: {folder} holds several splits ({', '.join(sorted(splits))}) and all are read: "
            "name the files to take one",
            file=sys.stderr,
        )
    return [source for _, source in chosen]


def _data_files(files: list[Path]) -> list[Path]:
    """The files without the metadata and caches of datasets.save_to_disk, whose state.json lists the data files."""
    tables = {file.parent for file in files if file.suffix == ".arrow"}
    listed = {file.parent: _listed(file) for file in files if file.name == "state.json" and file.parent in tables}
    if not listed:
        return files

    def is_data(file: Path) -> bool:
        names = listed.get(file.parent) or {file.name}
        cached = file.suffix == ".arrow" and file.name not in names
        return file.name not in DATASETS_METADATA and not cached

    return [file for file in files if is_data(file)]


def _listed(state: Path) -> set[str]:
    """The names of the data files in a state.json, none when it isn't one of datasets."""
    try:
        content = json.loads(state.read_bytes()) if state.stat().st_size <= MAX_STATE else None
        return {str(entry["filename"]) for entry in content["_data_files"]}  # type: ignore[index]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return set()


def _file(name: str) -> Source | None:
    path = Path(name)
    packed = path.suffix if path.suffix in PACKED else ""
    format = FORMATS.get((path.with_suffix("") if packed else path).suffix.lower())
    return Source(name, format, packed) if format else None


def _visible(file: Path, folder: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)


def _endings() -> str:
    return f"known endings are {', '.join(FORMATS)}, each also with .gz or .zst"
