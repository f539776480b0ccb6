"""`puna train`: from a run's options to a trained checkpoint or adapter that every other verb reads."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from puna import __version__
from puna.errors import UserError
from puna.files import write_text
from puna.options import to_yaml
from puna.train.options import TrainOptions

if TYPE_CHECKING:
    from puna.parallel.strategy import ParallelStrategy


def run(options: TrainOptions) -> int:
    """The verb. Prints where the result is; 128 + the signal's number when one ended the run before its last step."""
    from puna.parallel.strategy import ParallelStrategy
    from puna.train.build import check, claim

    check(options)
    strategy = ParallelStrategy.start(options.mesh, options.device)
    try:
        with strategy.watch_ranks(), claim(options.out, strategy):
            return _train(options, strategy)
    finally:
        strategy.close()


def _train(options: TrainOptions, strategy: ParallelStrategy) -> int:
    import torch

    from puna.parallel.mesh import check_batch
    from puna.train.build import base_fingerprint, build_parts, left_out, make_loader, open_origin, resume
    from puna.train.checkpoint import CheckpointManager
    from puna.train.lora_init import open_initial
    from puna.train.monitor import Monitor, read_metrics
    from puna.train.optim import check_optim, make_optimizer
    from puna.train.report import environment, write_report
    from puna.train.run_folder import CONFIG, MARK
    from puna.train.save_model import export
    from puna.train.schedule import check_warmup
    from puna.train.trainer import Trainer

    check_optim(options.optim, strategy.size)
    config = MARK + to_yaml(options)
    origin, source = open_origin(options)
    lora, adapter = open_initial(options.lora, origin.config)
    options = replace(options, lora=lora)
    seq_len = options.data.seq_len
    if seq_len > origin.config.max_position_embeddings:
        raise UserError(
            f"data.seq_len {seq_len} is longer than the model's context of {origin.config.max_position_embeddings}."
        )
    check_batch(strategy.options, options.batch_size, options.micro_batch_size, seq_len)
    loader = make_loader(options, strategy, options.data.train, options.data.weights, origin.tokenizer)
    steps = options.steps or max(1, math.ceil(options.epochs * loader.epoch_rows / options.batch_size))
    held_out = options.data.validation
    validation = make_loader(options, strategy, held_out, (), origin.tokenizer) if held_out else None
    check_warmup(options.schedule, steps)
    base = base_fingerprint(strategy, source) if lora.rank and source is not None else None
    parts = build_parts(options, strategy, origin.config, source, adapter)
    if source is not None:
        source.close()
    optimizer = make_optimizer(strategy.parameters(parts), options.optim)
    trainer = Trainer(
        options, origin.config, strategy, parts, optimizer, loader, steps=steps, validation=validation, base=base
    )
    checkpoints = CheckpointManager(
        options.out / "checkpoints", keep=options.checkpoint.keep, asynchronous=options.checkpoint.asynchronous
    )
    resume(options, trainer, checkpoints)
    trained = strategy.trained(parts)
    if strategy.is_first:
        write_text(options.out / CONFIG, config)
    monitor = Monitor(options.out, options.log, steps, step=trainer.step_number, writes=strategy.is_first)
    if strategy.is_first:
        shown = sum(math.prod(shape) for shape in origin.config.tensors().values())
        monitor.note(
            f"{origin.name}: {shown:,} parameters, {trained:,} trained; {steps:,} steps of"
            f" {options.batch_size * seq_len:,} tokens; an epoch is {loader.epoch_rows:,} rows of {seq_len:,}"
        )
        for note in left_out(loader, options.data.long):
            monitor.note(note)
    try:
        trainer.fit(monitor, checkpoints)
    finally:
        monitor.close()
        checkpoints.close()
        if strategy.is_first:
            write_report(options.out, read_metrics(options.out), config, environment(strategy.size, strategy.device))
    if trainer.stopped is not None:
        if strategy.is_first:
            print(
                f"stopped after step {trainer.step_number} of {steps}, which is saved; the same command resumes there.",
                file=sys.stderr,
            )
        return 128 + trainer.stopped.signal
    if trainer.skipped and strategy.is_first:
        print(
            f"{trainer.skipped:,} of {steps:,} steps were skipped: their loss or gradient was not finite",
            file=sys.stderr,
        )
    if trainer.skipped == steps:
        raise UserError("Every step was skipped, so nothing was trained and no model was written.")
    dtype = getattr(torch, options.checkpoint.export_dtype)
    manifest = {"puna": __version__, "base": origin.name, "step": trainer.step_number, "tokens": trainer.tokens}
    print(export(strategy, parts, origin, options.out, dtype, manifest, lora if lora.rank else None))
    return 0
