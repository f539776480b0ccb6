"""Panics of the `tokenizers` library as errors of one sentence: a file's regular expression can exhaust its engine.

A panic is a BaseException in Python, and the library writes it to stderr by itself, with its own stack.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from puna.errors import UserError

_LOCK = threading.Lock()  # there is one stderr


@contextmanager
def panics_refused(*, hush: bool = False) -> Iterator[None]:
    """Raises UserError for a panic of the library. `hush` suppresses the library's own report on stderr."""
    try:
        if hush:
            with _LOCK, _no_stderr():
                yield
        else:
            yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # the library gives no way to import it
            raise
        reason = " ".join(str(error)[:200].split())
        raise UserError(
            f"The tokenizer's regular expressions fail on this text ({reason}); "
            "use the tokenizer of the original checkpoint."
        ) from None


@contextmanager
def _no_stderr() -> Iterator[None]:
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
