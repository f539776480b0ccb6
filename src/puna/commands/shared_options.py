"""Options that several verbs share: sampling, and what they make of the engine's options."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from puna.engine.options import EngineOptions
from puna.engine.sampling_params import SamplingParams
from puna.options import option


@dataclass(kw_only=True)
class SamplingOptions:
    """How tokens are chosen. What is not given comes from generation_config.json, else greedy."""

    max_tokens: int | None = option(None, "most tokens in an answer; up to the context when not given")
    min_tokens: int | None = option(None, "no end token before this many")
    temperature: float | None = option(None, "0 is greedy; 1 samples the model's own distribution")
    top_p: float | None = option(None, "sample among the likeliest tokens that together reach this probability")
    top_k: int | None = option(None, "sample among this many likeliest tokens; 0 is all")
    min_p: float | None = option(None, "drop tokens less likely than this fraction of the likeliest")
    typical_p: float | None = option(None, "locally typical sampling, 1 is off")
    repetition_penalty: float | None = option(None, "above 1 makes tokens that occurred less likely")
    presence_penalty: float | None = option(None, "subtracted once from tokens of the answer so far")
    frequency_penalty: float | None = option(None, "subtracted per occurrence from tokens of the answer so far")
    no_repeat_ngram_size: int | None = option(None, "no sequence of this many tokens twice; 0 is off")
    bad_words: tuple[str, ...] | None = option(None, "never write this text; repeat for several", escapes=True)
    logit_bias: dict[int, float] | None = option(None, "added to the logits of token ids, as in '{13: -100}'")
    seed: int | None = option(None, "makes sampling repeatable")
    stop: tuple[str, ...] | None = option(None, "end the answer before this text; repeat for several", escapes=True)
    include_stop_str_in_output: bool | None = option(None, "true: the answer keeps the text that ended it")
    stop_token_ids: tuple[int, ...] | None = option(None, "end the answer at any of these token ids")
    ignore_eos: bool | None = option(None, "true: go on past the end token, to time fixed lengths")
    n: int | None = option(None, "answers per prompt")
    num_beams: int | None = option(None, "beam search with this many beams; 1 is off")
    length_penalty: float | None = option(None, "beam search: above 0 prefers longer answers")
    early_stopping: bool | Literal["never"] | None = option(None, "beam search: when to stop looking for better")
    logprobs: int | None = option(None, "give the log-probability of each token, and of this many likeliest")
    prompt_logprobs: int | None = option(None, "the same for the tokens of the prompt")


def sampling(options: SamplingOptions) -> dict[str, Any]:
    """The sampling options that were given; the checkpoint decides the others. Raises UserError for a bad value."""
    given = {entry.name: getattr(options, entry.name) for entry in fields(SamplingOptions)}
    given = {name: value for name, value in given.items() if value is not None}
    SamplingParams().merged(given)  # refuses bad values before a model is loaded
    return given


def loading(options: EngineOptions) -> dict[str, Any]:
    """`LLM`'s keyword arguments, with progress shown."""
    return {entry.name: getattr(options, entry.name) for entry in fields(EngineOptions)} | {"quiet": False}
