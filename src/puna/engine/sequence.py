"""A request, its sequences and a step's batch: plain Python data, so that schedules are tested without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from puna.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from puna.engine.text_stream import TextStream

Logprob = tuple[int, float, list[tuple[int, float]]]  # token id, its log-probability, the likeliest (id, logprob)


@dataclass(slots=True, eq=False)
class Sequence:
    """One continuation of a request's prompt.

    `computed` counts the positions whose keys and values are in the cache. Prefill, a chunk of it, and decode are the
    same case, with more or fewer tokens pending.
    """

    tokens: list[int]  # prompt and output
    prompt_len: int
    max_len: int  # maximum length in tokens, prompt included
    seed: int
    index: int = 0  # among the request's continuations
    computed: int = 0
    blocks: list[int] = field(default_factory=list)  # cache blocks, in order of position
    content_ids: list[int] = field(default_factory=list)  # content ids of its leading full blocks, see BlockPool
    logprobs: list[Logprob] = field(default_factory=list)  # of the output
    cumulative_logprob: float = 0.0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    stream: TextStream | None = None  # detokenizes the output; None without a tokenizer and before the first token
    texts: list[str] = field(default_factory=list)  # its text so far

    @property
    def pending(self) -> int:
        """Tokens not yet in the cache; at least 1 while it runs, for the newest token's logits are not computed yet."""
        return len(self.tokens) - self.computed

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_len :]


@dataclass(slots=True)
class RequestTimes:
    """When a request reached each stage, in seconds of a monotonic clock; None for what has not happened."""

    arrived: float = 0.0
    scheduled: float | None = None  # first computed
    first_token: float | None = None
    last_token: float | None = None


@dataclass(slots=True, eq=False)
class Request:
    """A prompt and its parameters. Its sequences are scheduled, preempted and finished as one group."""

    id: str
    prompt: list[int]
    params: SamplingParams
    stop_ids: tuple[int, ...]  # ids that end a sequence
    sequences: list[Sequence]  # running ones; finished ones move to `finished`
    times: RequestTimes = field(default_factory=RequestTimes)
    bad_words: tuple[tuple[int, ...], ...] = ()  # token ids of params.bad_words
    finished: list[Sequence] = field(default_factory=list)
    prompt_logprobs: list[Logprob] = field(default_factory=list)  # from the second token on
    num_cached_tokens: int | None = None  # of the prompt; None before it is first scheduled
    aborted: bool = False
    error: str | None = None

    @property
    def score_only(self) -> bool:
        """Whether it only scores the prompt, without output."""
        return self.params.max_tokens == 0

    @property
    def wants_prompt(self) -> bool:
        """Whether log-probabilities of its prompt are not complete."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.prompt) - 1

    @property
    def has_beams(self) -> bool:
        return self.params.num_beams > 1 and not self.score_only

    @property
    def unforked(self) -> bool:
        """Whether n > 1 and its sequences have not forked yet, which happens at the first token."""
        return self.params.n > len(self.sequences) + len(self.finished)

    @property
    def width(self) -> int:
        """The maximum number of sequences that it runs at once."""
        return max(self.params.n, self.params.num_beams)


@dataclass(slots=True)
class Chunk:
    """The next `count` tokens of a sequence, from position `start` on, to be computed in one step."""

    request: Request
    sequence: Sequence
    start: int
    count: int

    @property
    def positions(self) -> range:
        return range(self.start, self.start + self.count)

    @property
    def samples(self) -> bool:
        """Whether its last logits choose the next token."""
        return self.start + self.count == len(self.sequence.tokens) and not self.request.score_only

    @property
    def logit_rows(self) -> range:
        """Offsets inside the chunk whose logits are needed: those that predict prompt tokens, and always the last.

        The last token attends to all that the chunk wrote: its logits also show whether the chunk's keys and values are
        finite.
        """
        first = self.count - 1
        if self.request.wants_prompt:
            first = min(max(len(self.request.prompt_logprobs) - self.start, 0), first)
        return range(first, self.count)


@dataclass(slots=True)
class Batch:
    """One step: chunks of many sequences, and the block copies (source, target) that come before it."""

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    num_tokens: int = 0

    def add(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        self.num_tokens += chunk.count
