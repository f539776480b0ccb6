"""Verification of a conversion against its source: config, tensors bit by bit, tokenizer, logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from puna.errors import UserError
from puna.model.config import ModelConfig
from puna.progress import meter, track
from puna.tokenizer import Tokenizer
from puna.weights.checkpoint import Checkpoint, Index
from puna.weights.layerwise import STEP, trace

PROBES = (
    "The capital of France is Paris.",
    "  It's 1,999.50 or 2^10; isn't it?\n\n\tNew line.",
    "naïve café, señor, Ærøskøbing, Привет, 你好，世界, こんにちは, 한국어, 🦙🏔️",
    "def add(a, b):\n    return a + b  # 100%",
    "<|im_start|>user\n<s>[INST] hi [/INST]</s><|eot_id|>",
)
PROBE_SHAPE = (2, 16)  # sequences and tokens of the prompts that logits are compared on


class VerificationError(Exception):
    """A conversion's result is not its source: a defect of puna or of the disk."""


def verify(source: Checkpoint, expected: Checkpoint, result: Checkpoint) -> dict[str, Any]:
    """Compares `result`, read back, with `expected`: `source` as the format stores it.

    Returns the results for the manifest. Raises `VerificationError`, naming the first difference; models that a format
    can't hold are refused before writing. Takes the memory of `STEP` elements of a tensor and of the probes'
    activations.
    """
    if difference := config_difference(source.config, result.config):
        raise VerificationError(f"the result's {difference}")
    compared: dict[str, Any] = {"tensors": _same_tensors(expected, result)}
    if (tokenizer := source.tokenizer()) is not None:
        if difference := tokenizer_difference(tokenizer, result.tokenizer(), source.config.vocab_size):
            raise VerificationError(f"the result's tokenizer is another one: {difference}")
        compared["tokenizer_probes"] = len(PROBES) + len(tokenizer.probes)
    return {**compared, "logits": _same_logits(source, expected, result)}


def as_stored(source: Checkpoint, store: Callable[[str, Tensor], Tensor]) -> Checkpoint:
    """`source` with each tensor, or rows of it, as `store(name, rows)` leaves it."""

    def read(name: str, index: Index | None) -> Tensor:
        return store(name, source.read(name, index))

    return dataclasses.replace(source, reader=read)


def config_difference(source: ModelConfig, result: ModelConfig) -> str:
    """The first field that differs, in words, "" when there is none. Numbers are compared as float32, as models use
    them and GGUF stores them."""
    for field in dataclasses.fields(source):
        expected, found = getattr(source, field.name), getattr(result, field.name)
        if _as_float32(expected) != _as_float32(found):
            return f"{field.name} is {found}, the source's {expected}"
    return ""


def _as_float32(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_float32(item) for key, item in value.items()}
    return torch.tensor(value, dtype=torch.float32).item() if isinstance(value, float) else value


def _same_tensors(expected: Checkpoint, result: Checkpoint) -> int:
    if differing := sorted(expected.tensors.keys() ^ result.tensors.keys()):
        raise VerificationError(f"{differing[0]} is in only one of source and result")
    total = sum(info.nbytes for info in result.tensors.values())
    with meter("Comparing tensors", total, "B") as advance:
        for name, info in result.tensors.items():
            rows = info.shape[0]
            step = max(1, STEP * rows // max(1, torch.Size(info.shape).numel()))
            for start in range(0, rows, step):
                index = (slice(start, min(start + step, rows)),)
                if not bit_equal(expected.read(name, index), result.read(name, index)):
                    raise VerificationError(f"{name} differs from the source in rows {start} to {index[0].stop - 1}")
                advance(info.nbytes * (index[0].stop - start) // rows)
    return len(result.tensors)


def bit_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits, after widening to a common dtype."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    a, b = (x.to(dtype).contiguous().view(integers) for x in (a, b))
    return torch.equal(a, b)


def tokenizer_difference(source: Tokenizer, result: Tokenizer | None, vocab_size: int) -> str:
    """The first difference of two tokenizers, in words, "" when there is none: ids of probe texts, of each added token
    with spaces around it, end tokens, chat template. Tokens beyond the `vocab_size` rows of the model, which no text
    can use, don't count."""
    if result is None:
        return "it is missing"
    for text in (*PROBES, *source.probes):
        ids = source.encode(text)
        if max(ids, default=0) < vocab_size and ids != result.encode(text):
            return f"it encodes {text!r} otherwise"
    stops, found = ({index for index in tokenizer.stop_ids if index < vocab_size} for tokenizer in (source, result))
    if stops != found:
        return f"it stops at {sorted(found)}, not at {sorted(stops)}"
    return "" if source.chat_template == result.chat_template else "it has another chat template"


def _logits(source: Checkpoint, ids: Tensor) -> Tensor:
    steps = track(trace(source, ids), "Computing logits", total=source.config.num_hidden_layers + 3)
    return dict(steps)["lm_head"]


def _same_logits(source: Checkpoint, expected: Checkpoint, result: Checkpoint) -> dict[str, Any]:
    """Logits of random ids: those of the stored numbers must be equal, the distance of the source's own is reported."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(source.config.vocab_size, PROBE_SHAPE, generator=generator)
    original = _logits(source, ids)
    if not original.isfinite().all():
        raise UserError(f"{source.path} gives logits that aren't finite, its weights are damaged; fetch it again.")
    stored = original if expected is source else _logits(expected, ids)
    found = _logits(result, ids)
    if not torch.equal(stored, found):
        worst = (stored - found).abs().max().item()
        raise VerificationError(f"the result's logits are up to {worst:.3g} from the source's on {ids.numel()} tokens")
    log_p, log_q = original.double().log_softmax(-1), found.double().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return {
        "tokens": ids.numel(),
        "max_difference": (original - found).abs().max().item(),
        "mean_kl": max(0.0, kl.mean().item()),
    }
