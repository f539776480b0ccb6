"""What each rank of `quant.test_int8.test_smollm2_over_three_ranks` runs."""

import sys
from pathlib import Path

import torch

from puna.model.attention import causal
from puna.model_loader import load_model
from puna.parallel.tp_inference import TensorParallel
from puna.weights.open import open_checkpoint

IDS = torch.arange(48)[None] * 101 % 40_000


@torch.inference_mode()
def logits(checkpoint, tp=None):
    """Logits [1, 48, vocab] of int8 weights, in float32."""
    model = load_model(checkpoint, torch.float32, tp=tp, quantization="int8", fast=True)
    return model.logits(model(IDS, torch.arange(48)[None], causal))


def work(path, folder):
    tp = TensorParallel.start("cpu")
    with open_checkpoint(path) as checkpoint:
        torch.save(logits(checkpoint, tp), Path(folder, f"{tp.rank}.pt"))


if __name__ == "__main__":
    work(*sys.argv[1:])
