"""Two checkpoints of any two formats side by side: what differs in config, tensors, tokenizer, layers and logits.

Reads both tensor by tensor and runs both layer by layer, so that models larger than memory can be compared too.
Rounding to a narrower type is told apart from a difference; quantised tensors may differ by up to `tolerance`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.errors import UserError
from puna.progress import meter
from puna.tokenizer import Tokenizer
from puna.weights.checkpoint import Checkpoint
from puna.weights.layerwise import trace
from puna.weights.open import open_checkpoint
from puna.weights.verification import PROBES, as_stored, bit_equal

QUANTISED_TOLERANCE = 0.02  # Q8_0 is within 0.01 of its source, 4-bit types are around 0.08
CHUNK = 1 << 21  # elements compared at a time, in float64
NOISE = 1e-5  # relative; what float32 arithmetic may leave between two equal models
PROBE_TOKENS = 32  # of each probe text, for logits
MESSAGES = [
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A llama."},
    {"role": "user", "content": "Since when?"},
]


@dataclass(frozen=True)
class TensorDifference:
    """How two tensors of one name differ. `relative` is |a - b| / |a| in the Frobenius norm."""

    name: str
    max_difference: float
    relative: float
    unequal: float  # the fraction of elements that aren't bit-equal


@dataclass(frozen=True)
class LogitsDifference:
    """Over all probe tokens: `mean_kl` in nats, `top1` the fraction where both have the same likeliest token."""

    tokens: int
    max_difference: float
    mean_kl: float
    top1: float


@dataclass
class Report:
    """The result of `compare`. `skipped`: part -> the reason why it was not compared."""

    a: str
    b: str
    tolerance: float
    config: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    tensors: int = 0
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    rounded: list[str] = field(default_factory=list)  # equal after rounding to the narrower of the two types
    close: list[TensorDifference] = field(default_factory=list)  # within the tolerance
    different: list[TensorDifference] = field(default_factory=list)
    tokenizer: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    layers: dict[str, float] = field(default_factory=dict)  # relative difference of each layer's output
    first_layer: str | None = None  # the first whose difference is more than rounding and tolerance explain
    logits: LogitsDifference | None = None
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        found = (self.config, self.only_a, self.only_b, self.shapes, self.different, self.tokenizer, self.first_layer)
        return not any(found)


def verify(a: str | Path, b: str | Path, tolerance: float | None = None, *, logits: bool = True) -> Report:
    """Compares two checkpoints, each given by path, Hub id or alias. See `compare`."""
    with open_checkpoint(a) as opened_a, open_checkpoint(b) as opened_b:
        return compare(opened_a, opened_b, tolerance, logits=logits)


def compare(a: Checkpoint, b: Checkpoint, tolerance: float | None = None, *, logits: bool = True) -> Report:
    """Compares config, tensors, tokenizer, and with `logits` the outputs of each layer for probe texts.

    `tolerance`: the relative difference up to which a tensor counts as the same; None is 0, and 0.02 when one of the
    two is quantised. Rounding to a narrower type needs no tolerance. Takes the memory of a slice of a tensor and of the
    activations.
    """
    if tolerance is None:
        tolerance = QUANTISED_TOLERANCE if quantised(a) or quantised(b) else 0.0
    report = Report(_describe(a), _describe(b), tolerance)
    for entry in dataclasses.fields(a.config):
        values = getattr(a.config, entry.name), getattr(b.config, entry.name)
        if values[0] != values[1]:
            report.config[entry.name] = values
    _compare_tensors(a, b, report)
    tokenizers = a.tokenizer(), b.tokenizer()
    if tokenizers == (None, None):
        report.skipped["tokenizer"] = "neither has one"
    else:
        report.tokenizer = compare_tokenizers(*tokenizers, min(a.config.vocab_size, b.config.vocab_size))
    if not logits:
        report.skipped["logits"] = "not asked for"
    elif report.only_a or report.only_b or report.shapes:
        report.skipped["logits"] = "the tensors don't match"
    else:
        _compare_layers(a, b, _probe_ids(tokenizers[0] or tokenizers[1], a.config.vocab_size), report)
    return report


def quantised(source: Checkpoint) -> bool:
    return bool(source.details.get("quantised"))


def compare_tokenizers(a: Tokenizer | None, b: Tokenizer | None, vocab_size: int) -> dict[str, tuple[Any, Any]]:
    """The differences: ids of probe texts, decoded texts, BOS and end tokens, the template and a rendered conversation.

    Tokens beyond the `vocab_size` rows of the model, which no text can use, don't count.
    """
    if a is None or b is None:
        return {"tokenizer": (None if a is None else "present", None if b is None else "present")}
    found = {}

    def same(what: str, of_a: Any, of_b: Any) -> None:
        if of_a != of_b:
            found[what] = (of_a, of_b)

    for probe in dict.fromkeys((*PROBES, *a.probes, *b.probes)):
        for special in (True, False):
            ids = [tokenizer.encode(probe, special=special) for tokenizer in (a, b)]
            if probe not in PROBES and any(max(each, default=0) >= vocab_size for each in ids):
                continue
            same(f"ids of {probe!r}", *ids)
            same(f"text of the ids of {probe!r}", a.decode(ids[0]), b.decode(ids[0]))
    for name in ("bos_id", "eos_id", "add_bos", "add_eos"):
        same(name, getattr(a, name), getattr(b, name))
    same("stop_ids", sorted(a.stop_ids), sorted(b.stop_ids))
    same("chat_template", a.chat_template, b.chat_template)
    if a.chat_template and b.chat_template:
        same("chat prompt", *(_rendered(tokenizer) for tokenizer in (a, b)))
    return found


def _rendered(tokenizer: Tokenizer) -> str:
    try:
        return tokenizer.render(MESSAGES)
    except UserError as error:
        return f"refused: {error}"


def _compare_tensors(a: Checkpoint, b: Checkpoint, report: Report) -> None:
    report.only_a = [name for name in a.tensors if name not in b.tensors]
    report.only_b = [name for name in b.tensors if name not in a.tensors]
    common = [name for name in a.tensors if name in b.tensors]
    shapes = {name: (a.tensors[name].shape, b.tensors[name].shape) for name in common}
    report.shapes = {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
    common = [name for name in common if name not in report.shapes]
    report.tensors = len(common)
    with meter("Comparing tensors", sum(a.tensors[name].nbytes for name in common), "B") as advance:
        for name in common:
            narrow = narrower(a.tensors[name].dtype, b.tensors[name].dtype)
            worst = squares_a = squares = unequal = 0.0
            rounded = True
            rows = a.tensors[name].shape[0]
            elements = torch.Size(a.tensors[name].shape).numel()
            step = max(1, CHUNK * rows // elements)
            for start in range(0, rows, step):
                index = (slice(start, min(start + step, rows)),)
                of_a, of_b = a.read(name, index), b.read(name, index)
                advance(of_a.nbytes)
                if bit_equal(of_a, of_b):
                    squares_a += of_a.double().square().sum().item()
                    continue
                rounded = rounded and bit_equal(of_a.to(narrow), of_b.to(narrow))
                wide_a, wide_b = of_a.double(), of_b.double()
                difference = (wide_a - wide_b).abs()
                worst = _largest(worst, difference.max().item())
                squares_a += wide_a.square().sum().item()
                squares += difference.square().sum().item()
                unequal += (wide_a != wide_b).sum().item()
            if not unequal:
                continue
            relative = math.sqrt(squares / squares_a) if squares_a else math.inf
            found = TensorDifference(name, worst, relative, unequal / elements)
            if rounded:
                report.rounded.append(name)
            elif relative <= report.tolerance:
                report.close.append(found)
            else:
                report.different.append(found)


def narrower(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The type that the other one was rounded to, if either was."""
    return a if a.itemsize < b.itemsize else b


