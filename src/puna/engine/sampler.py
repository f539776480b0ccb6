"""Batched sampling: logits to tokens, greedy or by draws that each request can reproduce alone.

A row's token depends on its own logits, parameters, seed and position, never on the rows beside it: every reduction
runs along the vocabulary in an order that doesn't depend on the batch (bit for bit on the CPU; on a GPU the sums may
differ in their last bits).

A draw inverts the cumulative distribution in vocabulary order. In order of descending probability, two nearly equal
logits that swap places (another kernel, another split over devices) would move everything between them; in vocabulary
order a change of 1e-6 in the logits moves the token with a probability of about 1e-6.

Cost per row: one pass over the vocabulary for a greedy row; for a draw, a softmax, and a partial selection where top-k
or top-p asks for one. A repetition penalty reads the row's prompt and output, presence and frequency its output.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.engine.sampling_params import SamplingParams
from puna.errors import UserError

_BLOCK = 256  # long rows are reduced in blocks: several times faster than torch's argmax and cumsum on the CPU
_NUCLEUS = 256  # likeliest tokens looked at first for top-p; a flat distribution takes more
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


class NonFiniteLogits(UserError):
    """The logits of `rows` (indices into the batch) hold NaN or infinity; the other rows are fine."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__(
            "The model gave NaN or infinite logits for this request; try --dtype float32, or check the checkpoint with "
            "`puna verify`."
        )
        self.rows = rows


@dataclass(slots=True)
class Row:
    """The sampler's view of the sequence of a row of logits."""

    params: SamplingParams
    seed: int
    position: int  # index of the token to be sampled; with `seed` it fixes the noise
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()
    stop_ids: Sequence[int] = ()  # banned until the output has `min_tokens` tokens
    bad_words: Sequence[tuple[int, ...]] = ()  # token sequences whose last token is banned behind the others


class Sampled(NamedTuple):
    """One token. Log-probabilities are the model's own, before penalties and filters; None when not asked for."""

    token: int
    logprob: float | None
    top: list[tuple[int, float]] | None


def sample(logits: Tensor, rows: Sequence[Row]) -> list[Sampled]:
    """The next token of each row.

    logits: [len(rows), vocab], any float dtype, any device; not changed. Works in float32 (float64 for float64).
    Raises NonFiniteLogits, which names the rows at fault, when a row's largest logit is not finite.
    """
    scores = _adjust(logits, rows)
    tokens, peaks = _argmax(scores)
    drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
    if len(drawn) == len(rows):
        tokens = _draw(scores, rows)
    elif drawn:
        tokens[drawn] = _draw(scores[drawn], [rows[i] for i in drawn])

    parts = [tokens.double(), peaks.double()]
    wanted: dict[int, list[int]] = {}  # alternatives -> rows; one selection each, for ties fall out by its width
    for i, row in enumerate(rows):
        if row.params.logprobs is not None:
            wanted.setdefault(min(row.params.logprobs, logits.shape[1]), []).append(i)
    for top, members in wanted.items():
        for part in token_logprobs(logits[members], tokens[members], top):
            parts.append(part.double().flatten())
    found = torch.cat(parts).cpu().split([part.numel() for part in parts])  # the only wait for the device

    if bad := [i for i, peak in enumerate(found[1].tolist()) if not math.isfinite(peak)]:
        raise NonFiniteLogits(bad)
    out = [Sampled(token, None, None) for token in found[0].long().tolist()]
    for n, (top, members) in enumerate(wanted.items()):
        chosen, ids, levels = found[2 + 3 * n : 5 + 3 * n]
        ids, levels = ids.long().view(len(members), top), levels.view(len(members), top)
        for i, level, row_ids, row_levels in zip(members, chosen.tolist(), ids.tolist(), levels.tolist(), strict=True):
            out[i] = Sampled(out[i].token, level, list(zip(row_ids, row_levels, strict=True)))
    return out


