"""The interface to a checkpoint of any format: Hugging Face names, rotate-half RoPE order, one tensor at a time.

Readers of weights use a `Checkpoint` and never learn which file a tensor came from. Importing this module imports no
torch, so that help texts can list the formats at once.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.errors import UserError

if TYPE_CHECKING:
    import torch

    from puna.model.config import ModelConfig
    from puna.tokenizer import Tokenizer

Index = tuple[slice, ...]
Reader = Callable[[str, Index | None], "torch.Tensor"]


@dataclass(frozen=True)
class TensorInfo:
    """What `Checkpoint.read` returns for a whole tensor; a quantised tensor has the dtype it dequantises to."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class Checkpoint:
    """An open checkpoint.

    `hf_config` is the config.json that the native layout carries for it (transformers-4 keys with `torch_dtype` and
    the token ids), `generation` its generation_config.json ({} when there is none). `tensors` is in model order.
    `files` are all files that it was read from. `details` are facts of the format, for people.
    """

    path: Path
    format: str
    config: ModelConfig
    hf_config: dict[str, Any]
    generation: dict[str, Any]
    tensors: dict[str, TensorInfo]
    files: list[Path]
    details: dict[str, Any]
    reader: Reader
    load_tokenizer: Callable[[], Tokenizer | None]

    def __post_init__(self) -> None:
        self.load_tokenizer = functools.cache(self.load_tokenizer)  # reading a vocabulary of 128k takes seconds

    def read(self, name: str, index: Index | None = None) -> torch.Tensor:
        """The tensor on the CPU, or `tensor[index]` of it. May be a view of a mapped file: don't write into it."""
        if name not in self.tensors:
            raise UserError(f"{self.path} has no tensor {name}.")
        return self.reader(name, index)

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that the checkpoint carries, None when it carries none."""
        return self.load_tokenizer()

    def close(self) -> None:
        """Releases the mapped files; tensors that were read stay valid."""
        self.reader = _closed

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _closed(name: str, index: Index | None) -> torch.Tensor:
    raise ValueError(f"{name} is read from a checkpoint that was closed")


def check_tensors(source: Checkpoint) -> None:
    """Raises `UserError` unless the tensors are exactly those that the config describes, in name and shape."""
    expected = source.config.tensors()
    actual = {name: info.shape for name, info in source.tensors.items()}
    if any(".lora_" in name for name in actual):
        raise UserError(
            f"{source.path} holds a model with its LoRA adapter unmerged: merge it by peft's merge_and_unload() and"
            " save it again, or save the adapter alone."
        )
    if empty := [name for name in expected if 0 in actual.get(name, ())]:
        raise UserError(
            f"{source.path} holds empty tensors ({_some(empty)}), as files do that were saved from sharded"
            " parameters (ZeRO-3, FSDP): gather them and save the model again."
        )
    wrong = [f"{name} has shape {list(actual[name])}, the config says {list(shape)}"
             for name, shape in expected.items() if name in actual and actual[name] != tuple(shape)]  # fmt: skip
    quantised = [f"{name} is {info.dtype}" for name, info in source.tensors.items()
             if not info.dtype.is_floating_point or info.dtype.itemsize < 2]  # fmt: skip
    problems = (
        ("is missing", [name for name in expected if name not in actual]),
        ("has tensors that a LLaMA doesn't:", [name for name in actual if name not in expected]),
        ("doesn't fit its config:", wrong),
        ("is quantised in a way that puna doesn't read:", quantised),
    )
    if found := [f"{problem} {_some(names)}" for problem, names in problems if names]:
        raise UserError(f"{source.path} {', and '.join(found)}.")


def cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor` in `dtype`; `UserError` when it holds values beyond float16's range."""
    import torch

    if dtype == torch.float16 != tensor.dtype and tensor.numel():
        low, high = torch.aminmax(tensor)
        if max(-low.item(), high.item()) > torch.finfo(dtype).max:
            raise UserError(f"{name} has values beyond float16's 65,504: write bfloat16 or float32.")
    return tensor.to(dtype)


def in_model_order(config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """`tensors` from the embedding to the output layer, those that the config doesn't know at the end."""
    order = {name: position for position, name in enumerate(config.tensors())}
    return dict(sorted(tensors.items(), key=lambda item: order.get(item[0], len(order))))


def main_dtype(tensors: Mapping[str, TensorInfo]) -> str:
    """The dtype that most bytes are in, as config.json's `torch_dtype` spells it."""
    import torch

    sizes: Counter[torch.dtype] = Counter()
    for info in tensors.values():
        sizes[info.dtype] += info.nbytes
    return str(sizes.most_common(1)[0][0] if sizes else torch.float32).removeprefix("torch.")


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
