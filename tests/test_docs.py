"""Every command in README and the guides runs, on a tiny model that stands in for the real one."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
SETUP = ("make ", "pip ", "puna pull ")  # what sets a machine up is tried by using it, not by its tests


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return ["".join(line for line in block.splitlines(True) if not line.startswith(SETUP)) for block in found]


@pytest.fixture
def desk(tmp_path, tiny_checkpoint, monkeypatch):
    """A folder to work in, where a tiny model lies under the real one's name, with as many heads."""
    shape = {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 1024}
    (tmp_path / "smollm2-135m-instruct").symlink_to(tiny_checkpoint(**shape, torch_dtype="bfloat16"))
    commands = tmp_path / ".bin"
    commands.mkdir()
    for command, module in (("puna", "puna"), ("torchrun", "torch.distributed.run")):
        script = commands / command
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page, "bash"))], ids=lambda page: page.stem)
def test_commands_run(page, desk):
    script = "\n".join(blocks(page, "bash"))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page, "python"))], ids=lambda page: page.stem)
def test_python_runs(page, desk):
    (desk / "smollm2").symlink_to(desk / "smollm2-135m-instruct")
    for block in blocks(page, "python"):
        done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]


STEP = re.compile(
    r"<!-- (file|in): (\S+?)(?:, (after|replace): (.*?))? -->\n```(?:py|text)\n(.*?)^```|^```sh\n(.*?)^```",
    re.DOTALL | re.MULTILINE,
)


@pytest.mark.slow
def test_what_extending_shows_is_all_that_it_takes(desk, monkeypatch):
    """Each example is added to a copy of the package, as the page writes it, and its command runs."""
    shutil.copytree(ROOT / "src", desk / "src", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("PYTHONPATH", str(desk / "src"))
    ran = 0
    for kind, file, mode, anchor, code, command in STEP.findall((ROOT / "docs/extending.md").read_text()):
        if kind == "file":
            assert not (desk / file).exists(), "an example adds a file, it doesn't change one"
            (desk / file).write_text(code)
        elif kind == "in":
            text = (desk / file).read_text()
            assert text.count(anchor) == 1, f"{file} has {anchor!r} {text.count(anchor)} times"
            new = f"{anchor}\n{code.rstrip()}" if mode == "after" else code.strip()
            (desk / file).write_text(text.replace(anchor, new))
        else:
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", command], capture_output=True, text=True)
            assert done.returncode == 0, f"{command}{done.stderr[-2000:]}"
            ran += 1
    assert ran == 4


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name} links to {target}"
