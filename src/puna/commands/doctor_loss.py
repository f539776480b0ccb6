"""`puna doctor loss`: the losses of two training runs side by side."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from puna.commands.verify import DIFFERENT
from puna.options import argument, option


@dataclass(kw_only=True)
class DoctorLossOptions:
    """Compare the losses of two training runs.

    The limits, 2 % relative and 0.005 absolute, are of means over the steps that both runs have.

    Exit code 0 when they agree, 3 when they differ.

    Examples:
      puna doctor loss runs/one-gpu runs/eight-gpus
      puna doctor loss runs/a runs/b --plot losses.png
    """

    a: Path = argument("a run's folder or metrics.jsonl, the reference")
    b: Path = argument("the other run")
    relative: float = option(0.02, "limit of the mean relative difference", minimum=0)
    absolute: float = option(0.005, "limit of the mean absolute difference", minimum=0)
    plot: Path | None = option(None, "also draw both as a PNG", writes="file")
    json: bool = option(False, "print JSON")


def run(options: DoctorLossOptions) -> int:
    """The verb: prints the comparison; 0 when the runs agree, 3 when they don't."""
    from puna.doctor.losses import compare, plot, read_losses, text

    a, b = (read_losses(path) for path in (options.a, options.b))
    report = compare(a, b, str(options.a), str(options.b), options.relative, options.absolute)
    if options.plot:
        plot(options.plot, a, b, report)
    if options.json:
        print(json.dumps(asdict(report), indent=2))
    else:
        print(text(report, options.relative, options.absolute))
    return 0 if report.same else DIFFERENT
