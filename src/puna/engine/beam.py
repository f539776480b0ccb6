"""Beam search over one prompt as a pure state: logits in, (parent, token) out. The engine runs the model and the cache.

It is transformers' `_beam_search` (version 5.24) at batch 1, token for token: the same float32 arithmetic on tensors of
the same shape, so that ties and additions to -1e9 agree, and for beam sampling the same draws from a CPU generator with
the same seed. It works in float32 whatever the dtype of the logits, as transformers does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from puna.engine.sampler import NonFiniteLogits, Row, process
from puna.engine.sampling_params import SamplingParams

_NEVER = -1e9  # transformers' score of a beam that must not win; finite, so that nothing turns into NaN


class Hypothesis(NamedTuple):
    """A finished beam.

    tokens: the new tokens, the end token included if there is one. score: the sum of the processed log-probabilities
    over length ** length_penalty. logprobs: the model's own, of each token.
    """

    tokens: list[int]
    score: float
    logprobs: list[float]


class BeamSearch:
    """The running beams and the best finished ones.

    prompt_len and max_length (prompt and output together) are in tokens; max_length > prompt_len. eos_ids: every token
    that ends a beam (empty to ignore them). bad_words: as in `Row`. params.n hypotheses are returned;
    params.temperature > 0 samples.
    """

    def __init__(
        self,
        prompt_len: int,
        params: SamplingParams,
        eos_ids: Sequence[int],
        max_length: int,
        seed: int,
        bad_words: Sequence[tuple[int, ...]] = (),
    ) -> None:
        self.params, self.eos_ids, self.bad_words = params, tuple(dict.fromkeys(eos_ids)), bad_words
        self.prompt_len, self.length, self.max_length = prompt_len, prompt_len, max_length
        self.done = False
        # Enough candidates for num_beams to continue, even when each beam's likeliest tokens all end it.
        self._spare = max(2, 1 + len(self.eos_ids))
        self._generator = torch.Generator().manual_seed(seed)
        # At first only one beam is real. The others have a hopeless score, and are there because a draw without
        # replacement takes one random number per candidate.
        self._scores = torch.full((params.num_beams,), _NEVER)
        self._scores[0] = 0
        self._logprobs: list[list[float]] = [[]] * params.num_beams
        self._best = [Hypothesis([], _NEVER, [])] * params.num_beams
        self._best_scores = torch.full((params.num_beams,), _NEVER)
        self._best_finished = torch.zeros(params.num_beams, dtype=torch.bool)

    def advance(self, logits: Tensor, sequences: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        """One step, from the running beams' logits [beams, vocab] and tokens (with the prompt), as last returned.

        The first call takes the prompt alone. Returns the next running beams as (index of the parent, token), best
        first, num_beams of them; none when the search is done. Raises NonFiniteLogits.
        """
        index, scores, logprobs = self._candidates(logits, sequences)
        picks = [divmod(i, logits.shape[1]) for i in index]
        picks = [(min(parent, len(sequences) - 1), token) for parent, token in picks]
        outputs = [[*sequences[parent][self.prompt_len :], token] for parent, token in picks]
        traces = [[*self._logprobs[parent], logprob] for (parent, _), logprob in zip(picks, logprobs, strict=True)]
        self.length += 1
        ended = torch.tensor([token in self.eos_ids or self.length >= self.max_length for _, token in picks])

        running = scores + ended.float() * _NEVER
        kept = running.topk(self.params.num_beams).indices
        self._scores, self._logprobs = running[kept], [traces[i] for i in kept.tolist()]
        self._keep_best(outputs, scores, traces, ended)
        enough = self.params.early_stopping is True and bool(self._best_finished.all())
        self.done = enough or not self._may_improve() or bool(ended.all())
        return [] if self.done else [picks[i] for i in kept.tolist()]

    def results(self) -> list[Hypothesis]:
        """The best params.n hypotheses, best first."""
        return self._best[: self.params.n]

    def _candidates(self, logits: Tensor, sequences: Sequence[Sequence[int]]) -> tuple[list[int], Tensor, list[float]]:
        """Indices into [num_beams * vocab], summed log-probabilities (CPU), and the tokens' own log-probabilities."""
        finite = logits.amax(-1).isfinite().tolist()
        if not all(finite):
            raise NonFiniteLogits([i for i, fine in enumerate(finite) if not fine])
        logprobs = logits.float().log_softmax(-1)
        start = self.prompt_len
        rows = [Row(self.params, 0, 0, s[:start], s[start:], self.eos_ids, self.bad_words) for s in sequences]
        total = process(logprobs, rows, keep=self._spare) + self._scores.to(logits.device)[:, None]
        total = total.reshape(1, -1)
        count = self._spare * self.params.num_beams
        if self.params.greedy:
            scores, index = total.topk(count)
        else:  # drawn on the CPU, so that a seed means the same everywhere
            index = total.softmax(-1).cpu().multinomial(count, generator=self._generator).to(total.device)
            # Draws come in random order, but only the first num_beams candidates may finish a hypothesis. So they are
            # sorted by score, as in transformers since 5.24 (up to 5.23, the order of the draws decided). A stable sort
            # breaks ties alike on every device; on CPUs, torch's sort is always stable.
            scores, order = total.gather(1, index).sort(dim=1, descending=True, stable=True)
            index = index.gather(1, order)
        chosen = logprobs.expand(self.params.num_beams, -1).reshape(1, -1).gather(1, index)
        results = torch.cat([index.double(), scores.double(), chosen.double()]).cpu()
        return results[0].long().tolist(), results[1].float(), results[2].tolist()

    def _keep_best(self, outputs: list[list[int]], scores: Tensor, traces: list[list[float]], ended: Tensor) -> None:
        """Merge the candidates that ended among the first num_beams into the best finished hypotheses."""
        count = self.params.num_beams
        finished = ended & (torch.arange(len(ended)) < count)
        scores = scores / (self.length - self.prompt_len) ** self.params.length_penalty + (~finished).float() * _NEVER
        merged = torch.cat([self._best_scores, scores])
        order = merged.topk(count).indices
        self._best_scores = merged[order]
        self._best_finished = torch.cat([self._best_finished, finished])[order]
        self._best = [
            self._best[i] if i < count else Hypothesis(outputs[i - count], merged[i].item(), traces[i - count])
            for i in order.tolist()
        ]

    def _may_improve(self) -> bool:
        """Whether the best running beam may still beat the worst finished one: transformers' heuristic."""
        longest = self.params.early_stopping == "never" and self.params.length_penalty > 0
        length = (self.max_length if longest else self.length) - self.prompt_len
        possible = self._scores[0] / length**self.params.length_penalty
        worst = torch.where(self._best_finished, self._best_scores.min(), _NEVER)
        return bool((possible > worst).any())
