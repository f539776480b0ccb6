"""`puna VERB`: finds the verb's function, and turns an error into one sentence and an exit code.

Exit codes: 0 done, 2 the user can put it right, 1 a defect of puna, 130 Ctrl-C. The verbs are in `puna.commands`. No
--help imports torch: command modules import it inside their functions.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Any

from puna import __version__, options
from puna.commands import VERBS, command, second_words, split_verb
from puna.errors import UserError

OPENING = re.compile(r"(the|a|an|there|this|that|no|not|more|give|choose|cannot|it|its|every|only|out of|neither)\b")
HELP = ("-h", "--help", "help")
FULL = {errno.ENOSPC, errno.EDQUOT}
UNUSABLE = {errno.EACCES, errno.EPERM, errno.ENOENT, errno.EISDIR, errno.ENOTDIR}
UNUSABLE |= {errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code."""
    _open_closed_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--"]:  # as in torchrun ... -m puna -- generate, which keeps torchrun from reading our options
        del words[0]
    rank = os.environ.get("RANK", "0")
    name, errors = ("puna" if rank == "0" else f"puna (rank {rank})"), sys.stderr
    for stream, handler in (
        (sys.stdout, "surrogateescape"),
        (errors, "backslashreplace"),
    ):  # file names may be no UTF-8
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=handler)
    if rank != "0":  # under torchrun only rank 0 prints results; the others print their own errors at most
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (open as long as the process)
    trace = bool(os.environ.get("PUNA_TRACEBACK"))
    if "--traceback" in words:
        words.remove("--traceback")
        trace = True
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except SystemExit:  # --help and --print-config
        return 0
    except BrokenPipeError:  # the reader of stdout ended, as `head` does: not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("puna: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if trace:
            traceback.print_exc(file=errors)
        if isinstance(error, UserError) and os.environ.get("LOCAL_RANK", "0") != "0":
            # This machine's first rank reports the same error: keep torchrun from ending it before it has.
            time.sleep(1)
            return 2
        sentence = _users_own(error)
        if sentence:
            print(f"{name}: {_punctuated(sentence)}", file=errors)
            return 2
        print(
            f"{name}: internal error, {type(error).__name__}: {str(error).strip() or 'no message'}"
            + ("" if trace else " (PUNA_TRACEBACK=1 shows where; please report it)"),
            file=errors,
        )
        return 1


def _open_closed_streams() -> None:
    """Opens the null device for each standard stream that the caller closed (`>&-`), for which Python has None.

    In their order, so that each takes its own number, which otherwise the next file to be opened would take.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115 (open as long as the process)
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


def _run(words: list[str]) -> int:
    if not words:
        print(_overview(), file=sys.stderr)
        return 2
    verb, *rest = words
    if verb in HELP:
        print(_overview())
        return 0
    if verb == "--version":
        print(f"puna {__version__}")
        return 0
    if second_words(verb) and rest[:1] and rest[0] in HELP:
        print(_overview(verb))
        return 0
    verb, rest = split_verb(words)
    run, options_type = command(verb)
    chosen: Any = options.parse(verb, options_type, rest)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # `__main__` has its own until here
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return run(chosen) or 0


def _overview(group: str = "") -> str:
    usage = " ".join(filter(None, ("usage: puna", group, "VERB [options]")))
    lines = [usage, "", "LLaMA checkpoints through their whole life.", ""]
    for verb in VERBS:
        if verb.startswith(group):
            lines.append(f"  {verb:<18}{options.summary(command(verb)[1])}")
    return "\n".join([*lines, "", "puna VERB --help shows a verb's options with examples; puna --version the version."])


def _punctuated(sentence: str) -> str:
    """The sentence with a capital, where it opens with a plain English word, and a full stop."""
    if OPENING.match(sentence):
        sentence = sentence[0].upper() + sentence[1:]
    return sentence if sentence.endswith((".", "?", "!")) else f"{sentence}."


def _users_own(error: Exception) -> str | None:
    """The sentence for an error that the user can put right, None for a defect of puna."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in FULL:
        return f"the disk is full{f' at {error.filename}' if error.filename else ''}: free some space and run again"
    if isinstance(error, OSError) and error.errno in UNUSABLE:
        return f"cannot use {error.filename}: {error.strerror}"
    # torch raises OutOfMemoryError on a GPU and a plain RuntimeError on the CPU
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "can't allocate memory" in str(error):
        return "out of memory: use a smaller model, batch, context or data type"
    return None
