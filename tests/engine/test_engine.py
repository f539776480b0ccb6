"""The engine gives a request the tokens that a whole forward per token would give it, whatever happens around it.

On a tiny random model in float64, in which equality is exact: nothing is so near a tie that the order of sums decides.
"""

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from puna.engine.beam import BeamSearch
from puna.engine.block_pool import BlockPool
from puna.engine.cuda_graphs import GraphRunner
from puna.engine.eager_runner import EagerRunner
from puna.engine.engine import Engine
from puna.engine.outputs import Completion, RequestOutput, StepOutput
from puna.engine.sampler import Row, fork_seed, sample
from puna.engine.sampling_params import SamplingParams
from puna.engine.sequence import Batch
from puna.engine.validation import RequestValidator
from puna.errors import UserError
from puna.model.attention import causal
from puna.model.llama import Llama
from puna.model_loader import load_model
from puna.tokenizer import Tokenizer
from puna.weights.open import open_checkpoint

CONTEXT = 96
SCORE = SamplingParams(max_tokens=0, prompt_logprobs=0)
STOP = tuple(range(2, 40))  # ids that end a text; so many that some texts end before their longest
TIGHT = 22  # blocks of 4 tokens: just enough for the largest of the cases


@dataclass
class Tiny:
    """A model, a slow oracle on it, and engines of any size around it."""

    model: Llama
    tokenizer: Tokenizer
    engines: list[Engine] = field(default_factory=list)

    def engine(
        self,
        *,
        blocks: int = 256,
        size: int = 4,
        batch_tokens: int = 256,
        seqs: int = 64,
        caching: bool = True,
        stop_ids: tuple[int, ...] = STOP,
        runner: Any = EagerRunner,
        **options: Any,
    ) -> Engine:
        validator = RequestValidator(self.model.config.vocab_size, CONTEXT, batch_tokens, seqs)
        pool = BlockPool(blocks, size, prefix_caching=caching)
        made = runner(self.model, blocks, size)
        engine = Engine(made, pool, validator, self.tokenizer, stop_ids=stop_ids, **options)
        self.engines.append(engine)
        return engine

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> Tensor:
        """[len(tokens), vocab] by one whole forward."""
        hidden = self.model(torch.tensor([tokens]), torch.arange(len(tokens))[None], causal)
        return self.model.logits(hidden[0])

    def expected(self, prompt: list[int], params: SamplingParams) -> list[list[int]]:
        """The new tokens of each completion, by a whole forward for every one of them."""
        assert params.max_tokens is not None
        ends = (*(() if params.ignore_eos else STOP), *params.stop_token_ids)
        if params.num_beams > 1:
            return self.expected_beams(prompt, params, ends)
        assert params.greedy or params.seed is not None
        out = []
        for index in range(params.n):
            seed, new = fork_seed(params.seed or 0, index), []
            while len(new) < params.max_tokens and not (new and new[-1] in ends):
                logits = self.logits([*prompt, *new])[-1:]
                if params.greedy and not params.adjusts:
                    new.append(int(logits.argmax()))
                else:
                    row = Row(params, seed, len(prompt) + len(new), prompt, new, ends)
                    new.append(sample(logits, [row])[0].token)
            out.append(new)
        return out

    def expected_beams(self, prompt: list[int], params: SamplingParams, ends: tuple[int, ...]) -> list[list[int]]:
        search = BeamSearch(len(prompt), params, ends, len(prompt) + (params.max_tokens or 0), params.seed or 0)
        beams = [list(prompt)]
        while not search.done:
            picks = search.advance(torch.stack([self.logits(beam)[-1] for beam in beams]), beams)
            beams = [[*beams[parent], token] for parent, token in picks]
        return [found.tokens for found in search.results()]


@dataclass
class Case:
    """A request and what it must give."""

    prompt: list[int]
    params: SamplingParams
    expected: list[list[int]]


def load(path: Any, *, dtype: torch.dtype = torch.float64, fast: bool = True) -> Tiny:
    with open_checkpoint(path) as source:
        tokenizer = source.tokenizer()
        assert tokenizer is not None
        model = load_model(source, dtype, fast=fast)
        model.fix_rope(CONTEXT)
        return Tiny(model, tokenizer)


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint) -> Tiny:
    return load(tiny_checkpoint())


