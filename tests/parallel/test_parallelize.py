"""The forward pass that training computes in half precision: the one of inference, in one process and in two stages."""

import sys
from pathlib import Path

import pytest
import torch

from launching import launch
from puna.model.attention import causal
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.model_loader import random_model, random_reader
from puna.parallel.mesh import MeshOptions
from puna.parallel.strategy import ParallelStrategy

# Enough layers for the residual stream's rounding to be the largest error.
CONFIG = ModelConfig(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=16,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    tie_word_embeddings=True,
)
IDS = torch.randint(CONFIG.vocab_size, (4, 65), generator=torch.Generator().manual_seed(1))
PRECISIONS = {  # of training: stored dtype, compute dtype
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "fp16-mixed": (torch.float32, torch.float16),
    "bf16": (torch.bfloat16, None),
}


def inference(dtype, weights):
    """Hidden states and logits of the model that inference builds in `dtype`, with `weights` of their rounding."""
    model = random_model(CONFIG, weights).to(dtype)
    with torch.inference_mode():
        hidden = model(IDS[:, :-1], torch.arange(64).expand(4, 64), causal)
        return hidden, model.logits(hidden)


def training(strategy, precision):
    """Hidden states and logits of a training step's forward pass; None on a stage that isn't the last."""
    dtype, compute_dtype = PRECISIONS[precision]
    with torch.device("meta"):
        model = Llama(CONFIG)
    parts = strategy.prepare(model, dtype=dtype, compute_dtype=compute_dtype)
    # As inference rounds them: initialised in the dtype of its weights.
    strategy.load(parts, random_reader(CONFIG, compute_dtype or dtype))
    seen = []

    def loss(hidden, labels, head):
        seen.append((hidden.detach(), hidden.detach() @ head.weight.detach().to(hidden.dtype).t()))
        return hidden.float().sum().view(1)

    rows = {"ids": IDS[:, :-1], "labels": IDS[:, 1:], "positions": torch.arange(64).expand(4, 64)}
    microbatches = [{name: tensor[half] for name, tensor in rows.items()} for half in (slice(2), slice(2, 4))]
    strategy.step(parts, microbatches, loss)
    return [torch.cat(tensors) for tensors in zip(*seen, strict=True)] if seen else None


def check(found, dtype):
    """Training is as far from the float64 oracle as inference is, and not further from inference than both errors."""
    exact = inference(torch.float64, dtype)
    for mine, theirs, oracle in zip(found, inference(dtype, dtype), exact, strict=True):
        assert mine.dtype == theirs.dtype == dtype
        error, other = ((x.double() - oracle).norm() / oracle.norm() for x in (mine, theirs))
        assert error < 1.15 * other, (error, other)
        assert (mine.double() - theirs.double()).norm() / oracle.norm() < 1.15 * (error**2 + other**2) ** 0.5


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_forward_pass_is_that_of_inference(precision):
    dtype, compute_dtype = PRECISIONS[precision]
    check(training(ParallelStrategy.single(), precision), compute_dtype or dtype)


@pytest.mark.slow
def test_pipeline_stages_exchange_the_residual_stream_of_inference(tmp_path):
    for rank in launch(2, __file__, tmp_path):
        assert rank.code == 0, rank.err
    for precision, found in torch.load(tmp_path / "hidden.pt").items():
        dtype, compute_dtype = PRECISIONS[precision]
        check(found, compute_dtype or dtype)


if __name__ == "__main__":
    strategy = ParallelStrategy.start(MeshOptions(pp=2))
    found = {precision: training(strategy, precision) for precision in PRECISIONS}
    if strategy.pp_rank == 1:
        torch.save(found, Path(sys.argv[1], "hidden.pt"))
    strategy.barrier()
    strategy.close()
