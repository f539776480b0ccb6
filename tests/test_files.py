"""Files are replaced as a whole or not at all, and what a killed process left is named."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest

from puna import files
from puna.errors import UserError
from puna.weights import hub


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path) -> None:
    path = tmp_path / "x.json"
    files.write_json(path, {"a": "ü"})
    assert files.read_json(path) == {"a": "ü"} and path.read_text().endswith("\n")
    with pytest.raises(ZeroDivisionError), files.replacing(path) as part:
        part.write_text("half")
        1 / 0  # noqa: B018
    assert files.read_json(path) == {"a": "ü"} and list(tmp_path.iterdir()) == [path]
    assert files.sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_reading_is_bounded(tmp_path) -> None:
    (tmp_path / "x").write_bytes(bytes(11))
    assert files.read_bytes(tmp_path / "x", 11) == bytes(11)
    with pytest.raises(UserError, match="larger than the 10 bytes"):
        files.read_bytes(tmp_path / "x", 10)
    with pytest.raises(UserError, match="No such file"):
        files.read_bytes(tmp_path / "y", 10)


def test_what_a_killed_process_left_is_named_and_what_a_running_one_writes_is_not(tmp_path, capsys) -> None:
    dst = tmp_path / "out[1]"
    code = "import sys, os, signal; from puna.files import staged; from pathlib import Path\n"
    code += "with staged(Path(sys.argv[1])) as path:\n    path.mkdir(); os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code, str(dst)])
    (left,) = files.leftovers(dst)
    assert left.name.startswith(".out[1].") and left.name.endswith(".part")
    with pytest.raises(UserError, match="There is no checkpoint .* left .* behind.* rm -r"):
        hub.resolve(dst)
    with files.staged(dst) as path:
        assert files.leftovers(dst) == [left]
        path.mkdir()
    assert f"rm -r {left}" in capsys.readouterr().err and left.exists()