def _largest(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _compare_layers(a: Checkpoint, b: Checkpoint, ids: Tensor, report: Report) -> None:
    """Runs both side by side. If one is the other rounded, both run rounded, and the outputs must be equal."""
    narrow = {name: narrower(a.tensors[name].dtype, b.tensors[name].dtype) for name in report.rounded}
    stored = [as_stored(source, lambda name, rows: rows.to(narrow.get(name, rows.dtype))) for source in (a, b)]
    # An error of the weights grows through the layers, but not beyond this.
    limit = 10 * report.tolerance if report.close else NOISE
    with meter("Running both", a.config.num_hidden_layers + 3, "layers") as advance:
        for (name, of_a), (_, of_b) in zip(*(trace(source, ids) for source in stored), strict=True):
            relative = ((of_a - of_b).norm() / of_a.norm()).item()
            report.layers[name] = relative
            if report.first_layer is None and not relative <= limit:
                report.first_layer = name
            advance(1)
    log_a, log_b = of_a.double().log_softmax(-1), of_b.double().log_softmax(-1)
    report.logits = LogitsDifference(
        tokens=ids.numel(),
        max_difference=(of_a - of_b).abs().max().item(),
        mean_kl=max(0.0, (log_a.exp() * (log_a - log_b)).sum(-1).mean().item()),
        top1=(of_a.argmax(-1) == of_b.argmax(-1)).double().mean().item(),
    )


def _probe_ids(tokenizer: Tokenizer | None, vocab_size: int) -> Tensor:
    """[texts, PROBE_TOKENS]: the probe texts, each repeated until it is long enough; without a tokenizer random ids."""
    if tokenizer is None or tokenizer.vocab_size > vocab_size:
        return torch.randint(vocab_size, (len(PROBES), PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    texts = [tokenizer.encode(probe) for probe in PROBES]
    return torch.tensor([(ids * PROBE_TOKENS)[:PROBE_TOKENS] for ids in texts])


def _describe(source: Checkpoint) -> str:
    kinds = "+".join(source.details["types"]) if quantised(source) else source.hf_config["torch_dtype"]
    return f"{source.path} ({source.format}, {kinds})"
