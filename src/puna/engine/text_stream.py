"""Streaming text of one sequence: only final text, up to the first stop string.

Text is held back while it may still become part of a stop string; the detokenizer below holds back the bytes of an
incomplete character.
"""

from __future__ import annotations

from collections.abc import Sequence

from puna.tokenizer import IncrementalDetokenizer


class TextStream:
    """Text up to the first stop string; of several, the one that is complete first (the longest of those).

    `push` and `end` return the text that became final and the stop string that ended the sequence, if any. The result
    does not depend on how the text is divided into tokens.
    """

    def __init__(
        self, detokenizer: IncrementalDetokenizer, stop: Sequence[str] = (), *, include_stop: bool = False
    ) -> None:
        self._detokenizer, self._stop, self._include_stop = detokenizer, stop, include_stop
        self._held = ""  # the longest suffix of the text that is a prefix of a stop string

    def push(self, token: int, *, stops: bool = True) -> tuple[str, str | None]:
        """Add a token. `stops=False`: stop strings that this token completes do not count (`min_tokens`)."""
        text = self._detokenizer.push(token)
        return self._search(text, stops) if self._stop else (text, None)

    def end(self) -> tuple[str, str | None]:
        """The sequence has ended: release what was held back; bytes of an incomplete character become U+FFFD."""
        text, stop = self._search(self._detokenizer.end(), True)
        if stop is None:
            text, self._held = text + self._held, ""
        return text, stop

    def _search(self, new: str, stops: bool) -> tuple[str, str | None]:
        known, text = len(self._held), self._held + new
        if new and stops:
            starts = ((text.find(stop, max(0, known - len(stop) + 1)), stop) for stop in self._stop)
            if hits := [(start + len(stop), start, stop) for start, stop in starts if start >= 0]:
                end, start, stop = min(hits)
                self._held = ""
                return text[: end if self._include_stop else start], stop
        final = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[final:]
        return text[:final], None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