@pytest.fixture
def tiny(loaded: Tiny) -> Iterator[Tiny]:
    """The same for every test, each of which must leave its engines idle and their caches whole."""
    yield loaded
    for engine in loaded.engines:
        drain(engine)
    loaded.engines.clear()


@pytest.fixture(scope="module")
def cases(loaded: Tiny) -> list[Case]:
    """Requests of every kind. Half of the prompts share their beginning; some end on the edge of a block."""
    kinds: list[tuple[int, int, dict[str, Any]]] = [  # prompt tokens, new tokens, options
        (1, 9, {}),
        (3, 12, {"temperature": 1.0}),
        (4, 1, {"temperature": 0.8, "top_k": 20, "top_p": 0.9}),
        (16, 7, {"temperature": 1.0, "n": 3}),
        (17, 6, {"temperature": 1.0, "n": 2, "repetition_penalty": 1.3, "min_p": 0.01}),
        (15, 8, {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.2}),
        (8, 12, {"min_tokens": 10}),
        (24, 10, {"ignore_eos": True}),
        (30, 5, {"logprobs": 3, "prompt_logprobs": 2}),
        (20, 8, {"num_beams": 3, "n": 2}),
        (7, 9, {"num_beams": 4, "temperature": 1.0, "early_stopping": True}),
        (40, 14, {"temperature": 1.0, "prompt_logprobs": 0}),
    ]
    draw = random.Random(0)
    start = [draw.randrange(45, 300) for _ in range(40)]
    out = []
    for seed, (length, new, options) in enumerate(kinds):
        shared = start[: length - 1] if seed % 2 else []
        prompt = shared + [draw.randrange(45, 300) for _ in range(length - len(shared))]
        params = SamplingParams(max_tokens=new, seed=seed, **options)
        out.append(Case(prompt, params, loaded.expected(prompt, params)))
    assert sum(len(tokens) < case.params.max_tokens for case in out for tokens in case.expected) > 3
    return out


def drain(engine: Engine) -> dict[str, RequestOutput]:
    """Step until nothing is left to do. The scheduler must be sound after every step, and the cache free at the end."""
    done = {}
    while engine.busy:
        for output in engine.step().finished:
            assert output.id not in done
            done[output.id] = output
        engine.scheduler.check()
    assert engine.scheduler.pool.available == engine.scheduler.pool.num_blocks
    assert not engine._beams
    return done


def tokens_of(output: RequestOutput) -> list[list[int]]:
    assert output.error is None
    assert [completion.index for completion in output.outputs] == list(range(len(output.outputs)))
    return [completion.token_ids for completion in output.outputs]


def check(engine: Engine, cases: list[Case]) -> list[RequestOutput]:
    """All cases together give what each must give."""
    ids = [engine.add(case.prompt, case.params) for case in cases]
    done = drain(engine)
    for id, case in zip(ids, cases, strict=True):
        assert tokens_of(done[id]) == case.expected, case.params
    return [done[id] for id in ids]


def one(engine: Engine, prompt: list[int], params: SamplingParams) -> RequestOutput:
    id = engine.add(prompt, params)
    return drain(engine)[id]


# The same tokens


def test_each_request_alone(tiny: Tiny, cases: list[Case]):
    for case in cases:
        check(tiny.engine(), [case])


def test_all_requests_together(tiny: Tiny, cases: list[Case]):
    check(tiny.engine(), cases)


@pytest.mark.parametrize("batch_tokens", [4, 5, 7, 16, 33])
def test_any_chunk_size(tiny: Tiny, cases: list[Case], batch_tokens: int):
    engine = tiny.engine(batch_tokens=batch_tokens)
    check(engine, cases)


def test_one_token_a_step(tiny: Tiny, cases: list[Case]):
    single = [case for case in cases if max(case.params.n, case.params.num_beams) == 1]
    check(tiny.engine(batch_tokens=1), single)


