"""Decisions from a step's logits: plain values that the driver makes and every rank applies."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from puna.engine.beam import BeamSearch
from puna.engine.sampler import NonFiniteLogits, Row, Sampled, fork_seed, sample, token_logprobs
from puna.engine.sampling_params import SamplingParams
from puna.engine.sequence import Batch, Chunk, Request

GREEDY = SamplingParams()
Owner = tuple[Request, int | None]  # of a row of logits, and the index of the sequence that gets the token, if any

# (kind, request id, sequence index, value), where value is for
#   "tokens"  list[Sampled], one token; as many as the request has completions when they fork
#   "beams"   the (parent, token) of each beam, as BeamSearch.advance returns them
#   "prompt"  list[Logprob] of prompt tokens
#   "error"   the reason why the request fails
Decision = tuple[str, str, int, Any]


def decide(batch: Batch, logits: Tensor, beams: dict[str, BeamSearch]) -> Iterator[Decision]:
    """The decisions of a step, in the order of their application. Requests with non-finite logits fail alone.

    logits: [rows, vocab], as `Runner.run` returns them. beams: the searches by request id.
    """
    rows: list[Row] = []
    logit_rows: list[int] = []  # row of the logits for each of `rows`
    owners: list[Owner] = []
    members: dict[str, list[int]] = {}  # of each beam search, its rows of the logits
    requests: dict[str, Request] = {}
    row = 0
    for chunk in batch.chunks:
        request, seq = chunk.request, chunk.sequence
        first, row = row, row + len(chunk.logit_rows)
        if request.wants_prompt:
            yield _prompt_logprobs(chunk, logits[first:row])
        if chunk.samples and request.has_beams:
            members.setdefault(request.id, []).append(row - 1)
            requests[request.id] = request
            continue
        if not chunk.samples:  # checked all the same: non-finite keys and values must not stay in the cache
            rows.append(Row(GREEDY, 0, 0))
            logit_rows.append(row - 1)
            owners.append((request, None))
            continue
        # Only rows whose logits depend on their tokens pay for the copies.
        prompt, output = (seq.tokens[: seq.prompt_len], seq.output) if request.params.adjusts else ((), ())
        index, position = request.sequences.index(seq), len(seq.tokens)
        for fork in range(request.params.n if request.unforked else 1):
            seed = fork_seed(seq.seed, fork)
            rows.append(Row(request.params, seed, position, prompt, output, request.stop_ids, request.bad_words))
            logit_rows.append(row - 1)
            owners.append((request, index))
    if rows:
        whole = logit_rows == list(range(len(logits)))
        yield from _sample(logits if whole else logits[logit_rows], rows, owners)
    for id, indices in members.items():
        try:
            yield "beams", id, 0, beams[id].advance(logits[indices], [seq.tokens for seq in requests[id].sequences])
        except NonFiniteLogits as error:
            yield "error", id, 0, str(error)


def _sample(logits: Tensor, rows: list[Row], owners: list[Owner]) -> Iterator[Decision]:
    try:
        sampled = sample(logits, rows)
    except NonFiniteLogits as error:
        failed = {owners[i][0].id for i in error.rows}
        for id in failed:
            yield "error", id, 0, str(error)
        good = [i for i, (request, _) in enumerate(owners) if request.id not in failed]
        if good:
            yield from _sample(logits[good], [rows[i] for i in good], [owners[i] for i in good])
        return
    grouped: dict[tuple[str, int], list[Sampled]] = {}
    for (request, index), result in zip(owners, sampled, strict=True):
        if index is not None:
            grouped.setdefault((request.id, index), []).append(result)
    for (id, index), results in grouped.items():
        yield "tokens", id, index, results


def _prompt_logprobs(chunk: Chunk, logits: Tensor) -> Decision:
    """Log-probabilities of the prompt tokens that this chunk's logits predict, except for those known already."""
    request = chunk.request
    first, known = chunk.start + chunk.logit_rows.start, len(request.prompt_logprobs)
    targets = request.prompt[known + 1 : first + len(logits) + 1]
    logits = logits[: len(targets)]
    top = min(request.params.prompt_logprobs or 0, logits.shape[1])
    chosen, ids, levels = token_logprobs(logits, torch.tensor(targets, device=logits.device), top)
    entries = [
        (token, level, list(zip(i, v, strict=True)))
        for token, level, i, v in zip(targets, chosen.tolist(), ids.tolist(), levels.tolist(), strict=True)
    ]
    if any(math.isnan(level) for _, level, _ in entries):
        return "error", request.id, 0, str(NonFiniteLogits([]))
    return "prompt", request.id, 0, entries
