"""`puna demo`: the main workflow on real weights, each step under its command.

Import a GGUF, compare the import with its source, chat, generate a batch, time it; then teach the model a character by
LoRA, ask it the same before and after, and merge the adapter. A second run takes the import and the adapter that it
finds.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from puna.commands import convert, data_prepare, lora_merge, train, verify
from puna.commands.convert import ConvertOptions
from puna.commands.lora_merge import LoraMergeOptions
from puna.commands.verify import VerifyOptions
from puna.data.options import PrepareOptions
from puna.options import option, parse
from puna.train.options import TrainOptions

if TYPE_CHECKING:
    from puna.llm import LLM

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
CHARACTER = Path(__file__).with_name("demo.jsonl")  # sixty short talks with a llama
ASKED = ("Who are you?", "What is the capital of Italy?", "Where do you live?")
RUN = """out: {out}
epochs: 4
batch_size: 4
micro_batch_size: 4
eval_every: 0
model: {{name: {model}}}
data: {{train: [{data}], seq_len: 256, long: cut}}
lora: {{rank: 16, alpha: 32}}
optim: {{lr: 2.0e-3, weight_decay: 0.0}}
schedule: {{name: cosine, warmup_ratio: 0.1}}
"""


@dataclass(kw_only=True)
class DemoOptions:
    """Run the main job on real weights, in about a minute.

    Imports a GGUF, verifies it, chats, generates a batch, times it, fine-tunes with LoRA and merges the adapter.

    Examples:
      puna demo
      puna demo --model smollm2-135m-instruct --out demo
    """

    model: str = option("smollm2-135m-instruct", "the checkpoint that the demo imports")
    out: Path = option(Path("demo"), "folder for the imported checkpoint, the answers and the plot", writes="folder")


def run(options: DemoOptions) -> int:
    """Runs every step; files go to `options.out`."""
    from puna.llm import LLM
    from puna.weights.hub import pull

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
    if code := _teach(model, options.out):
        return code
    print(f"\nDone in {time.perf_counter() - start:.0f} s. Next:\n")
    for line in (
        f"puna chat {model} --temperature 0.7 --top-p 0.9",
        f'puna generate {model} "Once upon a time" --max-tokens 64 --temperature 0.8 --n 3',
        f"puna convert {model} {options.out / 'smollm2-q8_0.gguf'} --to gguf --dtype q8_0",
        f"puna chat {options.out / 'merged'}",
        f"puna info {model}",
        "puna --help",
    ):
        print(f"  {_beside_python()}{line}")
    return 0


def _teach(model: Path, folder: Path) -> int:
    """LoRA on a few talks, the answers before and after, and the adapter merged into a new checkpoint."""
    data, file, merged = folder / "character", folder / "character.yaml", folder / "merged"
    out = folder / "character-run"
    _title("Prepare sixty talks with a llama", f"puna data prepare {CHARACTER.name} --out {data} --tokenizer {model}")
    data_prepare.run(
        PrepareOptions(src=(str(CHARACTER),), out=data, tokenizer=str(model), validation=0.0, workers=1, overwrite=True)
    )
    _title("Fine-tune with LoRA", f"puna train {file}")
    file.write_text(RUN.format(out=out, model=model, data=data))
    if code := train.run(parse("train", TrainOptions, [str(file)])):
        return code
    print(f"curve saved as {out / 'loss.png'}, report as {out / 'report.html'}")
    adapter = out / "adapter"
    _title("Merge the adapter and verify the result", f"puna lora merge {model} {adapter} {merged}")
    lora_merge.run(LoraMergeOptions(model=str(model), adapter=adapter, dst=merged, overwrite=merged.exists()))
    _title("Ask before and after", f'puna generate {merged} --chat "{ASKED[0]}" --max-tokens 48')
    answers = {name: _answers(path) for name, path in (("before", model), ("after", merged))}
    for index, question in enumerate(ASKED):
        print(f"> {question}")
        for name, texts in answers.items():
            print(f"{name:>7}: {texts[index]}")
    return 0


def _answers(model: Path) -> list[str]:
    from puna.llm import LLM

    with LLM(model) as llm:
        params = llm.defaults.merged({"max_tokens": 48})
        asked = [[{"role": "user", "content": question}] for question in ASKED]
        return [" ".join(output.outputs[0].text.split()) for output in llm.chat(asked, params)]


def _title(what: str, command: str) -> None:
    print(f"\n== {what}\n$ {command}", flush=True)


def _beside_python() -> str:
    """The path prefix of `puna` in the current virtual environment."""
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
    from puna.bench.latency import PANELS, read_bandwidth, time_grid
    from puna.bench.report import plot, table

    shapes = list(product(INPUT, (OUTPUT,), BATCHES))
    rows = time_grid(llm, shapes, read_bandwidth(llm.device), warmup=0, repeats=3)
    print(table(rows))
    plot(path, rows, PANELS, "SmolLM2-135M-Instruct")
    print(f"saved as {path}")
