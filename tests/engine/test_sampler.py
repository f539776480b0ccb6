"""Sampling: transformers' processors, a distribution that is right, and rows that don't feel their neighbours."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from puna.engine.sampler import NonFiniteLogits, Row, _mix, fork_seed, process, sample, token_logprobs, uniform
from puna.engine.sampling_params import SamplingParams


def row(position: int = 0, seed: int = 0, prompt=(), output=(), stop_ids=(), **params) -> Row:
    return Row(SamplingParams(**params), seed, position, prompt, output, stop_ids)


def random_logits(seed: int, rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)).to(dtype)


FILTERS = [
    {},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10**6},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"top_p": 0.99999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"typical_p": 0.3},
    {"typical_p": 0.95},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.8},
    {"temperature": 3.0, "top_p": 0.99, "min_p": 0.01},
    {"temperature": 0.5, "top_k": 50, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.9},
]


def transformers_filters(params: SamplingParams, keep: int) -> hf.LogitsProcessorList:
    """What GenerationMixin._get_logits_processor builds, with its conditions."""
    chain = hf.LogitsProcessorList([hf.TemperatureLogitsWarper(float(params.temperature))])
    if params.top_k:
        chain.append(hf.TopKLogitsWarper(params.top_k, min_tokens_to_keep=keep))
    if params.top_p < 1:
        chain.append(hf.TopPLogitsWarper(params.top_p, min_tokens_to_keep=keep))
    if params.min_p:
        chain.append(hf.MinPLogitsWarper(params.min_p, min_tokens_to_keep=keep))
    if params.typical_p < 1:
        chain.append(hf.TypicalLogitsWarper(params.typical_p, min_tokens_to_keep=keep))
    return chain


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("vocab", [5, 256, 1000, 5001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_filters_equal_transformers(dtype: torch.dtype, vocab: int, keep: int) -> None:
    """Exactly in float64; in float32 a nucleus may end a token earlier or later, by the rounding of its mass."""
    logits = random_logits(vocab + keep, len(FILTERS), vocab, dtype)
    rows = [row(**{"temperature": 1.0, **options}) for options in FILTERS]
    ours = process(logits, rows, keep)
    for i, asked in enumerate(rows):
        theirs = transformers_filters(asked.params, keep)(None, logits[i : i + 1].clone())  # type: ignore[arg-type]
        apart = logits[i].softmax(-1)[ours[i] != theirs[0]].sum()
        assert apart <= (0 if dtype == torch.float64 else 1e-6), FILTERS[i]


def test_top_k_keeps_ties_as_transformers_does() -> None:
    logits = random_logits(0, 4, 4000).bfloat16()
    ours = process(logits, [row(temperature=1.0, top_k=k) for k in (3, 50, 400, 1000)])
    for i, k in enumerate((3, 50, 400, 1000)):
        assert torch.equal(ours[i], hf.TopKLogitsWarper(k)(None, logits[i : i + 1].float())[0])  # type: ignore[arg-type]
    assert (ours[2] > -math.inf).sum() > 400  # the case does occur


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_penalties_equal_transformers_and_the_formula(dtype: torch.dtype) -> None:
    logits = random_logits(1, 4, 300, dtype)
    ids = [[1, 5, 5, 9], [2, 2, 2, 299], [7, 8, 9, 10], [1, 2, 3, 4]]
    rows = [row(prompt=r[:2], output=r[2:], repetition_penalty=1.3) for r in ids[:2]]
    rows += [row(prompt=[3], output=[7, 7, 8], presence_penalty=0.5, frequency_penalty=-0.25)]
    rows += [row(prompt=[3], output=[1], min_tokens=2, stop_ids=(4, 299, 300), logit_bias={4: 9.0, 6: -2.0})]
    ours = process(logits, rows)
    theirs = hf.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(ids[:2]), logits[:2])
    assert torch.equal(ours[:2], theirs)
    counted = logits[2].clone()
    counted[7] -= 0.5 - 2 * 0.25
    counted[8] -= 0.5 - 0.25
    assert torch.equal(ours[2], counted)
    biased = hf.SequenceBiasLogitsProcessor([[[4], 9.0], [[6], -2.0]])(torch.tensor(ids[3:]), logits[3:])
    banned = hf.MinNewTokensLengthLogitsProcessor(3, 2, [4, 299])(torch.tensor(ids[3:]), biased)
    assert torch.equal(ours[3], banned[0])


def test_bias_comes_before_the_repetition_penalty_as_in_transformers() -> None:
    logits = torch.tensor([[1.0, -1.0, 0.0]])
    ours = process(logits, [row(prompt=[0, 1], repetition_penalty=2.0, logit_bias={0: -3.0})])
    assert ours.tolist() == [[-4.0, -2.0, 0.0]]


def test_logits_are_left_alone() -> None:
    logits = random_logits(2, 2, 50)
    before = logits.clone()
    rows = [row(repetition_penalty=2.0, prompt=[1, 2]), row(temperature=0.5, top_p=0.5, logprobs=2)]
    sample(logits, rows)
    process(logits, rows).zero_()
    process(logits, [row(), row()]).zero_()
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 255, 256, 257, 3000])
def test_greedy_takes_the_first_of_the_largest(vocab: int, dtype: torch.dtype) -> None:
    logits = random_logits(vocab, 9, vocab, dtype)
    expected = [next(i for i, x in enumerate(r) if x == max(r)) for r in logits.tolist()]
    assert [s.token for s in sample(logits, [row()] * 9)] == expected
    assert all(s.logprob is None and s.top is None for s in sample(logits, [row()] * 9))


ANY_ROW = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0])},
    optional={
        "top_k": st.sampled_from([1, 3, 40, 300]),
        "top_p": st.sampled_from([0.1, 0.9, 0.999]),
        "min_p": st.sampled_from([0.01, 0.5]),
        "typical_p": st.sampled_from([0.2, 0.9]),
        "repetition_penalty": st.sampled_from([0.8, 1.2]),
        "presence_penalty": st.just(0.5),
        "frequency_penalty": st.just(0.5),
        "logit_bias": st.just({0: 2.0, 17: -1.0}),
        "min_tokens": st.just(3),
        "logprobs": st.sampled_from([0, 1, 4]),
    },
)


@settings(max_examples=120)
@given(
    asked=st.lists(ANY_ROW, min_size=2, max_size=6),
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from([40, 700, 33000]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_a_row_alone_is_the_row_in_any_batch(asked: list[dict], seed: int, vocab: int, dtype: torch.dtype) -> None:
    logits = random_logits(seed, len(asked), vocab, dtype)
    rows = [
        row(position=i, seed=seed, prompt=[1, 2, 3], output=[5, 5, i], stop_ids=(2, 4), **options)
        for i, options in enumerate(asked)
    ]
    together = sample(logits, rows)
    assert together == [sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(len(rows))]
    backwards = sample(logits.flip(0), rows[::-1])
    assert backwards[::-1] == together
    processed = process(logits, rows)
    for i, sampled in enumerate(together):
        assert torch.equal(processed[i : i + 1], process(logits[i : i + 1], rows[i : i + 1]))
        assert processed[i, sampled.token] > -math.inf


def test_a_draw_is_the_inverse_cdf_of_the_processed_softmax() -> None:
    vocab = 3000
    logits = random_logits(5, len(FILTERS), vocab, torch.float64)
    for position in range(30):
        rows = [row(position, seed=9, **{"temperature": 1.0, **options}) for options in FILTERS]
        cdf = process(logits, rows).softmax(-1).cumsum(-1)
        expected = (cdf <= uniform(9, position)).sum(-1).tolist()
        assert [s.token for s in sample(logits, rows)] == expected


@pytest.mark.parametrize("options", [{}, {"top_k": 12}, {"top_p": 0.8}, {"typical_p": 0.7}], ids=str)
def test_draws_follow_the_distribution(options: dict) -> None:
    """Chi-square over 20,000 draws; the seed is fixed, so the test cannot fail by bad luck later."""
    count, batch = 20_000, 500
    logits = random_logits(3, 1, 30)
    rows = [row(position, seed=4, temperature=1.0, **options) for position in range(count)]
    probs = process(logits, rows[:1]).softmax(-1)[0].double()
    seen = torch.zeros(30, dtype=torch.float64)
    for start in range(0, count, batch):
        for sampled in sample(logits.expand(batch, -1), rows[start : start + batch]):
            seen[sampled.token] += 1
    assert seen[probs == 0].sum() == 0
    common = probs * count >= 5
    expected = torch.cat([probs[common], probs[~common].sum()[None]]) * count
    got = torch.cat([seen[common], seen[~common].sum()[None]])
    expected, got = expected[expected > 0], got[expected > 0]
    chi_square = ((got - expected) ** 2 / expected).sum().item()
    freedom = max(len(got) - 1, 1)
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_extreme_noise_never_lands_on_a_token_of_no_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.full((1, 1000), -math.inf)
    logits[0, [300, 999 - 300]] = 0.0
    for noise, token in ((0.0, 300), (0.5, 699), (1 - 2.0**-53, 699)):
        monkeypatch.setattr("puna.engine.sampler.uniform", lambda seed, position, noise=noise: noise)
        assert sample(logits, [row(temperature=1.0)])[0].token == token


def test_noise_is_splitmix64_of_seed_and_position() -> None:
    # First outputs of the reference generator seeded with 1234567 (Vigna, splitmix64.c).
    state, golden = 1234567, 0x9E3779B97F4A7C15
    assert [_mix(state + i * golden) for i in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]
    noise = torch.tensor([[uniform(seed, position) for position in range(300)] for seed in range(100)]).double()
    assert noise.min() >= 0 and noise.max() < 1
    assert abs(noise.mean() - 0.5) < 0.01 and abs(noise.var() - 1 / 12) < 0.003
    assert noise.corrcoef().fill_diagonal_(0).abs().max() < 0.3  # neighbouring seeds are unrelated
    assert fork_seed(5, 0) == 5 and len({fork_seed(s, i) for s in range(50) for i in range(50)}) == 2500


def test_logprobs_are_the_models_own() -> None:
    logits = random_logits(6, 3, 400)
    rows = [
        row(logprobs=0, repetition_penalty=3.0, prompt=list(range(200))),
        row(),
        row(logprobs=5, temperature=0.3, top_k=2),
    ]
    first, second, third = sample(logits, rows)
    expected = logits.log_softmax(-1)
    assert first.logprob == expected[0, first.token].item() and first.top == []
    assert second.logprob is None and second.top is None
    assert third.logprob == expected[2, third.token].item()
    levels, ids = expected[2].topk(5)
    assert third.top == list(zip(ids.tolist(), levels.tolist(), strict=True))
    assert len(sample(logits[:, :3], [row(logprobs=5)] * 3)[0].top or []) == 3


def test_token_logprobs_come_in_any_chunks() -> None:
    logits = random_logits(7, 12, 500, torch.bfloat16)
    targets = torch.arange(12) * 40
    chosen, ids, levels = token_logprobs(logits, targets, 3)
    expected = logits.double().log_softmax(-1)
    assert (chosen - expected[torch.arange(12), targets]).abs().max() < 1e-5
    assert chosen.dtype == torch.float32 and ids.shape == levels.shape == (12, 3)
    for start in range(0, 12, 5):
        parts = token_logprobs(logits[start : start + 5], targets[start : start + 5], 3)
        for part, whole in zip(parts, (chosen, ids, levels), strict=True):
            assert torch.equal(part, whole[start : start + 5])


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}, {"logprobs": 1}], ids=str
)
def test_nan_logits_name_the_rows_at_fault(options: dict, value: float) -> None:
    logits = random_logits(8, 4, 600)
    logits[1, 500] = value
    logits[3] = -math.inf
    with pytest.raises(NonFiniteLogits, match="NaN or infinite") as error:
        sample(logits, [row(**options)] * 4)
    assert error.value.rows == [1, 3]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(8))
def test_repeated_ngrams_are_those_of_transformers(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 5, (12 * seed,), generator=generator).tolist()
    logits = random_logits(seed, 1, 40)
    ours = process(logits, [row(prompt=tokens[:7], output=tokens[7:], no_repeat_ngram_size=size)])
    ids = torch.tensor([tokens], dtype=torch.long)
    assert torch.equal(ours, hf.NoRepeatNGramLogitsProcessor(size)(ids, logits.clone()))


@pytest.mark.parametrize("seed", range(20))
def test_bad_words_are_those_of_transformers(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[int]:
        return torch.randint(0, 4, (length,), generator=generator).tolist()

    words = [draw(1 + i % 4) for i in range(6)] if seed % 2 else [draw(3) for _ in range(9)]
    tokens, logits = draw(seed + 1), random_logits(seed, 1, 30)
    asked = Row(SamplingParams(bad_words=("x",)), 0, 0, tokens[:3], tokens[3:], (), [tuple(word) for word in words])
    theirs = hf.NoBadWordsLogitsProcessor(words)(torch.tensor([tokens]), logits.clone())
    assert torch.equal(process(logits, [asked]), theirs)
