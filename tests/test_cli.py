"""The command line as a whole: help without torch, exit codes, one sentence and never a traceback."""

import os
import re
import shlex
import signal
import subprocess
import sys
from typing import get_type_hints

import pytest

from launching import SECONDS
from puna import cli
from puna.commands import VERBS, command, info
from puna.errors import UserError
from puna.options import options_of

PUNA = [sys.executable, "-m", "puna"]


def puna(*words, **kw):
    return subprocess.run([*PUNA, *words], capture_output=True, text=True, timeout=SECONDS, **kw)


@pytest.fixture
def failing(monkeypatch):
    """`puna info x` raises what it is told to."""

    def install(error):
        def run(options):
            raise error

        run.__annotations__ = get_type_hints(info.run)
        monkeypatch.setattr(info, "run", run)

    return install


@pytest.mark.parametrize("verb", [(), *((*verb.split(),) for verb in VERBS), ("bench",)])
def test_help_imports_no_torch(verb):
    code = (
        "import sys; from puna.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'tokenizers'} & set(sys.modules);"
        "sys.exit(code or (f'imported {heavy}' if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", code, *verb, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: puna") and not done.stderr
    if verb not in ((), ("bench",)):
        assert "Examples:\n  puna " + " ".join(verb) in done.stdout


NEGATIVE = re.compile(r"(leave|omit|skip|without|don't|do not|no|never|disable)\b")


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_flag_says_what_true_does(verb):
    entries = options_of(command(verb)[1]).values()
    assert not [entry.name for entry in entries if entry.is_flag and NEGATIVE.match(entry.help)]


def test_overview_names_every_verb():
    text = puna("--help").stdout
    assert all(f"  {verb}" in text for verb in VERBS)


def test_version():
    assert puna("--version").stdout.startswith("puna ")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["chatt"], "puna has no verb 'chatt' (did you mean 'chat'?) (see puna --help)."),
        (["bench"], "puna bench needs latency or throughput as its first word (see puna bench --help)"),
        (["bench", "latncy"], "latency or throughput as its first word (did you mean 'latency'?)"),
        (["info", "m", "--bogus", "1"], "puna info has no option --bogus (see puna info --help)"),
        (["generate", "m", "--temprature", "1"], "did you mean '--temperature'?"),
    ],
)
def test_user_errors_are_one_sentence_and_exit_2(capsys, words, says):
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert not out and says in err and err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("data prepare x --tokenizer t --out p/", "--out p/ is a folder"),
        ("data prepare x --tokenizer t --out .", "--out '.' must name a prefix of its own"),
        ("data prepare x --tokenizer t --out nowhere", "--out nowhere is a symbolic link to nothing"),
        ("data prepare x --tokenizer t --out p --workers -3", "--workers must be at least 1, not -3."),
        ("data show p --samples 0", "--samples must be at least 1, not 0."),
        ("data show p --html no/page.html", "--html no/page.html is in a folder that doesn't exist"),
        ("data stats p --seq-len 0", "--seq-len must be at least 1, not 0."),
        (
            "data stats p --seq-len 99999999999999999999",
            "--seq-len must be at most 2147483647, not 99999999999999999999.",
        ),
        ("bench latency m --seed -1", "--seed must be at least 0, not -1."),
        ("doctor loss a b --plot .", "--plot '.' must name a file of its own"),
        ("convert m . --to hf", "--dst '.' must name a file or folder of its own"),
        ("convert m nowhere --to hf", "--dst nowhere is a symbolic link to nothing"),
        ("lora merge m a ..", "--dst '..' must name a file or folder of its own"),
        ("generate m x --max-num-seqs 0", "--max-num-seqs must be at least 1, not 0."),
        ("generate m x --kv-tokens -1", "--kv-cache-tokens must be at least 1, not -1."),
        ("chat m --max-model-len 0", "--max-model-len must be at least 2, not 0."),
        ("launch --cpus 0 info m", "--cpus must be at least 1, not 0."),
        ("train --out o --model.name tiny --model.weights random --data.train d --log.every 0", "log.every must be"),
        (
            "train --out o --model.name tiny --model.weights random --data.train d --eval-every -1",
            "--eval-every must be at least 0",
        ),
        ("train --out= --model.name tiny --data.train d", "--out takes a path, not ''."),
        ("train --out o --model.name tiny --data.train d --mesh.tp 0", "--mesh.tp must be at least 1, not 0."),
        ("train --out o --model.name tiny --data.train d --lora.alpha 0", "--lora.alpha must be above 0, not 0.0."),
    ],
)
def test_what_can_not_be_meant_is_refused_before_anything_is_opened(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    assert cli.main(words.split()) == 2
    err = capsys.readouterr().err.splitlines()
    assert says in err[-1] and all(line.startswith("note: ") for line in err[:-1])
    assert [path.name for path in tmp_path.iterdir()] == ["nowhere"]


def test_a_name_of_bytes_is_printed():
    done = subprocess.run([*PUNA, "info", b"no\xff"], capture_output=True)
    assert done.returncode == 2 and b"There is no checkpoint no\\udcff" in done.stderr
    code = "import sys; from puna import cli; cli._run = lambda words: print(words[0]); sys.exit(cli.main())"
    done = subprocess.run([sys.executable, "-c", code, b"no\xff"], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"no\xff\n", b"")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(("words", "code"), [("info --help", 0), ("chatt", 2)])
def test_a_closed_standard_stream_is_no_defect(closed, words, code):
    line = f"exec {' '.join(map(shlex.quote, PUNA))} {words} {closed}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert done.returncode == code and "internal error" not in done.stderr and "Traceback" not in done.stderr
    assert bool(done.stdout) == (code == 0 and ">&-" not in closed.replace("2>&-", ""))
    assert bool(done.stderr) == (code == 2 and "2>&-" not in closed)


def test_the_overview_of_a_group_names_it():
    text = puna("bench", "--help").stdout
    assert text.startswith("usage: puna bench VERB [options]") and "chat" not in text


def test_no_verb_shows_the_overview_on_stderr(capsys):
    assert cli.main([]) == 2
    out, err = capsys.readouterr()
    assert not out and "usage: puna VERB" in err


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (UserError("no such file; give another"), 2, "puna: No such file; give another.\n"),
        (UserError("max_tokens must be 1 or more."), 2, "puna: max_tokens must be 1 or more.\n"),
        (UserError("there is no x (did you mean 'y'?)"), 2, "puna: There is no x (did you mean 'y'?).\n"),
        (OSError(28, "No space left on device", "big.gguf"), 2, "puna: The disk is full at big.gguf: free some"),
        (OSError(122, "Disk quota exceeded", "x"), 2, "puna: The disk is full at x: free some"),
        (OSError(30, "Read-only file system", "x"), 2, "puna: Cannot use x: Read-only file system.\n"),
        (OSError(36, "File name too long", "x"), 2, "puna: Cannot use x: File name too long.\n"),
        (OSError(40, "Too many levels of symbolic links", "x"), 2, "puna: Cannot use x: Too many levels"),
        (UserError("A full stop."), 2, "puna: A full stop.\n"),
        (PermissionError(13, "Permission denied", "x"), 2, "puna: Cannot use x: Permission denied.\n"),
        (MemoryError(), 2, "puna: Out of memory: use a smaller model, batch, context or data type."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "puna: Out of memory"),
        (KeyError("oops"), 1, "puna: internal error, KeyError: 'oops' (PUNA_TRACEBACK=1 shows where"),
        (KeyboardInterrupt(), 130, "puna: stopped\n"),
    ],
)
def test_exit_codes(failing, capsys, error, code, says):
    failing(error)
    assert cli.main(["info", "x"]) == code
    err = capsys.readouterr().err
    assert err.startswith(says) and err.count("\n") == 1


