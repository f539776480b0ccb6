"""Sampling parameters of one request, checked once on construction. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

from puna.errors import UserError, nearest
from puna.options import option

# Bounds of what one request may cost, far beyond ordinary use.
MAX_LOGPROBS = 1024  # alternatives for each token
MAX_STRINGS, MAX_STRING = 1024, 1024  # stop strings or bad words, and characters in one
MAX_TOKEN_IDS = 1024  # stop_token_ids and entries of logit_bias

# name -> (integer?, lowest, highest, is the lowest itself excluded?)
_RANGES: dict[str, tuple[bool, float, float, bool]] = {
    "max_tokens": (True, 0, math.inf, False),
    "min_tokens": (True, 0, math.inf, False),
    "n": (True, 1, math.inf, False),
    "temperature": (False, 0, math.inf, False),
    "top_k": (True, 0, math.inf, False),
    "top_p": (False, 0, 1, True),
    "min_p": (False, 0, 1, False),
    "typical_p": (False, 0, 1, True),
    "repetition_penalty": (False, 0, 100, True),
    "no_repeat_ngram_size": (True, 0, math.inf, False),
    "presence_penalty": (False, -2, 2, False),
    "frequency_penalty": (False, -2, 2, False),
    "seed": (True, 0, 2**64 - 1, False),
    "logprobs": (True, 0, MAX_LOGPROBS, False),
    "prompt_logprobs": (True, 0, MAX_LOGPROBS, False),
    "num_beams": (True, 1, 128, False),  # torch draws from at most 2**24 candidates: beams * vocabulary
    "length_penalty": (False, -10, 10, False),  # a length to a higher power overflows
}
_FLAGS = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens")

# generation_config.json (transformers) -> SamplingParams, where the names differ
_HF_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "num_return_sequences": "n",
    "stop_strings": "stop",
}
_HF_SAME = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "num_beams",
    "length_penalty",
    "early_stopping",
)


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen.

    On the command line, missing values are the checkpoint's (generation_config.json), then the defaults here.
    Raises UserError for a value out of its range and for values that contradict each other.
    """

    max_tokens: int | None = option(
        None, "most new tokens; up to the context when not given; 0 with --prompt-logprobs only scores the prompt"
    )
    min_tokens: int = option(0, "before this many, end tokens are banned and stop strings do not count")
    temperature: float = option(0.0, "0 is greedy; 1 samples the model's own distribution")
    top_p: float = option(1.0, "sample among the likeliest tokens that together reach this probability")
    top_k: int = option(0, "sample among this many likeliest tokens; 0 is all")
    min_p: float = option(0.0, "drop tokens less likely than this fraction of the likeliest")
    typical_p: float = option(1.0, "locally typical sampling; 1 is off")
    # over prompt and output, CTRL (arXiv:1909.05858)
    repetition_penalty: float = option(1.0, "above 1 makes tokens that occurred in prompt or output less likely")
    # over the output, as in the OpenAI API
    presence_penalty: float = option(0.0, "subtracted once from tokens of the output so far")
    frequency_penalty: float = option(0.0, "subtracted per occurrence from tokens of the output so far")
    no_repeat_ngram_size: int = option(0, "no sequence of this many tokens twice in prompt and output; 0 is off")
    bad_words: tuple[str, ...] = option((), "texts that are never completed; repeat for several", escapes=True)
    logit_bias: Mapping[int, float] | None = option(None, "added to the logits of token ids, as in '{13: -100}'")
    seed: int | None = option(None, "makes sampling repeatable")
    stop: tuple[str, ...] = option((), r"end before this text, such as '\n'; repeat for several", escapes=True)
    stop_token_ids: tuple[int, ...] = option((), "end at any of these token ids")
    ignore_eos: bool = option(False, "generate beyond end tokens, to time fixed lengths")
    include_stop_str_in_output: bool = option(False, "keep the stop string in the text", aliases=("include_stop",))
    skip_special_tokens: bool = option(True, "remove special tokens from the text")
    n: int = option(1, "completions of each prompt")
    num_beams: int = option(1, "beam search with this many beams; 1 is off")
    length_penalty: float = option(1.0, "beam search: above 0 prefers longer answers")
    early_stopping: bool | Literal["never"] = option(False, "beam search: when to stop, as in transformers")
    logprobs: int | None = option(None, "log-probability of each new token and of this many likeliest; 0: no others")
    prompt_logprobs: int | None = option(None, "the same for the tokens of the prompt")

    def __post_init__(self) -> None:
        set_ = object.__setattr__  # the dataclass is frozen; JSON spellings become one spelling here
        if self.top_k == -1:
            set_(self, "top_k", 0)
        for name, limits in _RANGES.items():
            _check_range(name, getattr(self, name), *limits)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} must be true or false, not {getattr(self, name)!r}.")
        for name in ("stop", "bad_words"):
            set_(self, name, _strings(name, getattr(self, name)))
        set_(self, "stop_token_ids", _tuple("stop_token_ids", self.stop_token_ids, MAX_TOKEN_IDS))
        if not all(_is_int(t) and t >= 0 for t in self.stop_token_ids):
            raise UserError(f"stop_token_ids must be token ids, not {list(self.stop_token_ids)!r:.100}.")
        if self.logit_bias is not None:
            set_(self, "logit_bias", _bias(self.logit_bias))
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise UserError(f'early_stopping must be true, false or "never", not {self.early_stopping!r}.')
        self._check_together()

    def _check_together(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UserError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}; lower it.")
        if self.max_tokens == 0 and self.prompt_logprobs is None:
            raise UserError("With max_tokens 0 nothing is generated; set prompt_logprobs to score the prompt.")
        if self.num_beams == 1:
            return
        if self.n > self.num_beams:
            raise UserError(f"n = {self.n} is more than num_beams = {self.num_beams}; raise num_beams.")
        if self.stop:
            raise UserError("Stop strings don't work with beam search; use stop_token_ids, or num_beams = 1.")
        if self.logprobs:
            raise UserError("Beam search reports the chosen tokens only; set logprobs to 0, or num_beams to 1.")

    @cached_property
    def greedy(self) -> bool:
        """True when the likeliest token is taken; a temperature below 1e-5 could only overflow."""
        return self.temperature < 1e-5

    @cached_property
    def adjusts(self) -> bool:
        """True when bias, penalties, bans or a minimum length may change the logits before any filter."""
        return bool(self.logit_bias or self.min_tokens or self.no_repeat_ngram_size or self.bad_words) or (
            (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)
        )

    def merged(self, over: Mapping[str, Any]) -> SamplingParams:
        """A copy with the values of `over`; None means "not given". Raises UserError for an unknown name."""
        known = [f.name for f in fields(self)]
        for name in over:
            if name not in known:
                raise UserError(f"There is no sampling option {name!r}{nearest(name, known)}.")
        return replace(self, **{name: value for name, value in over.items() if value is not None})

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any], **over: Any) -> SamplingParams:
        """The defaults that a checkpoint's generation_config.json asks for, with `over` on top.

        As in transformers, `do_sample` false or absent means greedy decoding whatever the temperature. A filter that
        the file does not name is off (transformers would still apply top_k = 50, vLLM would not). `max_length` is
        ignored: it counts the prompt, and files hold the context length there. End tokens belong to the tokenizer.
        """
        given = {_HF_NAMES.get(name, name): config.get(name) for name in (*_HF_NAMES, *_HF_SAME)}
        if not config.get("do_sample"):
            given["temperature"] = None
        elif given["temperature"] is None:
            given["temperature"] = 1.0
        given.update({name: value for name, value in over.items() if value is not None})
        return cls().merged(given)

    def check_fits(self, vocab_size: int) -> None:
        """Raise UserError when logit_bias names a token that the vocabulary doesn't have."""
        for token in self.logit_bias or ():
            if token >= vocab_size:
                raise UserError(f"logit_bias names token {token}, but the vocabulary ends at {vocab_size - 1}.")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_range(name: str, value: Any, whole: bool, low: float, high: float, open_low: bool) -> None:
    if value is None and name in ("max_tokens", "seed", "logprobs", "prompt_logprobs"):
        return
    number = _is_int(value) or (not whole and isinstance(value, float) and math.isfinite(value))
    if number and low <= value <= high and not (open_low and value == low):
        return
    bounds = "" if math.isinf(low) else f" {'above' if open_low else 'of at least'} {low}"
    bounds += "" if math.isinf(high) else f"{' and' if bounds else ''} at most {high}"
    raise UserError(f"{name} must be {'an integer' if whole else 'a number'}{bounds}, not {value!r:.60}.")


