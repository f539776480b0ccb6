"""`puna bench latency`: times of prefill and decode over a grid of shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from puna.engine.options import EngineOptions
from puna.errors import UserError
from puna.options import CHECKPOINT, MAX_SEED, argument, option

if TYPE_CHECKING:
    from puna.bench.report import Panel, Row
    from puna.llm import LLM


@dataclass(kw_only=True)
class BenchOptions(EngineOptions):
    """What is timed."""

    model: str = argument(CHECKPOINT + "; with --load-format dummy also a preset (llama2-7b, llama3.1-8b ...)")
    input_len: tuple[int, ...] = option((128, 512), "prompt lengths in tokens", minimum=1)
    output_len: tuple[int, ...] = option((64,), "answer lengths in tokens", minimum=1)
    batch_size: tuple[int, ...] = option((1, 4, 16), "requests at once", minimum=1)
    seed: int = option(0, "of the random prompts and weights", minimum=0, maximum=MAX_SEED)
    json: Path | None = option(None, "also write the table as JSON", writes="file")
    plot: Path | None = option(None, "also draw the table as a PNG", writes="file")


@dataclass(kw_only=True)
class LatencyOptions(BenchOptions):
    """Time prefill and decode over a grid of lengths and batch sizes.

    Times are medians. Decode is also given as a fraction of the memory bandwidth that a plain read reaches on the same
    device.

    Examples:
      puna bench latency smollm2-135m-instruct --input-len 128,512 --output-len 64 --batch-size 1,4
      puna bench latency tiny --load-format dummy --input-len 64 --json times.json --plot times.png
    """

    warmup: int = option(1, "untimed rounds before the timed ones", minimum=0)
    repeats: int = option(3, "timed rounds", minimum=1)


def run(options: LatencyOptions) -> int:
    """Times the grid and publishes it."""
    from puna.bench.latency import PANELS, read_bandwidth, time_grid

    if min(options.output_len) < 2:
        raise UserError("--output-len must be at least 2: decoding begins with the second token.")
    shapes = list(product(options.input_len, options.output_len, options.batch_size))
    with load_model(options, max(options.input_len) + max(options.output_len)) as llm:
        bandwidth = read_bandwidth(llm.device)
        rows = time_grid(llm, shapes, bandwidth, options.warmup, options.repeats, options.seed)
    publish(rows, options, {"read_bandwidth": bandwidth}, PANELS)
    return 0


def load_model(options: BenchOptions, longest: int) -> LLM:
    """The model, sure to hold requests of `longest` tokens."""
    from puna.llm import LLM

    sequences = max(options.max_num_seqs, *options.batch_size)
    llm = LLM(**options.arguments() | {"max_num_seqs": sequences}, seed=options.seed, quiet=False)
    if longest > llm.max_model_len:
        raise UserError(
            f"--input-len and --output-len come to {longest} tokens, the context is {llm.max_model_len}: shorten them"
        )
    return llm


def publish(rows: Sequence[Row], options: BenchOptions, facts: Row, panels: Sequence[Panel]) -> None:
    """Prints the table and writes the files that were asked for."""
    from puna.bench.report import plot, table, write_report

    print(table(rows))
    if options.json:
        given = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}
        write_report(options.json, rows, given, facts)
    if options.plot:
        plot(options.plot, rows, panels, options.model)
