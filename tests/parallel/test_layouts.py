"""Every layout of a training run against one process: the same losses, gradients and weights.

Starting ranks costs seconds, so all layouts of a world size run in one launch (`work`, below). In float64 three steps
of AdamW must agree to 1e-9; in float32, where AdamW makes much of little, the loss and gradients of one step to 1e-5.
"""

import functools
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
import zlib
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.model.lora import LoraOptions, add_lora
from puna.parallel.mesh import MeshOptions
from puna.parallel.state_dict import get_state, set_state
from puna.parallel.strategy import ParallelStrategy
from puna.parallel.tp_training import local_index
from puna.train.loss import VocabPart, chunked_loss

pytestmark = pytest.mark.slow

BASE = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
)
MODELS = {
    "plain": BASE,
    "odd": replace(BASE, vocab_size=67, num_key_value_heads=1, attention_bias=True, mlp_bias=True),
    "tied": replace(BASE, vocab_size=67, num_key_value_heads=2, tie_word_embeddings=True),
}
LORA = LoraOptions(rank=3, alpha=6, targets="all-linear")
AXES = {  # what they leave of the ranks is dp_shard
    "dp": {},
    "ddp": {"dp_replicate": 2},
    "tp": {"tp": 2},
    "sp": {"tp": 2, "sequence_parallel": True},
    "gpipe": {"pp": 2, "pp_schedule": "gpipe"},
    "1f1b": {"pp": 2},
    "interleaved": {"pp": 2, "pp_schedule": "interleaved", "virtual_stages": 2},
    "cp": {"cp": 2},
    "ring": {"cp": 2, "cp_method": "ring"},
    "tp4": {"tp": 4},
    "sp4": {"tp": 4, "sequence_parallel": True},
}
# Each layout once, with what may break it: fewer key heads than ranks, a vocabulary that they don't divide, biases
# ("odd"), tied embeddings, LoRA. Then, with all else, from which layout to which a run is resumed.
QUICK = {
    2: [
        *(f"{axes} tied" for axes in ("dp", "gpipe", "1f1b", "interleaved", "ring")),
        *(f"{axes} odd" for axes in ("ddp", "tp", "sp", "cp")),
        *(f"{axes} odd lora" for axes in ("dp", "tp", "sp", "1f1b", "cp")),
    ],
    4: ["tp odd", "1f1b tied", "tp+1f1b tied", "sp4 tied", "tp odd lora", "sp+gpipe odd lora"],
    8: ["sp+1f1b tied", "tp+1f1b odd lora"],
}
RESUMED = {4: [("tp tied", "sp4"), ("sp tied", "1f1b"), ("sp+gpipe tied", "ddp"), ("tp4 odd lora", "gpipe")]}
DATA = ["dp", "ddp", "tp", "sp", "gpipe", "1f1b", "interleaved", "cp", "ring"]
KINDS = ["plain", "odd", "tied", "odd lora", "tied lora"]
FULL = {
    2: [f"{axes} {kind}" for axes, kind in itertools.product(DATA, KINDS)],
    4: [
        f"{axes} {kind}"
        for axes, kind in itertools.product(
            ["tp", "sp", "1f1b", "tp+1f1b", "sp+interleaved", "ddp", "sp+cp", "tp+ring", "cp+gpipe", "tp4", "sp4"],
            KINDS,
        )
    ],
    8: [
        f"{axes} {kind}"
        for axes, kind in itertools.product(["tp+1f1b", "sp+interleaved", "ddp+sp", "cp+sp+gpipe", "tp4"], KINDS)
    ],
}
ROWS, LENGTH, STEPS = 8, 16, 3


def parse(name):
    """(mesh, kind of model) of a case."""
    axes, kind = name.split(" ", 1)
    return MeshOptions(**{key: value for axis in axes.split("+") for key, value in AXES[axis].items()}), kind


