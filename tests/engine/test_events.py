"""What `Engine.step` returns: updates that join to the outputs, counts and times, whatever else happens."""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor

from puna.engine.block_pool import BlockPool
from puna.engine.engine import Engine
from puna.engine.outputs import RequestOutput, SequenceUpdate
from puna.engine.sampling_params import SamplingParams
from puna.engine.sequence import Batch, RequestTimes
from puna.engine.validation import RequestValidator
from puna.tokenizer import Tokenizer

VOCAB, CONTEXT = 384, 96


class Script:
    """A runner without a model: the token after position p of a sequence is the p-th of a fixed text, repeated."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.calls, self.fail_at = tokens, 0, -1

    def run(self, batch: Batch) -> Tensor:
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        positions = [chunk.start + row for chunk in batch.chunks for row in chunk.logit_rows]
        logits = torch.zeros(len(positions), VOCAB)
        logits[range(len(positions)), [self.tokens[p % len(self.tokens)] for p in positions]] = 9.0
        return logits

    def clear(self, blocks) -> None:
        pass


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint) -> Tokenizer:
    return Tokenizer.load(tiny_checkpoint())


TEXT = "señor 🐑🐑 llama, naïve café; it's Ærø. Once upon"


def engine_of(tokenizer: Tokenizer, *, blocks: int = 200, batch_tokens: int = 64, text: str = TEXT) -> Engine:
    ticks = count()
    return Engine(
        Script(tokenizer.encode(text)),  # type: ignore[arg-type]
        BlockPool(blocks, 4),
        RequestValidator(VOCAB, CONTEXT, batch_tokens, 32),
        tokenizer,
        clock=lambda: float(next(ticks)),
    )


def run(engine: Engine) -> tuple[dict[str, list[SequenceUpdate]], dict[str, RequestOutput]]:
    updates, finished = defaultdict(list), {}
    while engine.busy:
        out = engine.step()
        for update in out.updates:
            assert update.request_id not in finished, "an update after the end"
            updates[update.request_id].append(update)
        finished |= {output.id: output for output in out.finished}
        engine.scheduler.check()
    return updates, finished


def check_join(updates: list[SequenceUpdate], output: RequestOutput) -> None:
    """Joined updates are the output, and each text is final."""
    assert {update.index for update in updates} <= {completion.index for completion in output.outputs}
    for completion in output.outputs:
        mine = [update for update in updates if update.index == completion.index]
        assert "".join(update.text for update in mine) == completion.text
        assert [token for update in mine for token in update.token_ids] == completion.token_ids
        assert [u.finish_reason for u in mine] == [None] * (len(mine) - 1) + [completion.finish_reason]
        assert mine[-1].stop_reason == completion.stop_reason
        if completion.logprobs is None:
            assert all(update.logprobs is None for update in mine)
        else:
            assert [entry for update in mine for entry in update.logprobs or []] == completion.logprobs
        if "\ufffd" not in completion.text[:-1]:
            assert not any("\ufffd" in update.text for update in mine[:-1])


OPTIONS = [
    {"max_tokens": 30},
    {"max_tokens": 25, "n": 3, "temperature": 1.0, "logprobs": 2},
    {"max_tokens": 12, "n": 2},
    {"max_tokens": 40, "stop": ("Once", "café;", "🐑🐑 ll")},
    {"max_tokens": 40, "stop": ("café",), "include_stop_str_in_output": True, "logprobs": 0},
    {"max_tokens": 5, "prompt_logprobs": 1},
    {"max_tokens": 20, "min_tokens": 10, "stop": (" ",)},
]


@pytest.mark.parametrize(("blocks", "batch_tokens"), [(200, 64), (200, 7), (40, 64)])
@pytest.mark.parametrize("seed", range(3))
def test_updates_join_to_the_outputs(tokenizer: Tokenizer, blocks: int, batch_tokens: int, seed: int):
    draw = random.Random(seed)
    engine = engine_of(tokenizer, blocks=blocks, batch_tokens=batch_tokens)
    asked = []
    for options in OPTIONS * 2:
        prompt = [draw.randrange(45, 300) for _ in range(draw.randrange(1, 20))]
        asked.append(engine.add(prompt, SamplingParams(seed=seed, **options)))
    updates, finished = run(engine)
    assert finished.keys() == set(asked)
    assert blocks > 40 or engine.scheduler.preemptions
    for id in asked:
        check_join(updates[id], finished[id])


def test_a_stop_string_is_never_given_out_in_parts(tokenizer: Tokenizer):
    engine = engine_of(tokenizer)
    id = engine.add([60], SamplingParams(max_tokens=60, stop=("llama, na",)))
    updates, finished = run(engine)
    assert finished[id].outputs[0].stop_reason == "llama, na"
    assert finished[id].outputs[0].text in TEXT and "lla" not in "".join(u.text for u in updates[id])


def test_equal_completions_of_a_greedy_request(tokenizer: Tokenizer):
    engine = engine_of(tokenizer)
    id = engine.add([60, 61], SamplingParams(max_tokens=9, n=3))
    _, finished = run(engine)
    first, *others = finished[id].outputs
    assert len(others) == 2 and all((c.token_ids, c.text) == (first.token_ids, first.text) for c in others)
    assert finished[id].num_output_tokens == 27


def test_scoring_has_no_updates(tokenizer: Tokenizer):
    engine = engine_of(tokenizer)
    id = engine.add([60, 61, 62], SamplingParams(max_tokens=0, prompt_logprobs=0, n=2))
    updates, finished = run(engine)
    assert not updates[id] and [len(c.token_ids) for c in finished[id].outputs] == [0, 0]
    assert [token for token, _, _ in finished[id].prompt_logprobs or []] == [61, 62]


def test_an_aborted_sequence_gives_out_what_it_held_back(tokenizer: Tokenizer):
    engine = engine_of(tokenizer, text="stop")
    params = SamplingParams(max_tokens=50, stop=("stopstopstopstopstopstop!",))
    ids = [engine.add([60], params) for _ in range(2)]
    texts = "".join(update.text for _ in range(6) for update in engine.step().updates if update.request_id == ids[0])
    assert texts == ""
    engine.abort(ids[0])
    out = engine.step()
    (output,) = out.finished
    (last,) = [update for update in out.updates if update.request_id == ids[0]]
    assert (last.finish_reason, last.text) == ("abort", output.outputs[0].text) and last.text.startswith("sto")


# Counts and times


def test_counts_and_times(tokenizer: Tokenizer):
    engine = engine_of(tokenizer, batch_tokens=8)
    prompt = list(range(50, 70))
    first = engine.add(prompt, SamplingParams(max_tokens=3))
    _, finished = run(engine)
    output = finished[first]
    assert (output.num_prompt_tokens, output.num_cached_tokens, output.num_output_tokens) == (20, 0, 3)
    # The clock ticks when a request is added, when a batch is scheduled and when its tokens are there: the prompt
    # takes three steps, of which the last brings the first token, and two more tokens follow.
    assert output.times == RequestTimes(arrived=0, scheduled=1, first_token=6, last_token=10)
    again = engine.add(prompt, SamplingParams(max_tokens=3))
    _, finished = run(engine)
    assert finished[again].num_cached_tokens == 16
    scored = engine.add(prompt, SamplingParams(max_tokens=0, prompt_logprobs=0))
    _, finished = run(engine)
    times = finished[scored].times
    assert times is not None and times.scheduled is not None and times.first_token is times.last_token is None


def test_preemption_keeps_the_first_times(tokenizer: Tokenizer):
    engine = engine_of(tokenizer, blocks=26)
    ids = [engine.add([60 + i] * 9, SamplingParams(max_tokens=40)) for i in range(5)]
    _, finished = run(engine)
    assert engine.scheduler.preemptions
    for id in ids:
        times = finished[id].times
        assert times is not None
        assert times.arrived < times.scheduled < times.first_token < times.last_token  # type: ignore[operator]
        assert finished[id].num_cached_tokens == 0


# What may go wrong in between


def test_an_interrupted_step_loses_no_event(tokenizer: Tokenizer):
    """The abort was applied before the interruption: its output comes with the next step."""
    engine = engine_of(tokenizer)
    ids = [engine.add([60 + i], SamplingParams(max_tokens=20)) for i in range(2)]
    engine.step()
    engine.abort(ids[0])
    engine.runner.fail_at = engine.runner.calls + 1  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    updates, finished = run(engine)
    assert finished.keys() == set(ids)
    assert finished[ids[0]].outputs[0].finish_reason == "abort" and updates[ids[0]][-1].finish_reason == "abort"


def test_requests_may_be_added_and_aborted_during_a_step(tokenizer: Tokenizer):
    engine = engine_of(tokenizer)
    done: set[str] = set()
    added: list[str] = []
    aborted: set[str] = set()
    failures: list[BaseException] = []

    def add(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for _ in range(60):
                id = engine.add([draw.randrange(45, 300)] * 3, SamplingParams(max_tokens=draw.randrange(1, 9)))
                added.append(id)
                if draw.random() < 0.3:
                    engine.abort(id)
                    aborted.add(id)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=add, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or engine.busy:
        done |= {output.id for output in engine.step().finished}
    assert not failures and len(set(added)) == 240 and done == set(added)
    engine.scheduler.check()


def test_seeds_come_from_the_operating_system(tokenizer: Tokenizer):
    assert engine_of(tokenizer).seed != engine_of(tokenizer).seed


@pytest.mark.parametrize("words", [("llama",), (" llama", "café"), ("sheep", "🐑")])
def test_bad_words_are_never_completed(tokenizer: Tokenizer, tmp_path: Path, words: tuple[str, ...]):
    """The script insists on them: their last token is banned, and the next likeliest (here token 0) comes instead."""
    engine = engine_of(tokenizer)
    id = engine.add([60], SamplingParams(max_tokens=60, bad_words=words, skip_special_tokens=False))
    _, finished = run(engine)
    text = finished[id].outputs[0].text
    spelled = [word for word in words if word in TEXT * 3]
    assert spelled and not any(word in text for word in spelled)
    assert "<|endoftext|>" in text
