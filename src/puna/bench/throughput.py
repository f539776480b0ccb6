"""Throughput of a queue of requests at a fixed concurrency."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

from puna.bench.latency import random_prompt
from puna.bench.report import Row
from puna.engine.sampling_params import SamplingParams
from puna.errors import UserError
from puna.llm import LLM
from puna.progress import meter

PANELS = (("output_tok_s", "generated tokens/s"), ("p50_s", "median latency, s"), ("p99_s", "99th percentile, s"))
SHORTEST, LONGEST_PROMPT, LONGEST = 4, 1024, 2048  # tokens; vLLM's filter of ShareGPT, so that numbers compare
Lengths = tuple[int, int]  # tokens of the prompt, tokens to generate
Queue = tuple[str | int, str | int, list[Lengths]]  # what the table calls its prompts and answers, and their lengths


def time_queues(llm: LLM, queues: Sequence[Queue], batches: Sequence[int], rng: random.Random) -> list[Row]:
    """A row per queue and batch size."""
    serve(llm, [(8, 4)], 1, rng)  # warm up
    rows = []
    with meter("Timing", sum(len(requests) for *_, requests in queues) * len(batches), "requests") as advance:
        for (prompt, answer, requests), batch in product(queues, batches):
            seconds, latencies = serve(llm, requests, batch, rng)
            rows.append({"input": prompt, "output": answer, "batch": batch} | _rates(requests, seconds, latencies))
            advance(len(requests))
    return rows


def serve(llm: LLM, requests: list[Lengths], batch: int, rng: random.Random) -> tuple[float, list[float]]:
    """Seconds until all are answered, and each request's own latency, at a concurrency of `batch`.

    Prompts are random tokens of the given lengths, so that none finds its prefix in the cache.
    """
    waiting = [(random_prompt(llm, length, rng), tokens) for length, tokens in reversed(requests)]
    started: dict[str, float] = {}
    latencies = []
    begin = time.perf_counter()
    while waiting or started:
        while waiting and len(started) < batch:
            prompt, tokens = waiting.pop()
            started[llm.submit(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True))] = time.perf_counter()
        for output in llm.step():
            if output.error:
                raise UserError(output.error)
            latencies.append(time.perf_counter() - started.pop(output.id))
    return time.perf_counter() - begin, latencies


def read_conversations(path: Path) -> list[tuple[str, str]]:
    """The first question and answer of each conversation of a ShareGPT-style file."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--dataset {path} is not JSON: {error}") from None
    pairs = []
    for row in rows if isinstance(rows, list) else []:
        turns: list[Any] = row.get("conversations", []) if isinstance(row, dict) else []
        if len(turns) >= 2 and all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns[:2]):
            pairs.append((turns[0]["value"], turns[1]["value"]))
    if not pairs:
        raise UserError(f'--dataset {path} has no rows of {{"conversations": [{{"value": ...}}, {{"value": ...}}]}}')
    return pairs


def sample_lengths(llm: LLM, pairs: list[tuple[str, str]], count: int, rng: random.Random) -> list[Lengths]:
    """The lengths of up to `count` random conversations; too short and too long ones are left out."""
    if llm.tokenizer is None:
        raise UserError("--dataset needs a tokenizer to measure lengths, and the checkpoint carries none")
    longest, lengths = min(LONGEST, llm.max_model_len), list[Lengths]()
    for question, answer in rng.sample(pairs, len(pairs)):
        prompt, tokens = len(llm.tokenizer.encode(question)), len(llm.tokenizer.encode(answer, bos=False))
        if SHORTEST <= prompt <= LONGEST_PROMPT and SHORTEST <= tokens <= longest - prompt:
            lengths.append((prompt, tokens))
        if len(lengths) == count:
            break
    if not lengths:
        raise UserError(f"no conversation of --dataset fits {SHORTEST} to {longest} tokens")
    return lengths


def _rates(requests: list[Lengths], seconds: float, latencies: list[float]) -> Row:
    read, written = sum(prompt for prompt, _ in requests), sum(tokens for _, tokens in requests)
    cuts = quantiles(latencies, n=100, method="inclusive") if len(latencies) > 1 else latencies * 99
    return {
        "requests": len(requests),
        "requests_s": len(requests) / seconds,
        "total_tok_s": (read + written) / seconds,
        "output_tok_s": written / seconds,
        "mean_s": fmean(latencies),
        "p50_s": cuts[49],
        "p90_s": cuts[89],
        "p99_s": cuts[98],
    }
