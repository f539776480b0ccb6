"""What a request gives back, and the text of a sequence as it grows."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from puna.engine.beam import BeamSearch, Hypothesis
from puna.engine.sequence import Logprob, Request, Sequence
from puna.tokenizer import IncrementalDetokenizer, Tokenizer


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


def completions(request: Request, tokenizer: Tokenizer | None, search: BeamSearch | None) -> list[Completion]:
    """What an ended request has produced; none of beams that were aborted, which choose at the end."""
    if search is None:
        return [_completion(request, seq, tokenizer) for seq in sorted(request.finished, key=lambda seq: seq.index)]
    if any(seq.finish_reason == "abort" for seq in request.finished):
        return []
    return [_beam(request, index, found, tokenizer) for index, found in enumerate(search.results())]


def _completion(request: Request, seq: Sequence, tokenizer: Tokenizer | None) -> Completion:
    if seq.text is None:
        text = _decode(request, seq.output, tokenizer)
    else:
        if (stop := seq.text.end()) and seq.finish_reason == "length":
            seq.finish_reason, seq.stop_reason = "stop", stop
        text = seq.text.text
    done = Completion(seq.index, text, seq.output, seq.finish_reason or "abort", seq.stop_reason)
    if request.params.logprobs is not None:
        done.cumulative_logprob, done.logprobs = seq.cumulative_logprob, seq.logprobs
    return done


def _beam(request: Request, index: int, found: Hypothesis, tokenizer: Tokenizer | None) -> Completion:
    last = found.tokens[-1] if found.tokens else None
    stopped = last in request.stop_ids
    logprobs: list[Logprob] = [(token, level, []) for token, level in zip(found.tokens, found.logprobs, strict=True)]
    return Completion(
        index=index,
        text=_decode(request, found.tokens, tokenizer),
        token_ids=found.tokens,
        finish_reason="stop" if stopped else "length",
        stop_reason=last if stopped else None,
        cumulative_logprob=sum(found.logprobs),
        logprobs=logprobs if request.params.logprobs is not None else None,
        score=found.score,
    )


def _decode(request: Request, tokens: list[int], tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        return ""
    if tokens and tokens[-1] in request.stop_ids:  # an end token need not be a special one to be left out
        tokens = tokens[:-1]
    return tokenizer.decode(tokens, skip_special=request.params.skip_special_tokens)


class TextStream:
    """The text of one sequence, token by token, up to its first stop string.

    What might be the beginning of a stop string is held back until it is decided.
    """

    def __init__(self, stream: IncrementalDetokenizer, stop: Seq[str], *, include_stop: bool) -> None:
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
