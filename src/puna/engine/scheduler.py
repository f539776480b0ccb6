"""The scheduler: which tokens the next step computes. There are no phases; all pending tokens share one budget.

Running requests come first, oldest first; then waiting ones are admitted. When the cache is full, the newest running
request is preempted: its blocks are freed and it waits at the front. Its tokens are recomputed later, at the cost
of time only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

from puna.engine.block_pool import BlockPool
from puna.engine.sequence import Batch, Chunk, Request, Sequence

PROMPT_LOGIT_ROWS = 256  # prompt positions per step of a request with prompt_logprobs: [256, vocab] logits


class Scheduler:
    """First come, first served, with at most `max_tokens` tokens and `max_sequences` sequences a step."""

    def __init__(self, pool: BlockPool, max_tokens: int, max_sequences: int) -> None:
        self.pool, self.max_tokens, self.max_sequences = pool, max_tokens, max_sequences
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preemptions = 0
        self.hit_tokens = 0  # found in the cache

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def add(self, request: Request) -> None:
        """Queue a request. The caller has checked that it alone fits the cache."""
        self.waiting.append(request)

    def schedule(self) -> Batch:
        """The batch of the next step; empty only without requests."""
        batch = Batch()
        i = 0
        while i < len(self.running):
            if self._place(self.running[i], batch):
                i += 1
            else:
                self._preempt()  # at worst this one itself; never one that is in the batch already
        while self.waiting and batch.num_tokens < self.max_tokens:
            request = self.waiting[0]
            full = sum(r.width for r in self.running) + request.width > self.max_sequences
            if full or not self._admit(request, batch):
                break
            self.running.append(self.waiting.popleft())
        return batch

    def update(self, batch: Batch) -> None:
        """Count the computed tokens of a batch and make its full blocks available to other requests."""
        for chunk in batch.chunks:
            seq = chunk.sequence
            seq.computed = chunk.start + chunk.count
            self.pool.register(seq.tokens, seq.blocks, seq.content_ids, seq.computed)

    def preempt_all(self) -> None:
        """Return all running requests to the queue, to be computed again."""
        while self.running:
            self._preempt()

    def branch(self, request: Request, parents: list[int]) -> None:
        """Replace the request's sequences by one continuation of each of `parents` (indices; one may occur many times).

        Continuations share their parent's blocks; the first to write into a shared block gets its own copy of it.
        """
        old, new = request.sequences, []
        for index, parent in enumerate(parents):
            seq = old[parent]
            if parent in parents[:index]:
                self.pool.fork(seq.blocks)
                seq = replace(
                    seq,
                    index=index,
                    tokens=list(seq.tokens),
                    blocks=list(seq.blocks),
                    content_ids=list(seq.content_ids),
                    logprobs=list(seq.logprobs),
                    texts=list(seq.texts),
                )
            new.append(seq)
        for parent, seq in enumerate(old):
            if parent not in parents:
                self.release(seq)
        request.sequences = new

    def release(self, sequence: Sequence) -> None:
        """Free a sequence's blocks."""
        self.pool.free(sequence.blocks)
        sequence.blocks, sequence.content_ids, sequence.computed = [], [], 0

    def remove(self, request: Request) -> None:
        """Forget a request that has ended."""
        self._release(request)
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)

    def check(self) -> None:
        """Raise AssertionError when blocks and sequences disagree."""
        sequences = [seq for request in (*self.running, *self.waiting) for seq in request.sequences]
        self.pool.check(seq.blocks for seq in sequences)
        for seq in sequences:
            assert seq.pending >= 1 and len(seq.tokens) <= seq.max_len
            assert len(seq.blocks) * self.pool.block_size >= seq.computed
        waiting = [seq for request in self.waiting for seq in request.sequences]
        assert not any(seq.blocks for seq in waiting), "a waiting request has blocks"

    def _preempt(self) -> None:
        """Preempt the newest running request."""
        victim = self.running.pop()
        self._release(victim)
        self.waiting.appendleft(victim)
        self.preemptions += 1

    def _release(self, request: Request) -> None:
        for seq in request.sequences:
            self.release(seq)

    def _admit(self, request: Request, batch: Batch) -> bool:
        """Match cached prefixes, then add what fits the budget, provided that the cache could hold all of it now."""
        for seq in request.sequences:
            if not request.wants_prompt:  # which needs the logits of all positions
                seq.blocks, seq.content_ids = self.pool.match(seq.tokens)
                seq.computed = len(seq.blocks) * self.pool.block_size
        needed = sum(-(-len(seq.tokens) // self.pool.block_size) - len(seq.blocks) for seq in request.sequences)
        hits, before = sum(seq.computed for seq in request.sequences), batch.num_tokens
        if needed > self.pool.available or not self._place(request, batch) or batch.num_tokens == before:
            self._release(request)
            return False
        self.hit_tokens += hits
        if request.num_cached_tokens is None:
            request.num_cached_tokens = hits
        return True

    def _place(self, request: Request, batch: Batch) -> bool:
        """Add the request's chunks within the budget. False, and no change, without enough blocks."""
        pool, size = self.pool, self.pool.block_size
        plan: list[tuple[Sequence, int, bool, int]] = []  # sequence, tokens, needs its own copy of its tail, new blocks
        users: dict[int, int] = {}
        for seq, count in self._counts(request, self.max_tokens - batch.num_tokens):
            own_tail = False
            if seq.computed % size:  # its last block is partly filled, and may be shared with its siblings
                tail = seq.blocks[seq.computed // size]
                users.setdefault(tail, pool.users[tail])
                own_tail = users[tail] > 1
                users[tail] -= own_tail
            plan.append((seq, count, own_tail, max(0, -(-(seq.computed + count) // size) - len(seq.blocks))))
        blocks = pool.allocate(sum(own_tail + fresh for _, _, own_tail, fresh in plan))
        if blocks is None:
            return False
        for seq, count, own_tail, fresh in plan:
            if own_tail:
                tail, copy = seq.computed // size, blocks.pop()
                batch.copies.append((seq.blocks[tail], copy))
                pool.free([seq.blocks[tail]])
                seq.blocks[tail] = copy
            seq.blocks.extend(blocks.pop(0) for _ in range(fresh))
            batch.add(Chunk(request, seq, seq.computed, count))
        return True

    def _counts(self, request: Request, budget: int) -> Iterator[tuple[Sequence, int]]:
        """The number of tokens of each sequence. The last tokens of all beams come in one step, since beams compete."""
        hold_last = request.has_beams and sum(seq.pending for seq in request.sequences) > budget
        for seq in request.sequences:
            count = min(seq.pending - hold_last, budget)
            if request.wants_prompt:
                count = min(count, PROMPT_LOGIT_ROWS)
            if count > 0:
                budget -= count
                yield seq, count