@functools.cache
def batch():
    """A global batch [ROWS, LENGTH] of packed rows whose documents are of any length, unevenly trained."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, 64, (ROWS, LENGTH), generator=generator)
    cuts = torch.randint(1, LENGTH, (ROWS, 1), generator=generator)
    place = torch.arange(LENGTH)
    documents = (place >= cuts).int()
    positions = torch.where(documents > 0, place - cuts, place)
    labels = ids.roll(-1, 1).masked_fill(torch.rand(ROWS, LENGTH, generator=generator) < 0.4, -100)
    labels.masked_fill_((place + 1 == cuts) | (place + 1 == LENGTH), -100)
    return {"ids": ids, "labels": labels, "positions": positions, "documents": documents}


def loss(hidden, labels, head):
    part = None if head.group is None else VocabPart(head.group, head.vocab_start)
    total, count, z = chunked_loss(hidden, labels, head.weight, chunk=5, z_loss=1e-2, tp=part)
    return torch.stack((total, count.to(total.dtype), z))


@functools.cache
def weight(name, shape):
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())), dtype=torch.float64)
    size = 0.3 if len(shape) == 1 else 0.1 if name.endswith(".b") else shape[1] ** -0.5
    return noise * size + name.endswith("norm.weight")


class Run:
    """A training run on a layout."""

    def __init__(self, strategy, kind, dtype):
        model, *lora = kind.split()
        self.strategy, self.dtype = strategy, dtype
        with torch.device("meta"):
            whole = Llama(MODELS[model])
            if lora:
                add_lora(whole, LORA)
        shapes = {f"model.{name}".replace("model.lm_head", "lm_head"): p.shape for name, p in whole.named_parameters()}
        self.parts = strategy.prepare(whole, dtype=dtype)
        strategy.load(self.parts, lambda name, index: weight(name, tuple(shapes[name]))[index].to(dtype))
        self.weights = strategy.parameters(self.parts)
        self.trained = {name: p for name, p in self.weights.items() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), 1e-2, foreach=False)

    def microbatches(self):
        """This rank's rows, in as many microbatches as a pipeline needs; all at once in one process."""
        strategy = self.strategy
        rows = ROWS // strategy.data_size
        size = 1 if strategy.data_size > 2 else 2 // strategy.data_size
        size = ROWS if strategy.mesh is None else size
        starts = range(strategy.data_rank * rows, (strategy.data_rank + 1) * rows, size)
        return [{name: tensor[start : start + size] for name, tensor in batch().items()} for start in starts]

    def step(self):
        """(mean loss, mean z, gradient norm) of one step of AdamW."""
        sums = self.strategy.step(self.parts, self.microbatches(), loss)
        self.strategy.scale_grads(self.parts, 1 / float(sums[1]))
        told = [float(sums[0] / sums[1]), float(sums[2] / sums[1]), self.strategy.grad_norm(self.parts)]
        self.gradients = {name: local(p.grad).clone() for name, p in self.trained.items()}
        self.optimizer.step()
        self.optimizer.zero_grad()
        return told

    def evaluate(self):
        sums = self.strategy.evaluate(self.parts, self.microbatches(), loss)
        return float(sums[0] / sums[1])


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@functools.cache
def reference(kind, dtype, steps):
    run = Run(ParallelStrategy.single(), kind, dtype)
    before = run.evaluate()
    return [run.step() for _ in range(steps)], before, run


@torch.no_grad()
def furthest(run, mine, whole):
    """The largest difference of this rank's parts from whole tensors, and in which."""
    off = {
        name: (local(part) - local(whole[name])[local_index(run.weights[name])]).abs().max().item()
        for name, part in mine.items()
        if local(part).numel()
    }
    return max((value, name) for name, value in off.items())


def compare(strategy, kind):
    """How far this rank is from one process."""
    run = Run(strategy, kind, torch.float64)
    before = run.evaluate()
    told = [run.step() for _ in range(STEPS)]
    expected, expected_before, other = reference(kind, torch.float64, STEPS)
    full = dict(strategy.full_state(run.parts))
    found = {
        "trained": [strategy.trained(run.parts), other.strategy.trained(other.parts)],
        "losses and norms": [told, expected],
        "evaluation": [before, expected_before],
        "weights": furthest(run, run.weights, other.weights),
        "gathered": max((full[n] - w).abs().max().item() for n, w in other.weights.items()) if full else 0.0,
        "not gathered": list(set(other.weights) ^ set(full)) if strategy.is_first else [],
    }
    run = Run(strategy, kind, torch.float32)
    told = [run.step()]
    expected, _, other = reference(kind, torch.float32, 1)
    found["float32 loss"] = [told[0][0], expected[0][0]]
    found["float32 gradients"] = furthest(run, run.gradients, other.gradients)
    return found


