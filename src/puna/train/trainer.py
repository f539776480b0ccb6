"""The training loop: rows -> gradients of the summed loss -> divided by the trained tokens -> clipped -> optimizer.

Pretraining, fine-tuning and LoRA are configurations of it, and it doesn't know how the model is sharded. The loss of a
step is the sum over all its trained tokens on all ranks, divided by their number: gradient accumulation, packing and
the parallel layout don't change it.
"""

from __future__ import annotations

import math
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from puna.data.loader import PackedLoader, PackedRow, collate
from puna.errors import UserError
from puna.model.config import ModelConfig
from puna.parallel.model_part import Head, ModelPart
from puna.parallel.state_dict import get_state, set_state
from puna.parallel.strategy import ParallelStrategy
from puna.train.checkpoint import CheckpointManager, SavedCheckpoint
from puna.train.flops import flops_per_token, peak_tflops, published_flops_per_token
from puna.train.loss import VocabPart, chunked_loss
from puna.train.monitor import Metrics, Monitor
from puna.train.optim import for_disk, set_rate
from puna.train.options import TrainOptions
from puna.train.resume import all_options, changes, check_fixed, fixed_facts
from puna.train.schedule import learning_rate

SCALE, SCALE_STEPS = 65536.0, 2000  # initial loss scale of float16, and good steps before it is doubled
NAMED = 8  # samples of a step that a message names


class NonFiniteStep(UserError):
    """The loss or gradient of a step is not finite. All ranks raise it together."""


@dataclass
class Stopped:
    """Why a run ended before its last step."""

    signal: int


