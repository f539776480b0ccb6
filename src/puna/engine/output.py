"""What a request gives back, and the text of a sequence as it grows."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from puna.engine.sequence import Logprob
from puna.text import Stream


@dataclass
class Completion:
    """One continuation. `token_ids` include the token that ended it; `text` does not, unless asked for.

    finish_reason: "stop" (an end token or stop string, in `stop_reason`), "length" or "abort".
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None  # with logprobs asked for, or beams
    logprobs: list[Logprob] | None = None
    score: float | None = None  # of a beam: the sum of log-probabilities over length ** length_penalty


@dataclass
class RequestOutput:
    """A finished request. `prompt_logprobs` starts with the second token: nothing predicts the first."""

    id: str
    prompt_token_ids: list[int]
    prompt: str | None = None
    outputs: list[Completion] = field(default_factory=list)
    prompt_logprobs: list[Logprob] | None = None
    error: str | None = None


class TextStream:
    """The text of one sequence, token by token, up to its first stop string.

    What might be the beginning of a stop string is held back until it is decided.
    """

    def __init__(self, stream: Stream, stop: Seq[str], *, include_stop: bool) -> None:
        self._stream, self._stop, self._include_stop = stream, stop, include_stop
        self._given = 0
        self.text = ""

    def push(self, token: int, *, stops: bool = True) -> str | None:
        """Add a token; gives the stop string when it completes one, unless it is too early for that (not `stops`)."""
        return self._add(self._stream.push(token), stops)

    def end(self) -> str | None:
        """The sequence is over: bytes of an unfinished character come out too."""
        return self._add(self._stream.end(), True)

    def take(self, *, over: bool) -> str:
        """The text that has come since the last call and is sure to stay; all of it when the sequence is `over`."""
        held = 0 if over else max((_overlap(self.text, stop) for stop in self._stop), default=0)
        new = self.text[self._given : len(self.text) - held]
        self._given += len(new)
        return new

    def _add(self, new: str, stops: bool) -> str | None:
        longest = max(map(len, self._stop), default=0)
        searched = max(0, len(self.text) - longest + 1)
        self.text += new
        found = [(self.text.find(stop, searched), stop) for stop in self._stop]
        hits = [(at, stop) for at, stop in found if at >= 0]
        if not (new and stops and hits):
            return None
        at, stop = min(hits)
        self.text = self.text[: at + (len(stop) if self._include_stop else 0)]
        return stop


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
