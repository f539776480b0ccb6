"""`puna lora merge`: a checkpoint and its LoRA adapter into one checkpoint, in any format, proven.

The sums are in float32 and rounded once, to the type that is written. Two things are measured: that the float32 sum
computes what the unmerged adapter does, and what the rounding changes.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch

from puna.option_sets import LoraMergeOptions
from puna.progress import track
from puna.weights.adapter import Adapter, attach, read_adapter
from puna.weights.checkpoint import Checkpoint, open_checkpoint
from puna.weights.convert import DTYPES, Conversion, Target, summary, write
from puna.weights.layerwise import trace
from puna.weights.merge import merge, replaced
from puna.weights.verification import PROBE_SHAPE, VerificationError

TOLERANCE = (
    1e-4  # relative, of the logits; what the order of float32 sums leaves in a deep model is about a tenth of it
)


def run(options: LoraMergeOptions) -> int:
    """The verb: merges, and says on stderr what it did; on stdout stands the path."""
    done = merge_adapter(
        options.model,
        options.adapter,
        options.dst,
        options.to,
        options.dtype,
        revision=options.revision,
        overwrite=options.overwrite,
        prove=options.proof,
    )
    said = done.manifest["adapter"]
    print(summary(done), file=sys.stderr)
    line = f"merged: an adapter of rank {said['rank']} into {said['layers']} layers"
    if said["replaced"]:
        line += f", {len(said['replaced'])} tensors replaced"
    if said["difference"] is not None:
        line += f"; before rounding its logits are within {said['difference']:.1g} of the unmerged adapter's"
    print(line, file=sys.stderr)
    print(done.path)
    return 0


def merge_adapter(
    model: str | Path,
    adapter: str | Path,
    dst: str | Path,
    to: str = "hf",
    dtype: str = "auto",
    *,
    revision: str | None = None,
    overwrite: bool = False,
    prove: bool = True,
) -> Conversion:
    """Writes `model` with `adapter` (a directory in peft's layout) merged into it, as `weights.convert.convert` writes.

    `dtype` auto is the one that the model is stored in; float32 for a quantised one. Raises `UserError` when the
    adapter isn't one of this model, `VerificationError` when the result isn't the model with its adapter.
    """
    lora = read_adapter(adapter)
    with open_checkpoint(model, revision=revision) as source:
        merged = merge(source, lora)
        stored = source.hf_config["torch_dtype"]
        target = Target(to, (stored if stored in DTYPES else "float32") if dtype == "auto" else dtype)
        said = {
            "name": lora.path.resolve().name,
            "base": lora.base,
            "rank": lora.options.rank,
            "alpha": lora.options.alpha,
            "layers": len(lora.modules),
            "replaced": list(lora.whole),
            "difference": _difference(source, lora, merged) if prove else None,
        }
        name = source.path.resolve().name if Path(model).expanduser().exists() else str(model)
        return write(merged, dst, target, name, overwrite=overwrite, prove=prove, said={"adapter": said})


def _difference(source: Checkpoint, adapter: Adapter, merged: Checkpoint) -> float:
    """The largest difference of the merged model's logits from the unmerged one's, both in float32."""
    ids = torch.randint(merged.config.vocab_size, PROBE_SHAPE, generator=torch.Generator().manual_seed(0))
    apart = trace(replaced(source, adapter), ids, adapt=partial(attach, adapter=adapter, dtype=torch.float32))
    expected, found = (
        dict(track(steps, "Computing logits", total=merged.config.num_hidden_layers + 3))["lm_head"]
        for steps in (apart, trace(merged, ids))
    )
    worst = (expected - found).abs().max().item()
    if not worst <= TOLERANCE * expected.abs().max().item():
        raise VerificationError(
            f"the merged model's logits are up to {worst:.3g} from those of the model with its adapter"
        )
    return worst
