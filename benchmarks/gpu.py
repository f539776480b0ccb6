"""What puna does on one GPU: correctness, then decode, prefill and training beside what the device can do.

    benchmarks/gpu.sh                                   # one H100 or H200, within 7 minutes
    benchmarks/gpu.sh --device cpu --inference tiny --training tiny --length 64    # the same code, to try the script

Every part is a separate process with a time limit. A part that fails is one line in the table; the others still run.
Bandwidth and product rate are measured on the same device in the same run: a large sum, a bfloat16 product.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
parser.add_argument("--inference", default="llama3.1-8b", help="preset for decode and prefill")
parser.add_argument("--training", default="llama2-7b", help="preset for training steps")
parser.add_argument("--length", type=int, default=4096, help="tokens of a prefill and of a training row")
parser.add_argument("--context", type=int, default=512, help="tokens in the cache when decode is timed")
parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
parser.add_argument("--parts", nargs="+", default=["tests", "inference", "lora", "full"])
parser.add_argument("--json", type=Path, help="also write the figures here")
parser.add_argument("--part", help=argparse.SUPPRESS)
options = parser.parse_args()

SECONDS = {"tests": 130, "inference": 110, "lora": 70, "full": 90}  # on a GPU, 400 in all; a CPU takes its time
BLOCK = 16
Row = tuple[str, str]


def tests() -> list[Row]:
    """The tests marked `gpu`."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/test_gpu.py", "-q", "-p", "no:cacheprovider", "-rfE"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTEST_ADDOPTS": ""})
    print(done.stdout[-6000:], done.stderr[-2000:], file=sys.stderr)
    lines = done.stdout.strip().splitlines() or ["no output"]
    return [("tests", lines[-1]), *[("", line[:110]) for line in lines if line.startswith(("FAILED", "ERROR"))][:8]]


def timed(step: Any, repeats: int, warmup: int = 2) -> float:
    """Median seconds of a call, the device's queue emptied around it."""
    import torch

    wait = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    seconds = []
    for turn in range(warmup + repeats):
        wait()
        start = time.perf_counter()
        step()
        wait()
        if turn >= warmup:
            seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2]


def bounds() -> tuple[float, float]:
    """Bytes a second of a large read, FLOP/s of a large bfloat16 product."""
    import torch

    gpu = options.device == "cuda"
    data = torch.ones(2**30 if gpu else 2**24, device=options.device)
    bandwidth = data.nbytes / timed(data.sum, 10)
    n = 8192 if gpu else 512
    a, b = (torch.randn(n, n, device=options.device, dtype=torch.bfloat16) for _ in range(2))
    return bandwidth, 2 * n**3 / timed(lambda: a @ b, 10)


