"""`puna convert`: a checkpoint of any format into another."""

from __future__ import annotations

import sys
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

from puna.options import CHECKPOINT, argument, option


@dataclass(kw_only=True)
class ConvertOptions:
    """Convert a checkpoint to another format and verify the result against its source.

    Reads Hugging Face directories (safetensors, .bin), Meta consolidated.*.pth, directories of pre-split ranks,
    Megatron checkpoints, GGUF and llama2.c .bin. A conversion that is stopped leaves nothing behind.

    Examples:
      puna convert smollm2-135m-instruct smollm2 --to hf --dtype bfloat16
      puna convert smollm2 smollm2-q8_0.gguf --to gguf --dtype q8_0
      puna convert smollm2 smollm2-ranks --to ranks --ranks 3
      puna convert smollm2 smollm2-tp3 --to megatron --tp 3 --pp 2
    """

    src: str = argument(CHECKPOINT)
    dst: Path = argument("what to write: a directory, or for gguf a file")
    to: Literal["hf", "gguf", "meta", "ranks", "megatron"] = option(MISSING, "format to write")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "q8_0"] = option(
        "auto", "data type to write; auto keeps each tensor's own; q8_0 for gguf only"
    )
    ranks: int = option(1, "meta, ranks: how many files or directories to split over")
    tp: int = option(1, "megatron: tensor-parallel ranks")
    pp: int = option(1, "megatron: stages of the pipeline")
    names: Literal["ascendspeed", "legacy", "core"] = option(
        "ascendspeed", "megatron: names of the tensors; legacy is Megatron-LM's former GPT model, core Megatron-core's"
    )
    merge_mlp: bool = option(False, "megatron: gate and up as one matrix; legacy and core always have them so")
    make_vocab_size_divisible_by: int = option(128, "megatron: pad the vocabulary to a multiple of this x --tp")
    vocab_size: int | None = option(None, "tokens of the source's vocabulary; rows beyond are padding and left out")
    revision: str | None = option(None, "branch, tag or commit of a Hugging Face id")
    overwrite: bool = option(False, "replace DST, if an earlier puna convert wrote it")
    max_shard_gb: float = option(5.0, "hf: largest weight file, in GB")
    proof: bool = option(True, "leave out the comparison of the result with its source")


def run(options: ConvertOptions) -> int:
    """The verb: converts, and says on stderr what it did; on stdout stands the path."""
    from puna.weights.convert import convert, summary

    done = convert(
        options.src,
        options.dst,
        options.to,
        options.dtype,
        ranks=options.ranks,
        max_shard=int(options.max_shard_gb * 1e9),
        tp=options.tp,
        pp=options.pp,
        names=options.names,
        merge_mlp=options.merge_mlp,
        vocab_multiple=options.make_vocab_size_divisible_by,
        vocab_size=options.vocab_size,
        revision=options.revision,
        overwrite=options.overwrite,
        prove=options.proof,
    )
    print(summary(done), file=sys.stderr)
    print(done.path)
    return 0
