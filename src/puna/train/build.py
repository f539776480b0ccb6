"""Builds a training run from its options: base checkpoint, data loader, sharded model, resume checkpoint."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from puna.data.indexed_dataset import open_dataset
from puna.data.loader import PackedLoader
from puna.errors import UserError
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.model.lora import add_lora, initial
from puna.model.presets import PRESETS
from puna.model_loader import random_reader
from puna.parallel.model_part import ModelPart
from puna.parallel.strategy import ParallelStrategy
from puna.tokenizer import Tokenizer
from puna.train.checkpoint import CheckpointManager
from puna.train.lora_init import check_rank
from puna.train.optim import check_optim
from puna.train.options import TrainOptions
from puna.train.run_folder import check_folder, lock
from puna.train.save_model import Origin
from puna.train.schedule import check_schedule
from puna.train.trainer import Trainer
from puna.weights.adapter import Adapter
from puna.weights.checkpoint import Checkpoint
from puna.weights.open import open_checkpoint

# precision -> (dtype of the trained weights, compute dtype where it differs)
TYPES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "fp16-mixed": (torch.float32, torch.float16),
    "bf16": (torch.bfloat16, None),
    "fp32": (torch.float32, None),
    "fp64": (torch.float64, None),
}
Read = Callable[[str, tuple[slice, ...]], Tensor]


def check(options: TrainOptions) -> None:
    """Raises UserError for contradictory options; the parser checks the bounds of single values."""
    if options.data.weights and len(options.data.weights) != len(options.data.train):
        raise UserError("data.weights needs a number for every prefix of data.train.")
    if options.model.weights == "random" and (options.lora.rank or options.lora.init):
        raise UserError("LoRA trains updates of a checkpoint, not of random weights: leave lora.* out.")
    check_rank(options.lora)
    check_optim(options.optim)
    check_schedule(options.schedule, options.optim.lr)


@contextmanager
def claim(folder: Path, strategy: ParallelStrategy) -> Iterator[None]:
    """Check and lock the run's folder on the first rank; its error is raised on all ranks."""
    with ExitStack() as stack:
        problem: list[str | None] = [None]
        if strategy.is_first:
            try:
                check_folder(folder)
                stack.enter_context(lock(folder))
            except UserError as error:
                problem = [str(error)]
        if strategy.mesh is not None:
            dist.broadcast_object_list(problem)
        if problem[0] is not None:
            raise UserError(problem[0])
        yield


def base_fingerprint(strategy: ParallelStrategy, source: Checkpoint) -> str:
    """sha256 over the first row of every tensor of a checkpoint, the same on all ranks and for every float type."""
    digest = hashlib.sha256()
    if strategy.is_first:
        for name in sorted(source.tensors):
            digest.update(f"{name} {list(source.tensors[name].shape)}".encode())
            digest.update(source.read(name, (slice(0, 1),)).to(torch.float32).contiguous().numpy().tobytes())
    fingerprint = [digest.hexdigest()]
    if strategy.mesh is not None:
        dist.broadcast_object_list(fingerprint)
    return fingerprint[0]


def left_out(loader: PackedLoader, long: str) -> list[str]:
    """Notes on the samples longer than a row, one per dataset."""
    notes = []
    for dataset in loader.datasets:
        if count := loader.too_long.get(dataset.prefix):
            text = f"{dataset.prefix}: {count:,} of {len(dataset.lengths):,} samples are longer than"
            text += f" {loader.seq_len:,} tokens and were {'cut' if long == 'cut' else 'dropped'}"
            if empty := loader.cut_empty.get(dataset.prefix):
                text += f"; {empty:,} of them had no trained token left and were dropped"
            notes.append(text)
    return notes


def open_origin(options: TrainOptions) -> tuple[Origin, Checkpoint | None]:
    """The base of the run, and the open checkpoint with its weights (None for random weights)."""
    asked = options.model
    source = None if asked.name in PRESETS and asked.weights == "random" else _open(asked.name, asked.revision)
    tokenizer = source.tokenizer() if source is not None else None
    if asked.tokenizer is not None:
        path = Path(asked.tokenizer).expanduser()
        tokenizer = Tokenizer.load(path) if path.exists() else _open(asked.tokenizer, None).tokenizer()
    if source is not None and asked.weights == "auto":
        if asked.vocab_size is not None or asked.context is not None:
            raise UserError("model.vocab_size and model.context are for random weights; a checkpoint has its own.")
        return Origin(asked.name, source.config, source.hf_config, source.generation, tokenizer), source
    config = PRESETS[asked.name] if source is None else source.config
    if source is not None:
        source.close()
    config = replace(
        config,
        vocab_size=asked.vocab_size or config.vocab_size,
        max_position_embeddings=asked.context or config.max_position_embeddings,
    )
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"The tokenizer has {tokenizer.vocab_size:,} ids, the shape {asked.name} has {config.vocab_size:,}:"
            f" give --model.vocab-size {tokenizer.vocab_size}, or more."
        )
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id", None) for name in ("bos", "eos", "pad")}
    hf_config = config.to_hf() | {name: index for name, index in ids.items() if index is not None}
    hf_config["torch_dtype"] = options.checkpoint.export_dtype
    return Origin(asked.name, config, hf_config, {}, tokenizer), None


