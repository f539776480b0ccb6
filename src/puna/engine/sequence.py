"""What the engine keeps of a request: plain Python data, so that thousands of schedules can be tested without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from puna.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from puna.engine.outputs import TextStream

Logprob = tuple[int, float, list[tuple[int, float]]]  # token id, its log-probability, the likeliest (id, logprob)


@dataclass(slots=True, eq=False)
class Sequence:
    """One continuation of a request's prompt.

    `computed` chases `len(tokens)`: it counts the positions whose keys and values are in the cache. Prefill, a chunk of
    it, and decode are the same case, with more or fewer tokens pending.
    """

    tokens: list[int]  # prompt and output
    prompt_len: int
    max_len: int  # tokens at which it ends, prompt included
    seed: int
    index: int = 0  # among the request's continuations
    computed: int = 0
    blocks: list[int] = field(default_factory=list)  # cache blocks, in order of position
    content_ids: list[int] = field(default_factory=list)  # content ids of its leading full blocks, see BlockPool
    logprobs: list[Logprob] = field(default_factory=list)  # of the output
    cumulative_logprob: float = 0.0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    text: TextStream | None = None  # of the output, where the request keeps one

    @property
    def pending(self) -> int:
        """Tokens not yet in the cache. At least 1 while it runs: the newest token's logits are still to come."""
        return len(self.tokens) - self.computed

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_len :]


@dataclass(slots=True, eq=False)
class Request:
    """A prompt and what was asked of it. Its sequences are scheduled, preempted and finished as one group."""

    id: str
    prompt: list[int]
    params: SamplingParams
    stop_ids: tuple[int, ...]  # ids that end a sequence
    sequences: list[Sequence]  # running ones; finished ones move to `finished`
    score_only: bool = False  # wants log-probabilities of the prompt and no output
    finished: list[Sequence] = field(default_factory=list)
    prompt_logprobs: list[Logprob] = field(default_factory=list)  # from the second token on
    keeps_text: bool = False  # its text is wanted as it grows: to stream, or to look for stop strings
    error: str | None = None

    @property
    def wants_prompt(self) -> bool:
        """Whether log-probabilities of its prompt are still to come."""
        asked = self.score_only or self.params.prompt_logprobs is not None
        return asked and len(self.prompt_logprobs) < len(self.prompt) - 1

    @property
    def has_beams(self) -> bool:
        return self.params.num_beams > 1 and not self.score_only

    @property
    def width(self) -> int:
        """The most sequences that it ever runs at once."""
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

        The last token sees all that the chunk wrote, so its logits tell whether that is fit for the cache, too.
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
