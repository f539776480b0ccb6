"""Progress on stderr: a bar on a terminal, a line in a log, nothing for what is quick, quiet, or of another rank."""

import io
import sys

import pytest

from puna import progress


@pytest.fixture
def clock(monkeypatch):
    """Every look at the clock is three seconds later."""
    ticks = iter(range(0, 1000, 3))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(ticks)))


def test_one_line_in_a_log(clock, capsys):
    assert list(progress.track(range(6), "Counting")) == list(range(6))
    assert capsys.readouterr() == ("", "Counting: 6 it in 3.0 s (2 it/s)\n")
    with progress.meter("Reading", 9_000_000_000, "B") as advance:
        advance(4_500_000_000)
        advance(4_500_000_000)
    assert capsys.readouterr().err == "Reading: 9 GB in 3.0 s (3 GB/s)\n"
    list(progress.track(["ab", "cde"], "Writing", unit="B", size=len))
    assert capsys.readouterr().err == "Writing: 5 B in 3.0 s (1.67 B/s)\n"


def test_what_is_quick_says_nothing(capsys):
    list(progress.track(range(6), "Counting"))
    assert capsys.readouterr() == ("", "")


def test_quiet_and_other_ranks_say_nothing(clock, capsys, monkeypatch):
    list(progress.track(range(6), "Counting", quiet=True))
    monkeypatch.setenv("RANK", "1")
    list(progress.track(range(6), "Counting"))
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    assert list(progress.track(range(6), "Counting")) == list(range(6))
    assert "Counting" in terminal.getvalue() and "6 it/6 it" in terminal.getvalue()