def inference() -> list[Row]:
    """Decode at several batch sizes and one prefill, random bfloat16 weights, runner and greedy sampler."""
    import torch

    from puna.engine.runner import make_runner
    from puna.engine.sampler import Row as SamplerRow
    from puna.engine.sampler import sample
    from puna.engine.sampling_params import SamplingParams
    from puna.engine.sequence import Batch, Chunk, Request, Sequence
    from puna.model.presets import PRESETS
    from puna.model_loader import random_model

    config, bandwidth, rate = PRESETS[options.inference], *bounds()
    rows = [("measured", f"read {bandwidth / 1e9:,.0f} GB/s, bfloat16 product {rate / 1e12:,.0f} TFLOP/s")]
    model = random_model(config, torch.bfloat16, options.device, fast=True)
    model.fix_rope(max(options.length, options.context) + 256)
    weights = [p for name, p in model.named_parameters() if config.tie_word_embeddings or "embed_tokens" not in name]
    weight_bytes = sum(p.nbytes for p in weights)
    token_bytes = config.kv_bytes_per_token(2)
    span = -(-(options.context + 128) // BLOCK)
    prefill_blocks = -(-options.length // BLOCK)
    runner = make_runner(model, max(max(options.batches) * span, prefill_blocks), BLOCK)
    params = SamplingParams(max_tokens=1)

    def sequence(tokens: int, first: int, blocks: int) -> Sequence:
        made = Sequence([index % config.vocab_size for index in range(tokens)], tokens, tokens + 256, 0)
        made.blocks = list(range(first, first + blocks))
        return made

    def step(sequences: list[Sequence], start: int) -> None:
        batch = Batch()
        for one in sequences:
            request = Request("0", one.tokens, params, (), [one])
            batch.add(Chunk(request, one, start, len(one.tokens) - start))
        logits = runner.run(batch)
        for one, result in zip(sequences, sample(logits, [SamplerRow(params, 0, 0)] * len(sequences)), strict=True):
            one.tokens.append(result.token)

    for batch in options.batches:
        sequences = [sequence(options.context, index * span, span) for index in range(batch)]

        def decode(sequences: list[Sequence] = sequences) -> None:
            step(sequences, len(sequences[0].tokens) - 1)

        seconds = timed(decode, 40, 8)
        read = weight_bytes + batch * token_bytes * (options.context + 24)
        share = read / seconds / bandwidth
        rows.append((f"decode {batch}", f"{batch / seconds:,.0f} tok/s, {share:.0%} of the measured bandwidth"))

    def prefill() -> None:
        step([sequence(options.length, 0, prefill_blocks)], 0)

    seconds = timed(prefill, 5)
    flops = 2 * sum(p.numel() for p in weights if p.dim() == 2 and p.shape[0] != config.vocab_size) * options.length
    flops += 2 * options.length**2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim  # causal
    share = flops / seconds / rate
    rows.append(
        (f"prefill {options.length}", f"{options.length / seconds:,.0f} tok/s, {share:.0%} of the product rate")
    )
    return rows


def training(method: str) -> list[Row]:
    """A few steps of the trainer. In full: bfloat16 weights and gradients, everything recomputed; AdamW's averages in 8
    bits where torchao is installed, else in bfloat16; as many layers as fit, the figures scaled to all of them."""
    import importlib.util

    from puna.model.presets import PRESETS
    from puna.train.flops import flops_per_token, peak_tflops

    config = PRESETS[options.training]
    eight_bit = importlib.util.find_spec("torchao") is not None
    note = "" if method == "lora" else f", {'8-bit' if eight_bit else 'bfloat16'} AdamW"
    for layers in [n for n in (config.num_hidden_layers, config.num_hidden_layers // 2, 4, 1) if n]:
        command = [sys.executable, "benchmarks/training.py", "--ours", "--device", options.device]
        command += ["--model", options.training, "--rows", "1", "--length", str(options.length), "--rounds", "3"]
        command += ["--layers", str(layers), "--methods", method, "--precision", "bf16", "--json", f"{folder()}/t.json"]
        command += ["--recompute", "full" if method == "full" else "selective"]
        command += ["--optimizer", "adamw8bit"] if method == "full" and eight_bit else []
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            break
        if "memory" not in done.stderr.lower():
            raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no output")
    else:
        raise RuntimeError("not even one layer fits")
    row = json.loads(Path(f"{folder()}/t.json").read_text())[method]["puna"]
    per_token = flops_per_token(config, options.length, trained=float(method == "full"))
    if layers < config.num_hidden_layers:  # the output layer's part counts once, whatever the number of layers
        from dataclasses import replace

        part = flops_per_token(
            replace(config, num_hidden_layers=layers), options.length, trained=float(method == "full")
        )
        row["tokens_per_second"] *= part / per_token
        note += f", {layers} of {config.num_hidden_layers} layers fit, scaled by their FLOPs"
    tflops, name = row["tokens_per_second"] * per_token / 1e12, device_name()
    peak = peak_tflops(name)
    mfu = f", MFU {tflops / peak:.0%} of {peak:.0f}" if peak else ""
    return [(f"train {method}", f"{row['tokens_per_second']:,.0f} tok/s, {tflops:,.0f} TFLOP/s{mfu}"
             f", peak {row['peak_gb']:.1f} GB{note}")]  # fmt: skip


def folder() -> str:
    import tempfile

    return os.environ.setdefault("PUNA_GPU_FOLDER", tempfile.mkdtemp())


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if options.device == "cuda" else "cpu"


PARTS = {
    "tests": tests,
    "inference": inference,
    "lora": lambda: training("lora"),
    "full": lambda: training("full"),
}


def run(part: str) -> list[Row]:
    """Run a part in a separate process; an error becomes its row."""
    command = [sys.executable, __file__, *sys.argv[1:], "--part", part]
    try:
        limit = SECONDS[part] if options.device == "cuda" else None
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return [(part, f"FAILED: not done after {SECONDS[part]} s")]
    try:
        return [(name, text) for name, text in json.loads(done.stdout.splitlines()[-1])]
    except (ValueError, IndexError):
        return [(part, f"FAILED: exit code {done.returncode}")]


def main() -> int:
    if options.part:
        out, sys.stdout = sys.stdout, sys.stderr
        try:
            rows = PARTS[options.part]()
        except Exception as error:
            import traceback

            traceback.print_exc()
            rows = [(options.part, f"FAILED: {type(error).__name__}: {str(error).strip()[:200] or 'no message'}")]
        print(json.dumps(rows), file=out)
        return 0
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu.sh: torch sees no CUDA device here.", file=sys.stderr)
        return 2
    rows: list[Row] = [("device", f"{device_name()}, torch {torch.__version__}")]
    for part in options.parts:
        start = time.monotonic()
        rows += run(part)
        print(f"{part}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    if options.json:
        options.json.write_text(json.dumps(dict(rows), indent=2) + "\n")
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {text}" for name, text in rows))
    return int(any(text.startswith("FAILED") for _, text in rows))


if __name__ == "__main__":
    sys.exit(main())