@pytest.mark.parametrize("size", [1, 2, 16])
def test_any_block_size(tiny: Tiny, cases: list[Case], size: int):
    check(tiny.engine(blocks=1024 // size, size=size), cases)


def test_a_warm_cache(tiny: Tiny, cases: list[Case]):
    engine = tiny.engine()
    check(engine, cases)
    before, computed = engine.scheduler.hit_tokens, engine.computed_tokens
    check(engine, cases)
    assert engine.scheduler.hit_tokens - before > 80
    assert engine.computed_tokens - computed < computed


def test_no_prefix_caching(tiny: Tiny, cases: list[Case]):
    engine = tiny.engine(caching=False)
    check(engine, cases)
    check(engine, cases)
    assert engine.scheduler.hit_tokens == 0


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("batch_tokens", [16, 64])
def test_preemption(tiny: Tiny, cases: list[Case], batch_tokens: int, caching: bool):
    engine = tiny.engine(blocks=TIGHT, batch_tokens=batch_tokens, caching=caching)
    check(engine, cases * 2)
    assert engine.scheduler.preemptions > 3


def test_few_sequences_at_once(tiny: Tiny, cases: list[Case]):
    check(tiny.engine(seqs=4), cases)


def test_plain_layers_instead_of_fused_ones(tiny_checkpoint, cases: list[Case]):
    check(load(tiny_checkpoint(), fast=False).engine(), cases)


@pytest.mark.parametrize(
    "config",
    [
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
        {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 24},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 32},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}},
    ],
    ids=["mha", "mqa", "gqa", "dynamic", "yarn"],
)
def test_any_architecture(tiny_checkpoint, cases: list[Case], config: dict):
    other = load(tiny_checkpoint(seed=5, **config))
    again = [Case(case.prompt, case.params, other.expected(case.prompt, case.params)) for case in cases]
    check(other.engine(batch_tokens=20), again)


@pytest.mark.parametrize("seed", range(6))
def test_requests_that_come_and_go_at_any_time(tiny: Tiny, cases: list[Case], seed: int):
    random_traffic(tiny, cases, seed)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(100, 300))
def test_requests_that_come_and_go_at_any_time_more(tiny: Tiny, cases: list[Case], seed: int):
    random_traffic(tiny, cases, seed)


def random_traffic(tiny: Tiny, cases: list[Case], seed: int) -> None:
    draw = random.Random(seed)
    engine = tiny.engine(
        blocks=draw.choice((TIGHT, 40, 200)),
        batch_tokens=draw.choice((4, 9, 30, 256)),
        seqs=draw.choice((4, 7, 64)),
        caching=draw.random() < 0.7,
        runner=draw.choice((EagerRunner, graph_runner)),
    )
    asked: dict[str, Case] = {}
    aborted = set()
    done: dict[str, RequestOutput] = {}
    for _ in range(30):
        case = draw.choice(cases)
        asked[engine.add(case.prompt, case.params)] = case
        while engine.busy and draw.random() < 0.7:
            if draw.random() < 0.1:
                aborted.add(id := draw.choice(list(engine.requests)))
                engine.abort(id)
            done |= {output.id: output for output in engine.step().finished}
            engine.scheduler.check()
    done |= drain(engine)
    assert done.keys() == asked.keys()
    for id, case in asked.items():
        if id in aborted:
            aborted_like(done[id], case)
        else:
            assert tokens_of(done[id]) == case.expected


def aborted_like(output: RequestOutput, case: Case) -> None:
    """Every completion is what it must be or, when it was cut off, begins like it."""
    assert output.error is None
    for completion in output.outputs:
        whole = case.expected[completion.index]
        if completion.finish_reason == "abort":
            assert completion.token_ids == whole[: len(completion.token_ids)]
        else:
            assert completion.token_ids == whole


def graph_runner(model: Llama, blocks: int, size: int) -> GraphRunner:
    return GraphRunner(model, blocks, size, capture=False)


class TwinRunner(EagerRunner):
    """Runs the padded decode of the graphs beside the eager one, on a cache of its own, and compares all logits."""

    def __init__(self, model: Llama, blocks: int, size: int) -> None:
        super().__init__(model, blocks, size)
        self.twin = graph_runner(model, blocks, size)

    def run(self, batch: Batch) -> Tensor:
        logits = super().run(batch)
        torch.testing.assert_close(self.twin.run(batch), logits, rtol=0, atol=1e-12)
        return logits


def test_padded_decode_gives_the_logits_of_the_eager_runner(tiny: Tiny, cases: list[Case]):
    steps = set()
    for blocks in (TIGHT, 256):
        engine = tiny.engine(blocks=blocks, runner=TwinRunner)
        check(engine, cases)
        steps |= engine.runner.twin.steps.keys()  # type: ignore[attr-defined]
    assert len(steps) > 3 and any(rows > 4 for rows, _ in steps)


