"""The scheduler on thousands of random schedules, without torch: a dict of cache slots plays the model.

What stands in a slot is a digest of all tokens up to its position, as a key or value depends on them all. After every
step each sequence must see exactly its own digests, through sharing, copies, prefix hits and preemption; every request
must end with the result that it has when it runs alone.
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from puna.engine import scheduler as scheduler_module
from puna.engine.block_pool import BlockPool
from puna.engine.sampling_params import SamplingParams
from puna.engine.scheduler import Scheduler
from puna.engine.sequence import Batch, Chunk, Request, Sequence

END = 2  # of the tokens 0, 1, 2
PLAIN, GREEDY = SamplingParams(temperature=1.0), SamplingParams()


@pytest.fixture(autouse=True)
def few_logit_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that small prompts meet the limit."""
    monkeypatch.setattr(scheduler_module, "PROMPT_LOGIT_ROWS", 3)


@dataclass
class Asked:
    """A request as the simulation knows it. `width` > 1 continuations are beams or independent samples."""

    number: int
    prompt: list[int]
    new: int  # most new tokens
    width: int = 1
    beams: bool = False
    score: bool = False
    prompt_logprobs: bool = False

    def request(self) -> Request:
        params = SamplingParams(
            n=1 if self.beams else self.width,
            num_beams=self.width if self.beams else 1,
            temperature=0.0 if self.beams else 1.0,
            max_tokens=0 if self.score else None,
            prompt_logprobs=0 if self.prompt_logprobs or self.score else None,
        )
        longest = len(self.prompt) + (0 if self.score else self.new)
        sequence = Sequence(list(self.prompt), len(self.prompt), longest, seed=self.number)
        return Request(str(self.number), list(self.prompt), params, (END,), [sequence])

    def alone(self) -> list[list[int]]:
        """Its continuations, without any scheduler."""
        if self.score:
            return []
        beams = [list(self.prompt)]
        if self.beams:
            while picks := choose_beams(self, beams):
                beams = [[*beams[parent], token] for parent, token in picks]
            return beams
        out = []
        for index in range(self.width):
            tokens = list(self.prompt)
            while len(tokens) < len(self.prompt) + self.new and tokens[len(self.prompt) :][-1:] != [END]:
                tokens.append(choose_token(self.number + index, tokens))
            out.append(tokens)
        return out


def choose_token(seed: int, tokens: list[int]) -> int:
    draw = hash((seed, *tokens))
    return END if draw % 20 == 0 else draw // 20 % 2


def choose_beams(asked: Asked, beams: list[list[int]]) -> list[tuple[int, int]]:
    """Parents, in any order and as often as it falls, and tokens; none at the end."""
    draw = random.Random(hash((asked.number, *map(tuple, beams))))
    if len(beams[0]) + 1 >= len(asked.prompt) + asked.new or draw.random() < 0.05:
        return []
    return [(draw.randrange(len(beams)), draw.randrange(2)) for _ in range(asked.width)]


