"""The engine: requests in, events out, one step at a time.

A step schedules a batch, runs it, decides the next tokens and applies them. Under tensor parallelism every rank runs
this engine on the same requests; rank 0, the driver, accepts requests and decides, and broadcasts only that.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Any

from puna.engine.beam import BeamSearch
from puna.engine.block_pool import BlockPool
from puna.engine.decisions import Decision, decide
from puna.engine.outputs import SequenceUpdate, StepOutput, request_output
from puna.engine.runner import Runner
from puna.engine.sampler import Sampled, fork_seed
from puna.engine.sampling_params import SamplingParams
from puna.engine.scheduler import Scheduler
from puna.engine.sequence import Batch, Request, RequestTimes, Sequence
from puna.engine.text_stream import TextStream
from puna.engine.validation import RequestValidator
from puna.errors import UserError
from puna.parallel.tp_inference import TensorParallel
from puna.tokenizer import Tokenizer


class Engine:
    """Continuous batching over one runner. A request's result does not depend on the rest of the batch.

    `step` belongs to one thread at a time; `add` and `abort` may be called from any thread at any time and take effect
    when the next step begins.

    stop_ids: end tokens of the model. defaults: the checkpoint's sampling parameters, for callers to apply. seed: of
    requests without one; None draws it from the operating system. clock: monotonic seconds.
    """

    def __init__(
        self,
        runner: Runner,
        pool: BlockPool,
        validator: RequestValidator,
        tokenizer: Tokenizer | None,
        *,
        stop_ids: tuple[int, ...] = (),
        defaults: SamplingParams = SamplingParams(),  # noqa: B008 (frozen)
        seed: int | None = None,
        tp: TensorParallel | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runner, self.validator, self.tokenizer, self.stop_ids = runner, validator, tokenizer, stop_ids
        self.defaults = defaults
        self.seed = secrets.randbits(64) if seed is None else seed
        self.tp, self.is_driver, self.clock = tp, tp is None or tp.rank == 0, clock
        self.scheduler = Scheduler(pool, validator.max_num_batched_tokens, validator.max_num_seqs)
        self.requests: dict[str, Request] = {}
        self.computed_tokens = 0
        self._beams: dict[str, BeamSearch] = {}  # of requests with num_beams > 1, on the driver
        self._pending_ops: deque[tuple[str, Any]] = deque()  # for the next step to begin with
        self._numbers = count(1)  # of requests, for ids and seeds
        self._stopped = False
        self._out = StepOutput()  # of the step in progress; kept for the next one when it is interrupted

    # Requests in

    def add(self, prompt: list[int], params: SamplingParams, *, id: str | None = None) -> str:
        """Queue a request and return its id. Raises UserError when it can never run."""
        number = next(self._numbers)
        max_len = self.validator.max_len(prompt, params, self.scheduler.pool)
        if self.tokenizer is None and (params.stop or params.bad_words):
            raise UserError("This model has no tokenizer; use stop_token_ids and logit_bias instead of texts.")
        if id is None:
            id = next(name for n in count(number) if (name := str(n)) not in self.requests)
        seed = params.seed if params.seed is not None else fork_seed(self.seed, number)
        request = Request(
            id,
            list(prompt),
            params,
            stop_ids=(*(() if params.ignore_eos else self.stop_ids), *params.stop_token_ids),
            sequences=[Sequence(list(prompt), len(prompt), max_len, seed)],
            times=RequestTimes(self.clock()),
            bad_words=self._word_ids(params.bad_words),
        )
        if self.requests.setdefault(id, request) is not request:
            raise UserError(f"There is already a request {id!r}; give each its own id.")
        if request.has_beams:
            self._beams[id] = BeamSearch(len(prompt), params, request.stop_ids, max_len, seed, request.bad_words)
        self._pending_ops.append(("add", request))
        return id

    def abort(self, id: str) -> None:
        """End a request early; the next step returns what it has. Unknown and finished ones are ignored."""
        if id in self.requests:
            self._pending_ops.append(("abort", id))

    @property
    def busy(self) -> int:
        """Requests whose output no step has returned yet."""
        return len(self.requests)

    def _word_ids(self, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """Each word's tokens, at the beginning of a text and after a space."""
        if not words or self.tokenizer is None:
            return ()
        spellings = [text for word in words for text in (word, " " + word.lstrip(" "))]
        encoded = [tuple(self.tokenizer.encode(text, bos=False, special=False)) for text in spellings]
        return tuple(dict.fromkeys(ids for ids in encoded if ids))

    # Steps

    def step(self) -> StepOutput:
        """Compute the next batch. Returns an update per sequence with new tokens, and the finished requests."""
        if self._stopped:
            raise UserError("The other ranks were released; start the script again.")
        ops = []
        while self._pending_ops:  # emptied entry by entry, since other threads may append meanwhile
            ops.append(self._pending_ops.popleft())
        try:
            for op, value in self._broadcast(ops):
                self._apply_op(op, value)
            batch = self.scheduler.schedule()
            if batch.chunks:
                decisions = self._broadcast(self._run(batch))
                self.computed_tokens += batch.num_tokens
                now = self.clock()
                for what, id, index, value in decisions:
                    self._apply(what, id, index, value, now)
        except StopIteration:
            raise
        except BaseException:
            if self.tp is not None:
                self.tp.broken = True  # the ranks no longer agree on what comes next
            raise
        for request in {chunk.request.id: chunk.request for chunk in batch.chunks}.values():
            if self._is_over(request):
                self._finish(request)
        out, self._out = self._out, StepOutput()
        return out

    def stop(self) -> None:
        """Release the other ranks from `run_worker`, if any."""
        if self.tp is not None and not self.tp.broken and not self._stopped:
            self._broadcast([*self._pending_ops, ("stop", None)])
            self._stopped = True

    def run_worker(self) -> None:
        """The loop of the other ranks: step with the driver until it stops."""
        try:
            while True:
                self.step()
        except StopIteration:
            return

    def _run(self, batch: Batch) -> list[Decision] | None:
        """Compute a batch and decide what follows, on the driver."""
        now = self.clock()
        for chunk in batch.chunks:
            if chunk.request.times.scheduled is None:
                chunk.request.times.scheduled = now
        try:
            logits = self.runner.run(batch)
            self.scheduler.update(batch)
            return list(decide(batch, logits, self._beams)) if self.is_driver else None
        except BaseException:  # Ctrl-C, or out of memory: the batch is discarded and computed again
            self.scheduler.preempt_all()
            raise

    def _broadcast(self, value: Any) -> Any:
        """The driver's value on every rank."""
        return value if self.tp is None else self.tp.broadcast_object(value)

    def _apply_op(self, op: str, value: Any) -> None:
        if op == "stop":
            raise StopIteration
        if op == "add":
            self.requests[value.id] = value
            self.scheduler.add(value)
        elif value in self.requests:  # it may have finished since
            request = self.requests[value]
            request.aborted = True
            for seq in request.sequences:
                seq.finish_reason = "abort"
                if not request.score_only and not request.has_beams:
                    update = SequenceUpdate(request.id, seq.index, [], self._end_text(seq), None, "abort")
                    self._out.updates.append(update)
            request.finished += request.sequences
            self._finish(request)

    # Decisions to sequences, on every rank

    def _apply(self, what: str, id: str, index: int, value: Any, now: float) -> None:
        request = self.requests[id]
        if what == "error":
            request.error = value
        elif what == "prompt":
            request.prompt_logprobs += value
        else:
            request.times.last_token = now
            if request.times.first_token is None:
                request.times.first_token = now
            if what == "beams":
                self._grow_beams(request, value)
            elif request.unforked:
                self.scheduler.branch(request, [0] * len(value))
                for fork, (seq, result) in enumerate(zip(request.sequences, value, strict=True)):
                    seq.seed = fork_seed(seq.seed, fork)
                    self._out.updates.append(self._append(request, seq, result))
            else:
                self._out.updates.append(self._append(request, request.sequences[index], value[0]))

    def _grow_beams(self, request: Request, picks: list[tuple[int, int]]) -> None:
        """Each pick continues a parent by a token; no picks end the search."""
        if not picks:
            for seq in request.sequences:
                seq.finish_reason = "length"  # which of them count, and why they ended, is the search's result
            return
        self.scheduler.branch(request, [parent for parent, _ in picks])
        for seq, (_, token) in zip(request.sequences, picks, strict=True):
            seq.tokens.append(token)

    def _append(self, request: Request, seq: Sequence, result: Sampled) -> SequenceUpdate:
        params, token = request.params, result.token
        seq.tokens.append(token)
        logprobs = None
        if result.logprob is not None:
            logprobs = [(token, result.logprob, result.top or [])]
            seq.logprobs += logprobs
            seq.cumulative_logprob += result.logprob
        text, stop = "", None
        if token in request.stop_ids:  # an end token is not text, even one that is not special
            seq.finish_reason, seq.stop_reason = "stop", token
        elif self.tokenizer is not None:
            if seq.stream is None:
                seq.stream = self._text_stream(request)
            early = len(seq.tokens) - seq.prompt_len <= params.min_tokens
            text, stop = seq.stream.push(token, stops=not early)
            seq.texts.append(text)
        if stop is not None:
            seq.finish_reason, seq.stop_reason = "stop", stop
        elif seq.finish_reason is not None or len(seq.tokens) >= seq.max_len:
            seq.finish_reason = seq.finish_reason or "length"
            text += self._end_text(seq)
        return SequenceUpdate(request.id, seq.index, [token], text, logprobs, seq.finish_reason, seq.stop_reason)

    def _text_stream(self, request: Request) -> TextStream:
        assert self.tokenizer is not None
        params = request.params
        detokenizer = self.tokenizer.stream(skip_special=params.skip_special_tokens, after=request.prompt)
        return TextStream(detokenizer, params.stop, include_stop=params.include_stop_str_in_output)

    def _end_text(self, seq: Sequence) -> str:
        """The text that a sequence held back; it may still complete a stop string."""
        if seq.stream is None:
            return ""
        text, stop = seq.stream.end()
        seq.texts.append(text)
        if stop is not None and seq.finish_reason == "length":
            seq.finish_reason, seq.stop_reason = "stop", stop
        return text

    # Requests out

    def _is_over(self, request: Request) -> bool:
        """Release the sequences that have ended. Returns whether the whole request has."""
        if request.error is not None:
            return True
        if request.score_only:
            return not request.wants_prompt
        for seq in [seq for seq in request.sequences if seq.finish_reason]:
            self.scheduler.release(seq)
            request.sequences.remove(seq)
            request.finished.append(seq)
        return not request.sequences

    def _finish(self, request: Request) -> None:
        if request.error is not None:
            # Its keys and values are not finite; blocks that it alone holds must not reach others like that.
            users = self.scheduler.pool.users
            own = {block for seq in request.sequences for block in seq.blocks if users[block] == 1}
            self.scheduler.pool.forget(own)
            self.runner.clear(own)
        self.scheduler.remove(request)
        del self.requests[request.id]
        self._out.finished.append(request_output(request, self.tokenizer, self._beams.pop(request.id, None)))
