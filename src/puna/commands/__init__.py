"""The verbs of the command line, one module each. A new verb is a module here and a line in `VERBS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, get_type_hints

from puna.errors import UserError, nearest

# verb -> its module, whose `run(options)` takes the dataclass that its annotation names
VERBS = {
    "pull": "pull",
    "info": "info",
    "convert": "convert",
    "lora merge": "lora_merge",
    "verify": "verify",
    "chat": "chat",
    "generate": "generate",
    "bench latency": "bench_latency",
    "bench throughput": "bench_throughput",
    "train": "train",
    "data prepare": "data_prepare",
    "data show": "data_show",
    "data stats": "data_stats",
    "launch": "launch",
    "doctor loss": "doctor_loss",
    "demo": "demo",
}


def command(verb: str) -> tuple[Callable[[Any], int | None], type]:
    """The function of a verb and its options dataclass."""
    run = import_module(f"puna.commands.{VERBS[verb]}").run
    return run, get_type_hints(run)["options"]


def second_words(word: str) -> list[str]:
    """The second words of the verbs that begin with `word`: latency and throughput for bench."""
    return [name.split()[1] for name in VERBS if name.startswith(f"{word} ")]


def split_verb(words: Sequence[str]) -> tuple[str, list[str]]:
    """The verb of a command line and its arguments. Raises UserError for none that is known."""
    verb, *rest = words
    if known := second_words(verb):
        if not rest or rest[0] not in known:
            hint = nearest(rest[0], known) if rest else ""
            raise UserError(f"puna {verb} needs {' or '.join(known)} as its first word{hint} (see puna {verb} --help).")
        verb, rest = f"{verb} {rest[0]}", rest[1:]
    if verb not in VERBS:
        raise UserError(f"puna has no verb {verb!r}{nearest(verb, VERBS)} (see puna --help).")
    return verb, rest
