"""`QuantScheme`, the record of a quantisation scheme, and what follows from it: shapes, bytes, slicing, fusing.

A scheme stores the weight [out, in] of a `Linear` as one or several tensors. Each is declared with its dtype and, per
dimension, what of the weight it follows: `out`, `in`, `in/32` (one entry per 32 input features) or `1`. From that
follow the shapes that the loader allocates, the bytes that memory checks count, the slice that a tensor-parallel rank
holds, and how q, k, v and gate, up are concatenated into one layer. Nothing else in the package knows what a scheme
stores.

`pack` treats every output row on its own, so that a rank which holds some rows packs just these, with the same result.
A rank which holds some input features packs whole rows and keeps its slice: scales don't depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from puna.errors import UserError
from puna.model.linear import Kernel, Linear

Index = tuple[slice, ...]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a scheme: its dtype, and the feature of the weight [out, in] that each dimension follows."""

    dtype: torch.dtype
    dims: tuple[str, ...]

    def shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Its shape for a weight [out_features, in_features]. Raises UserError where a group doesn't divide it."""
        sizes = {"out": out_features, "in": in_features, "1": 1}
        shape = []
        for dim in self.dims:
            feature, _, group = dim.partition("/")
            if sizes[feature] % int(group or 1):
                raise UserError(
                    f"A weight of {sizes[feature]} {feature}put features can't be cut into groups of {group}."
                )
            shape.append(sizes[feature] // int(group or 1))
        return tuple(shape)

    def index(self, weight_index: Index) -> Index:
        """Its slice for `weight[weight_index]`, an index of two slices with bounds and step 1."""
        slices = dict(zip(("out", "in"), weight_index, strict=True)) | {"1": slice(0, 1)}
        index = []
        for dim in self.dims:
            feature, _, group = dim.partition("/")
            part, size = slices[feature], int(group or 1)
            if part.start % size or part.stop % size:
                raise UserError(
                    f"Groups of {size} {feature}put features can't be split at {part.start} and {part.stop}."
                )
            index.append(slice(part.start // size, part.stop // size))
        return tuple(index)


@dataclass(frozen=True)
class QuantScheme:
    """How a weight is stored and multiplied.

    name, summary: for the command line. stored: the tensors that replace `Linear.weight`, by attribute name.
    pack(weight [out, in], any float dtype) -> those tensors. unpack(stored tensors, dtype) -> the dequantised weight
    [out, in]. matmul(x [..., in], linear) -> [..., out] in x's dtype, the plain torch form and the oracle of every
    faster one. kernel(device, dtype): the fastest equal form on a device for activations of a dtype, chosen once when
    the model is built; None where there is only `matmul`. differentiable: the gradient of x passes through `matmul`.
    """

    name: str
    summary: str
    stored: Mapping[str, StoredTensor]
    pack: Callable[[Tensor], dict[str, Tensor]]
    unpack: Callable[[Mapping[str, Tensor], torch.dtype], Tensor]
    matmul: Kernel
    kernel: Callable[[torch.device, torch.dtype], Kernel | None] = lambda device, dtype: None
    differentiable: bool = True

    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the stored tensors of a weight [out_features, in_features]. Raises UserError where it doesn't
        fit."""
        return {name: tensor.shape(out_features, in_features) for name, tensor in self.stored.items()}

    def nbytes(self, out_features: int, in_features: int) -> int:
        """Bytes of a stored weight [out_features, in_features]."""
        shapes = self.shapes(out_features, in_features)
        return sum(torch.Size(shapes[name]).numel() * tensor.dtype.itemsize for name, tensor in self.stored.items())

    def cut(self, tensors: Mapping[str, Tensor], weight_index: Index) -> dict[str, Tensor]:
        """The stored tensors of `weight[weight_index]`, out of those of the whole weight."""
        return {name: tensors[name][tensor.index(weight_index)].contiguous() for name, tensor in self.stored.items()}

    def fuse(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The stored tensors of weights that are concatenated along their output features."""
        return {
            name: torch.cat([part[name] for part in parts], tensor.dims.index("out"))
            for name, tensor in self.stored.items()
        }

    def tensors(self, linear: Linear) -> dict[str, Tensor]:
        """The stored tensors of a layer."""
        return {name: getattr(linear, name) for name in self.stored}
