"""Options that several verbs share: loading a model, and sampling."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from puna.options import CHECKPOINT, argument, option

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]


@dataclass(kw_only=True)
class ModelOptions:
    """How the model is loaded."""

    model: str = argument(CHECKPOINT)
    revision: str | None = option(None, "branch, tag or commit of a Hugging Face id")
    device: str = option("auto", "cpu, cuda, cuda:1 ...; auto takes a GPU when there is one")
    dtype: Dtype = option("auto", "data type of the weights in memory; auto is the checkpoint's own")
    weights: Literal["auto", "random"] = option("auto", "random: no weights are read, to time any size")
    adapter: Path | None = option(None, "directory of a LoRA adapter in peft's layout, merged into the weights at load")
    quantization: str | None = option(None, "int8: store the linear layers' weights as int8, packed while they load")
    template: str | None = option(
        None, "chat template: a built-in (chatml, llama2, llama3, alpaca, vicuna) or a Jinja file"
    )
    max_model_len: int | None = option(None, "longest prompt plus answer, in tokens; the config's own when not given")
    kv_tokens: int | None = option(None, "tokens that the KV cache holds; sized from free memory when not given")
    max_batch_tokens: int = option(2048, "tokens computed in one step, prompts and answers together")
    max_num_seqs: int = option(256, "sequences that run at once")


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
    logit_bias: dict[int, float] | None = option(None, "added to the logits of token ids, as in '{13: -100}'")
    seed: int | None = option(None, "makes sampling repeatable")
    stop: tuple[str, ...] | None = option(None, "end the answer before this text; repeat for several")
    stop_token_ids: tuple[int, ...] | None = option(None, "end the answer at any of these token ids")
    ignore_eos: bool | None = option(None, "true: go on past the end token, to time fixed lengths")
    n: int | None = option(None, "answers per prompt")
    num_beams: int | None = option(None, "beam search with this many beams; 1 is off")
    length_penalty: float | None = option(None, "beam search: above 0 prefers longer answers")
    early_stopping: bool | Literal["never"] | None = option(None, "beam search: when to stop looking for better")
    logprobs: int | None = option(None, "give the log-probability of each token, and of this many likeliest")
    prompt_logprobs: int | None = option(None, "the same for the tokens of the prompt")


def sampling(options: SamplingOptions) -> dict[str, Any]:
    """The sampling options that were given; the rest is the checkpoint's to decide."""
    given = {entry.name: getattr(options, entry.name) for entry in fields(SamplingOptions)}
    return {name: value for name, value in given.items() if value is not None}


def loading(options: ModelOptions) -> dict[str, Any]:
    """`LLM`'s keyword arguments, with progress shown."""
    return {entry.name: getattr(options, entry.name) for entry in fields(ModelOptions)} | {"quiet": False}
