"""From a checkpoint to a model that runs, in one fixed order: meta, split, load, adapt, fuse, pack.

Nothing is allocated before the model has its final shape: modules are made on the meta device, cut to this rank's part,
and filled tensor by tensor, each rank reading only its slices. Fusing comes after, on local shards; packing (CPU) is
last.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from puna.errors import UserError
from puna.kernels.packed_linear import PackedWeight, packed_works
from puna.model.config import ModelConfig
from puna.model.linear import Linear
from puna.model.llama import MLP, Attention, Llama
from puna.model.tp_plan import tp_slice
from puna.parallel.memory import free_bytes
from puna.parallel.tp_inference import TensorParallel, split
from puna.progress import track
from puna.weights.adapter import Adapter, attach
from puna.weights.merge import replaced

if TYPE_CHECKING:
    from puna.weights.checkpoint import Checkpoint

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
Reader = Callable[[str, tuple[slice, ...]], Tensor]


def load_model(
    source: Checkpoint,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    *,
    tp: TensorParallel | None = None,
    adapter: Adapter | None = None,
    fast: bool = False,
    quiet: bool = True,
    room: int | None = None,
) -> Llama:
    """The model of an open checkpoint, with weights of `dtype` on `device`, in evaluation mode.

    `tp` splits it over a tensor-parallel group; `adapter` goes in unmerged (`weights.merge.merge` gives a merged
    source); `fast` fuses and packs it for inference. `room`: bytes that this rank may take, None for what is free now.
    Raises UserError when that is too little, and when a tensor is missing or of another shape.
    """
    if adapter is not None:
        source = replaced(source, adapter)
    return _build(source.config, source.read, dtype, device, tp, fast, quiet, room, adapter)


def random_model(
    config: ModelConfig,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    *,
    seed: int = 0,
    tp: TensorParallel | None = None,
    fast: bool = False,
    quiet: bool = True,
    room: int | None = None,
) -> Llama:
    """The same with random weights; the same for every split."""
    return _build(config, random_reader(config, dtype, device, seed), dtype, device, tp, fast, quiet, room)


def random_reader(config: ModelConfig, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0) -> Reader:
    """Weights before any training, by their names alone: normal with deviation 0.02, norms 1, biases 0."""
    shapes = config.tensors()

    def read(name: str, index: tuple[slice, ...]) -> Tensor:
        if len(shapes[name]) == 1:
            full = torch.full(shapes[name], 0.0 if name.endswith("bias") else 1.0, dtype=dtype, device=device)
        else:
            generator = torch.Generator(device).manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
            full = torch.empty(shapes[name], dtype=dtype, device=device).normal_(0, 0.02, generator=generator)
        return full[index]

    return read


def _build(
    config: ModelConfig,
    read: Reader,
    dtype: torch.dtype,
    device: str | torch.device,
    tp: TensorParallel | None,
    fast: bool,
    quiet: bool,
    room: int | None,
    adapter: Adapter | None = None,
) -> Llama:
    with torch.device("meta"):
        model = Llama(config)
    if tp is not None:
        split(model, tp)
    _check_room(model, dtype, device, free_bytes(device) if room is None else room)
    _load(model, read, dtype, torch.device(device), tp, quiet)
    if adapter is not None:
        attach(model, adapter, dtype, device, rank=tp.rank if tp else 0, size=tp.size if tp else 1)
    if fast:
        fuse(model)
        if torch.device(device).type == "cpu":
            pack(model, dtype, notes=tp is None or tp.rank == 0)
    if dtype in (torch.bfloat16, torch.float16):
        model.residual_dtype = torch.float32
    return model.eval().requires_grad_(False)


def _check_room(model: Llama, dtype: torch.dtype, device: str | torch.device, room: int) -> None:
    """Refuse a meta model whose weights, this rank's part of them, would not fit into `room` bytes."""
    needed = sum(weight.numel() for weight in model.parameters()) * dtype.itemsize
    if needed > room:
        raise UserError(
            f"the weights take {needed:,} bytes ({needed / 2**30:.1f} GiB) of {str(dtype).removeprefix('torch.')}, but"
            f" {device} has {room:,} bytes free; use a smaller model or dtype, more ranks or another device."
        )


def _load(
    model: Llama, read: Reader, dtype: torch.dtype, device: torch.device, tp: TensorParallel | None, quiet: bool
) -> None:
    """Replace each meta parameter by its tensor."""
    rank, size = (tp.rank, tp.size) if tp else (0, 1)
    for name, shape in track(model.config.tensors().items(), "Loading weights", unit="tensors", quiet=quiet):
        tensor = read(name, tp_slice(name, shape, model.config, rank, size))
        owner, _, kind = name.removeprefix("model.").rpartition(".")
        module = model.get_submodule(owner)
        expected = getattr(module, kind).shape
        if tensor.shape != expected:
            raise UserError(f"{name} has shape {list(tensor.shape)}, the config says {list(expected)}.")
        # A copy even where nothing is converted: the reader may have given a view of the file, which is closed soon.
        tensor = tensor.to(device, dtype, copy=True).contiguous()
        setattr(module, kind, nn.Parameter(tensor, requires_grad=False))
    model.tie()


def fuse(model: Llama) -> None:
    """Merge q, k, v and gate, up into one product each. For inference, after the split: shards are whole heads.

    Layers that carry an adapter stay apart: each adds its own update.
    """
    for module in list(model.modules()):
        if isinstance(module, Attention) and _plain(module.q_proj, module.k_proj, module.v_proj):
            module.qkv_proj = _concat(module.q_proj, module.k_proj, module.v_proj)
            del module.q_proj, module.k_proj, module.v_proj
        elif isinstance(module, MLP) and _plain(module.gate_proj, module.up_proj):
            module.gate_up_proj = _concat(module.gate_proj, module.up_proj)
            del module.gate_proj, module.up_proj


def _plain(*parts: Linear) -> bool:
    return all(part.adapter is None for part in parts)


def _concat(*parts: Linear) -> Linear:
    with torch.device("meta"):
        fused = Linear(1, 1)
    fused.weight = nn.Parameter(torch.cat([p.weight for p in parts]), requires_grad=False)
    if parts[0].bias is not None:
        fused.bias = nn.Parameter(torch.cat([p.bias for p in parts if p.bias is not None]), requires_grad=False)
    return fused


def pack(model: Llama, dtype: torch.dtype, *, notes: bool = True) -> None:
    """Give every linear layer its packed form and let the plain weight go. Says so where the machine has none."""
    if not packed_works(dtype):
        if notes and dtype == torch.bfloat16:
            print("note: no packed bfloat16 products on this CPU; plain ones run, more slowly.", file=sys.stderr)
        return
    for module in model.modules():
        if isinstance(module, Linear):
            module.scheme = PackedWeight(module.weight)
            module.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
