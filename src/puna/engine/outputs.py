"""Outputs of the engine: an update per sequence with new tokens in a step, and the outputs of finished requests."""

from __future__ import annotations

from dataclasses import dataclass, field

from puna.engine.beam import BeamSearch, Hypothesis
from puna.engine.sequence import Logprob, Request, RequestTimes, Sequence
from puna.tokenizer import Tokenizer


@dataclass(slots=True)
class SequenceUpdate:
    """The output of one step for one sequence (completion `index` of a request).

    text: final text. It never ends inside a character or in what may become a stop string, so that the texts of all
    updates join to the completion's text. It may be empty, and may belong to tokens of earlier updates. logprobs: of
    `token_ids`, None unless asked for. finish_reason: set in the last update of the sequence. Beam search has no
    updates: it chooses at the end.
    """

    request_id: str
    index: int
    token_ids: list[int]
    text: str
    logprobs: list[Logprob] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
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


@dataclass(slots=True)
class RequestOutput:
    """A finished request. `prompt_logprobs` starts with the second token: nothing predicts the first.

    error: why the request failed; it has no outputs then. num_cached_tokens: prompt tokens whose keys and values were
    found in the cache. times: None for a request that was refused before it reached the engine.
    """

    id: str
    prompt_token_ids: list[int]
    prompt: str | None = None
    outputs: list[Completion] = field(default_factory=list)
    prompt_logprobs: list[Logprob] | None = None
    error: str | None = None
    num_cached_tokens: int = 0
    times: RequestTimes | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens of all completions."""
        return sum(len(completion.token_ids) for completion in self.outputs)


@dataclass(slots=True)
class StepOutput:
    """The events of a step: updates in the order of the batch, and the requests that it finished."""

    updates: list[SequenceUpdate] = field(default_factory=list)
    finished: list[RequestOutput] = field(default_factory=list)


def request_output(request: Request, tokenizer: Tokenizer | None, search: BeamSearch | None) -> RequestOutput:
    """The output of a request that has ended. A failed one has no completions, and neither have aborted beams."""
    out = RequestOutput(request.id, request.prompt, error=request.error)
    out.num_cached_tokens, out.times = request.num_cached_tokens or 0, request.times
    if request.params.prompt_logprobs is not None:
        out.prompt_logprobs = request.prompt_logprobs
    if request.error is not None:
        return out
    if request.score_only:
        out.outputs = [
            Completion(index, "", [], "abort" if request.aborted else "length") for index in range(request.params.n)
        ]
    elif search is None:
        out.outputs = [_completion(request, seq) for seq in sorted(request.finished, key=lambda seq: seq.index)]
    elif not request.aborted:
        out.outputs = [_beam(request, index, beam, tokenizer) for index, beam in enumerate(search.results())]
    return out


def _completion(request: Request, seq: Sequence) -> Completion:
    assert seq.finish_reason is not None
    done = Completion(seq.index, "".join(seq.texts), seq.output, seq.finish_reason, seq.stop_reason)
    if request.params.logprobs is not None:
        done.cumulative_logprob, done.logprobs = seq.cumulative_logprob, seq.logprobs
    return done


def _beam(request: Request, index: int, beam: Hypothesis, tokenizer: Tokenizer | None) -> Completion:
    last = beam.tokens[-1] if beam.tokens else None
    stopped = last in request.stop_ids
    text = ""
    if tokenizer is not None:  # an end token need not be a special one to be left out
        tokens = beam.tokens[:-1] if stopped else beam.tokens
        text = tokenizer.decode(tokens, skip_special=request.params.skip_special_tokens, after=request.prompt)
    logprobs: list[Logprob] = [(token, level, []) for token, level in zip(beam.tokens, beam.logprobs, strict=True)]
    return Completion(
        index=index,
        text=text,
        token_ids=beam.tokens,
        finish_reason="stop" if stopped else "length",
        stop_reason=last if stopped else None,
        cumulative_logprob=sum(beam.logprobs),
        logprobs=logprobs if request.params.logprobs is not None else None,
        score=beam.score,
    )
