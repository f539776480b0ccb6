"""`puna bench throughput`: requests and tokens per second of a queue, and percentiles of the latency."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from puna.commands.bench_latency import BenchOptions, load_model, publish
from puna.options import option


@dataclass(kw_only=True)
class ThroughputOptions(BenchOptions):
    """Time a queue of requests: requests/s, tokens/s, percentiles of the latency.

    --batch-size of them run at once. Lengths come from the grid, or from the conversations of a ShareGPT-style file:
    [{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}].

    Examples:
      puna bench throughput smollm2-135m-instruct --input-len 128 --output-len 64 --num-prompts 32
      puna bench throughput smollm2-135m-instruct --dataset conversations.json --batch-size 16
    """

    num_prompts: int = option(64, "requests per line of the table", minimum=1)
    dataset: Path | None = option(None, "a ShareGPT-style JSON file; its lengths replace the grid")


def run(options: ThroughputOptions) -> int:
    """Runs each queue and publishes the table."""
    from puna.bench.throughput import PANELS, Queue, read_conversations, sample_lengths, time_queues

    conversations = read_conversations(options.dataset) if options.dataset else []
    rng = random.Random(options.seed)
    with load_model(options, 0 if options.dataset else max(options.input_len) + max(options.output_len)) as llm:
        queues: list[Queue] = []
        if options.dataset:
            queues.append(("dataset", "dataset", sample_lengths(llm, conversations, options.num_prompts, rng)))
        else:
            for prompt, answer in product(options.input_len, options.output_len):
                queues.append((prompt, answer, [(prompt, answer)] * options.num_prompts))
        rows = time_queues(llm, queues, options.batch_size, rng)
    publish(rows, options, {}, PANELS)
    return 0
