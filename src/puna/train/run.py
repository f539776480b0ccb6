"""`puna train`: from a run's options to a trainer, and from its end to a checkpoint that every other verb reads."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from puna import __version__
from puna.build import random_reader
from puna.config import to_yaml
from puna.data.loader import PackedLoader
from puna.data.store import open_dataset
from puna.errors import UserError
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.model.lora import LoraOptions, add_lora, initial
from puna.model.presets import PRESETS
from puna.parallel.layout import Layout
from puna.parallel.mesh import MeshOptions, check_batch
from puna.text import Tokenizer
from puna.train.checkpoint import Checkpoints
from puna.train.export import Origin, export
from puna.train.monitor import Monitor, read_metrics
from puna.train.optim import check_optim, make_optimizer
from puna.train.options import TrainOptions
from puna.train.report import environment, write_report
from puna.train.schedule import check_schedule
from puna.train.trainer import Trainer
from puna.weights.source import Source, open_source

# precision -> type of trained weights, type of products where it is another
TYPES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "fp16-mixed": (torch.float32, torch.float16),
    "bf16": (torch.bfloat16, None),
    "fp32": (torch.float32, None),
    "fp64": (torch.float64, None),
}
Read = Callable[[str, tuple[slice, ...]], Tensor]


def run(options: TrainOptions) -> int:
    """The verb. Prints where the result is; 128 + the signal's number when one ended the run before its last step."""
    check(options)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = Layout.start(MeshOptions(**asdict(options.mesh)), device)
    try:
        with layout.guard():
            return _train(options, layout)
    finally:
        layout.close()


def check(options: TrainOptions) -> None:
    """Raises UserError for values that cannot be meant."""
    positive = {"batch_size": options.batch_size, "micro_batch_size": options.micro_batch_size,
                "data.seq_len": options.data.seq_len, "loss_chunk": options.loss_chunk}  # fmt: skip
    for name, value in positive.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}.")
    if options.steps is not None and options.steps < 1 or options.epochs <= 0:
        raise UserError("steps must be at least 1, epochs above 0.")
    if options.data.weights and len(options.data.weights) != len(options.data.train):
        raise UserError("data.weights needs a number for every store of data.train.")
    if options.model.weights == "random" and options.lora.rank:
        raise UserError("lora.rank trains adapters of a checkpoint, not of random weights; set it to 0.")
    check_optim(options.optim)
    check_schedule(options.schedule, options.optim.lr)


def _train(options: TrainOptions, layout: Layout) -> int:
    check_optim(options.optim, layout.size)
    origin, source = _origin(options)
    seq_len = options.data.seq_len
    if seq_len > origin.config.max_position_embeddings:
        raise UserError(
            f"data.seq_len {seq_len} is longer than the model's context of {origin.config.max_position_embeddings}."
        )
    check_batch(layout.options, options.batch_size, options.micro_batch_size, seq_len)
    loader = _loader(options, layout, options.data.train, options.data.weights, origin.tokenizer)
    steps = options.steps or max(1, math.ceil(options.epochs * loader.epoch_rows / options.batch_size))
    held_out = options.data.validation
    validation = _loader(options, layout, held_out, (), origin.tokenizer) if held_out else None
    lora = _lora(options)
    parts = _parts(options, layout, origin.config, source, lora)
    if source is not None:
        source.close()
    optimizer = make_optimizer(layout.parameters(parts), options.optim)
    trainer = Trainer(options, origin.config, layout, parts, optimizer, loader, steps=steps, validation=validation)
    checkpoints = Checkpoints(
        options.out / "checkpoints", keep=options.checkpoint.keep, asynchronous=options.checkpoint.asynchronous
    )
    _resume(options, trainer, checkpoints)
    monitor = Monitor(options.out, options.log, steps, step=trainer.step_number, speaks=layout.is_first)
    config = to_yaml(options)
    trained = layout.trained(parts)
    if layout.is_first:
        (options.out / "config.yaml").write_text(config, encoding="utf-8")
        shown = sum(math.prod(shape) for shape in origin.config.tensors().values())
        monitor.note(
            f"{origin.name}: {shown:,} parameters, {trained:,} trained; {steps:,} steps of"
            f" {options.batch_size * seq_len:,} tokens; an epoch is {loader.epoch_rows:,} rows of {seq_len:,}"
        )
    try:
        trainer.fit(monitor, checkpoints)
    finally:
        monitor.close()
        checkpoints.close()
        if layout.is_first:
            write_report(options.out, read_metrics(options.out), config, environment(layout.size, layout.device))
    if trainer.stopped is not None:
        if layout.is_first:
            print(
                f"stopped after step {trainer.step_number} of {steps}, which is saved; the same command goes on there.",
                file=sys.stderr,
            )
        return 128 + trainer.stopped.signal
    dtype = getattr(torch, options.checkpoint.export_dtype)
    said = {"puna": __version__, "base": origin.name, "step": trainer.step_number, "tokens": trainer.tokens}
    print(export(layout, parts, origin, options.out, dtype, said, lora))
    return 0


