"""`puna lora merge`: a checkpoint and its LoRA adapter into one checkpoint, in any format."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from puna.options import CHECKPOINT, argument, option
from puna.weights.formats.registry import DTYPE, OLD_NAMES, TO, WriteOptions, chosen


@dataclass(kw_only=True)
class LoraMergeOptions(WriteOptions):
    """Merge a LoRA adapter into its model and verify the result against model and adapter.

    Sums are in float32 and rounded once, to the type that is written; how far that moves the logits is reported. An
    adapter needs no merging to be used: puna chat, generate and bench take --adapter.

    Examples:
      puna lora merge smollm2-135m-instruct ./adapter ./merged
      puna lora merge ./llama3-8b ./adapter merged.gguf --to gguf --dtype q8_0
    """

    model: str = argument(CHECKPOINT)
    adapter: Path = argument("directory of an adapter in peft's layout: adapter_config.json, adapter_model.safetensors")
    dst: Path = argument("what to write: a directory, or for gguf a file", writes="file or folder")
    to: str = option("hf", TO, old_values=OLD_NAMES)
    dtype: str = option("auto", f"{DTYPE}; auto is the one that the model is stored in")
    revision: str | None = option(None, "branch, tag or commit of a Hugging Face id")
    overwrite: bool = option(False, "replace DST, if puna wrote it")
    verify: bool = option(True, "compare the result with model and adapter", aliases=("proof",))


def run(options: LoraMergeOptions) -> int:
    """Merges; prints a summary on stderr and the path on stdout."""
    from puna.weights.convert import summary
    from puna.weights.merge import merge_adapter

    done = merge_adapter(
        options.model,
        options.adapter,
        options.dst,
        options.to,
        options.dtype,
        revision=options.revision,
        overwrite=options.overwrite,
        verify=options.verify,
        **chosen(options),
    )
    adapter = done.manifest["adapter"]
    print(summary(done), file=sys.stderr)
    line = f"merged: an adapter of rank {adapter['rank']} into {adapter['layers']} layers"
    if adapter["replaced"]:
        line += f", {len(adapter['replaced'])} tensors replaced"
    if adapter["difference"] is not None:
        line += f"; before rounding its logits are within {adapter['difference']:.1g} of the unmerged adapter's"
    print(line, file=sys.stderr)
    print(done.path)
    return 0