def test_samples_differ_and_the_seed_repeats_them(tiny: Tiny):
    params = SamplingParams(max_tokens=12, temperature=1.0, n=4, seed=3, ignore_eos=True)
    first = tokens_of(one(tiny.engine(), [50, 60, 70], params))
    assert first == tokens_of(one(tiny.engine(), [50, 60, 70], params))
    assert len(set(map(tuple, first))) == 4
    alone = replace(params, n=1)
    assert tokens_of(one(tiny.engine(), [50, 60, 70], alone)) == first[:1]


def test_requests_without_a_seed_differ_and_the_engine_repeats_them(tiny: Tiny):
    params = SamplingParams(max_tokens=12, temperature=1.0, ignore_eos=True)
    twice = []
    for _ in range(2):
        engine = tiny.engine(seed=7)
        ids = [engine.add([50, 60, 70], params) for _ in range(3)]
        done = drain(engine)
        twice.append([tokens_of(done[id]) for id in ids])
    assert twice[0] == twice[1]
    assert twice[0][0] != twice[0][1] != twice[0][2]


# Beams, as transformers finds them


@pytest.fixture(scope="module")
def theirs(tiny_checkpoint) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny_checkpoint(), dtype=torch.float32).eval()


BEAMS: list[dict[str, Any]] = [
    {"num_beams": 2},
    {"num_beams": 4, "n": 4, "early_stopping": True},
    {"num_beams": 3, "n": 2, "length_penalty": 2.0, "early_stopping": "never"},
    {"num_beams": 3, "temperature": 1.0},
    {"num_beams": 4, "n": 2, "temperature": 1.5, "top_k": 30, "early_stopping": "never"},
    {"num_beams": 2, "temperature": 0.7, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize(("blocks", "batch_tokens"), [(256, 256), (256, 9), (TIGHT, 64)])
def test_beams_are_those_of_transformers(
    tiny_checkpoint, theirs: LlamaForCausalLM, cases: list[Case], blocks: int, batch_tokens: int
):
    """All at once and beside other requests, preempted where the cache is tight; in float32, as transformers does."""
    tiny = load(tiny_checkpoint(), dtype=torch.float32)
    engine = tiny.engine(blocks=blocks, batch_tokens=batch_tokens)
    draw = random.Random(batch_tokens)
    ids = []
    for seed, options in enumerate(BEAMS):
        prompt = [draw.randrange(45, 300) for _ in range(draw.randint(1, 12))]
        params = SamplingParams(max_tokens=10, seed=seed, **options)
        ids.append((engine.add(prompt, params), prompt, params))
        engine.add(cases[seed].prompt, replace(cases[seed].params, max_tokens=10))
    done = drain(engine)
    assert blocks > TIGHT or engine.scheduler.preemptions
    for id, prompt, params in ids:
        for found, (tokens, score) in zip(done[id].outputs, searched(theirs, prompt, params), strict=True):
            assert found.token_ids == tokens[: len(found.token_ids)], params
            assert set(tokens[len(found.token_ids) :]) <= {PAD}
            assert found.score == pytest.approx(score, abs=1e-4)
            assert found.finish_reason == ("stop" if found.token_ids[-1] in STOP else "length")


PAD = 1  # transformers takes 0 for none


def searched(model: LlamaForCausalLM, prompt: list[int], params: SamplingParams) -> list[tuple[list[int], float]]:
    """(new tokens, score) of each beam that transformers returns."""
    same = ["num_beams", "early_stopping", "length_penalty", "repetition_penalty"]
    if not params.greedy:
        same += ["temperature", "top_k", "top_p"]
    torch.manual_seed(params.seed or 0)
    found = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=not params.greedy,
        num_return_sequences=params.n,
        max_new_tokens=params.max_tokens,
        eos_token_id=list(STOP),
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_scores=True,
        **{name: getattr(params, name) for name in same},
    )
    return [(s[len(prompt) :].tolist(), v.item()) for s, v in zip(found.sequences, found.sequences_scores, strict=True)]


# How a text ends


def text_of(tiny: Tiny, prompt: list[int], **options: Any) -> Completion:
    return one(tiny.engine(stop_ids=()), prompt, SamplingParams(**options)).outputs[0]


PROMPT = [60, 70, 80, 90]


def test_a_stop_id_ends_it_and_is_not_text(tiny: Tiny):
    free = text_of(tiny, PROMPT, max_tokens=20)
    assert (free.finish_reason, free.stop_reason) == ("length", None)
    stop = free.token_ids[5]
    at = free.token_ids.index(stop)
    found = text_of(tiny, PROMPT, max_tokens=20, stop_token_ids=(stop,))
    assert found.token_ids == free.token_ids[: at + 1]
    assert (found.finish_reason, found.stop_reason) == ("stop", stop)
    assert found.text == tiny.tokenizer.decode(found.token_ids[:-1])


def test_the_models_own_end_can_be_ignored_or_put_off(tiny: Tiny):
    free = text_of(tiny, PROMPT, max_tokens=20).token_ids
    engine = tiny.engine(stop_ids=(free[0],))
    assert tokens_of(one(engine, PROMPT, SamplingParams(max_tokens=20))) == [free[:1]]
    assert tokens_of(one(engine, PROMPT, SamplingParams(max_tokens=20, ignore_eos=True))) == [free]
    late = tokens_of(one(engine, PROMPT, SamplingParams(max_tokens=20, min_tokens=6)))[0]
    assert free[0] not in late[:6]


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_over_token_boundaries(tiny: Tiny, include: bool):
    free = text_of(tiny, PROMPT, max_tokens=30)
    pieces = [tiny.tokenizer.decode([token]) for token in free.token_ids]
    assert "".join(pieces[:12]) in free.text  # characters of one token each, or the next lines cut through one
    stop = pieces[8][-1:] + pieces[9] + pieces[10][:1]
    found = text_of(tiny, PROMPT, max_tokens=30, stop=(stop, "never there"), include_stop_str_in_output=include)
    at = free.text.index(stop)
    assert found.text == free.text[: at + (len(stop) if include else 0)]
    assert (found.finish_reason, found.stop_reason) == ("stop", stop)
    assert len(found.token_ids) <= 11


def test_a_stop_string_in_the_very_last_token(tiny: Tiny):
    free = text_of(tiny, PROMPT, max_tokens=9)
    stop = free.text[-3:]
    assert free.text.index(stop) == len(free.text) - 3
    found = text_of(tiny, PROMPT, max_tokens=9, stop=(stop,))
    assert (found.text, found.finish_reason, found.stop_reason) == (free.text[:-3], "stop", stop)


def test_a_stop_string_waits_for_min_tokens(tiny: Tiny):
    free = text_of(tiny, PROMPT, max_tokens=12)
    stop = free.text[:2]
    found = text_of(tiny, PROMPT, max_tokens=12, stop=(stop,))
    assert found.text == ""
    later = text_of(tiny, PROMPT, max_tokens=12, stop=(stop,), min_tokens=11)
    assert len(later.token_ids) > 11 or later.finish_reason == "length"


def test_each_of_n_has_its_own_text_and_end(tiny: Tiny):
    params = SamplingParams(max_tokens=25, n=5, temperature=1.0, seed=1)
    free = one(tiny.engine(), PROMPT, params).outputs
    stop = next(a for a in free[2].text if a.isascii() and not all(a in c.text for c in free))
    found = one(tiny.engine(), PROMPT, replace(params, stop=(stop,))).outputs
    for before, after in zip(free, found, strict=True):
        at = before.text.find(stop)
        assert after.text == (before.text if at < 0 else before.text[:at])
        assert (after.stop_reason == stop) == (at >= 0)


# Log-probabilities


def test_logprobs_are_the_models_own(tiny: Tiny):
    params = SamplingParams(max_tokens=10, temperature=0.7, top_k=5, seed=2, logprobs=4, prompt_logprobs=1)
    found = one(tiny.engine(), PROMPT, params)
    completion = found.outputs[0]
    tokens = PROMPT + completion.token_ids
    levels = tiny.logits(tokens).log_softmax(-1)
    entries = [*(found.prompt_logprobs or []), *(completion.logprobs or [])]
    assert [entry[0] for entry in entries] == tokens[1:]
    for position, (token, level, top) in enumerate(entries):
        assert level == pytest.approx(levels[position, token].item(), abs=1e-9)
        best = levels[position].topk(len(top))
        assert [id for id, _ in top] == best.indices.tolist()
        assert [value for _, value in top] == pytest.approx(best.values.tolist(), abs=1e-9)
        assert len(top) == (1 if position < len(PROMPT) - 1 else 4)
    chosen = sum(level for _, level, _ in completion.logprobs or [])
    assert completion.cumulative_logprob == pytest.approx(chosen, abs=1e-9)


@pytest.mark.parametrize(("blocks", "batch_tokens"), [(256, 256), (256, 7), (24, 11), (24, 64)])
def test_prompt_logprobs_in_chunks_under_preemption_on_a_warm_cache(tiny: Tiny, blocks: int, batch_tokens: int):
    draw = random.Random(batch_tokens)
    engine = tiny.engine(blocks=blocks, batch_tokens=batch_tokens)
    params = SamplingParams(max_tokens=20, prompt_logprobs=0, ignore_eos=True)
    for _ in range(2):
        prompts = [[draw.randrange(300) for _ in range(draw.randrange(1, 60))] for _ in range(5)]
        ids = [engine.add(prompt, params) for prompt in prompts * 2]
        done = drain(engine)
        for id, prompt in zip(ids, prompts * 2, strict=True):
            levels = tiny.logits(prompt).log_softmax(-1)
            found = done[id].prompt_logprobs
            assert [token for token, _, _ in found or []] == prompt[1:]
            expected = [levels[i, token].item() for i, token in enumerate(prompt[1:])]
            assert [level for _, level, _ in found or []] == pytest.approx(expected, abs=1e-9)
    assert blocks > 30 or engine.scheduler.preemptions


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_other_dtypes_come_near(tiny_checkpoint, tiny: Tiny, cases: list[Case], dtype: torch.dtype, error: float):
    """Log-probabilities of prompt and output, in chunks beside others, are those of float64 up to rounding."""
    engine = load(tiny_checkpoint(), dtype=dtype).engine(batch_tokens=16)
    ids = [engine.add(case.prompt, replace(case.params, prompt_logprobs=0, logprobs=0)) for case in cases]
    done = drain(engine)
    for output in (done[id] for id in ids):
        assert output.error is None
        for completion in output.outputs:
            tokens = output.prompt_token_ids + completion.token_ids
            levels = tiny.logits(tokens).log_softmax(-1)
            found = [level for _, level, _ in [*(output.prompt_logprobs or []), *(completion.logprobs or [])]]
            expected = [levels[i, token].item() for i, token in enumerate(tokens[1:])]
            assert found == pytest.approx(expected, abs=error)


def test_more_alternatives_than_the_vocabulary_has(tiny: Tiny):
    found = one(tiny.engine(), PROMPT, SamplingParams(max_tokens=1, logprobs=1000, prompt_logprobs=1000))
    vocab = tiny.model.config.vocab_size
    assert len(found.prompt_logprobs[0][2]) == len(found.outputs[0].logprobs[0][2]) == vocab  # type: ignore[index]


def test_scoring_a_text_beside_others(tiny: Tiny, cases: list[Case]):
    engine = tiny.engine(blocks=TIGHT, batch_tokens=20)
    text = cases[-1].prompt
    ids = [engine.add(text, SCORE) for _ in range(2)]
    others = [engine.add(case.prompt, case.params) for case in cases]
    ids += [engine.add(text[:1], SCORE)]
    done = drain(engine)
    levels = tiny.logits(text).log_softmax(-1)
    for id in ids[:2]:
        assert done[id].outputs == [Completion(0, "", [], "length")]
        assert [token for token, _, _ in done[id].prompt_logprobs or []] == text[1:]
        expected = [levels[i, token].item() for i, token in enumerate(text[1:])]
        assert [level for _, level, _ in done[id].prompt_logprobs or []] == pytest.approx(expected, abs=1e-9)
    assert done[ids[2]].prompt_logprobs == []
    for id, case in zip(others, cases, strict=True):
        assert tokens_of(done[id]) == case.expected


# Requests that end otherwise


def test_abort_gives_what_there_is(tiny: Tiny, cases: list[Case]):
    engine = tiny.engine(stop_ids=())
    params = SamplingParams(max_tokens=40)
    id = engine.add(PROMPT, params)
    never_taken = engine.add(PROMPT, params)
    engine.abort(never_taken)
    for _ in range(5):
        done = {output.id: output for output in engine.step().finished}
        assert (never_taken in done) == (engine.computed_tokens == len(PROMPT))
    engine.abort(id)
    engine.abort(id)
    engine.abort("unknown")
    (output,) = engine.step().finished
    completion = output.outputs[0]
    assert completion.finish_reason == "abort"
    assert completion.token_ids == tiny.expected(PROMPT, replace(params, max_tokens=5, ignore_eos=True))[0]
    assert completion.text == tiny.tokenizer.decode(completion.token_ids)
    assert engine.busy == 0 and engine.step() == StepOutput()


@pytest.mark.parametrize("steps", range(5))
def test_abort_in_the_middle_frees_everything(tiny: Tiny, cases: list[Case], steps: int):
    engine = tiny.engine(batch_tokens=20)
    ids = [engine.add(case.prompt, case.params) for case in cases]
    ended = {output.id for _ in range(steps * 3) for output in engine.step().finished}
    for id in ids:
        engine.abort(id)
    outputs = engine.step().finished
    assert {output.id for output in outputs} == set(ids) - ended
    for output in outputs:
        aborted_like(output, cases[ids.index(output.id)])
    assert engine.busy == 0
    engine.scheduler.check()
    assert engine.scheduler.pool.available == engine.scheduler.pool.num_blocks
    check(engine, cases)


@pytest.mark.parametrize("batch_tokens", [5, 12, 256])
@pytest.mark.parametrize("blocks", [TIGHT, 256])
def test_nan_fails_one_request_and_no_other(tiny: Tiny, cases: list[Case], batch_tokens: int, blocks: int):
    """The poisoned token makes real NaN keys and values in the cache, which later requests get to reuse."""
    token = max(set(range(300)) - {token for case in cases for each in case.expected for token in case.prompt + each})
    engine = poison(tiny, token).engine(blocks=blocks, batch_tokens=batch_tokens)
    bad_prompts = [[token, *PROMPT * 6], [*PROMPT * 6, token], [token]]
    options = [{}, {"n": 2, "temperature": 1.0}, {"num_beams": 3}, {"prompt_logprobs": 1}, {"stop": ("x",)}]
    bad, good = [], {}
    for i, case in enumerate(cases):
        bad.append(engine.add(bad_prompts[i % 3], SamplingParams(max_tokens=3, **options[i % 5])))
        good[engine.add(case.prompt, case.params)] = case
    bad.append(engine.add(bad_prompts[0], SCORE))
    for _ in range(6):  # one leaves in the middle of a poisoned prompt
        last = engine.add(bad_prompts[0], SamplingParams(max_tokens=3))
    engine.abort(last)
    done = drain(engine)
    for id in bad:
        assert done[id].outputs == [] and "NaN" in str(done[id].error)
    for id, case in good.items():
        assert tokens_of(done[id]) == case.expected
    assert not engine.runner.cache.isnan().any()  # type: ignore[attr-defined]
    check(engine, cases)


def test_nan_is_found_with_the_chunk_that_made_it(tiny: Tiny):
    """Before anybody can find or reuse its blocks."""
    engine = poison(tiny, 5).engine(batch_tokens=4)
    engine.add([*PROMPT, 5, *PROMPT * 6], SamplingParams(max_tokens=3))
    assert [len(engine.step().finished) for _ in range(2)] == [0, 1]
    assert not engine.runner.cache.isnan().any()  # type: ignore[attr-defined]


def poison(tiny: Tiny, *tokens: int) -> Tiny:
    """The same model, but that the embeddings of these tokens are not numbers."""
    model = copy.deepcopy(tiny.model)
    model.embed_tokens.weight[list(tokens)] = torch.nan
    return Tiny(model, tiny.tokenizer)


def test_padding_of_graphs_keeps_nan_apart(tiny: Tiny, cases: list[Case]):
    """The padding rows' token, 0, may be one that is not a number."""
    without = [case for case in cases if case.params.num_beams == 1 and not any(0 in each for each in case.expected)]
    check(poison(tiny, 0).engine(runner=graph_runner), without)


class Interrupted(EagerRunner):
    """Stops in every third step, in which it has written some of what it should."""

    steps = 0

    def run(self, batch: Batch) -> Tensor:
        self.steps += 1
        logits = super().run(batch)
        if self.steps % 3 == 0:
            self.cache[:, :, :, [chunk.sequence.blocks[-1] for chunk in batch.chunks]] += 1
            raise KeyboardInterrupt
        return logits


def test_an_interrupted_step_is_done_again(tiny: Tiny, cases: list[Case]):
    engine = tiny.engine(runner=Interrupted)
    ids = [engine.add(case.prompt, case.params) for case in cases]
    done, interrupted = {}, 0
    while engine.busy:
        try:
            done |= {output.id: output for output in engine.step().finished}
        except KeyboardInterrupt:
            interrupted += 1
        engine.scheduler.check()
    assert interrupted > 3
    assert [tokens_of(done[id]) for id in ids] == [case.expected for case in cases]


# Requests that are refused


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ([], {}, "The prompt is empty"),
        ([5] * CONTEXT, {}, f"The prompt has {CONTEXT} tokens, and the context of {CONTEXT} must hold the answer too"),
        ([5] * 90, {"max_tokens": 7}, "90 prompt tokens and max_tokens 7 exceed the context of 96; ask for at most 6"),
        (
            [5] * 60,
            {"max_tokens": 10},
            "1 sequence of 70 tokens cannot fit the KV cache of 64 tokens; raise kv_cache_tokens",
        ),
        ([5] * 64, {}, "1 sequence of 65 tokens cannot fit the KV cache"),
        ([5] * 10, {"max_tokens": 10, "num_beams": 4}, "4 sequences of 20 tokens cannot fit the KV cache of 64 tokens"),
        ([5, 384], {}, "token 384, but the model's vocabulary ends at 383"),
        ([5, -1], {}, "token -1"),
        ([5], {"n": 9, "temperature": 1.0}, "9 sequences at once are more than a step takes"),
        ([5], {"num_beams": 9}, "9 sequences at once are more than a step takes"),
        ([5], {"logit_bias": {384: 1.0}}, "logit_bias names token 384"),
    ],
)
def test_what_can_never_run_is_refused_in_a_sentence(tiny: Tiny, prompt: list[int], options: dict, says: str):
    engine = tiny.engine(blocks=16, seqs=8)
    with pytest.raises(UserError, match="^.*" + says.replace("'", ".")):
        engine.add(prompt, SamplingParams(**options))
    assert engine.busy == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ([], "empty"),
        ([5] * (CONTEXT + 1), f"The text has {CONTEXT + 1} tokens, more than the context"),
        ([5] * 65, "cannot fit the KV cache of 64"),
        ([5, 384], "vocabulary"),
    ],
)
def test_a_text_that_cannot_be_scored_is_refused(tiny: Tiny, text: list[int], says: str):
    with pytest.raises(UserError, match=says):
        tiny.engine(blocks=16).add(text, SCORE)