def _origin(options: TrainOptions) -> tuple[Origin, Source | None]:
    """What the run starts from, and the open checkpoint that weights are read from."""
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
    if tokenizer is not None:
        tokenizer.check_fits(config.vocab_size)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id", None) for name in ("bos", "eos", "pad")}
    hf_config = config.to_hf() | {name: index for name, index in ids.items() if index is not None}
    hf_config["torch_dtype"] = options.checkpoint.export_dtype
    return Origin(asked.name, config, hf_config, {}, tokenizer), None


def _open(name: str, revision: str | None) -> Source:
    try:
        return open_source(name, revision=revision)
    except UserError as error:
        if name in PRESETS:
            raise UserError(f"{name} is a shape without weights here: add model.weights: random.") from None
        raise error


def _loader(
    options: TrainOptions,
    layout: Layout,
    prefixes: tuple[str, ...],
    weights: tuple[float, ...],
    tokenizer: Tokenizer | None,
) -> PackedLoader:
    datasets = [open_dataset(prefix) for prefix in prefixes]
    if not datasets:
        raise UserError("data.train names no token data; puna data prepare makes some.")
    if tokenizer is not None:
        for dataset in datasets:
            dataset.check_tokenizer(tokenizer)
    return PackedLoader(
        list(zip(datasets, weights or [None] * len(datasets), strict=True)),
        options.data.seq_len,
        options.data.seed,
        packing=options.data.packing,
        long=options.data.long,
        rank=layout.data_rank,
        size=layout.data_size,
    )


def _lora(options: TrainOptions) -> LoraOptions | None:
    return LoraOptions(**asdict(options.lora)) if options.lora.rank else None


def _parts(
    options: TrainOptions, layout: Layout, config: ModelConfig, source: Source | None, lora: LoraOptions | None
) -> list:
    """The model as this layout holds it, with its first weights."""
    dtype, compute = TYPES[options.precision]
    with torch.device("meta"):
        model = Llama(config)
    shapes: dict[str, tuple[int, ...]] = {}
    if lora is not None:
        add_lora(model, lora, seed=options.seed)
        shapes = {f"model.{name}": tuple(p.shape) for name, p in model.named_parameters() if ".adapter." in name}
    parts = layout.prepare(
        model,
        dtype=dtype,
        compute_dtype=compute,
        recompute_blocks=options.recompute,
        compile_blocks=options.compile,
    )
    read: Read = source.read if source is not None else random_reader(config, torch.float32, "cpu", options.seed)

    def read_any(name: str, index: tuple[slice, ...]) -> Tensor:
        if ".adapter." in name:
            shape = shapes.get(name) or shapes[f"model.{name}"]
            return initial(name, shape, options.seed)[index]
        return read(name, index)

    layout.load(parts, read_any)
    return parts


def _resume(options: TrainOptions, trainer: Trainer, checkpoints: Checkpoints) -> None:
    """Go on where `options.resume` says, and say what was found."""
    if options.resume == "never":
        if any(checkpoints.folder.glob("step-*")):
            raise UserError(f"{options.out} holds checkpoints of an earlier run: choose another --out, or resume it.")
        return
    saved = checkpoints.newest() if options.resume == "auto" else checkpoints.open(Path(options.resume))
    if saved is None:
        return
    trainer.resume(checkpoints, saved)
    if trainer.layout.is_first:
        score = "" if saved.score is None else f", validation loss {saved.score:.4f}"
        print(f"going on from {saved.path}: step {saved.step} of {trainer.steps}{score}", file=sys.stderr)
