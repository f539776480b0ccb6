"""Files of torch.save: what they may name, and how large their pickles may be."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch

from puna.errors import UserError
from puna.weights.formats import torch_pickle


def zipped(path: Path, content: bytes, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3")
    return path


def old_format(objects: bytes) -> bytes:
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    return b"".join(parts) + objects + pickle.dumps([], 2)


MANY = b"\x80\x02" + b"]" * (torch_pickle.MAX_OPCODES + 1) + b"."
LARGE = pickle.dumps({"a": "x" * (torch_pickle.MAX_PICKLE + 1)}, 2)


@pytest.mark.parametrize("content", [MANY, LARGE], ids=["opcodes", "bytes"])
def test_a_pickle_larger_than_any_checkpoints_is_refused(content, tmp_path) -> None:
    """The first is a megabyte that unpickles to a hundred, the second some kilobytes that decompress to 32 MiB."""
    (tmp_path / "old.bin").write_bytes(old_format(content))
    for path in (zipped(tmp_path / "new.bin", content), tmp_path / "old.bin"):
        with pytest.raises(UserError, match="its pickle is larger than that of any checkpoint"):
            torch_pickle.load_file(path)


@pytest.mark.parametrize("new", [True, False])
def test_a_checkpoint_of_many_tensors_is_read(new, tmp_path) -> None:
    state = {f"model.layers.{n}.weight": torch.full((1,), float(n)) for n in range(5000)}
    torch.save(state, tmp_path / "x.bin", _use_new_zipfile_serialization=new)
    found = torch_pickle.load_file(tmp_path / "x.bin")
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def test_classes_that_the_caller_names_become_placeholders(tmp_path) -> None:
    torch.save({"a": torch.ones(2), "path": Path("x")}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="asks for pathlib"):
        torch_pickle.load_objects(tmp_path / "x.pt")
    state = torch_pickle.load_objects(tmp_path / "x.pt", placeholders=re.compile(r"pathlib\..*"))
    assert isinstance(state["path"], torch_pickle.Placeholder) and torch.equal(state["a"], torch.ones(2))


def test_files_without_checksums_are_read(tmp_path) -> None:
    """torch can be told to write none."""
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer)
    content = bytearray(buffer.getvalue())
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith(".pkl"))
    checksum = entry.CRC.to_bytes(4, "little")
    (tmp_path / "x.bin").write_bytes(content.replace(checksum, bytes(4)))
    assert torch.equal(torch_pickle.load_file(tmp_path / "x.bin")["a"], torch.ones(2))