def _tuple(name: str, value: Any, most: int) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{name} must be a list, not {value!r:.60}.")
    if len(value) > most:
        raise UserError(f"{name} takes at most {most} entries, not {len(value)}.")
    return tuple(value)


def _strings(name: str, value: Any) -> tuple[str, ...]:
    """A string or a list of strings as a tuple."""
    strings = (value,) if isinstance(value, str) else _tuple(name, value, MAX_STRINGS)
    if not all(isinstance(text, str) and text for text in strings):
        raise UserError(f"{name} must be a string or a list of non-empty strings, not {list(strings)!r:.100}.")
    if any(len(text) > MAX_STRING for text in strings):
        raise UserError(f"{name} takes strings of at most {MAX_STRING} characters.")
    return strings


def _bias(value: Any) -> dict[int, float]:
    """JSON has string keys only, so "50" names token 50."""
    try:
        bias = {int(token): float(amount) for token, amount in value.items()}
    except (AttributeError, TypeError, ValueError):
        raise UserError(f"logit_bias must map token ids to numbers, not {value!r:.100}.") from None
    if len(bias) > MAX_TOKEN_IDS:
        raise UserError(f"logit_bias takes at most {MAX_TOKEN_IDS} entries, not {len(bias)}.")
    if any(token < 0 for token in bias) or not all(-100 <= amount <= 100 for amount in bias.values()):
        raise UserError(f"logit_bias must map token ids to numbers from -100 to 100, not {value!r:.100}.")
    return bias
