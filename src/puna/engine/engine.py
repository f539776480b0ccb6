"""The engine: requests in, finished requests out, one step at a time.

A step is schedule, run, decide, apply. Under tensor parallelism every rank runs this same engine on the same requests;
rank 0 alone takes requests and chooses tokens, and the ranks share just those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import torch
from torch import Tensor

from puna.engine.beam import BeamSearch
from puna.engine.block_pool import BlockPool
from puna.engine.outputs import RequestOutput, TextStream, completions
from puna.engine.runner import Runner
from puna.engine.sampler import NonFiniteLogits, Row, Sampled, fork_seed, sample, token_logprobs
from puna.engine.sampling_params import SamplingParams
from puna.engine.scheduler import Scheduler
from puna.engine.sequence import Batch, Chunk, Request, Sequence
from puna.engine.validation import RequestValidator
from puna.errors import UserError
from puna.tokenizer import Tokenizer

Broadcast = Callable[[Any], Any]  # rank 0's value on every rank
GREEDY = SamplingParams()


class Engine:
    """Continuous batching over one runner. Nothing in it depends on what else is in the batch."""

    def __init__(
        self,
        runner: Runner,
        pool: BlockPool,
        validator: RequestValidator,
        tokenizer: Tokenizer | None,
        *,
        stop_ids: tuple[int, ...] = (),
        seed: int = 0,
        share: Broadcast | None = None,
        is_driver: bool = True,
    ) -> None:
        self.runner, self.validator, self.tokenizer, self.stop_ids, self.seed = (
            runner,
            validator,
            tokenizer,
            stop_ids,
            seed,
        )
        self.scheduler = Scheduler(pool, validator.max_batch_tokens, validator.max_num_seqs)
        self.requests: dict[str, Request] = {}
        self.computed_tokens = 0
        self._beams: dict[str, BeamSearch] = {}  # of requests with num_beams > 1, on rank 0
        self._broadcast: Broadcast = share or (lambda value: value)
        self.is_driver = is_driver
        self._pending_ops: list[tuple[str, Any]] = []  # what this rank was told since the last step
        self._count = 0

    # What callers do

    def add(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        id: str | None = None,
        score_only: bool = False,
        stream: bool = False,
    ) -> str:
        """Queue a request and give its id. Raises UserError when it can never run.

        `score_only` asks for log-probabilities of the prompt and no output; `stream` keeps the text up to date.
        """
        self._count += 1
        if id is None:
            id = next(name for n in count(self._count) if (name := str(n)) not in self.requests)
        if id in self.requests:
            raise UserError(f"there is already a request {id!r}; give each its own id.")
        max_len = self.validator.max_len(prompt, params, self.scheduler.pool, score_only=score_only)
        seed = params.seed if params.seed is not None else fork_seed(self.seed, self._count)
        stop_ids = () if params.ignore_eos else self.stop_ids
        sequence = Sequence(list(prompt), len(prompt), max_len, seed)
        request = Request(id, list(prompt), params, (*stop_ids, *params.stop_token_ids), [sequence], score_only)
        request.keeps_text = stream or bool(params.stop)
        if request.keeps_text and self.tokenizer is None:
            raise UserError("this model has no tokenizer, so there is no text to stream or to stop at.")
        if stream and request.has_beams:
            raise UserError("beam search chooses at the end and cannot stream; use generate, or num_beams = 1.")
        if request.has_beams:
            self._beams[id] = BeamSearch(len(prompt), params, request.stop_ids, max_len, seed)
        self.requests[id] = request
        self._pending_ops.append(("add", request))
        return id

    def abort(self, id: str) -> None:
        """Drop a request; unknown and finished ones are ignored."""
        if id in self.requests:
            self._pending_ops.append(("abort", id))

    @property
    def busy(self) -> int:
        """Requests that have not finished."""
        return len(self.requests)

    def step(self) -> list[RequestOutput]:
        """Compute the next batch; gives the requests that ended with it."""
        told = self._broadcast(self._pending_ops)
        self._pending_ops = []
        done = [out for op, value in told if (out := self._take(op, value))]
        batch = self.scheduler.schedule()
        if not batch.chunks:
            return done
        try:
            logits = self.runner.run(batch)
            self.scheduler.update(batch)
            decisions = list(self._decide(batch, logits)) if self.is_driver else None
        except BaseException:  # Ctrl-C, or no memory: what was scheduled is not done, and may be done again
            self.scheduler.preempt_all()
            raise
        self.computed_tokens += batch.num_tokens
        for decision in self._broadcast(decisions):
            self._apply(*decision)
        stepped = {chunk.request.id: chunk.request for chunk in batch.chunks}
        return done + [self._finish(request) for request in stepped.values() if self._over(request)]

    def stop(self) -> None:
        """Let the other ranks leave `follow`."""
        self._broadcast([*self._pending_ops, ("stop", None)])

    def run_worker(self) -> None:
        """What the other ranks do: step along with rank 0 until it stops."""
        try:
            while True:
                self.step()
        except StopIteration:
            return

    # Requests in

    def _take(self, op: str, value: Any) -> RequestOutput | None:
        if op == "stop":
            raise StopIteration
        if op == "add":
            self.requests[value.id] = value
            self.scheduler.add(value)
        elif value in self.requests:  # it may have ended since
            request = self.requests[value]
            for seq in request.sequences:
                seq.finish_reason = "abort"
            request.finished += request.sequences
            return self._finish(request)
        return None

    # Logits to decisions, on rank 0

    def _decide(self, batch: Batch, logits: Tensor) -> Iterator[tuple[str, str, int, Any]]:
        """(what, request id, sequence index, value): all that the step chose, in an order that every rank applies."""
        rows: list[Row] = []
        at: list[int] = []  # row of the logits for each of `rows`
        owners: list[tuple[Request, int | None]] = []  # and the index of the sequence that gets the token, if any
        beams: dict[str, list[int]] = {}
        row = 0
        for chunk in batch.chunks:
            request, seq = chunk.request, chunk.sequence
            first, row = row, row + len(chunk.logit_rows)
            if request.wants_prompt:
                yield self._prompt(chunk, logits[first:row])
            if chunk.samples and request.has_beams:
                beams.setdefault(request.id, []).append(row - 1)
                continue
            if not chunk.samples:  # looked at all the same: keys and values that are not numbers must not stay
                rows.append(Row(GREEDY, 0, 0))
                at.append(row - 1)
                owners.append((request, None))
                continue
            # Only rows whose logits depend on their tokens pay for the copies.
            prompt, output = (seq.tokens[: seq.prompt_len], seq.output) if request.params.adjusts else ((), ())
            for index in range(request.params.n if self._unforked(request) else 1):
                seed = fork_seed(seq.seed, index)
                rows.append(Row(request.params, seed, len(seq.tokens), prompt, output, request.stop_ids))
                at.append(row - 1)
                owners.append((request, request.sequences.index(seq)))
        if rows:
            plain = at == list(range(len(logits)))
            yield from self._tokens(logits if plain else logits[at], rows, owners)
        for id, where in beams.items():
            request = self.requests[id]
            try:
                picks = self._beams[id].advance(logits[where], [seq.tokens for seq in request.sequences])
                yield "beams", id, 0, picks
            except NonFiniteLogits as error:
                yield "error", id, 0, str(error)

    def _tokens(
        self, logits: Tensor, rows: list[Row], owners: list[tuple[Request, int | None]]
    ) -> Iterator[tuple[str, str, int, Any]]:
        """Sample; requests whose logits are unusable fail alone."""
        try:
            sampled = sample(logits, rows)
        except NonFiniteLogits as error:
            failed = {owners[i][0].id for i in error.rows}
            for id in failed:
                yield "error", id, 0, str(error)
            good = [i for i, (request, _) in enumerate(owners) if request.id not in failed]
            if good:
                yield from self._tokens(logits[good], [rows[i] for i in good], [owners[i] for i in good])
            return
        grouped: dict[tuple[str, int], list[Sampled]] = {}
        for (request, index), result in zip(owners, sampled, strict=True):
            if index is not None:
                grouped.setdefault((request.id, index), []).append(result)
        for (id, index), results in grouped.items():
            yield "tokens", id, index, results

    def _prompt(self, chunk: Chunk, logits: Tensor) -> tuple[str, str, int, Any]:
        """Log-probabilities of the prompt tokens that this chunk's logits predict, but for those known already."""
        request = chunk.request
        first, known = chunk.start + chunk.logit_rows.start, len(request.prompt_logprobs)
        targets = request.prompt[known + 1 : first + len(logits) + 1]
        logits = logits[: len(targets)]
        top = min(request.params.prompt_logprobs or 0, self.validator.vocab_size)
        chosen, ids, levels = token_logprobs(logits, torch.tensor(targets, device=logits.device), top)
        entries = [
            (token, level, list(zip(i, v, strict=True)))
            for token, level, i, v in zip(targets, chosen.tolist(), ids.tolist(), levels.tolist(), strict=True)
        ]
        if any(math.isnan(level) for _, level, _ in entries):
            return "error", request.id, 0, str(NonFiniteLogits([]))
        return "prompt", request.id, 0, entries

    @staticmethod
    def _unforked(request: Request) -> bool:
        """Its one sequence has computed the prompt, and the others of n > 1 are still to branch off."""
        return request.params.n > len(request.sequences) + len(request.finished)

    # Decisions to sequences, on every rank

    def _apply(self, what: str, id: str, index: int, value: Any) -> None:
        request = self.requests[id]
        if what == "error":
            request.error = value
        elif what == "prompt":
            request.prompt_logprobs += value
        elif what == "beams":
            self._grow_beams(request, value)
        elif self._unforked(request):
            self.scheduler.branch(request, [0] * len(value))
            for number, (seq, result) in enumerate(zip(request.sequences, value, strict=True)):
                seq.seed = fork_seed(seq.seed, number)
                self._append(request, seq, result)
        else:
            self._append(request, request.sequences[index], value[0])

    def _grow_beams(self, request: Request, picks: list[tuple[int, int]]) -> None:
        """Each pick continues a parent by a token; none when the search is over."""
        if not picks:
            for seq in request.sequences:
                seq.finish_reason = "length"  # which of them count, and why they ended, the search knows
            return
        self.scheduler.branch(request, [parent for parent, _ in picks])
        for seq, (_, token) in zip(request.sequences, picks, strict=True):
            seq.tokens.append(token)

    def _append(self, request: Request, seq: Sequence, result: Sampled) -> None:
        token = result.token
        seq.tokens.append(token)
        if result.logprob is not None:
            seq.logprobs.append((token, result.logprob, result.top or []))
            seq.cumulative_logprob += result.logprob
        if request.keeps_text and seq.text is None:
            seq.text = self._text_stream(request.params)
        if token in request.stop_ids:
            seq.finish_reason, seq.stop_reason = "stop", token
        elif seq.text is not None:
            early = len(seq.tokens) - seq.prompt_len <= request.params.min_tokens
            if found := seq.text.push(token, stops=not early):
                seq.finish_reason, seq.stop_reason = "stop", found
        if seq.finish_reason is None and len(seq.tokens) >= seq.max_len:
            seq.finish_reason = "length"

    def _text_stream(self, params: SamplingParams) -> TextStream:
        assert self.tokenizer is not None, "add() has refused this"
        stream = self.tokenizer.stream(skip_special=params.skip_special_tokens)
        return TextStream(stream, params.stop, include_stop=params.include_stop)

    # Requests out

    def _over(self, request: Request) -> bool:
        """Give the blocks of ended sequences back; whether the whole request has ended."""
        if request.error is not None:
            return True
        if request.score_only:
            return not request.wants_prompt
        for seq in [seq for seq in request.sequences if seq.finish_reason]:
            self.scheduler.release(seq)
            request.sequences.remove(seq)
            request.finished.append(seq)
        return not request.sequences

    def _finish(self, request: Request) -> RequestOutput:
        if request.error is not None:
            # Its keys and values are not numbers; blocks that it alone holds must not reach others like that.
            users = self.scheduler.pool.users
            own = {block for seq in request.sequences for block in seq.blocks if users[block] == 1}
            self.scheduler.pool.forget(own)
            self.runner.clear(own)
        self.scheduler.remove(request)
        del self.requests[request.id]
        search = self._beams.pop(request.id, None)
        out = RequestOutput(request.id, request.prompt, error=request.error)
        if request.score_only or request.params.prompt_logprobs is not None:
            out.prompt_logprobs = request.prompt_logprobs
        if request.error is None and not request.score_only:
            out.outputs = completions(request, self.tokenizer, search)
        return out