class Trainer:
    """The state of a run: model parts, optimizer, position in the data. Every method is a collective.

    `base`: fingerprint of the frozen weights, None where all weights are trained.
    """

    def __init__(
        self,
        options: TrainOptions,
        config: ModelConfig,
        strategy: ParallelStrategy,
        parts: list[ModelPart],
        optimizer: torch.optim.Optimizer,
        loader: PackedLoader,
        *,
        steps: int,
        validation: PackedLoader | None = None,
        base: str | None = None,
    ) -> None:
        self.facts = fixed_facts(options, config, base)
        self.options, self.config, self.strategy, self.parts = options, config, strategy, parts
        self.optimizer, self.loader, self.validation, self.steps = optimizer, loader, validation, steps
        self.step_number = 0  # steps done
        self.tokens = 0  # trained tokens seen
        self.scale = SCALE if options.precision == "fp16-mixed" else 1.0
        self.good = 0  # steps since the scale changed
        self.skipped = self.skipped_in_a_row = 0  # steps whose loss or gradient was not finite
        self.stopped: Stopped | None = None
        trained = sum(p.numel() for p in strategy.parameters(parts).values() if p.requires_grad)
        fraction = trained / max(1, sum(p.numel() for p in strategy.parameters(parts).values()))
        seq_len = options.data.seq_len
        self.flops = flops_per_token(config, seq_len, trained=fraction), published_flops_per_token(config, seq_len)
        device = torch.cuda.get_device_name(strategy.device) if strategy.device.type == "cuda" else ""
        self.peak = options.log.peak_tflops or peak_tflops(device)

    def fit(self, monitor: Monitor, checkpoints: CheckpointManager) -> None:
        """Train to the last step, or until a signal; the last checkpoint is complete when it returns.

        An error that ends the run leaves the checkpoint that was being written complete too.
        """
        with self._signals():
            try:
                self._fit(monitor, checkpoints)
            except (Exception, KeyboardInterrupt) as error:
                # Publishing is a collective: impossible after an error on one rank alone (a lost peer, a bad file).
                together = self.strategy.mesh is None or isinstance(error, NonFiniteStep)
                if together and (checkpoints.poll() or not isinstance(error, KeyboardInterrupt)):
                    checkpoints.wait()
                raise

    def _fit(self, monitor: Monitor, checkpoints: CheckpointManager) -> None:
        every, eval_every = self.options.checkpoint.every, self.options.eval_every
        while self.step_number < self.steps and self.stopped is None:
            metrics = self.step(monitor)
            number, last = self.step_number, self.step_number == self.steps
            due = every > 0 and number % every == 0
            if self.validation is not None and (last or due or (eval_every and number % eval_every == 0)):
                loss = self.evaluate()
                perplexity = math.exp(min(loss, 700.0))
                metrics |= {"validation_loss": loss, "perplexity": perplexity}
                monitor.note(f"step {number}: validation loss {loss:.4f}, perplexity {perplexity:.2f}")
            written = self._agree(checkpoints)
            save = due or last or self.stopped is not None
            monitor.step(metrics, line=save)  # so that a resumed run averages the loss over the same steps
            if written:
                checkpoints.wait()
            if save:
                self.save(checkpoints, metrics.get("validation_loss"))
        checkpoints.wait()

    def step(self, monitor: Monitor) -> Metrics:
        """One optimizer step.

        A step without a finite loss and gradient changes no weights; it raises NonFiniteStep when `on_nan` is stop, or
        when it is the `max_skipped`-th in a row. A step without a trained token changes none either.
        """
        start, number = time.perf_counter(), self.step_number
        rows = self.loader.next_batch(self.options.batch_size // self.strategy.data_size)
        self._check(rows)
        batches = self._batches(rows)
        self._seed(number)
        lr = learning_rate(self.options.schedule, self.options.optim.lr, number, self.steps)
        with monitor.watch(number + 1, self.names(rows)):
            total, count, z = self.strategy.step(self.parts, batches, self.loss, scale=self.scale).tolist()
            tokens = round(count)
            divisor = max(1, tokens)
            norm = self.strategy.grad_norm(self.parts) / (divisor * self.scale)
        finite = math.isfinite(total) and math.isfinite(norm)
        if finite and tokens:
            clip = self.options.optim.clip
            factor = min(1.0, clip / norm) if clip and norm else 1.0
            self.strategy.scale_grads(self.parts, factor / (divisor * self.scale))
            set_rate(self.optimizer, lr)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step_number += 1
        self._rescale(finite)
        if finite:
            self.skipped_in_a_row = 0
        else:
            self._skip(monitor, rows, total)
        if finite and not tokens:
            monitor.note(f"step {self.step_number}: none of its tokens is trained, so it changes nothing")
        self.tokens += tokens
        seconds = time.perf_counter() - start
        each = len(rows) * self.strategy.data_size * self.options.data.seq_len / seconds / self.strategy.size
        weight = self.options.optim.z_loss
        metrics: Metrics = {
            "step": self.step_number,
            "loss": (total - weight * z) / tokens if tokens else math.nan,
            "lr": lr,
            "grad_norm": norm,
            "tokens": self.tokens,
            "step_seconds": seconds,
            "tokens_per_second": each,
            "tflops": each * self.flops[0] / 1e12,
            "tflops_published": each * self.flops[1] / 1e12,
            "memory_gb": self._memory(),
            "samples": self.names(rows),
        }
        if weight:
            metrics["z_loss"] = weight * z / divisor
        if self.scale != 1:
            metrics["scale"] = self.scale
        if not finite:
            metrics["skipped"] = 1
        if self.peak:
            metrics["mfu"] = metrics["tflops"] / self.peak
        return metrics

    def evaluate(self) -> float:
        """Mean loss per token over `eval_rows` rows of the validation data; the same rows every time."""
        assert self.validation is not None
        total = count = 0.0
        rows_at_once = self.options.micro_batch_size
        done = 0
        for rows in self.validation.validation_batches(rows_at_once):
            self._check(rows, self.validation)
            loss, tokens, _ = self.strategy.evaluate(self.parts, self._batches(rows), self.loss).tolist()
            total, count = total + loss, count + tokens
            done += rows_at_once * self.strategy.data_size
            if done >= self.options.eval_rows:
                break
        return total / max(1.0, count)

    def loss(self, hidden: Tensor, labels: Tensor, head: Head) -> Tensor:
        """[loss with z-loss, tokens, z] of a microbatch."""
        part = None if head.group is None else VocabPart(head.group, head.vocab_start)
        z_loss = self.options.optim.z_loss if torch.is_grad_enabled() else 0.0
        loss, count, z = chunked_loss(
            hidden, labels, head.weight, chunk=self.options.loss_chunk, z_loss=z_loss, tp=part
        )
        return torch.stack((loss, count.to(loss.dtype), z))

    # Saving and resuming

    def save(self, checkpoints: CheckpointManager, validation_loss: float | None = None) -> None:
        """Begin to save the run's state as a checkpoint."""
        facts = {
            "validation_loss": validation_loss,
            "data": self.loader.state_dict(),
            "steps": self.steps,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "scale": self.scale,
            "good": self.good,
            "seed": self.options.seed,
            "options": all_options(self.options),
            **self.facts,
        }
        checkpoints.save(self.step_number, for_disk(get_state(self.parts, self.optimizer)), facts)

    def resume(self, checkpoints: CheckpointManager, saved: SavedCheckpoint) -> list[str]:
        """Load a checkpoint; returns the options that have changed since, in words.

        The optimizer's hyper-parameters are those of the options, not those of the checkpoint. Raises UserError for a
        checkpoint of another model, adapter, precision or data, and for one of a later step than the run's last.
        """
        check_fixed(saved.path, saved.facts, self.facts)
        if saved.step > self.steps:
            raise UserError(
                f"{saved.path} is at step {saved.step}, and the run ends after {self.steps}: raise --steps,"
                " or choose another --out."
            )
        self.loader.load_state_dict(saved.facts["data"])
        state = get_state(self.parts, self.optimizer)
        tensors = {name: value for name, value in state["optimizer"].items() if not name.startswith("param_groups.")}
        checkpoints.load(saved, for_disk(state | {"optimizer": tensors}))
        set_state(self.parts, self.optimizer, state)
        self.step_number, self.tokens = saved.step, saved.facts["tokens"]
        self.scale, self.good = saved.facts["scale"], saved.facts["good"]
        self.skipped = saved.facts.get("skipped", 0)
        self.skipped_in_a_row = saved.facts.get("skipped_in_a_row", 0)
        return changes(saved.facts, self.options)

    # Parts of a step

    def _batches(self, rows: Sequence[PackedRow]) -> list[dict[str, Tensor]]:
        """Microbatches as tensors, without `documents` where each row is one document: causal attention is enough."""
        size = self.options.micro_batch_size
        batches = [collate(rows[start : start + size]) for start in range(0, len(rows), size)]
        if all(len(row.samples) == 1 and row.documents[-1] == 0 for row in rows):
            for batch in batches:
                del batch["documents"]
        return batches

    def _check(self, rows: Sequence[PackedRow], loader: PackedLoader | None = None) -> None:
        """Refuse ids beyond the vocabulary, which a GPU would look up outside the embedding."""
        for row in rows:
            if row.ids.max() >= self.config.vocab_size:
                larger = "give a larger --model.vocab-size, or " if self.options.model.weights == "random" else ""
                raise UserError(
                    f"{self.names([row], loader)}: token id {row.ids.max()} is beyond the model's vocabulary of"
                    f" {self.config.vocab_size}: {larger}prepare the data again with the model's tokenizer."
                )

    def _seed(self, step: int) -> None:
        """Seed dropout by step and rank, so that no random state has to be saved.

        Ranks of one tensor-parallel group hold the same activations, so they must draw the same.
        """
        position = (
            self.strategy.data_rank * self.strategy.options.cp + self.strategy.cp_rank
        ) * self.strategy.options.pp
        seed = (self.options.seed * 1_000_003 + step) * 65_537 + position + self.strategy.pp_rank
        torch.manual_seed(seed % 2**64)

    def _rescale(self, updated: bool) -> None:
        """Dynamic loss scaling for float16, by the rule of torch.amp.GradScaler."""
        if self.options.precision != "fp16-mixed":
            return
        self.good = self.good + 1 if updated else 0
        if not updated:
            self.scale = max(1.0, self.scale / 2)
        elif self.good == SCALE_STEPS:
            self.scale, self.good = self.scale * 2, 0

    def _skip(self, monitor: Monitor, rows: Sequence[PackedRow], total: float) -> None:
        """Report a step skipped for a non-finite loss or gradient, or raise NonFiniteStep."""
        number = self.step_number
        if math.isfinite(total) and self.options.precision == "fp16-mixed" and self.scale > 1:
            monitor.note(f"step {number}: gradients beyond float16, skipped; the loss is now scaled by {self.scale:g}")
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        what = "the gradient" if math.isfinite(total) else "the loss"
        text = f"step {number}: {what} is not a finite number; samples: {self._culprits(rows)}"
        if self.options.on_nan == "stop":
            raise NonFiniteStep(
                f"{text}; look at them, lower optim.lr, or give --on-nan skip to skip such steps."
                " Earlier checkpoints are complete."
            )
        if self.skipped_in_a_row >= self.options.max_skipped:
            raise NonFiniteStep(
                f"{text}; {self.skipped_in_a_row} steps in a row ({self.skipped} in all) were skipped, so the run"
                " stops: lower optim.lr and resume from an earlier checkpoint, or look at the data."
            )
        monitor.note(f"{text}; skipped")

    def _culprits(self, rows: Sequence[PackedRow]) -> str:
        """The samples of the microbatches with a non-finite loss; all of the step's if every loss is finite."""
        size = self.options.micro_batch_size
        bad: list[PackedRow] = []
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            if not math.isfinite(self.strategy.evaluate(self.parts, self._batches(some), self.loss)[0]):
                bad += some
        names = [self.names(bad or rows)]
        if self.strategy.mesh is not None:
            every: list[Any] = [None] * self.strategy.size
            dist.all_gather_object(every, names[0])
            names = list(dict.fromkeys(every))
        return "; ".join(names)

    def names(self, rows: Sequence[PackedRow], loader: PackedLoader | None = None) -> str:
        """The samples of rows as "PREFIX 1, 2, 3"."""
        datasets = (loader or self.loader).datasets
        samples: dict[int, list[int]] = {}
        for row in rows:
            for dataset, sample in row.samples:
                samples.setdefault(dataset, []).append(sample)
        words = []
        for dataset, numbers in samples.items():
            more = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
            words.append(f"{datasets[dataset].prefix} {', '.join(map(str, numbers[:NAMED]))}{more}")
        return "; ".join(words)

    def _memory(self) -> float:
        """Peak memory of this device, GB."""
        if self.strategy.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.strategy.device) / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    def _agree(self, checkpoints: CheckpointManager) -> bool:
        """Whether all ranks have written their files of the pending save; if any rank got a signal, all stop here."""
        if self.strategy.mesh is None:
            return checkpoints.poll()
        signals = self.stopped.signal if self.stopped else 0
        flags = torch.tensor([signals, int(not checkpoints.poll())])
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        if flags[0]:
            self.stopped = Stopped(int(flags[0]))
        return not flags[1]

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run after its step; a second Ctrl-C ends it at once."""

        def stop(number: int, _: Any) -> None:
            if self.stopped is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stopped = Stopped(number)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