def test_without_max_tokens_the_context_or_the_cache_ends_it(tiny: Tiny):
    for blocks, length in ((256, CONTEXT), (16, 64)):
        output = one(tiny.engine(blocks=blocks, stop_ids=()), [5] * 60, SamplingParams())
        assert len(output.outputs[0].token_ids) == length - 60
        assert output.outputs[0].finish_reason == "length"


def test_a_prompt_of_all_but_one_token_of_the_context(tiny: Tiny):
    prompt = [5] * (CONTEXT - 1)
    params = SamplingParams(max_tokens=1)
    assert tokens_of(one(tiny.engine(), prompt, params)) == tiny.expected(prompt, params)


def test_ids_are_unique_among_the_unfinished(tiny: Tiny):
    engine = tiny.engine()
    params = SamplingParams(max_tokens=1)
    assert engine.add(PROMPT, params, id="2") == "2"
    with pytest.raises(UserError, match="already a request '2'"):
        engine.add(PROMPT, params, id="2")
    given = {engine.add(PROMPT, params) for _ in range(3)}
    assert drain(engine).keys() == {"2", *given}
    assert engine.add(PROMPT, params, id="2") == "2"


def test_a_model_without_a_tokenizer_has_no_text(tiny: Tiny):
    engine = Tiny(tiny.model, None).engine(stop_ids=())  # type: ignore[arg-type]
    output = one(engine, PROMPT, SamplingParams(max_tokens=3))
    assert output.outputs[0].text == "" and len(output.outputs[0].token_ids) == 3
    for options in ({"stop": ("x",)}, {"bad_words": ("x",)}):
        with pytest.raises(UserError, match="no tokenizer"):
            engine.add(PROMPT, SamplingParams(**options))