@dataclass
class Simulation:
    """What engine and runner do with a scheduler, on digests instead of tensors."""

    pool: BlockPool
    max_tokens: int
    max_sequences: int
    asked: dict[str, Asked] = field(default_factory=dict)
    requests: dict[str, Request] = field(default_factory=dict)  # not ended
    ended: int = 0
    copies: int = 0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.pool, self.max_tokens, self.max_sequences)
        self.slots: dict[int, int] = {}

    def fits(self, asked: Asked) -> bool:
        """What the engine refuses otherwise."""
        room = self.pool.num_blocks // asked.width * self.pool.block_size
        within = asked.width <= min(self.max_tokens, self.max_sequences)
        return within and len(asked.prompt) + (0 if asked.score else asked.new) <= room

    def add(self, asked: Asked) -> None:
        request = asked.request()
        self.asked[request.id], self.requests[request.id] = asked, request
        self.scheduler.add(request)
        self.check()

    def abort(self, id: str) -> None:
        self.scheduler.remove(self.requests.pop(id))
        self.check()

    def step(self) -> None:
        batch = self.scheduler.schedule()
        assert 0 < batch.num_tokens == sum(chunk.count for chunk in batch.chunks) <= self.max_tokens
        assert batch.chunks[0].request is self.scheduler.running[0], "the oldest request must go on in every step"
        assert sum(request.width for request in self.scheduler.running) <= self.max_sequences
        self.compute(batch)
        self.scheduler.update(batch)
        self.check_slots()
        for request in {chunk.request.id: chunk.request for chunk in batch.chunks}.values():
            self.decide(request, [chunk for chunk in batch.chunks if chunk.request is request])
        self.check()

    def compute(self, batch: Batch) -> None:
        size = self.pool.block_size
        self.copies += len(batch.copies)
        moved = {
            target * size + i: self.slots.get(source * size + i) for source, target in batch.copies for i in range(size)
        }
        self.slots.update({slot: digest for slot, digest in moved.items() if digest is not None})
        for chunk in batch.chunks:
            assert chunk.count > 0
            assert chunk.start == chunk.sequence.computed
            for position in range(chunk.start, chunk.start + chunk.count):
                slot = self.slot(chunk.sequence, position)
                assert self.pool.users[slot // size] == 1, "nobody writes into a block that another uses"
                self.slots[slot] = hash(tuple(chunk.sequence.tokens[: position + 1]))

    def slot(self, seq: Sequence, position: int) -> int:
        size = self.pool.block_size
        return seq.blocks[position // size] * size + position % size

    def decide(self, request: Request, chunks: list[Chunk]) -> None:
        asked = self.asked[request.id]
        for chunk in chunks:
            if request.wants_prompt:
                known, first = len(request.prompt_logprobs), chunk.start + chunk.logit_rows.start
                predicted = request.prompt[known + 1 : first + len(chunk.logit_rows) + 1]
                request.prompt_logprobs += [(token, 0.0, []) for token in predicted]
        sampling = [chunk.sequence for chunk in chunks if chunk.samples]
        if asked.beams:
            assert sampling in ([], request.sequences), "beams choose together"
            if sampling:
                self.grow_beams(request, asked)
        elif sampling and request.params.n > len(request.sequences) + len(request.finished):
            self.scheduler.branch(request, [0] * asked.width)
            for seq in request.sequences:
                seq.seed += seq.index
            sampling = request.sequences
        if not asked.beams:
            for seq in sampling:
                seq.tokens.append(choose_token(seq.seed, seq.tokens))
                if seq.tokens[-1] == END or len(seq.tokens) == seq.max_len:
                    seq.finish_reason = "stop"
        self.retire(request)

    def grow_beams(self, request: Request, asked: Asked) -> None:
        picks = choose_beams(asked, [seq.tokens for seq in request.sequences])
        if not picks:
            for seq in request.sequences:
                seq.finish_reason = "length"
            return
        self.scheduler.branch(request, [parent for parent, _ in picks])
        for seq, (_, token) in zip(request.sequences, picks, strict=True):
            seq.tokens.append(token)

    def retire(self, request: Request) -> None:
        for seq in [seq for seq in request.sequences if seq.finish_reason]:
            self.scheduler.release(seq)
            request.sequences.remove(seq)
            request.finished.append(seq)
        if request.sequences and not (request.score_only and not request.wants_prompt):
            return
        self.scheduler.remove(request)
        del self.requests[request.id]
        self.ended += 1
        asked = self.asked[request.id]
        order = request.finished if asked.beams else sorted(request.finished, key=lambda seq: seq.index)
        assert [seq.tokens for seq in order] == asked.alone()
        wanted = request.prompt[1:] if asked.score or asked.prompt_logprobs else []
        assert [token for token, _, _ in request.prompt_logprobs] == wanted

    def check(self) -> None:
        self.scheduler.check()
        queued = [int(request.id) for request in (*self.scheduler.running, *self.scheduler.waiting)]
        assert queued == sorted(queued) and set(map(str, queued)) == set(self.requests), "first come, first served"
        self.check_slots()

    def check_slots(self) -> None:
        for request in self.requests.values():
            for seq in request.sequences:
                seen = [self.slots[self.slot(seq, position)] for position in range(seq.computed)]
                assert seen == [hash(tuple(seq.tokens[: position + 1])) for position in range(seq.computed)]

    def drain(self) -> None:
        while self.requests:
            self.step()
        assert len(self.scheduler) == 0
        assert self.pool.available == self.pool.num_blocks


def random_request(draw: random.Random, number: int, longest: int, widest: int) -> Asked:
    prompt = [draw.randrange(2) for _ in range(draw.randint(1, longest))]
    if draw.random() < 0.3:  # many share a beginning
        prompt = [0, 1] * (len(prompt) // 2) + prompt[-1:]
    kind = draw.choice(("plain", "samples", "beams", "beams", "score", "prompt"))
    width = draw.randint(2, max(2, widest)) if kind in ("samples", "beams") else 1
    flags = {"beams": kind == "beams", "score": kind == "score", "prompt_logprobs": kind == "prompt"}
    return Asked(number, prompt, draw.randint(1, 16), width, **flags)


def random_simulation(draw: random.Random) -> Simulation:
    size = draw.randint(1, 5)
    pool = BlockPool(draw.randint(16, 48) // size, size, prefix_caching=draw.random() < 0.8)
    return Simulation(pool, draw.choice((1, 3, 4, 5, 8, 64)), draw.choice((1, 4, 5, 16)))


def random_history(seed: int) -> Simulation:
    """Requests that come at random moments, some of which are aborted; all the others end."""
    draw = random.Random(seed)
    simulation = random_simulation(draw)
    pace = draw.random() * 0.8
    for number in range(draw.randint(1, 16)):
        asked = random_request(draw, number, longest=16, widest=4)
        if simulation.fits(asked):
            simulation.add(asked)
        while simulation.requests and draw.random() < pace:
            if draw.random() < 0.05:
                simulation.abort(draw.choice(list(simulation.requests)))
            else:
                simulation.step()
    simulation.drain()
    return simulation


def histories(seeds: range) -> None:
    done = [random_history(seed) for seed in seeds]
    total = len(done)
    # Every mechanism must have been at work, or the histories prove little.
    assert sum(s.ended for s in done) > 3 * total
    assert sum(s.copies for s in done) > total / 2
    assert sum(s.scheduler.preemptions for s in done) > total / 4
    assert sum(s.scheduler.hit_tokens for s in done) > total


def test_any_schedule_gives_every_request_its_own_result():
    histories(range(3000))


@pytest.mark.full
def test_any_of_very_many_schedules_gives_every_request_its_own_result():
    histories(range(10_000, 40_000))


class SchedulerMachine(RuleBasedStateMachine):
    """The same, driven by Hypothesis, which shrinks a failure to the shortest history."""

    @initialize(seed=st.integers(0, 2**32))
    def start(self, seed: int) -> None:
        self.simulation = random_simulation(random.Random(seed))

    @rule(seed=st.integers(0, 2**32), longest=st.integers(1, 16), widest=st.integers(1, 4))
    def add(self, seed: int, longest: int, widest: int) -> None:
        asked = random_request(random.Random(seed), len(self.simulation.asked), longest, widest)
        if self.simulation.fits(asked):
            self.simulation.add(asked)

    @precondition(lambda self: self.simulation.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.simulation.abort(data.draw(st.sampled_from(sorted(self.simulation.requests))))

    @precondition(lambda self: self.simulation.requests)
    @rule(steps=st.integers(1, 5))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            if self.simulation.requests:
                self.simulation.step()

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.drain()


SchedulerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30)
test_any_history = SchedulerMachine.TestCase


# Single cases, in which the numbers can be followed


def steps(simulation: Simulation) -> Iterator[Batch]:
    """The batches until all is done."""
    kept: list[Batch] = []
    compute = simulation.compute
    simulation.compute = lambda batch: (kept.append(batch), compute(batch))[1]  # type: ignore[method-assign]
    while simulation.requests:
        simulation.step()
        yield kept[-1]


def counts(batch: Batch) -> Counter[str]:
    tokens: Counter[str] = Counter()
    for chunk in batch.chunks:
        tokens[chunk.request.id] += chunk.count
    return tokens


def test_a_long_prompt_is_computed_in_chunks_beside_others():
    simulation = Simulation(BlockPool(16, 4), 4, 8)
    simulation.add(Asked(0, [0], 30))
    simulation.add(Asked(1, [1] * 8, 1))
    seen = [counts(batch) for batch, _ in zip(steps(simulation), range(4), strict=False)]
    assert seen == [{"0": 1, "1": 3}, {"0": 1, "1": 3}, {"0": 1, "1": 2}, {"0": 1}]


def test_the_second_of_two_equal_prompts_computes_only_its_end():
    simulation = Simulation(BlockPool(16, 4), 64, 8)
    for number in (0, 1):
        simulation.add(Asked(number, [0, 1] * 5, 1))
        assert [counts(batch) for batch in steps(simulation)] == [{str(number): 2 if number else 10}]
    assert simulation.scheduler.hit_tokens == 8


def test_log_probabilities_of_a_prompt_need_all_of_it():
    simulation = Simulation(BlockPool(16, 4), 64, 8)
    simulation.add(Asked(0, [0, 1] * 5, 1))
    simulation.drain()
    simulation.add(Asked(1, [0, 1] * 5, 1, prompt_logprobs=True))
    assert [counts(batch) for batch in steps(simulation)] == [{"1": 3}, {"1": 3}, {"1": 3}, {"1": 1}]


@pytest.mark.parametrize(("length", "copies"), [(8, 0), (9, 2), (7, 2)])
def test_samples_share_the_prompt_and_copy_its_unfinished_block(length: int, copies: int):
    simulation = Simulation(BlockPool(16, 4), 64, 8)
    simulation.add(Asked(0, [0] * length, 2, width=3))
    batches = list(steps(simulation))
    assert batches[0].num_tokens == length
    assert len(batches[1].copies) == min(copies, len(batches[1].chunks) - 1)


def test_the_newest_request_makes_room_and_comes_back():
    simulation = Simulation(BlockPool(4, 4, prefix_caching=False), 64, 8)
    simulation.add(Asked(0, [0] * 7, 9))
    simulation.add(Asked(1, [1] * 7, 4))
    seen = [counts(batch) for batch in steps(simulation)]
    assert seen[0] == {"0": 7, "1": 7}
    assert simulation.scheduler.preemptions == 1
    assert {"1": 9} in seen  # the prompt and two tokens, once more


def test_beams_wait_until_all_their_last_tokens_fit_a_step():
    simulation = Simulation(BlockPool(64, 2), 4, 8)
    simulation.add(Asked(0, [0] * 3, 20))
    simulation.add(Asked(1, [1] * 3, 6, width=4, beams=True))
    seen = [counts(batch) for batch in steps(simulation)]
    assert seen[:3] == [{"0": 3, "1": 1}, {"0": 1, "1": 2}, {"0": 1}]  # the prompt, and then they wait for "0" to end
    assert seen[-1] == {"1": 4}


def test_a_waiting_request_can_be_aborted():
    simulation = Simulation(BlockPool(8, 4), 64, 1)
    simulation.add(Asked(0, [0] * 4, 4))
    simulation.add(Asked(1, [0] * 4, 4))
    simulation.step()
    simulation.abort("1")
    simulation.drain()
    assert simulation.ended == 1
