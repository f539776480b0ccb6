"""Training steps of puna beside the same loop over transformers (and peft), on the same shape and batch, in one run.

Each side runs in a separate process and makes a step on request, in turns, so that a busy machine slows both
alike; figures are medians. Weights are random: float32 master weights and bfloat16 products, fused AdamW, gradients
clipped, nothing recomputed. Memory is the peak of what a process allocates.

    pip install -e '.[bench]'
    python benchmarks/training.py                                    # CPU, 2 threads, SmolLM2's shape
    python benchmarks/training.py --device cuda --model llama2-7b --rows 1 --length 4096 --precision bf16 --ours
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="smollm2-135m", help="a preset of puna")
parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--rows", type=int, default=4)
parser.add_argument("--length", type=int, default=512)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--methods", nargs="+", default=["full", "lora"], choices=("full", "lora"))
parser.add_argument("--precision", default="bf16-mixed", choices=("bf16-mixed", "bf16"), help="bf16: state too")
parser.add_argument("--recompute", default="none", choices=("none", "selective", "full"), help="puna's side alone")
parser.add_argument("--layers", type=int, help="only so many layers of the shape")
parser.add_argument("--optimizer", default="adamw", choices=("adamw", "adamw8bit"), help="puna's side alone")
parser.add_argument("--compile", action="store_true", help="puna's side alone")
parser.add_argument("--ours", action="store_true", help="puna's side alone")
parser.add_argument("--json", type=Path)
parser.add_argument("--side", help=argparse.SUPPRESS)
options = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(options.threads)  # before torch is imported

RANK = 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def shape() -> Any:
    """The preset, with as many layers as were asked for."""
    from puna.model.presets import PRESETS

    config = PRESETS[options.model]
    return dataclasses.replace(config, num_hidden_layers=options.layers or config.num_hidden_layers)


def ours(method: str) -> Any:
    """A function that makes one step of puna's trainer and returns its loss."""
    import numpy as np
    import torch

    from puna.data.loader import PackedRow
    from puna.model.llama import Llama
    from puna.model.lora import LoraOptions, add_lora, initial
    from puna.model_loader import random_reader
    from puna.parallel.strategy import ParallelStrategy
    from puna.train.build import TYPES
    from puna.train.optim import make_optimizer
    from puna.train.options import OptimOptions, TrainDataOptions, TrainModelOptions, TrainOptions
    from puna.train.trainer import Trainer

    config = shape()
    strategy = ParallelStrategy.single(options.device)
    with torch.device("meta"):
        model = Llama(config)
    if method == "lora":
        add_lora(model, LoraOptions(rank=RANK, alpha=32, targets=tuple(TARGETS)))
    dtype, compute = TYPES[options.precision]
    parts = strategy.prepare(
        model, dtype=dtype, compute_dtype=compute, recompute_blocks=options.recompute, compile_blocks=options.compile
    )
    shapes = {name: tuple(p.shape) for name, p in strategy.parameters(parts).items()}
    read = random_reader(config, torch.float32, options.device)
    strategy.load(
        parts,
        lambda name, index: initial(name, shapes[name], 0)[index] if ".adapter." in name else read(name, index),
    )

    class Rows:
        datasets: tuple = ()

        def next_batch(self, n: int) -> list[PackedRow]:
            place, whole = np.arange(options.length), np.zeros(options.length, np.int32)
            rows = np.random.default_rng(0).integers(0, config.vocab_size, (n, options.length + 1))
            return [PackedRow(row[:-1], row[1:], place, whole, []) for row in rows]

    class Quiet:
        def watch(self, *_: Any) -> Any:
            import contextlib

            return contextlib.nullcontext()

    state = "bf16" if options.precision == "bf16" and options.optimizer == "adamw" else "fp32"
    settings = TrainOptions(
        out=Path(),
        model=TrainModelOptions(name=options.model),
        data=TrainDataOptions(train=(), seq_len=options.length),
        optim=OptimOptions(lr=1e-4, state=state, name=options.optimizer),
        batch_size=options.rows,
        micro_batch_size=options.rows,
        precision=options.precision,
    )
    optimizer = make_optimizer(strategy.parameters(parts), settings.optim)
    trainer = Trainer(settings, config, strategy, parts, optimizer, Rows(), steps=1000)  # type: ignore[arg-type]
    trainer.names = lambda *_: ""  # type: ignore[method-assign]
    return lambda: trainer.step(Quiet())["loss"]  # type: ignore[arg-type]