def test_the_traceback_is_there_for_who_asks(failing, capsys):
    failing(KeyError("oops"))
    assert cli.main(["info", "x", "--traceback"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error():
    shell = f"{sys.executable} -m puna generate --help | head -1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert done.stdout.count("\n") == 1 and not done.stderr


def test_only_the_first_rank_speaks():
    done = puna("--help", env=os.environ | {"RANK": "1"})
    assert done.returncode == 0 and not done.stdout
    done = puna("chatt", env=os.environ | {"RANK": "1"})
    assert done.returncode == 2 and done.stderr.startswith("puna (rank 1): ")  # the first one of its machine
    done = puna("chatt", env=os.environ | {"RANK": "1", "LOCAL_RANK": "1"})
    assert done.returncode == 2 and not done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("when", ["importing", "generating"])
def test_ctrl_c_in_a_process(tiny_checkpoint, when):
    python = [sys.executable, *(("-X", "importtime") if when == "importing" else ())]
    words = ["generate", str(tiny_checkpoint(max_position_embeddings=8192)), "x", "--max-tokens", "8000"]
    process = subprocess.Popen([*python, "-m", "puna", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if when == "importing":
        while b" torch." not in process.stderr.readline():  # the first of torch's modules, a second before the last
            assert process.poll() is None
    else:
        assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 130 and err.decode().endswith("puna: stopped\n") and b"Traceback" not in err