def resume(strategy, other, kind, folder):
    """Two steps on a layout, one on another, and how far that is from three steps in one process."""
    run = Run(strategy, kind, torch.float64)
    for _ in range(STEPS - 1):
        run.step()
    dcp.save(get_state(run.parts, run.optimizer), checkpoint_id=folder)
    return {"weights": resumed(other, kind, folder), "entries": len(get_state(run.parts, run.optimizer)["model"])}


def resumed(strategy, kind, folder):
    run = Run(strategy, kind, torch.float64)
    with torch.no_grad():
        for parameter in run.trained.values():
            local(parameter).zero_()
    state = get_state(run.parts, run.optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state(run.parts, run.optimizer, state)
    run.step()
    _, _, other = reference(kind, torch.float64, STEPS)
    return furthest(run, run.weights, other.weights)


def work(folder, names, pairs):
    """What each rank does; what it found goes into a file."""
    found, layouts = {}, {}

    def strategy(axes):
        if axes not in layouts:
            layouts[axes] = ParallelStrategy.start(parse(f"{axes} plain")[0])
        return layouts[axes]

    for name in names:
        axes, kind = name.split(" ", 1)
        found[name] = compare(strategy(axes), kind)
    for name, axes in pairs:
        before, kind = name.split(" ", 1)
        found[f"{name} -> {axes}"] = resume(strategy(before), strategy(axes), kind, folder / name)
    last = next(iter(layouts.values()))
    (folder / f"{last.rank}.json").write_text(json.dumps(found))
    last.barrier()  # the first rank keeps the store that groups are made by
    last.close()


def main(folder, size, names, pairs):
    """Fork `size` ranks, which so share the imports and what one process has found."""
    torch.set_num_threads(1)
    for kind in {name.split(" ", 1)[1] for name in (*names, *(name for name, _ in pairs))}:
        reference(kind, torch.float64, STEPS), reference(kind, torch.float32, 1)
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = set()
    for rank in range(size):
        if pid := os.fork():
            ranks.add(pid)
            continue
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        code = 1
        try:
            work(folder, names, pairs)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        if status:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            sys.exit(f"rank {pid} ended with {status}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *json.loads(sys.argv[2]))


def launched(tmp_path_factory, size, names, pairs, seconds):
    """(folder, what each rank found) of one launch."""
    folder = tmp_path_factory.mktemp("ranks")
    argv = [sys.executable, __file__, folder, json.dumps([size, names, pairs])]
    ended = subprocess.run(list(map(str, argv)), capture_output=True, text=True, timeout=seconds)
    assert ended.returncode == 0, ended.stderr
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """What each rank of a world size found, in a launch when it is first asked for."""
    return functools.cache(lambda size: launched(tmp_path_factory, size, QUICK[size], RESUMED.get(size, []), 900))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return functools.cache(lambda size: launched(tmp_path_factory, size, FULL[size], [], 3000))


def check(rank):
    for what in ("losses and norms", "evaluation"):
        found, expected = rank[what]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-9)
    assert rank["weights"][0] < 1e-9 and rank["gathered"] < 1e-9, rank
    assert not rank["not gathered"]
    assert rank["trained"][0] == rank["trained"][1]
    found, expected = rank["float32 loss"]
    assert abs(found - expected) < 1e-5
    assert rank["float32 gradients"][0] < 1e-5, rank


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, names in QUICK.items() for name in names])
def test_a_layout_trains_as_one_process_does(quick, size, name):
    for rank in quick(size)[1]:
        check(rank[name])


@pytest.mark.full
@pytest.mark.parametrize(("size", "name"), [(size, name) for size, names in FULL.items() for name in names])
def test_any_layout_trains_any_model_as_one_process_does(full, size, name):
    for rank in full(size)[1]:
        check(rank[name])


@pytest.mark.parametrize(("size", "name", "axes"), [(size, *pair) for size, pairs in RESUMED.items() for pair in pairs])
def test_a_run_goes_on_in_another_layout_and_in_one_process(quick, size, name, axes):
    folder, ranks = quick(size)
    for rank in ranks:
        assert rank[f"{name} -> {axes}"]["weights"][0] < 1e-9
    assert resumed(ParallelStrategy.single(), name.split(" ", 1)[1], folder / name)[0] < 1e-9
