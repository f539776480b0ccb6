"""Token data on disk: Megatron-LM's `.bin/.idx`, memory-mapped, so that a store may be larger than the memory.

`.bin` holds the tokens of all sequences end to end. `.idx` holds, little-endian: the magic, version 1 (uint64), a dtype
code (uint8), the number of sequences and of document bounds (uint64 each), then int32 lengths, int64 byte pointers, and
int64 document bounds, counted in sequences. This is what megatron-core's `IndexedDataset` reads and writes. puna writes
one sequence per document and reads any number.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from puna.errors import UserError
from puna.tokenizer import Tokenizer

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document bounds
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
BLOCK = 1 << 20  # entries of the index that are read at a time
SAMPLED = 64  # pages of a store that its fingerprint reads
IGNORED = -100  # the label of a token that is not trained
TEXT, IDS, LABELS = "_text_document", "_input_ids_document", "_labels_document"
SIDES = ("chosen", "rejected")  # the two sequences of a preference
PARTS = re.compile(r"(_train|_validation)?(_chosen|_rejected)?$")  # suffixes that the prefix of the metadata lacks
MAX_METADATA = 64 << 20


def token_dtype(vocab_size: int) -> np.dtype:
    """Megatron-LM's choice of dtype for the token ids of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedDataset:
    """The documents under a prefix: `doc(i)` is a view of the mapped file, `lengths` int32 [documents]."""

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.dtype, counts, self._pointers, self._bounds = _read_index(Path(f"{prefix}.idx"))
        path = Path(f"{prefix}.bin")
        needed = int(counts.sum(dtype=np.int64)) * self.dtype.itemsize
        size = _size(path)
        if size != needed:
            raise UserError(
                f"{path} has {size:,} bytes where its index says {needed:,}: it is cut short or belongs to another "
                "index; prepare the data again."
            )
        self.tokens = np.memmap(path, self.dtype, "r") if size else np.empty(0, self.dtype)
        self.lengths = counts
        if len(self._bounds) != len(counts) + 1 or (np.diff(self._bounds) != 1).any():  # several sequences per document
            ends = np.concatenate([[0], counts.cumsum(dtype=np.int64)])
            self.lengths = np.diff(ends[self._bounds]).astype(np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def doc(self, index: int) -> np.ndarray:
        """The tokens of a document, a read-only view."""
        length = int(self.lengths[index])
        if not length:
            return self.tokens[:0]
        start = int(self._pointers[self._bounds[index]]) // self.dtype.itemsize
        return self.tokens[start : start + length]

    def identity(self) -> bytes:
        """Bytes that identify the store: all lengths, and a sample of the tokens.

        The sample is the first and last 4 KiB and other pages at even distances.
        """
        raw = self.tokens.view(np.uint8)
        starts = np.linspace(0, max(0, len(raw) - 4096), SAMPLED).astype(np.int64)
        pages = b"".join(raw[start : start + 4096].tobytes() for start in np.unique(starts))
        return self.dtype.str.encode() + np.asarray(self.lengths).tobytes() + pages


class Dataset:
    """The samples under a prefix, as `puna data prepare` or Megatron-LM wrote them.

    Text is `PREFIX_text_document`; instruction data `PREFIX_input_ids_document` and `PREFIX_labels_document`, where a
    label is its token or -100. `lengths` is int32 [samples]; `metadata` the JSON that prepare wrote, {} without any.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.metadata = read_metadata(prefix)
        self.ids = IndexedDataset(prefix + (TEXT if Path(f"{prefix}{TEXT}.idx").exists() else IDS))
        self.labels = None if self.ids.prefix.endswith(TEXT) else IndexedDataset(prefix + LABELS)
        self.lengths = self.ids.lengths
        if not len(self.lengths):
            raise UserError(f"{prefix} holds no samples.")
        if self.labels is not None and not np.array_equal(self.labels.lengths, self.lengths):
            raise UserError(f"{prefix}: input_ids and labels have different lengths; prepare the data again.")

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and labels of a sample, int32 [n] each; the labels of text are its ids. Not shifted."""
        ids = self.ids.doc(index).astype(np.int32)
        return ids, ids if self.labels is None else self.labels.doc(index).astype(np.int32)

    def fingerprint(self) -> str:
        """sha256 that changes with the samples, their order or their tokenizer. Reads the index and some pages."""
        digest = hashlib.sha256(json.dumps(self.metadata.get("tokenizer"), sort_keys=True).encode())
        for store in (self.ids, self.labels):
            digest.update(b"" if store is None else store.identity())
        return digest.hexdigest()

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises UserError when the samples were made with another vocabulary. Without metadata there is no check."""
        made = self.metadata.get("tokenizer", {}).get("vocabulary")
        if made not in (None, tokenizer.fingerprint(template=False)):
            name = self.metadata["tokenizer"].get("source", "another tokenizer")
            raise UserError(
                f"{self.prefix} was made with the tokenizer of {name}, which is not the model's: "
                "prepare the data again with this model as --tokenizer."
            )


def open_dataset(prefix: str | Path) -> Dataset:
    """The dataset under a prefix; the name of its `_text_document` or `_input_ids_document` file is accepted too.

    Raises UserError when it is missing, naming the existing prefixes, and when it is empty or damaged.
    """
    name = re.sub(rf"({TEXT}|{IDS})(\.bin|\.idx)?$", "", str(prefix))
    if not any(Path(f"{name}{store}.idx").exists() for store in (TEXT, IDS)):
        folder = Path(name).parent
        there = sorted(path.name for store in (TEXT, IDS) for path in folder.glob(f"*{store}.idx"))
        known = dict.fromkeys(re.sub(rf"({TEXT}|{IDS})\.idx$", "", file) for file in there)
        hint = f": there {'is' if len(known) == 1 else 'are'} {', '.join(list(known)[:5])}" if known else ""
        raise UserError(f"There is no token data {name}{TEXT}.idx or {name}{IDS}.idx{hint}.")
    return Dataset(name)


def open_datasets(prefix: str | Path) -> list[Dataset]:
    """The dataset under a prefix, or the chosen and the rejected sequences of preference data."""
    if all(Path(f"{prefix}_{side}{IDS}.idx").exists() for side in SIDES):
        return [open_dataset(f"{prefix}_{side}") for side in SIDES]
    return [open_dataset(prefix)]


def read_metadata(prefix: str) -> dict[str, Any]:
    """The metadata that `puna data prepare` wrote beside the data, {} without any."""
    for path in (Path(f"{prefix}.json"), Path(PARTS.sub("", prefix) + ".json")):
        if path.is_file():
            try:
                content = json.loads(path.read_bytes()) if path.stat().st_size <= MAX_METADATA else None
            except ValueError:
                content = None
            if not isinstance(content, dict):
                raise UserError(f"{path} is damaged: it holds no JSON object; prepare the data again.")
            return content
    return {}


class IndexedDatasetBuilder:
    """Writes a store atomically.

    Tokens and lengths go to hidden files beside the destination, so that memory stays constant. `finalize` puts both in
    place. As a context manager it finalizes, and removes the hidden files when the body fails. `mark` and `at`
    resume after a kill: `IndexedDatasetBuilder(prefix, dtype, at=writer.mark())` restores the state at `mark`.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | type, *, at: tuple[int, int] | None = None) -> None:
        self.dtype = np.dtype(dtype)
        if self.dtype not in CODES:
            raise ValueError(f"the format has no dtype {self.dtype}")
        self.bin, self.idx = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        self.parts = [path.with_name(f".{path.name}.part") for path in (self.bin, self.idx)]
        self.bin.parent.mkdir(parents=True, exist_ok=True)
        mode = "wb" if at is None else "r+b"
        self._tokens: IO[bytes] = self.parts[0].open(mode)
        self._lengths: IO[bytes] = self.parts[1].open(mode)
        self.sequences, self.size = at or (0, 0)
        for file, end in ((self._tokens, self.size), (self._lengths, HEADER.size + 4 * self.sequences)):
            if at is not None and file.seek(0, os.SEEK_END) < end:
                raise UserError(f"{file.name} is shorter than it was when it was last saved: start over.")
            file.seek(end)
            file.truncate()

    def __enter__(self) -> IndexedDatasetBuilder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finalize()
        else:
            self.discard()

    def add(self, ids: np.ndarray | list[int]) -> None:
        """Append one document."""
        self.extend(np.asarray(ids), np.array([len(ids)]))

    def extend(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents, concatenated in `ids`. ValueError for an id that the dtype can't hold."""
        cast = ids.astype(self.dtype, copy=False)
        if len(ids) and not np.array_equal(cast, ids):
            raise ValueError(f"an id does not fit into {self.dtype}")
        if int(lengths.sum()) != len(ids):
            raise ValueError("the lengths do not add up to the ids")
        self._tokens.write(cast.tobytes())
        self._lengths.write(lengths.astype("<i4").tobytes())
        self.sequences += len(lengths)
        self.size += cast.nbytes

    def mark(self) -> tuple[int, int]:
        """(documents, bytes) so far, which are synced to the disk."""
        for file in (self._tokens, self._lengths):
            file.flush()
            os.fsync(file.fileno())
        return self.sequences, self.size

    def finalize(self) -> None:
        """Write the index and put both files in place, over an older store of that name."""
        self._lengths.seek(0)
        self._lengths.write(HEADER.pack(MAGIC, 1, CODES[self.dtype], self.sequences, self.sequences + 1))
        self._lengths.flush()
        lengths = (
            np.memmap(self.parts[1], "<i4", "r", HEADER.size, self.sequences) if self.sequences else np.empty(0, "<i4")
        )
        self._lengths.seek(0, os.SEEK_END)
        start = 0
        for first in range(0, self.sequences, BLOCK):
            sizes = lengths[first : first + BLOCK].astype("<i8") * self.dtype.itemsize
            ends = sizes.cumsum() + start
            self._lengths.write((ends - sizes).tobytes())
            start = int(ends[-1])
        for first in range(0, self.sequences + 1, BLOCK):
            self._lengths.write(np.arange(first, min(first + BLOCK, self.sequences + 1), dtype="<i8").tobytes())
        del lengths
        self.mark()
        self.close()
        self.idx.unlink(missing_ok=True)  # never beside the index of other tokens
        os.replace(self.parts[0], self.bin)
        os.replace(self.parts[1], self.idx)

    def close(self) -> None:
        """Close the hidden files and keep them."""
        self._tokens.close()
        self._lengths.close()

    def discard(self) -> None:
        """Close and remove the hidden files."""
        self.close()
        for part in self.parts:
            part.unlink(missing_ok=True)


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """dtype, lengths int32 and byte pointers int64 by sequence, document bounds int64; UserError when damaged."""
    size = _size(path)
    with path.open("rb") as file:
        head = file.read(HEADER.size)
    if not head.startswith(MAGIC):
        raise UserError(f"{path} isn't a token index: it does not begin with MMIDIDX.")
    if len(head) < HEADER.size:
        raise UserError(f"{path} is cut short: prepare the data again.")
    _, version, code, sequences, bounds = HEADER.unpack(head)
    if version != 1 or code not in DTYPES:
        raise UserError(f"{path} has version {version} and dtype code {code}; puna reads version 1 with integers.")
    dtype = np.dtype(DTYPES[code])
    fixed = HEADER.size + 12 * sequences + 8 * bounds
    if size not in (fixed, fixed + sequences):  # Megatron's multimodal stores end with one mode byte a sequence
        raise UserError(
            f"{path} has {size:,} bytes where {fixed:,} are needed: it is cut short; prepare the data again."
        )
    if not sequences:
        return dtype, np.empty(0, np.int32), np.empty(0, np.int64), np.zeros(1, np.int64)
    lengths = np.memmap(path, "<i4", "r", HEADER.size, (sequences,))
    pointers = np.memmap(path, "<i8", "r", HEADER.size + 4 * sequences, (sequences,))
    starts = np.memmap(path, "<i8", "r", HEADER.size + 12 * sequences, (bounds,)) if bounds else np.empty(0, np.int64)
    damaged = UserError(f"{path} is damaged: its entries contradict one another; prepare the data again.")
    end = 0
    for first in range(0, sequences, BLOCK):
        block = lengths[first : first + BLOCK].astype(np.int64)
        ends = block.cumsum() * dtype.itemsize + end
        if block.min() < 0 or not np.array_equal(pointers[first : first + BLOCK], ends - block * dtype.itemsize):
            raise damaged
        end = int(ends[-1])
    if not len(starts) or starts[0] != 0 or starts[-1] != sequences or (starts[1:] < starts[:-1]).any():
        raise damaged
    return dtype, lengths, pointers, starts


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"The token data {path} can't be read: {error.strerror}.") from None
