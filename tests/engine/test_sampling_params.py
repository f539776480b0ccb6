"""What a request may ask for: ranges, contradictions, and who wins over whom."""

import pytest

from puna.engine.sampling_params import SamplingParams
from puna.errors import UserError


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": -1},
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"min_tokens": -1},
        {"min_tokens": 5, "max_tokens": 4},
        {"n": 0},
        {"n": True},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"temperature": None},
        {"top_k": -2},
        {"top_k": 1.0},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"min_p": -0.01},
        {"min_p": 1.01},
        {"typical_p": 0},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"logit_bias": {"x": 1}},
        {"logit_bias": {-1: 1}},
        {"logit_bias": {1: float("inf")}},
        {"logit_bias": [1]},
        {"seed": -1},
        {"seed": 2**64},
        {"stop": ("",)},
        {"stop": 3},
        {"stop": (3,)},
        {"stop_token_ids": 2},
        {"stop_token_ids": ("a",)},
        {"ignore_eos": 1},
        {"logprobs": -1},
        {"logprobs": 1025},
        {"prompt_logprobs": 10**9},
        {"stop": ["x"] * 1025},
        {"stop": "x" * 1025},
        {"bad_words": [""]},
        {"bad_words": ["x"] * 1025},
        {"stop_token_ids": range(3)},
        {"stop_token_ids": [1] * 1025},
        {"logit_bias": {1: 1e30}},
        {"logit_bias": {1: -101}},
        {"logit_bias": dict.fromkeys(range(1025), 1.0)},
        {"repetition_penalty": 1e9},
        {"no_repeat_ngram_size": -1},
        {"no_repeat_ngram_size": 1.5},
        {"num_beams": 0},
        {"num_beams": 129},
        {"early_stopping": "always"},
        {"early_stopping": 1},
        {"length_penalty": float("nan")},
        {"length_penalty": 11},
        {"num_beams": 2, "n": 3},
        {"num_beams": 2, "stop": "\n"},
        {"num_beams": 2, "logprobs": 1},
    ],
    ids=str,
)
def test_a_bad_value_is_refused_by_name_in_one_sentence(bad: dict) -> None:
    with pytest.raises(UserError) as error:
        SamplingParams(**bad)
    assert any(name in str(error.value) for name in bad)
    assert str(error.value).count("\n") == 0 and len(str(error.value)) < 250


def test_spellings_become_one() -> None:
    params = SamplingParams(top_k=-1, stop="\n", stop_token_ids=[7], logit_bias={"50": -3})  # type: ignore[arg-type]
    assert (params.top_k, params.stop, params.stop_token_ids, params.logit_bias) == (0, ("\n",), (7,), {50: -3.0})


def test_the_default_is_greedy_and_adjusts_nothing() -> None:
    assert SamplingParams().greedy and not SamplingParams().adjusts
    assert SamplingParams(temperature=1e-6).greedy
    for changed in ({"min_tokens": 1}, {"logit_bias": {1: 1}}, {"repetition_penalty": 1.1}, {"presence_penalty": 1}):
        assert SamplingParams(**changed).adjusts
    assert not SamplingParams(temperature=1).adjusts


def test_merged_values_win_and_none_is_not_given() -> None:
    base = SamplingParams(temperature=0.5, max_tokens=9)
    assert base.merged({"temperature": 0.0, "max_tokens": None, "stop": ["a"]}) == SamplingParams(
        max_tokens=9, stop=("a",)
    )
    with pytest.raises(UserError, match="did you mean 'temperature'"):
        base.merged({"temprature": 1.0})
    with pytest.raises(UserError, match="top_p"):
        base.merged({"top_p": 3})


def test_generation_config_means_what_transformers_makes_of_it() -> None:
    read = SamplingParams.from_generation_config
    llama3 = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 4096, "eos_token_id": [1, 2]}
    assert read({}) == SamplingParams()
    assert read(llama3) == SamplingParams(temperature=0.6, top_p=0.9)
    assert read({"temperature": 0.6, "top_p": 0.9}).greedy  # do_sample is absent
    assert read({"do_sample": True}).temperature == 1.0
    assert read(llama3, temperature=0.0, top_p=None) == SamplingParams(top_p=0.9)
    assert read({}, temperature=0.3).temperature == 0.3
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, "early_stopping": "never", "top_k": None}
    assert read(beams) == SamplingParams(num_beams=3, n=2, max_tokens=5, early_stopping="never")


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    SamplingParams(logit_bias={9: 1.0}).check_fits(10)
    with pytest.raises(UserError, match="token 10"):
        SamplingParams(logit_bias={10: 1.0}).check_fits(10)