def token_logprobs(logits: Tensor, targets: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of given tokens, and the likeliest tokens with theirs.

    logits [R, vocab], targets [R] -> [R], ids [R, top], values [R, top], in float32 (float64 for float64) on the same
    device. Rows are independent, so a long text may come in chunks of any size.
    """
    logprobs = _wide(logits).log_softmax(-1)
    levels, ids = logprobs.topk(top)
    return logprobs.gather(1, targets[:, None])[:, 0], ids, levels


def process(logits: Tensor, rows: Sequence[Row], keep: int = 1) -> Tensor:
    """The processed logits [R, vocab], -inf where a token cannot be drawn; greedy rows skip temperature and filters.

    transformers' processors in transformers' order: bias, repetition penalty, (presence and frequency), repeated
    n-grams, bad words, minimum length, temperature, top-k, top-p, min-p, typical-p. `keep` is their min_tokens_to_keep.
    One difference: logits equal to the last one inside the top-p nucleus stay, where transformers keeps as many of them
    as its sort happens to put first.
    """
    scores = _wide(_adjust(logits, rows))
    drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
    if not drawn:
        return scores.clone() if scores is logits else scores
    scaled, _, floor, typical = _filter(scores[drawn], [rows[i] for i in drawn], keep)
    if floor is not None:
        scaled = scaled.masked_fill(scaled < floor, -math.inf)
    if typical is not None:
        scaled = scaled.masked_fill(~typical, -math.inf)
    return scores.index_copy(0, torch.tensor(drawn, device=scores.device), scaled)


def uniform(seed: int, position: int) -> float:
    """Number `position` of the SplitMix64 stream (Steele, Lea, Flood 2014) of a hashed seed, in [0, 1)."""
    return (_mix(_mix(seed) + _GOLDEN * position) >> 11) * 2.0**-53


def fork_seed(seed: int, index: int) -> int:
    """The seed of completion `index` of a request; the first one's is the request's own."""
    return _mix(seed + _GOLDEN * index) if index else seed


def _mix(state: int) -> int:
    z = (state + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _blocks(x: Tensor, fill: float) -> Tensor:
    """[R, V] -> [R, ceil(V / _BLOCK), _BLOCK]."""
    missing = -x.shape[1] % _BLOCK
    padded: Tensor = F.pad(x, (0, missing), value=fill) if missing else x
    return padded.view(len(padded), -1, _BLOCK)


def _argmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """[R] the first of the largest, and its value (NaN when the row holds one)."""
    blocks = _blocks(_wide(x), -math.inf)  # the CPU reduces bfloat16 slower than it converts it
    block = blocks.amax(-1).argmax(-1, keepdim=True)
    inner = blocks.gather(1, block[..., None].expand(-1, 1, _BLOCK))[:, 0]
    offset = inner.argmax(-1, keepdim=True)
    return (block * _BLOCK + offset)[:, 0], inner.gather(1, offset)[:, 0]


def _adjust(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Bias, penalties, bans and minimum length; `logits` itself when no row asks for any."""
    asking = [(i, row, row.params) for i, row in enumerate(rows) if row.params.adjusts]
    if not asking:
        return logits
    x = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    vocab = x.shape[1]
    flat = x.view(-1)

    def at(entries: Iterable[tuple[int, int, float]]) -> tuple[Tensor, Tensor]:
        """(row, token, number) -> where in `flat`, and the numbers; no place comes twice."""
        found = list(entries)
        where = torch.tensor([row * vocab + token for row, token, _ in found], dtype=torch.int64)
        numbers = torch.tensor([number for _, _, number in found], dtype=x.dtype)
        return where.to(x.device, non_blocking=True), numbers.to(x.device, non_blocking=True)

    where, bias = at((i, token, bias) for i, _, p in asking for token, bias in (p.logit_bias or {}).items())
    flat[where] += bias
    repeating = [(i, row) for i, row, p in asking if p.repetition_penalty != 1]
    where, penalty = at(
        (i, token, row.params.repetition_penalty) for i, row in repeating for token in {*row.prompt, *row.output}
    )
    seen = flat[where]
    flat[where] = torch.where(seen < 0, seen * penalty, seen / penalty)
    counting = [(i, row, p) for i, row, p in asking if p.presence_penalty or p.frequency_penalty]
    where, penalty = at(
        (i, token, p.presence_penalty + count * p.frequency_penalty)
        for i, row, p in counting
        for token, count in Counter(row.output).items()
    )
    flat[where] -= penalty
    where, banned = at((i, token, -math.inf) for i, row, _ in asking for token in _banned(row) if token < vocab)
    flat[where] = banned
    return x


def _banned(row: Row) -> set[int]:
    """The tokens that would repeat an n-gram, complete a bad word or end the text too early."""
    banned = {*row.stop_ids} if len(row.output) < row.params.min_tokens else set()
    size = row.params.no_repeat_ngram_size
    if size or row.bad_words:
        tokens = [*row.prompt, *row.output]
        if size and len(tokens) >= size:
            last = tokens[len(tokens) - size + 1 :]
            banned |= {tokens[i] for i in range(size - 1, len(tokens)) if tokens[i - size + 1 : i] == last}
        for *before, token in row.bad_words:
            if tokens[len(tokens) - len(before) :] == before:
                banned.add(token)
    return banned


def _draw(scores: Tensor, rows: Sequence[Row]) -> Tensor:
    """[R] a token each, by inverting the cumulative distribution: over blocks first, then inside the block."""
    scaled, weights, floor, typical = _filter(_wide(scores), rows, 1)
    if floor is not None:
        weights.mul_(_reaches(scaled, floor))
    if typical is not None:
        weights.mul_(typical)
    noise = torch.tensor([uniform(row.seed, row.position) for row in rows], dtype=torch.float64)
    blocks = _blocks(weights, 0.0)
    mass = _block_sums(blocks).cumsum(-1)
    target = noise[:, None].to(mass.device, non_blocking=True) * mass[:, -1:]
    # The first whose cumulative mass exceeds the target: never one of weight 0. The clamps matter for NaN alone.
    block = torch.searchsorted(mass, target, right=True).clamp_(max=mass.shape[1] - 1)
    below = torch.where(block > 0, mass.gather(1, (block - 1).clamp(min=0)), 0.0)
    inner = blocks.gather(1, block[..., None].expand(-1, 1, _BLOCK))[:, 0].cumsum(-1, dtype=torch.float64)
    rest = torch.minimum(target - below, torch.nextafter(inner[:, -1:], inner.new_zeros(())))
    offset = torch.searchsorted(inner, rest, right=True).clamp_(max=_BLOCK - 1)
    return (block * _BLOCK + offset)[:, 0]


def _filter(scores: Tensor, rows: Sequence[Row], keep: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Temperature and filters of rows that are drawn.

    Returns the scaled scores; weights, proportional to their softmax wherever a token may still be drawn; the score
    below which tokens are out ([R, 1], or None); and a mask of the tokens that typical-p leaves (or None).
    Most filters are a floor, because masking a vocabulary on the CPU costs more than everything else here.
    """
    asked = [row.params for row in rows]
    numbers = torch.tensor([(p.temperature, p.top_k, p.top_p, p.min_p) for p in asked], dtype=torch.float64)
    temperature, top_k, top_p, min_p = numbers.to(scores.device, non_blocking=True).split(1, dim=1)
    scaled = scores / temperature.to(scores.dtype)
    weights = scaled.softmax(-1)
    if not any(p.top_k or p.top_p < 1 or p.min_p or p.typical_p < 1 for p in asked):
        return scaled, weights, None, None
    vocab = scaled.shape[1]
    open_nucleus = any(p.top_p < 1 and not p.top_k for p in asked)
    # On a GPU a full sort costs less than waiting to see whether a partial one was enough.
    width = (vocab if scaled.is_cuda else _NUCLEUS) if open_nucleus else 1
    width = min(max(width, keep, *(p.top_k for p in asked)), vocab)
    best, ids = scaled.topk(width)

    floors = []
    if any(p.top_k for p in asked):
        last = best.gather(1, top_k.long().clamp(keep, width) - 1)
        floors.append(torch.where(top_k > 0, last, -math.inf))
        weights.mul_(_reaches(scaled, floors[-1]))
    if any(p.top_p < 1 for p in asked):
        share = torch.where(top_p < 1, top_p, 0.0)
        edge = _nucleus_edge(scaled, weights, share, best, ids, keep)
        floors.append(torch.where(top_p < 1, edge, -math.inf))
    if any(p.min_p for p in asked):
        floors.append(torch.minimum(best[:, :1] + min_p.log().to(best.dtype), best[:, min(keep, vocab) - 1, None]))
    floor = torch.cat(floors, dim=1).amax(1, keepdim=True) if floors else None
    typical = _typical(scaled, floor, asked, keep) if any(p.typical_p < 1 for p in asked) else None
    return scaled, weights, floor, typical


def _nucleus_edge(scaled: Tensor, weights: Tensor, top_p: Tensor, best: Tensor, ids: Tensor, keep: int) -> Tensor:
    """[R, 1] the smallest score in the smallest set of likeliest tokens that holds top_p of all the weight.

    best, ids: each row's largest scores, in order; on the CPU a row that they don't suffice for looks further.
    """
    mass = weights.gather(1, ids).cumsum(-1, dtype=torch.float64)
    limit = top_p * _total(weights)
    inside = 1 + (mass[:, :-1] < limit).sum(-1, keepdim=True)  # a token stays when less than the limit lies above it
    edge = best.gather(1, inside.clamp(min=min(keep, best.shape[1])) - 1)
    if best.shape[1] < scaled.shape[1] and not scaled.is_cuda and (short := mass[:, -1] < limit[:, 0]).any():
        best, ids = scaled[short].topk(min(16 * best.shape[1], scaled.shape[1]))
        edge[short] = _nucleus_edge(scaled[short], weights[short], top_p[short], best, ids, keep)
    return edge


def _typical(scaled: Tensor, floor: Tensor | None, asked: Sequence[SamplingParams], keep: int) -> Tensor:
    """[R, V] the tokens whose information is closest to the entropy (Meister et al., arXiv:2202.00666)."""
    stays = torch.ones_like(scaled, dtype=torch.bool)
    rows = [i for i, params in enumerate(asked) if params.typical_p < 1]  # the others need no sort
    x = scaled[rows]
    if floor is not None:
        x = x.masked_fill(x < floor[rows], -math.inf)
    logprobs = x.log_softmax(-1)
    probs = logprobs.exp()
    entropy = -_total((logprobs * probs).nan_to_num(nan=0.0))
    distance, order = (-logprobs - entropy.to(x.dtype)).abs().sort(-1)
    mass = probs.gather(1, order).cumsum(-1, dtype=torch.float64)
    limit = torch.tensor([[asked[i].typical_p] for i in rows], dtype=torch.float64).to(x.device, non_blocking=True)
    last = (mass < limit).sum(-1, keepdim=True).clamp(min=keep - 1).clamp(max=x.shape[1] - 1)
    stays[rows] = torch.empty_like(x, dtype=torch.bool).scatter(1, order, distance <= distance.gather(1, last))
    return stays


def _reaches(scaled: Tensor, floor: Tensor) -> Tensor:
    """1.0 where scaled >= floor, else 0.0: multiplying by a bool mask is several times slower on the CPU."""
    return torch.ge(scaled, floor, out=torch.empty_like(scaled))


def _block_sums(blocks: Tensor) -> Tensor:
    """[R, blocks, _BLOCK] -> [R, blocks] float64; float32 does inside a block, and saves a copy of the whole."""
    return blocks.sum(-1).double()


def _total(x: Tensor) -> Tensor:
    """[R, 1] float64 sum along the vocabulary, in an order that the number of rows doesn't change."""
    return _block_sums(_blocks(x, 0.0)).cumsum(-1)[:, -1:]
