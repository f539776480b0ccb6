"""The text of a sequence as it grows: any text, any stop strings, divided into tokens anywhere."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from puna.engine.text_stream import TextStream

LETTERS = st.sampled_from("abé\U0001f411 ")  # so few that stop strings occur, overlap and begin one another
TEXTS = st.text(LETTERS, max_size=24)
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=4)


class Pieces:
    """A detokenizer whose tokens are any texts; `end` gives what is left of an incomplete character."""

    def __init__(self, rest: str = "") -> None:
        self.rest = rest

    def push(self, token: str) -> str:
        return token

    def end(self) -> str:
        return self.rest


def expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Character by character: the first stop string to be complete ends the text; of several, the longest."""
    for end in range(len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            stop = max(hits, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def pushed(tokens: list[str], stops: list[str], include: bool, rest: str) -> tuple[list[str], str | None]:
    stream = TextStream(Pieces(rest), stops, include_stop=include)  # type: ignore[arg-type]
    parts = []
    for token in tokens:
        text, stop = stream.push(token)  # type: ignore[arg-type]
        parts.append(text)
        if stop is not None:
            return parts, stop
    text, stop = stream.end()
    return [*parts, text], stop


@given(TEXTS, STOPS, st.booleans(), st.lists(st.integers(0, 24)), TEXTS)
def test_text_does_not_depend_on_the_tokens(text: str, stops: list[str], include: bool, cuts: list[int], rest: str):
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    tokens = [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    want, stopped = expected(text + rest, stops, include)
    parts, stop = pushed(tokens, stops, include, rest)
    assert ("".join(parts), stop) == (want, stopped)


@given(TEXTS, STOPS)
def test_text_is_final_and_not_held_longer_than_needed(text: str, stops: list[str]):
    """What is held back is the longest end of the text that begins a stop string: no more, no less."""
    stream = TextStream(Pieces(), stops)  # type: ignore[arg-type]
    given_out = ""
    for end, letter in enumerate(text, 1):
        new, stop = stream.push(letter)  # type: ignore[arg-type]
        given_out += new
        if stop is not None:
            return
        held = text[:end].removeprefix(given_out)
        begins = {text[i:end] for i in range(end) for stop in stops if stop.startswith(text[i:end])}
        assert held == max(begins, key=len, default="")


@given(TEXTS, STOPS, st.integers(0, 24))
def test_stop_strings_that_are_complete_too_early_do_not_count(text: str, stops: list[str], early: int):
    stream = TextStream(Pieces(), stops)  # type: ignore[arg-type]
    got, stopped = "", None
    for i, letter in enumerate(text):
        new, stopped = stream.push(letter, stops=i >= early)  # type: ignore[arg-type]
        got += new
        if stopped is not None:
            break
    ends = [(end, stop) for end in range(early + 1, len(text) + 1) for stop in stops if text[:end].endswith(stop)]
    if not ends:
        assert stopped is None and got + stream.end()[0] == text
        return
    end = min(ends)[0]
    stop = max((stop for at, stop in ends if at == end), key=len)
    assert (got, stopped) == (text[: end - len(stop)], stop)
