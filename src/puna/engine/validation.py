"""What a request may ask for: refused in one sentence before it is queued, not found out in the middle of a batch."""

from __future__ import annotations

from dataclasses import dataclass

from puna.engine.block_pool import BlockPool
from puna.engine.sampling_params import SamplingParams
from puna.errors import UserError


@dataclass(frozen=True)
class RequestValidator:
    """What an engine takes. Lengths in tokens."""

    vocab_size: int
    max_model_len: int
    max_batch_tokens: int = 2048
    max_num_seqs: int = 256

    def __post_init__(self) -> None:
        for name in ("max_batch_tokens", "max_num_seqs"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")

    def max_len(self, prompt: list[int], params: SamplingParams, pool: BlockPool, *, score_only: bool) -> int:
        """Tokens at which the request's sequences end, which fit the cache when all else is preempted.

        Raises UserError when the request can never run.
        """
        context, vocab, length = self.max_model_len, self.vocab_size, len(prompt)
        params.check_fits(vocab)
        if not prompt:
            raise UserError("the prompt is empty and this tokenizer adds no BOS; give at least one token.")
        if min(prompt) < 0 or max(prompt) >= vocab:
            bad = next(token for token in prompt if not 0 <= token < vocab)
            raise UserError(f"the prompt has token {bad}, but the model's vocabulary ends at {vocab - 1}.")
        wanted = length if score_only else length + (params.max_tokens or 1)
        if score_only and length > context:
            raise UserError(f"the text has {length} tokens, more than the context of {context}; cut it into parts.")
        if not score_only and length >= context:
            raise UserError(
                f"the prompt has {length} tokens, and the context of {context} must hold the answer too;"
                " shorten it or raise --max-model-len."
            )
        if wanted > context:
            raise UserError(
                f"{length} prompt tokens and max_tokens {params.max_tokens} exceed the context of {context};"
                f" ask for at most {context - length}."
            )
        width = max(params.n, params.num_beams)
        if width > min(self.max_batch_tokens, self.max_num_seqs):
            raise UserError(
                f"{width} sequences at once are more than a step takes;"
                " lower n or num_beams, or raise --max-num-seqs and --max-batch-tokens."
            )
        room = pool.num_blocks // width * pool.block_size
        if wanted > room:
            raise UserError(
                f"{width} sequence{'s' * (width > 1)} of {wanted} tokens cannot fit the cache of"
                f" {pool.num_blocks * pool.block_size} tokens; raise --kv-tokens or ask for less."
            )
        return min(context, room) if params.max_tokens is None and not score_only else wanted
