"""Beam search equals transformers' `generate`, token for token, with and without sampling."""

import itertools
import math
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from puna.engine.beam import BeamSearch, Hypothesis
from puna.engine.sampler import NonFiniteLogits
from puna.engine.sampling_params import SamplingParams

VOCAB, PROMPT, NEW, PAD = 60, [3, 17, 42, 5], 12, 1
EOS = {"none": (), "one": (7,), "several": (7, 11, 23)}


@pytest.fixture(scope="module", params=[0, 1, 2])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    """Peaked enough that beams differ in score, and fond enough of the end tokens that many beams end early."""
    torch.manual_seed(request.param)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    model.lm_head = torch.nn.Linear(32, VOCAB)
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    model.lm_head.bias.data[list(EOS["several"])] += 1.5
    return model


def ours(model: LlamaForCausalLM, params: SamplingParams, eos: tuple[int, ...], seed: int) -> list[Hypothesis]:
    search = BeamSearch(len(PROMPT), params, eos, len(PROMPT) + NEW, seed)
    beams = [PROMPT]
    while not search.done:
        with torch.no_grad():
            logits = model(torch.tensor(beams)).logits[:, -1]
        steps = search.advance(logits, beams)
        assert len(steps) == (0 if search.done else params.num_beams)
        beams = [[*beams[parent], token] for parent, token in steps]
    return search.results()


def check_equal(model: LlamaForCausalLM, eos: tuple[int, ...], seed: int, **options) -> list[Hypothesis]:
    """Our beams and transformers' for the same options; ours are returned."""
    params = SamplingParams(**options)
    same = ("num_beams", "early_stopping", "length_penalty", "repetition_penalty")
    settings = {name: getattr(params, name) for name in same}
    if not params.greedy:
        filters = ("temperature", "top_k", "top_p", "typical_p")
        settings |= {name: getattr(params, name) for name in filters} | {"min_p": params.min_p or None}
    torch.manual_seed(seed)
    theirs = model.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
        do_sample=not params.greedy,
        num_return_sequences=params.n,
        max_new_tokens=NEW,
        min_new_tokens=params.min_tokens,
        eos_token_id=list(eos) or None,
        pad_token_id=PAD,
        use_cache=False,
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )
    found = ours(model, params, eos, seed)
    assert len(found) == params.n
    for hypothesis, tokens, score in zip(found, theirs.sequences, theirs.sequences_scores, strict=True):
        new = tokens[len(PROMPT) :].tolist()
        assert new[: len(hypothesis.tokens)] == hypothesis.tokens, options
        assert set(new[len(hypothesis.tokens) :]) <= {PAD}, options
        assert math.isclose(hypothesis.score, score.item(), rel_tol=1e-5, abs_tol=1e-5), options
    return found


def ends_early(found: list[Hypothesis], eos: tuple[int, ...]) -> bool:
    return any(h.tokens[-1] in eos and len(h.tokens) < NEW for h in found)


GRID = list(
    itertools.product(
        (2, 3, 4),  # num_beams
        (0.0, 1.0),  # temperature
        (False, True, "never"),  # early_stopping
        (1.0, 0.5, 2.0, 0.0, -1.0),  # length_penalty
        tuple(EOS),
        (False, True),  # all beams returned, or one
    )
)


def run(model: LlamaForCausalLM, cases: list[tuple]) -> None:
    early = with_eos = 0
    for seed, (beams, temperature, stopping, penalty, name, every) in enumerate(cases):
        options = {"temperature": temperature, "early_stopping": stopping, "length_penalty": penalty}
        found = check_equal(model, EOS[name], seed, num_beams=beams, n=beams if every else 1, **options)
        early += ends_early(found, EOS[name])
        with_eos += name != "none"
    assert early > with_eos / 2  # or the cases would prove little


def test_equals_transformers(model: LlamaForCausalLM) -> None:
    run(model, random.Random(0).sample(GRID, 90))


@pytest.mark.full
def test_equals_transformers_on_the_whole_grid(model: LlamaForCausalLM) -> None:
    run(model, GRID)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"min_tokens": 5},
        {"temperature": 0.6, "top_k": 5},
        {"temperature": 1.8, "top_p": 0.7},
        {"temperature": 1.2, "min_p": 0.1, "typical_p": 0.8},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2, "min_tokens": 3},
    ],
    ids=str,
)
def test_processors_apply_to_log_probabilities_as_in_transformers(model: LlamaForCausalLM, options: dict) -> None:
    for seed, (beams, eos) in enumerate(itertools.product((2, 4), EOS.values())):
        check_equal(model, eos, seed, num_beams=beams, n=2, **options)


def test_filters_that_leave_fewer_tokens_than_beams(model: LlamaForCausalLM) -> None:
    for seed in range(5):
        check_equal(model, EOS["one"], seed, num_beams=4, n=4, temperature=1.0, top_k=1)


def test_logprobs_are_the_models_own_and_explain_the_score(model: LlamaForCausalLM) -> None:
    params = SamplingParams(num_beams=3, n=3, length_penalty=0.5)
    for tokens, score, logprobs in ours(model, params, EOS["several"], 0):
        with torch.no_grad():
            table = model(torch.tensor([PROMPT + tokens])).logits[0].log_softmax(-1)
        expected = [table[len(PROMPT) - 1 + i, token].item() for i, token in enumerate(tokens)]
        assert logprobs == pytest.approx(expected, abs=1e-5)
        assert score == pytest.approx(sum(logprobs) / len(tokens) ** 0.5, abs=1e-5)


def test_nan_logits_are_refused() -> None:
    search = BeamSearch(1, SamplingParams(num_beams=2, temperature=1.0), (0,), 5, 0)
    beams = [[1]]
    steps = search.advance(torch.randn(1, 20), beams)
    logits = torch.randn(2, 20)
    logits[1, 3] = math.nan
    with pytest.raises(NonFiniteLogits) as error:
        search.advance(logits, [[*beams[parent], token] for parent, token in steps])
    assert error.value.rows == [1]