def theirs(method: str) -> Any:
    """The same over transformers' model, and peft's."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape().to_hf())
    with torch.device(options.device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=32, target_modules=TARGETS))
    if options.precision == "bf16":
        model = model.to(torch.bfloat16)
    model.config.use_cache = False
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    rows = np.random.default_rng(0).integers(0, config.vocab_size, (options.rows, options.length + 1))
    ids, labels = (torch.from_numpy(part.copy()).to(options.device) for part in (rows[:, :-1], rows[:, 1:]))

    def step() -> float:
        with torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16-mixed"):
            loss = model(input_ids=ids, labels=labels, shift_labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def serve(side: str) -> None:
    """Make a step per line of stdin and print its time."""
    name, method = side.split("-")
    out, sys.stdout = sys.stdout, sys.stderr
    step = {"puna": ours, "transformers": theirs}[name](method)
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = step()
        print(json.dumps([time.perf_counter() - start, loss, peak()]), file=out, flush=True)


def peak() -> float:
    """Bytes at the worst moment: of a GPU what torch allocated, of the CPU all but mapped files."""
    if options.device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return (int(lines["VmHWM"].split()[0]) - int(lines["RssFile"].split()[0])) * 1024


def measure(method: str) -> dict[str, dict[str, float]]:
    """Medians of each side, its first step left out."""
    names = ["puna"] if options.ours else ["puna", "transformers"]
    sides = {}
    for name in names:
        command = [sys.executable, __file__, *sys.argv[1:], "--side", f"{name}-{method}"]
        sides[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    found: dict[str, list[list[float]]] = {name: [] for name in names}
    for _ in range(options.rounds + 1):
        for name, process in sides.items():
            assert process.stdin and process.stdout
            process.stdin.write("\n")
            process.stdin.flush()
            found[name].append(json.loads(process.stdout.readline()))
    for process in sides.values():
        process.communicate()
    tokens = options.rows * options.length
    return {
        name: {
            "tokens_per_second": tokens / statistics.median(seconds for seconds, _, _ in rows[1:]),
            "first_loss": rows[0][1],
            "last_loss": rows[-1][1],
            "peak_gb": max(memory for _, _, memory in rows) / 1e9,
        }
        for name, rows in found.items()
    }


def main() -> None:
    from puna.train.flops import flops_per_token, published_flops_per_token

    results = {}
    for method in options.methods:
        found = results[method] = measure(method)
        trained = 1.0 if method == "full" else 0.0
        flops = flops_per_token(shape(), options.length, trained=trained)
        published = published_flops_per_token(shape(), options.length)
        for name, row in found.items():
            row["tflops"] = row["tokens_per_second"] * flops / 1e12
            row["tflops_published"] = row["tokens_per_second"] * published / 1e12
            print(f"{method:5} {name:13}" + "  ".join(f"{key} {value:,.4g}" for key, value in row.items()))
        if not options.ours:
            mine, other = found["puna"], found["transformers"]
            speed = mine["tokens_per_second"] / other["tokens_per_second"]
            memory = mine["peak_gb"] / other["peak_gb"]
            print(f"{method:5} puna / transformers: {speed:.2f}x tokens/s, {memory:.2f}x memory")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    if options.side:
        serve(options.side)
    else:
        main()