def _open(name: str, revision: str | None) -> Checkpoint:
    try:
        return open_checkpoint(name, revision=revision)
    except UserError as error:
        if name in PRESETS:
            raise UserError(
                f"{name} is a preset, a shape without weights: give --model.weights random to train it from scratch,"
                " with --model.tokenizer and --model.vocab-size to fit the data, or name a checkpoint."
            ) from None
        raise error


def make_loader(
    options: TrainOptions,
    strategy: ParallelStrategy,
    prefixes: tuple[str, ...],
    weights: tuple[float, ...],
    tokenizer: Tokenizer | None,
) -> PackedLoader:
    """The rows of this data rank from the token data at `prefixes`, mixed by `weights`."""
    datasets = [open_dataset(prefix) for prefix in prefixes]
    if not datasets:
        raise UserError("data.train names no token data: make some with puna data prepare.")
    if tokenizer is not None:
        for dataset in datasets:
            dataset.check_tokenizer(tokenizer)
    return PackedLoader(
        list(zip(datasets, weights or [None] * len(datasets), strict=True)),
        options.data.seq_len,
        options.data.seed,
        packing=options.data.packing,
        long=options.data.long,
        rank=strategy.data_rank,
        size=strategy.data_size,
    )


def build_parts(
    options: TrainOptions,
    strategy: ParallelStrategy,
    config: ModelConfig,
    source: Checkpoint | None,
    adapter: Adapter | None,
) -> list[ModelPart]:
    """The model parts of this rank with their initial weights: random, or those of `source` and `adapter`."""
    dtype, compute = TYPES[options.precision]
    with torch.device("meta"):
        model = Llama(config)
    shapes: dict[str, tuple[int, ...]] = {}
    if options.lora.rank:
        add_lora(model, options.lora, seed=options.seed)
        shapes = {f"model.{name}": tuple(p.shape) for name, p in model.named_parameters() if ".adapter." in name}
    parts = strategy.prepare(
        model,
        dtype=dtype,
        compute_dtype=compute,
        recompute_blocks=options.recompute,
        compile_blocks=options.compile,
    )
    read: Read = source.read if source is not None else random_reader(config, torch.float32, "cpu", options.seed)

    def read_any(name: str, index: tuple[slice, ...]) -> Tensor:
        trained = name if name.startswith("model.") or ".adapter." not in name else f"model.{name}"
        if adapter is not None and trained in adapter.tensors:
            return adapter.read(trained)[index]
        return initial(name, shapes[trained], options.seed)[index] if ".adapter." in name else read(name, index)

    strategy.load(parts, read_any)
    return parts


def resume(options: TrainOptions, trainer: Trainer, checkpoints: CheckpointManager) -> None:
    """Load the checkpoint selected by `options.resume`, if any, and report it and the changed options."""
    if options.resume == "never":
        if any(checkpoints.folder.glob("step-*")):
            raise UserError(f"{options.out} holds checkpoints of an earlier run: choose another --out, or resume it.")
        return
    path = None if options.resume == "auto" else Path(options.resume).expanduser()
    saved = checkpoints.newest() if path is None else checkpoints.open(path)
    own = any(checkpoints.folder.glob("step-*"))
    if path is not None and own and path.resolve().parent != checkpoints.folder.resolve():
        raise UserError(
            f"{options.out} holds checkpoints of its own beside those of {path.parent}: give --resume auto to go on"
            " with them, or choose another --out."
        )
    if saved is None and checkpoints.steps():
        raise UserError(
            f"None of the checkpoints in {checkpoints.folder} can be read: move that folder away to start again at"
            " step 1, or choose another --out."
        )
    changed = [] if saved is None else trainer.resume(checkpoints, saved)
    checkpoints.retire(trainer.step_number)
    if saved is not None and trainer.strategy.is_first:
        score = "" if saved.score is None else f", validation loss {saved.score:.4f}"
        print(f"resuming from {saved.path}: step {saved.step} of {trainer.steps}{score}", file=sys.stderr)
        if changed:
            print(f"changed since that checkpoint: {'; '.join(changed)}", file=sys.stderr)
