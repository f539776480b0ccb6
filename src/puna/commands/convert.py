"""`puna convert`: a checkpoint of any format into another."""

from __future__ import annotations

import sys
from dataclasses import MISSING, dataclass
from pathlib import Path

from puna.options import CHECKPOINT, argument, option
from puna.weights.formats.registry import DTYPE, OLD_NAMES, TO, WriteOptions, chosen


@dataclass(kw_only=True)
class ConvertOptions(WriteOptions):
    """Convert a checkpoint to another format and verify the result against its source.

    The source's format is detected. An interrupted conversion leaves nothing behind.

    Examples:
      puna convert smollm2-135m-instruct smollm2 --to hf --dtype bfloat16
      puna convert smollm2 smollm2-q8_0.gguf --to gguf --dtype q8_0
      puna convert smollm2 smollm2-ranks --to presharded --ranks 3
      puna convert smollm2 smollm2-tp3 --to megatron --tp 3 --pp 2
    """

    src: str = argument(CHECKPOINT)
    dst: Path = argument("what to write: a directory, or for gguf a file", writes="file or folder")
    to: str = option(MISSING, TO, old_values=OLD_NAMES)
    dtype: str = option("auto", f"{DTYPE}; auto keeps each tensor's own")
    vocab_size: int | None = option(None, "tokens of the source's vocabulary; rows beyond are padding and left out")
    revision: str | None = option(None, "branch, tag or commit of a Hugging Face id")
    overwrite: bool = option(False, "replace DST, if puna wrote it")
    verify: bool = option(True, "compare the result with its source", aliases=("proof",))


def run(options: ConvertOptions) -> int:
    """Converts; prints a summary on stderr and the path on stdout."""
    from puna.weights.convert import convert, summary

    done = convert(
        options.src,
        options.dst,
        options.to,
        options.dtype,
        vocab_size=options.vocab_size,
        revision=options.revision,
        overwrite=options.overwrite,
        verify=options.verify,
        **chosen(options),
    )
    print(summary(done), file=sys.stderr)
    print(done.path)
    return 0
