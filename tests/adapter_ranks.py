"""What each rank of `test_adapter.test_ranks_compute_what_one_process_does` runs, without that file's peers."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from puna.model.attention import causal
from puna.model_loader import load_model
from puna.parallel.tp_inference import TensorParallel
from puna.weights.adapter import read_adapter
from puna.weights.merge import merge
from puna.weights.open import open_checkpoint

IDS = torch.randint(300, (2, 17), generator=torch.Generator().manual_seed(5))


def logits(model):
    positions = torch.arange(IDS.shape[1]).expand(IDS.shape)
    with torch.inference_mode():
        return model.logits(model(IDS, positions, causal))


def work(base, *adapters):
    """Leaves beside each adapter the logits of the split model, unmerged and merged, in float64."""
    dist.init_process_group("gloo")
    tp = TensorParallel(dist.get_rank(), dist.get_world_size(), dist.group.WORLD, dist.group.WORLD)
    with open_checkpoint(base) as source:
        for folder in map(Path, adapters):
            adapter = read_adapter(folder)
            apart = load_model(source, torch.float64, tp=tp, adapter=adapter, fast=True)
            one = load_model(merge(source, adapter), torch.float64, tp=tp, fast=True)
            int8 = load_model(source, torch.float64, tp=tp, adapter=adapter, quantization="int8", fast=True)
            torch.save([logits(apart), logits(one), logits(int8)], folder / f"{tp.rank}.pt")
    tp.shutdown()


if __name__ == "__main__":
    work(*sys.argv[1:])
