"""`puna demo`: the main job on real weights, each step under the command that does the same.

Import a GGUF, compare the import with its source, chat, generate a batch, time it. A second run takes the import that
it finds.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import product
from pathlib import Path

from puna import convert, verify
from puna.api import LLM
from puna.bench.latency import PANELS, read_bandwidth, time_grid
from puna.bench.report import plot, replace_with, table
from puna.options import ConvertOptions, DemoOptions, VerifyOptions
from puna.weights.hub import pull

QUESTIONS = ("What is the capital of France?", "Why is the sky blue?", "Write one sentence about llamas.")
STARTS = (
    "The capital of Peru is",
    "Water boils at",
    "A llama is",
    "The first person on the Moon was",
    "Once upon a time",
    "The opposite of hot is",
    "In Python, a list is",
    "The sun rises in the",
)
INPUT, OUTPUT, BATCHES = (32, 128), 32, (1, 8)


def run(options: DemoOptions) -> int:
    """Runs every step; files go to `options.out`."""
    start, model = time.perf_counter(), options.out / "smollm2"
    options.out.mkdir(parents=True, exist_ok=True)
    pull(options.model)
    _title("Import the GGUF to a Hugging Face directory", f"puna convert {options.model} {model} --to hf")
    if model.exists():
        print(f"{model} is there from an earlier run.")
    else:
        convert.run(ConvertOptions(src=options.model, dst=model, to="hf"))
    _title("Compare the import with its source", f"puna verify {options.model} {model}")
    if code := verify.run(VerifyOptions(a=options.model, b=str(model))):
        return code
    with LLM(model, quiet=False) as llm:
        _title("Chat", f"puna chat {model} --max-tokens 64")
        _chat(llm)
        _title("Generate a batch", f"puna generate {model} --file {options.out / 'starts.txt'} --max-tokens 32")
        _batch(llm, options.out)
        grid = f"--input-len {_commas(INPUT)} --output-len {OUTPUT} --batch-size {_commas(BATCHES)} --warmup 0"
        _title("Time it", f"puna bench latency {model} {grid} --plot {options.out / 'times.png'}")
        _time(llm, options.out / "times.png")
    print(f"\nDone in {time.perf_counter() - start:.0f} s. Next:\n")
    for line in (
        f"puna chat {model} --temperature 0.7 --top-p 0.9",
        f'puna generate {model} "Once upon a time" --max-tokens 64 --temperature 0.8 --n 3',
        f"puna convert {model} {options.out / 'smollm2-q8_0.gguf'} --to gguf --dtype q8_0",
        f"puna info {model}",
        "puna --help",
    ):
        print(f"  {_beside_python()}{line}")
    return 0


def _title(what: str, command: str) -> None:
    print(f"\n== {what}\n$ {command}", flush=True)


def _beside_python() -> str:
    """What stands before `puna` to run it from the virtual environment that this is."""
    if sys.prefix == sys.base_prefix:
        return ""
    folder = Path(sys.executable).parent
    return f"{folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder}/"


def _commas(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values))


def _chat(llm: LLM) -> None:
    params = llm.defaults.merged({"max_tokens": 64})
    for question in QUESTIONS:
        print(f"> {question}")
        for piece in llm.stream([{"role": "user", "content": question}], params):
            print(piece.text, end="", flush=True)
        print("\n")


def _batch(llm: LLM, folder: Path) -> None:
    (folder / "starts.txt").write_text("\n".join(STARTS) + "\n")
    start = time.perf_counter()
    outputs = llm.generate(list(STARTS), llm.defaults.merged({"max_tokens": 32}))
    seconds = time.perf_counter() - start
    texts = [output.outputs[0].text for output in outputs]
    rows = [{"prompt": prompt, "text": text} for prompt, text in zip(STARTS, texts, strict=True)]
    path = folder / "batch.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for row in rows:
        print(f"{row['prompt']} | {' '.join(row['text'].split())[:70]}")
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    print(f"{len(rows)} prompts, {tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tokens/s; saved as {path}")


def _time(llm: LLM, path: Path) -> None:
    shapes = list(product(INPUT, (OUTPUT,), BATCHES))
    rows = time_grid(llm, shapes, read_bandwidth(llm.device), warmup=0, repeats=3)
    print(table(rows))
    replace_with(path, lambda beside: plot(rows, PANELS, "SmolLM2-135M-Instruct", beside))
    print(f"saved as {path}")
