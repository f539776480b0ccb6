"""`puna verify A B`: whether two checkpoints of any formats are the same model, and where they differ."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from puna.errors import UserError
from puna.options import CHECKPOINT, argument, option

if TYPE_CHECKING:
    from puna.weights.compare import Report, TensorDifference

DIFFERENT = 3  # exit code: neither an internal error (1) nor a mistake of the user (2)
MOST = 8  # lines of details


@dataclass(kw_only=True)
class VerifyOptions:
    """Compare two checkpoints of any formats: config, tokenizer, tensors, logits.

    Names the first layer that differs. Exit code 0 when they are the same model, 3 when they differ.

    Examples:
      puna verify smollm2-135m-instruct smollm2
      puna verify smollm2 smollm2-q8_0.gguf --tolerance 0.01
    """

    a: str = argument(CHECKPOINT)
    b: str = argument("the other checkpoint")
    tolerance: float | None = option(
        None, "relative difference of a tensor that counts as the same; 0 when not given, 0.02 for quantised ones"
    )
    logits: bool = option(True, "also compare the logits of probe texts")
    json: bool = option(False, "print JSON")


def run(options: VerifyOptions) -> int:
    """The verb: prints the report; 0 when the two are the same model, 3 when they differ."""
    from puna.weights.compare import verify

    if options.tolerance is not None and not 0 <= options.tolerance < 1:
        raise UserError("--tolerance is a relative difference: choose 0 or more, and less than 1")
    report = verify(options.a, options.b, options.tolerance, logits=options.logits)
    if options.json:
        print(json.dumps({"same": report.same, **dataclasses.asdict(report)}, indent=2))
    else:
        print(text(report))
    return 0 if report.same else DIFFERENT


def text(report: Report) -> str:
    """The report for people: a line per part with what differs below it, the verdict last."""
    from puna.model.config import ModelConfig
    from puna.weights.verification import PROBES

    lines = [f"A  {report.a}", f"B  {report.b}", ""]

    def part(name: str, differs: Any, what: str, details: list[str]) -> None:
        if name in report.skipped:
            lines.append(f"{name:<11}{'skipped':<9}{report.skipped[name]}")
            return
        lines.append(f"{name:<11}{'DIFFERS' if differs else 'ok':<9}{what}")
        lines.extend(f"{'':<20}{detail}" for detail in details[:MOST])
        if len(details) > MOST:
            lines.append(f"{'':<20}and {len(details) - MOST} more")

    part("config", report.config, f"{len(dataclasses.fields(ModelConfig))} fields", _pairs(report.config))
    unmatched = [f"{name}: in A alone" for name in report.only_a] + [f"{name}: in B alone" for name in report.only_b]
    wrong = [*unmatched, *_pairs(report.shapes), *map(_difference, _worst_first(report.different))]
    part("tensors", wrong, _tensors(report), wrong)
    part("tokenizer", report.tokenizer, f"{len(PROBES)} probe texts, stop tokens, template", _pairs(report.tokenizer))
    if report.logits is None:
        part("logits", False, "", [])
    else:
        largest = max(report.layers, key=report.layers.__getitem__)
        most = f"largest relative difference {report.layers[largest]:.2g} ({largest})"
        what = f"{len(report.layers)} compared: {most if report.layers[largest] else 'all equal'}"
        part("layers", report.first_layer, what, _first(report))
        found = report.logits
        what = f"{found.tokens} tokens: max difference {found.max_difference:.2g}, mean KL {found.mean_kl:.2g} nats"
        part("logits", report.first_layer, f"{what}, same likeliest token {found.top1:.1%}", [])
    return "\n".join([*lines, "", _verdict(report)])


def _tensors(report: Report) -> str:
    counts = {
        "rounded": len(report.rounded),
        f"within {report.tolerance:g}": len(report.close),
        "different": len(report.different),
    }
    equal = report.tensors - sum(counts.values())
    shown = [f"{count} {name}" for name, count in {"bit-equal": equal, **counts}.items() if count]
    return f"{report.tensors} compared: {', '.join(shown)}"


def _first(report: Report) -> list[str]:
    if report.first_layer is None:
        return []
    first = f"{report.first_layer}."
    own = [found.name.removeprefix(first).removesuffix(".weight")
           for found in report.different if found.name.startswith(first)]  # fmt: skip
    why = f"its {', '.join(own)}" if own else "with tensors that don't"
    return [f"first that differs: {report.first_layer} ({report.layers[report.first_layer]:.2g}), {why}"]


def _verdict(report: Report) -> str:
    if report.first_layer:
        return f"They differ, and the first layer that does is {report.first_layer}."
    if not report.same:
        return "They differ."
    if report.close:
        return f"The same model, within a relative difference of {report.tolerance:g} of each tensor."
    return "The same model, rounded." if report.rounded else "The same model."


def _worst_first(differences: list[TensorDifference]) -> list[TensorDifference]:
    return sorted(differences, key=lambda difference: -difference.relative)


def _difference(difference: TensorDifference) -> str:
    return (
        f"{difference.name}: relative difference {difference.relative:.2g}, largest {difference.max_difference:.2g},"
        f" {difference.unequal:.1%} of its elements"
    )


def _pairs(pairs: dict[str, tuple[Any, Any]]) -> list[str]:
    return [f"{name}: A {_short(a)}, B {_short(b)}" for name, (a, b) in pairs.items()]


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
