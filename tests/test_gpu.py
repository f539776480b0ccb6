"""On a GPU: the same numbers as on the CPU in float64, every fast path against its slow twin.

`benchmarks/gpu.sh` runs these. Without CUDA they skip; the twins themselves are tested on the CPU.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from puna.engine.cuda_graphs import GraphRunner
from puna.engine.eager_runner import EagerRunner
from puna.engine.sampler import Row, sample
from puna.engine.sampling_params import SamplingParams
from puna.engine.sequence import Batch, Chunk, Request, Sequence
from puna.model.attention import causal, document_attention, masked_attention
from puna.model.config import ModelConfig
from puna.model_loader import random_model

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
pytestmark = pytest.mark.gpu

BASE = ModelConfig(
    vocab_size=320,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
)
GRID = {
    "gqa": BASE,
    "mha": replace(BASE, num_key_value_heads=8),
    "biases": replace(BASE, attention_bias=True, mlp_bias=True),
    "tied": replace(BASE, tie_word_embeddings=True),
    "head_dim 64": replace(BASE, head_dim=64),
    "linear": replace(BASE, rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "dynamic": replace(BASE, rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
    "yarn": replace(BASE, rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}),
    "llama3": replace(
        BASE,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    ),
}


def logits(model, ids, attend=causal):
    return model.logits(model(ids, torch.arange(ids.shape[1], device=ids.device).expand_as(ids), attend))


def pair(config, dtype, **options):
    """The model on the GPU in `dtype`, and the same weights on the CPU in float64."""
    exact = random_model(config, torch.float64, **options)
    fast = copy.deepcopy(exact).to("cuda", dtype)
    return fast, exact


@ON_GPU
@torch.inference_mode()
@pytest.mark.parametrize("name", GRID)
def test_float32_logits_equal_the_cpus(name):
    fast, exact = pair(GRID[name], torch.float32)
    ids = torch.randint(0, 320, (2, 65))
    assert (logits(fast, ids.cuda()).double().cpu() - logits(exact, ids)).abs().max() < 1e-4


@ON_GPU
@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_as_exact_as_on_the_cpu(dtype):
    fast, exact = pair(BASE, dtype)
    slow = random_model(BASE, torch.float64).to(dtype)
    errors = []
    for _ in range(4):
        ids = torch.randint(0, 320, (2, 65))
        want = logits(exact, ids)
        errors.append([(logits(model, ids.to(device)).double().cpu() - want).abs().mean().item()
                       for model, device in ((fast, "cuda"), (slow, "cpu"))])  # fmt: skip
    gpu, cpu = (sum(column) for column in zip(*errors, strict=True))
    assert gpu < 1.2 * cpu


@ON_GPU
@torch.inference_mode()
def test_int8_on_the_gpu():
    quantised = random_model(BASE, torch.float32, "cuda", quantization="int8", fast=True)
    exact = random_model(BASE, torch.float64, quantization="int8")
    read_on_gpu = random_model(BASE, torch.float32, "cuda")
    for module, other in zip(exact.modules(), read_on_gpu.modules(), strict=True):
        if getattr(module, "scheme", None) is not None:  # random weights differ between devices: pack the GPU's
            for name, tensor in module.scheme.pack(other.weight.data.cpu()).items():
                getattr(module, name).data = tensor
        else:
            for name, parameter in module.named_parameters(recurse=False):
                parameter.data = getattr(other, name).data.cpu().double()
    ids = torch.randint(0, 320, (2, 33))
    assert (logits(quantised, ids.cuda()).double().cpu() - logits(exact, ids)).abs().max() < 1e-4


def decode(runner, prompts, steps):
    """Greedy tokens of each prompt, all in one batch, and the last logits."""
    params = SamplingParams(max_tokens=steps)
    sequences = [Sequence(list(prompt), len(prompt), 256, 0) for prompt in prompts]
    for index, sequence in enumerate(sequences):
        sequence.blocks = list(range(index * 8, index * 8 + 8))
    for step in range(steps):
        batch = Batch()
        for sequence in sequences:
            start = 0 if step == 0 else len(sequence.tokens) - 1
            request = Request("0", sequence.tokens, params, (), [sequence])
            batch.add(Chunk(request, sequence, start, len(sequence.tokens) - start))
        found = runner.run(batch).clone()
        for sequence, result in zip(sequences, sample(found, [Row(params, 0, 0)] * len(prompts)), strict=True):
            sequence.tokens.append(result.token)
    return [sequence.tokens for sequence in sequences], found


@ON_GPU
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_graph_decode_equals_its_twins(rows):
    model, _ = pair(BASE, torch.float64)
    prompts = [torch.randint(0, 320, (5 + 9 * row,)).tolist() for row in range(rows)]
    runners = [
        GraphRunner(model, 64, 16),
        GraphRunner(model, 64, 16, capture=False),
        EagerRunner(model, 64, 16),
    ]
    (tokens, last), (padded, second), (eager, third) = (decode(runner, prompts, 40) for runner in runners)
    assert tokens == padded == eager
    assert (last - third).abs().max() < 1e-9 and (second - third).abs().max() < 1e-9


@ON_GPU
def test_flex_attention_equals_the_mask():
    """Forward and gradients of packed documents, on rows that the kernel's blocks don't divide."""
    documents = torch.tensor([[0] * 70 + [1] * 100 + [2] * 130, [0] * 250 + [1] * 50], device="cuda")
    order = torch.arange(300, device="cuda")
    mask = (documents.unsqueeze(2) == documents.unsqueeze(1)) & (order.unsqueeze(1) >= order)
    inputs = [torch.randn(2, 300, heads, 32, device="cuda", requires_grad=True) for heads in (8, 2, 2)]
    gradient = torch.randn(2, 300, 8, 32, device="cuda")
    results = []
    for attend in (document_attention(documents, documents, order, order), masked_attention(mask)):
        out = attend(0, *inputs)
        results.append([out, *torch.autograd.grad(out, inputs, gradient)])
    for fast, slow in zip(*results, strict=True):
        assert (fast - slow).abs().max() < 2e-3 * slow.abs().max() + 1e-4  # TF32 products inside the kernel


@ON_GPU
def test_a_sampled_token_is_the_cpus():
    scores = torch.randn(64, 5000, dtype=torch.float64) * 3
    kinds = [{}, {"temperature": 0.8}, {"temperature": 1.2, "top_p": 0.9}, {"temperature": 1.0, "top_k": 20},
             {"temperature": 0.7, "min_p": 0.05, "repetition_penalty": 1.2}]  # fmt: skip
    rows = [Row(SamplingParams(**kinds[i % 5]), i, i, range(10), range(10, 30)) for i in range(64)]
    here, there = sample(scores, rows), sample(scores.cuda(), rows)
    assert [one.token for one in here] == [one.token for one in there]


@pytest.mark.slow
def test_the_script_runs_everywhere(tmp_path):
    """On the CPU, with a tiny shape: the parts, the table, and what a failing part looks like."""
    root = Path(__file__).parents[1]
    command = [root / "benchmarks/gpu.sh", "--device", "cpu", "--inference", "tiny", "--training", "tiny"]
    command += ["--length", "64", "--context", "20", "--batches", "1", "2", "--parts", "inference", "lora", "full"]
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    rows = [line.split()[0] for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows == ["device", "measured", "decode", "decode", "prefill", "train", "train"]
    command = [*command, "--training", "no-such-shape", "--parts", "lora"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "lora    FAILED: " in done.stdout
