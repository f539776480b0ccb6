"""Prefill and decode of puna beside transformers and llama.cpp, on the same weights, in one run.

Every figure is the median over interleaved rounds, so that a busy machine slows all of them alike. Decode is the time
of a generation less that of its first token. All in bfloat16, unquantised.

    pip install -e '.[bench]' && puna pull smollm2-135m-instruct
    python benchmarks/inference.py                                   # CPU, 2 threads
    python benchmarks/inference.py --device cuda --model llama3.1-8b # random weights of that shape
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="smollm2-135m-instruct", help="checkpoint, or a preset for random weights")
parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--prompt", type=int, default=128, help="prompt tokens before decode")
parser.add_argument("--new", type=int, default=128, help="tokens decoded")
parser.add_argument("--prefill", type=int, default=512)
parser.add_argument("--batch", type=int, nargs="+", default=None, help="default 1 16 (CPU), 1 16 64 (GPU)")
parser.add_argument("--json", type=Path)
options = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(options.threads)  # before torch is imported

import torch  # noqa: E402

import puna  # noqa: E402
from puna.model.presets import PRESETS  # noqa: E402

# run(prompts, new tokens): generates greedily and returns when all tokens are there
Peer = Callable[[list[list[int]], int], None]


def ours(directory: Path | None, rows: int, length: int) -> Peer:
    loading = {"load_format": "dummy"} if directory is None else {}
    llm = puna.LLM(
        options.model if directory is None else directory,
        dtype="bfloat16",
        device=options.device,
        prefix_caching=False,
        max_num_seqs=rows,
        max_num_batched_tokens=max(2048, length),
        **loading,
    )

    def run(prompts: list[list[int]], new: int) -> None:
        outputs = llm.generate(prompts, puna.SamplingParams(max_tokens=new, ignore_eos=True))
        assert all(len(out.outputs[0].token_ids) == new for out in outputs)

    return run


def transformers(directory: Path | None) -> Peer:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    kind = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
    if directory is not None:
        model = AutoModelForCausalLM.from_pretrained(directory, **kind)
    else:
        with torch.device(options.device):
            model = LlamaForCausalLM._from_config(LlamaConfig(**PRESETS[options.model].to_hf()), **kind)
    model = model.to(options.device).eval()
    model.generation_config.eos_token_id = None

    def run(prompts: list[list[int]], new: int) -> None:
        ids = torch.tensor(prompts, device=options.device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
        )
        assert out.shape[1] == ids.shape[1] + new

    return run


def llama_cpp(directory: Path, rows: int, length: int) -> Peer:
    import llama_cpp

    from puna.weights.convert import convert

    file = directory.parent / "model.gguf"
    convert(str(directory), file, to="gguf", dtype="bfloat16", verify=False)
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, None)
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
    wanted = llama_cpp.llama_context_default_params()
    wanted.n_ctx, wanted.n_batch, wanted.n_ubatch, wanted.n_seq_max = rows * length, 2048, 512, rows
    wanted.n_threads = wanted.n_threads_batch = options.threads
    raw = llama_cpp.llama_init_from_model(model, wanted)
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(2048, 0, 1)
    import numpy as np

    def decode(tokens: list[tuple[int, int, int, bool]]) -> None:
        """(token, position, sequence, wants logits) in calls of at most 2048."""
        for start in range(0, len(tokens), 2048):
            part = tokens[start : start + 2048]
            batch.n_tokens = len(part)
            for i, (token, position, sequence, wants) in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
                batch.seq_id[i][0], batch.logits[i] = sequence, wants
            assert llama_cpp.llama_decode(raw, batch) == 0

    def run(prompts: list[list[int]], new: int) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(raw), True)
        last = [0] * len(prompts)
        # One call per prompt, so that the row of its logits is known and no call is longer than the library's batch.
        for s, prompt in enumerate(prompts):
            decode([(token, i, s, i == len(prompt) - 1) for i, token in enumerate(prompt)])
            last[s] = int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(raw, -1), (vocab,)).argmax())
        for step in range(new - 1):
            decode([(last[s], len(prompt) + step, s, True) for s, prompt in enumerate(prompts)])
            for s in range(len(prompts)):
                last[s] = int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(raw, s), (vocab,)).argmax())

    return run


def seconds(peer: Peer, prompts: list[list[int]], new: int) -> float:
    if options.device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    peer(prompts, new)
    if options.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def bandwidth() -> float:
    """Bytes/s of a plain read of more memory than any cache holds: what bounds decode at batch 1."""
    big = torch.ones(2**28 if options.device == "cuda" else 2**26, dtype=torch.float32, device=options.device)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        float(big.sum())
        best = max(best, big.nbytes / (time.perf_counter() - start))
    return best


def matmul_rate() -> float:
    """FLOP/s of a large bfloat16 product: what bounds prefill."""
    n = 8192 if options.device == "cuda" else 1024
    a = torch.randn(n, n, dtype=torch.bfloat16, device=options.device)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        product = a @ a
        float(product[0, 0])
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def main() -> None:
    torch.set_num_threads(options.threads)
    batches = options.batch or ([1, 16, 64] if options.device == "cuda" else [1, 16])
    length = max(options.prompt + options.new, options.prefill + 1) + 16
    with tempfile.TemporaryDirectory() as folder:
        directory = None
        if options.model in PRESETS:
            config = PRESETS[options.model]
        else:
            from puna.weights.convert import convert

            directory = Path(folder) / "model"
            convert(options.model, directory, to="hf", dtype="bfloat16", verify=False)
            config = puna.ModelConfig.from_hf(json.loads((directory / "config.json").read_text()))
        peers: dict[str, Peer] = {"puna": ours(directory, max(batches), length)}
        for name, make in (
            ("transformers", lambda: transformers(directory)),
            ("llama.cpp", lambda: llama_cpp(directory, max(batches), length) if directory else None),
        ):
            try:
                if (peer := make()) is not None:
                    peers[name] = peer
            except ImportError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)

        draw = random.Random(0)

        def prompts(rows: int, tokens: int) -> list[list[int]]:
            return [[draw.randrange(config.vocab_size) for _ in range(tokens)] for _ in range(rows)]

        # name of the figure -> (prompts, tokens, runs whose difference is measured)
        times: dict[str, dict[str, list[float]]] = {}
        for peer in peers.values():
            peer(prompts(max(batches), 16), 4)
        for _ in range(options.rounds):
            for name, peer in peers.items():
                run = times.setdefault(f"prefill {options.prefill}", {}).setdefault(name, [])
                run.append(seconds(peer, prompts(1, options.prefill), 1))
            for rows in batches:
                for name, peer in peers.items():
                    given = prompts(rows, options.prompt)
                    first = seconds(peer, given, 1)
                    whole = seconds(peer, given, 1 + options.new)
                    times.setdefault(f"decode, batch {rows}", {}).setdefault(name, []).append(whole - first)
        report(times, batches, config)


def report(times: dict[str, dict[str, list[float]]], batches: list[int], config: puna.ModelConfig) -> None:
    counts = {f"prefill {options.prefill}": options.prefill}
    counts |= {f"decode, batch {rows}": rows * options.new for rows in batches}
    read, rate = bandwidth(), matmul_rate()
    weights = config.num_parameters() * 2  # bytes
    print(f"{options.model} in bfloat16 on {options.device}, torch {torch.__version__}, {options.threads} threads")
    print(f"measured here: {read / 1e9:.1f} GB/s read, {rate / 1e12:.2f} TFLOP/s bfloat16 product\n")
    names = list(next(iter(times.values())))
    print(f"{'tokens/s':18}" + "".join(f"{name:>16}" for name in names) + "   puna / peer      of the bound")
    rows = []
    for figure, by_peer in times.items():
        speed = {name: counts[figure] / statistics.median(runs) for name, runs in by_peer.items()}
        ratios = {name: speed["puna"] / speed[name] for name in names if name != "puna"}
        if figure.startswith("prefill"):
            share = speed["puna"] * 2 * config.num_parameters() / rate
        else:  # every step reads the weights once, whatever the batch
            share = speed["puna"] / int(figure.split()[-1]) * weights / read
        shown = " ".join(f"{ratio:.2f}" for ratio in ratios.values())
        print(f"{figure:18}" + "".join(f"{speed[name]:16.1f}" for name in names) + f"   {shown:14}   {share:.0%}")
        rows.append({"figure": figure, "tokens_per_second": speed, "ratios": ratios, "of_bound": share})
    if options.json:
        options.json.write_text(json.dumps({"model": options.model, "device": options.device, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
