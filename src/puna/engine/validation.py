"""Validation of requests: one that can never run is refused before it is queued."""

from __future__ import annotations

from dataclasses import dataclass

from puna.engine.block_pool import BlockPool
from puna.engine.sampling_params import SamplingParams
from puna.errors import UserError


@dataclass(frozen=True)
class RequestValidator:
    """The limits of an engine. Lengths in tokens. `longest_model_len`: the most that max_model_len could be set to."""

    vocab_size: int
    max_model_len: int
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    longest_model_len: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_num_batched_tokens", "max_num_seqs"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}.")

    def check_params(self, params: SamplingParams) -> None:
        """Raises UserError for sampling parameters that no prompt can run with."""
        params.check_fits(self.vocab_size)
        if params.max_tokens is not None and params.max_tokens >= self.max_model_len:
            remedy = self._remedy(f"ask for at most {self.max_model_len - 1}", params.max_tokens + 1)
            raise UserError(
                f"A prompt and max_tokens {params.max_tokens} exceed the context of {self.max_model_len}; {remedy}."
            )
        width = max(params.n, params.num_beams)
        if width > min(self.max_num_batched_tokens, self.max_num_seqs):
            raise UserError(
                f"{width} sequences at once are more than a step takes;"
                " lower n or num_beams, or raise max_num_seqs and max_num_batched_tokens."
            )

    def max_len(self, prompt: list[int], params: SamplingParams, pool: BlockPool) -> int:
        """The length at which the request's sequences end; they fit the cache when all others are preempted.

        Raises UserError when the request can never run.
        """
        context, vocab, length = self.max_model_len, self.vocab_size, len(prompt)
        self.check_params(params)
        if not prompt:
            raise UserError("The prompt is empty and this tokenizer adds no BOS; give at least one token.")
        if min(prompt) < 0 or max(prompt) >= vocab:
            bad = next(token for token in prompt if not 0 <= token < vocab)
            raise UserError(f"The prompt has token {bad}, but the model's vocabulary ends at {vocab - 1}.")
        score_only = params.max_tokens == 0
        wanted = length + (1 if params.max_tokens is None else params.max_tokens)
        if score_only and length > context:
            raise UserError(
                f"The text has {length} tokens, more than the context of {context}; {self._remedy('split it', length)}."
            )
        if not score_only and length >= context:
            raise UserError(
                f"The prompt has {length} tokens, and the context of {context} must hold the answer too;"
                f" {self._remedy('shorten it', length + 1)}."
            )
        if wanted > context:
            raise UserError(
                f"{length} prompt tokens and max_tokens {params.max_tokens} exceed the context of {context};"
                f" {self._remedy(f'ask for at most {context - length}', wanted)}."
            )
        width = max(params.n, params.num_beams)
        capacity = pool.num_blocks // width * pool.block_size
        if wanted > capacity:
            raise UserError(
                f"{width} sequence{'s' * (width > 1)} of {wanted} tokens cannot fit the KV cache of"
                f" {pool.num_blocks * pool.block_size} tokens; raise kv_cache_tokens or ask for less."
            )
        return min(context, capacity) if params.max_tokens is None else wanted

    def _remedy(self, change: str, needed: int) -> str:
        """What to do about a text that is too long: raising max_model_len only where that would be accepted."""
        possible = needed <= (self.longest_model_len or 0)
        return f"{change} or raise max_model_len to {needed}" if possible else change
