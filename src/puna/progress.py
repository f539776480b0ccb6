"""Progress on stderr for anything that takes more than two seconds.

On a terminal it is a live bar; in a log it is one final line, and only when the work took longer than two seconds.
Ranks other than the first say nothing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
QUIET_SECONDS = 2.0


def note(text: str) -> None:
    """Print a sentence that the user should know on stderr, from the first rank alone."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)


@contextmanager
def meter(
    label: str, total: int | None = None, unit: str = "it", *, quiet: bool = False
) -> Iterator[Callable[[int], None]]:
    """Give `advance(n)`, which moves the bar by `n` units. `unit`: "B" (bytes), "tok" (tokens) or "it" (items)."""
    if quiet or os.environ.get("RANK", "0") != "0":
        yield lambda n: None
        return
    start, done = time.perf_counter(), 0

    def count(n: int) -> None:
        nonlocal done
        done += n

    if sys.stderr.isatty():
        with _bar(label, total, unit) as advance:
            yield advance
        return
    yield count
    seconds = time.perf_counter() - start
    if seconds >= QUIET_SECONDS:
        amount, rate = _amount(done, unit), _amount(done / seconds, unit)
        print(f"{label}: {amount} in {seconds:.1f} s ({rate}/s)", file=sys.stderr)


def track(
    items: Iterable[T],
    label: str,
    *,
    total: int | None = None,
    unit: str = "it",
    size: Callable[[T], int] | None = None,
    quiet: bool = False,
) -> Iterator[T]:
    """Yield `items` and move a bar by one, or by `size(item)`, after each. `total` is in the same unit."""
    if total is None and size is None and isinstance(items, Sized):
        total = len(items)
    with meter(label, total, unit, quiet=quiet) as advance:
        for item in items:
            yield item
            advance(size(item) if size else 1)


@contextmanager
def _bar(label: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    # Imported here: rich costs a tenth of a second, which no --help and no piped run should pay.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            of = f"/{_amount(task.total, unit)}" if task.total else ""
            speed = f"  {_amount(task.speed, unit)}/s" if task.speed else ""
            return Text(f"{_amount(task.completed, unit)}{of}{speed}")

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), Rate(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda n: progress.advance(task, n)


def _amount(n: float, unit: str) -> str:
    if unit != "B":
        return f"{n:,.0f} {unit}" if n >= 10 or n == int(n) else f"{n:.1f} {unit}"
    power = 0
    while n >= 1000 and power < 4:
        n, power = n / 1000, power + 1
    return f"{n:.3g} {'kMGT'[power - 1] if power else ''}B"
