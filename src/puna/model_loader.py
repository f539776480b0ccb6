"""From a checkpoint to a model that runs, in one fixed order: meta, split, quantise, load, adapt, fuse, choose kernels.

Nothing is allocated before the model has its final shape: modules are made on the meta device, cut to this rank's part
and declared as their scheme stores them; then each tensor is read, only this rank's slice of it where that is enough,
and packed. Fusing comes after, on local shards; kernels are chosen last. (Not `load.py`: a module of that name would
hide the function `puna.load`.)
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Mapping
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
from puna.quant.registry import choose_scheme, quantised_layers
from puna.quant.scheme import QuantScheme
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
    quantization: str | None = None,
    fast: bool = False,
    quiet: bool = True,
    available: int | None = None,
) -> Llama:
    """The model of an open checkpoint, with weights of `dtype` on `device`, in evaluation mode.

    `tp` splits it over a tensor-parallel group; `adapter` goes in unmerged (`weights.merge.merge` gives a merged
    checkpoint); `quantization` names the scheme that the linear layers are packed in as they are read; `fast` fuses
    layers and chooses kernels for inference. `available`: bytes that this rank may take, None for what is free now.
    Raises UserError when that is too little, when a tensor is missing or misshapen, and when the scheme doesn't fit the
    model.
    """
    if adapter is not None:
        source = replaced(source, adapter)
    return _build(source.config, source.read, dtype, device, tp, adapter, quantization, fast, quiet, available)


def random_model(
    config: ModelConfig,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    *,
    seed: int = 0,
    tp: TensorParallel | None = None,
    quantization: str | None = None,
    fast: bool = False,
    quiet: bool = True,
    available: int | None = None,
) -> Llama:
    """The same with random weights, which don't depend on the tensor-parallel size."""
    read = random_reader(config, dtype, device, seed)
    return _build(config, read, dtype, device, tp, None, quantization, fast, quiet, available)


def random_reader(config: ModelConfig, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0) -> Reader:
    """Random initialisation, by a tensor's name alone: normal with deviation 0.02, norms 1, biases 0."""
    shapes = config.tensors()

    def read(name: str, index: tuple[slice, ...]) -> Tensor:
        if len(shapes[name]) == 1:
            full = torch.full(shapes[name], 0.0 if name.endswith("bias") else 1.0, dtype=dtype, device=device)
        else:
            generator = torch.Generator(device).manual_seed((seed * 1_000_003 + zlib.crc32(name.encode())) % 2**64)
            full = torch.empty(shapes[name], dtype=dtype, device=device).normal_(0, 0.02, generator=generator)
        return full[index]

    return read


def _build(
    config: ModelConfig,
    read: Reader,
    dtype: torch.dtype,
    device: str | torch.device,
    tp: TensorParallel | None,
    adapter: Adapter | None,
    quantization: str | None,
    fast: bool,
    quiet: bool,
    available: int | None,
) -> Llama:
    device = torch.device(device)
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    if tp is not None:
        split(model, tp)
    if quantization is not None:
        declare(model, choose_scheme(quantization))
    check_memory(model, device, free_bytes(device) if available is None else available)
    load_weights(model, read, dtype, device, tp, quiet)
    if adapter is not None:
        attach(model, adapter, dtype, device, rank=tp.rank if tp else 0, size=tp.size if tp else 1)
    if fast:
        fuse(model)
        choose_kernels(model, dtype, device, notes=tp is None or tp.rank == 0)
    return model.eval().requires_grad_(False)


def declare(model: Llama, scheme: QuantScheme) -> None:
    """Give the quantised layers of a meta model the tensors that the scheme stores, and the scheme's plain product."""
    for name, linear in quantised_layers(model):
        try:
            shapes = scheme.shapes(*linear.weight.shape)
        except UserError as error:
            raise UserError(f"The scheme {scheme.name} doesn't fit {name}: {error}") from None
        _store(
            linear,
            scheme,
            {n: torch.empty(shape, dtype=scheme.stored[n].dtype, device="meta") for n, shape in shapes.items()},
        )


def _store(linear: Linear, scheme: QuantScheme, tensors: Mapping[str, Tensor]) -> None:
    if "weight" not in tensors:
        linear.weight = None  # type: ignore[assignment]
    for name, tensor in tensors.items():
        setattr(linear, name, nn.Parameter(tensor, requires_grad=False))
    linear.scheme, linear.kernel = scheme, scheme.matmul


