"""Latency of the first token (prefill) and of each later one (decode), for a batch of equal requests.

Prefill is timed by requesting one token. Decode is the rest of the answer's time over the remaining tokens: the same
subtraction works for any engine, so that the numbers are comparable. Each round has fresh random prompts, so that no
prefix is found in the cache.
"""

from __future__ import annotations

import random
import time
from statistics import median

import torch

from puna.bench.report import Row
from puna.engine.sampling_params import SamplingParams
from puna.llm import LLM
from puna.model.tp_plan import kv_heads_per_rank
from puna.parallel.process_group import world_size
from puna.progress import meter

PANELS = (
    ("first_ms", "first token, ms"),
    ("per_token_ms", "each token after it, ms"),
    ("decode_tok_s", "generated tokens/s"),
)
Shape = tuple[int, int, int]  # tokens of each prompt, tokens of each answer, requests at once


def time_grid(llm: LLM, shapes: list[Shape], bandwidth: float, warmup: int, repeats: int, seed: int = 0) -> list[Row]:
    """A row per shape, medians over `repeats`. `bandwidth`: see `read_bandwidth`."""
    rng, rows = random.Random(seed), []
    with meter("Timing", len(shapes) * (warmup + repeats), "rounds") as advance:
        for shape in shapes:
            rounds = []
            for _ in range(warmup + repeats):
                rounds.append(measure(llm, *shape, rng))
                advance(1)
            rows.append(_row(llm, shape, rounds[warmup:], bandwidth))
    return rows


def measure(llm: LLM, input_len: int, output_len: int, batch: int, rng: random.Random) -> tuple[float, float]:
    """Seconds to the first token of the whole batch, and seconds for all tokens after it."""
    first = _timed(llm, input_len, 1, batch, rng)
    return first, max(_timed(llm, input_len, output_len, batch, rng) - first, 1e-9)


def _timed(llm: LLM, input_len: int, output_len: int, batch: int, rng: random.Random) -> float:
    params = SamplingParams(max_tokens=output_len, ignore_eos=True)
    prompts = [random_prompt(llm, input_len, rng) for _ in range(batch)]
    start = time.perf_counter()
    for prompt in prompts:
        llm.submit(prompt, params)
    while llm.busy:
        llm.step()
    return time.perf_counter() - start


def random_prompt(llm: LLM, length: int, rng: random.Random) -> list[int]:
    return [rng.randrange(llm.config.vocab_size) for _ in range(length)]


def _row(llm: LLM, shape: Shape, rounds: list[tuple[float, float]], bandwidth: float) -> Row:
    input_len, output_len, batch = shape
    first = median(prefill for prefill, _ in rounds)
    step = median(decode for _, decode in rounds) / (output_len - 1)
    return {
        "input": input_len,
        "output": output_len,
        "batch": batch,
        "first_ms": first * 1e3,
        "prefill_tok_s": batch * input_len / first,
        "per_token_ms": step * 1e3,
        "decode_tok_s": batch / step,
        "of_bandwidth": step_bytes(llm, batch, input_len + output_len / 2) / step / bandwidth,
    }


def step_bytes(llm: LLM, batch: int, context: float) -> float:
    """Bytes that one decode step must read on each rank: all weights once, and the batch's keys and values."""
    config, size = llm.config, llm.dtype.itemsize
    shapes = config.tensors()
    if "lm_head.weight" in shapes:
        del shapes["model.embed_tokens.weight"]  # a few rows of it, the others stay where they are
    weights = 0
    for shape in shapes.values():
        count = 1
        for n in shape:
            count *= n
        weights += count
    cache = config.kv_bytes_per_token(size, kv_heads_per_rank(config, world_size())) * batch * context
    return weights * size / world_size() + cache


def read_bandwidth(device: str) -> float:
    """Bytes per second that summing a large tensor reaches on the device: what a memory-bound step could."""
    data = torch.ones(2**29 if device.startswith("cuda") else 2**26, device=device)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        data.sum().item()
        best = min(best, time.perf_counter() - start)
    return data.nbytes / best