def check_memory(model: Llama, device: torch.device, available: int) -> None:
    """Refuse a meta model whose tensors, as this rank stores them, would not fit into `available` bytes."""
    needed = sum(tensor.numel() * tensor.dtype.itemsize for tensor in model.parameters())
    if needed > available:
        raise UserError(
            f"The weights take {needed:,} bytes ({needed / 2**30:.1f} GiB), but {device} has {available:,} bytes free;"
            " use a smaller model or dtype, --quantization, more ranks or another device."
        )


def load_weights(
    model: Llama, read: Reader, dtype: torch.dtype, device: torch.device, tp: TensorParallel | None, quiet: bool
) -> None:
    """Replace each meta parameter by its tensor."""
    rank, size = (tp.rank, tp.size) if tp else (0, 1)
    for name, shape in track(model.config.tensors().items(), "Loading weights", unit="tensors", quiet=quiet):
        owner, _, attribute = name.removeprefix("model.").rpartition(".")
        module, index = model.get_submodule(owner), tp_slice(name, shape, model.config, rank, size)
        if isinstance(module, Linear) and isinstance(module.scheme, QuantScheme) and attribute == "weight":
            _store(module, module.scheme, _packed(module.scheme, name, shape, index, read, device))
            continue
        # A copy even where nothing is converted: the reader may have given a view of the file, which is closed soon.
        tensor = read(name, index).to(device, dtype, copy=True).contiguous()
        _check_shape(name, tensor, getattr(module, attribute).shape)
        setattr(module, attribute, nn.Parameter(tensor, requires_grad=False))
    model.tie()


def _packed(
    scheme: QuantScheme,
    name: str,
    shape: tuple[int, ...],
    index: tuple[slice, ...],
    read: Reader,
    device: torch.device,
) -> dict[str, Tensor]:
    """This rank's part of a weight as the scheme stores it; rows are packed whole, so that it is the same at any
    size."""
    rows, columns = index[0], slice(0, shape[1])
    weight = read(name, (rows, columns)).to(device)
    _check_shape(name, weight, (rows.stop - rows.start, shape[1]))
    return scheme.cut(scheme.pack(weight), (slice(0, rows.stop - rows.start), index[1]))


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise UserError(f"{name} has shape {list(tensor.shape)}, but the config says {list(expected)}.")


def fuse(model: Llama) -> None:
    """Merge q, k, v and gate, up into one product each. For inference, after the split: shards are whole heads.

    Layers that carry an adapter stay apart, since each adds its own update; so do layers of different schemes.
    """
    for module in list(model.modules()):
        if isinstance(module, Attention) and _fusible(module.q_proj, module.k_proj, module.v_proj):
            module.qkv_proj = _concat(module.q_proj, module.k_proj, module.v_proj)
            del module.q_proj, module.k_proj, module.v_proj
        elif isinstance(module, MLP) and _fusible(module.gate_proj, module.up_proj):
            module.gate_up_proj = _concat(module.gate_proj, module.up_proj)
            del module.gate_proj, module.up_proj


def _fusible(*layers: Linear) -> bool:
    return all(layer.adapter is None and layer.scheme is layers[0].scheme for layer in layers)


def _concat(*layers: Linear) -> Linear:
    with torch.device("meta"):
        fused = Linear(1, 1)
    scheme = layers[0].scheme
    if isinstance(scheme, QuantScheme):
        _store(fused, scheme, scheme.fuse([scheme.tensors(layer) for layer in layers]))
    else:
        fused.weight = nn.Parameter(torch.cat([layer.weight.data for layer in layers]), requires_grad=False)
    biases = [layer.bias.data for layer in layers if layer.bias is not None]
    if biases:
        fused.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return fused


def choose_kernels(model: Llama, dtype: torch.dtype, device: torch.device, *, notes: bool = True) -> None:
    """Give every linear layer the fastest product that this device has for it, and say where that is a slow one."""
    packs = device.type == "cpu" and packed_works(dtype)
    if notes and device.type == "cpu" and dtype == torch.bfloat16 and not packs:
        print("note: this CPU has no packed bfloat16 products; plain ones run, more slowly.", file=sys.stderr)
    for module in model.modules():
        if not isinstance(module, Linear):
            continue
        if isinstance(module.scheme, QuantScheme):
            module.kernel = module.scheme.kernel(device, dtype) or module.scheme.matmul
        elif packs:
            module.kernel = PackedWeight(module.weight)
            module.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
