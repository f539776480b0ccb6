"""The one training loop: data -> gradients of a sum -> divided by the tokens -> clipped -> optimizer -> next.

Pretraining, fine-tuning and LoRA are settings of it, and it never learns how the model is laid out over ranks. The loss
of a step is the sum over all its trained tokens, wherever they were computed, divided by their number: accumulation,
packing and layout don't change it.
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
from puna.train.schedule import learning_rate

SCALE, SCALE_STEPS = 65536.0, 2000  # of float16's losses at first, and good steps before it is doubled
NAMED = 8  # samples of a step that a message names


@dataclass
class Stopped:
    """Why a run ended before its last step."""

    signal: int


class Trainer:
    """A run: its parts, optimizer and data, and where it stands. Every method is a collective."""

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
    ) -> None:
        self.options, self.config, self.strategy, self.parts = options, config, strategy, parts
        self.optimizer, self.loader, self.validation, self.steps = optimizer, loader, validation, steps
        self.step_number = 0  # steps done
        self.tokens = 0  # trained tokens seen
        self.scale = SCALE if options.precision == "fp16-mixed" else 1.0
        self.good = 0  # steps since the scale changed
        self.stopped: Stopped | None = None
        trained = sum(p.numel() for p in strategy.parameters(parts).values() if p.requires_grad)
        share = trained / max(1, sum(p.numel() for p in strategy.parameters(parts).values()))
        seq_len = options.data.seq_len
        self.flops = flops_per_token(config, seq_len, trained=share), published_flops_per_token(config, seq_len)
        device = torch.cuda.get_device_name(strategy.device) if strategy.device.type == "cuda" else ""
        self.peak = options.log.peak_tflops or peak_tflops(device)

    def fit(self, monitor: Monitor, checkpoints: CheckpointManager) -> None:
        """Train from where the run stands to its last step, or until a signal; the last checkpoint is there after."""
        every = self.options.checkpoint.every
        with self._signals():
            while self.step_number < self.steps and self.stopped is None:
                metrics = self.step(monitor)
                number, last = self.step_number, self.step_number == self.steps
                due = every > 0 and number % every == 0
                evaluated = self.options.eval_every and number % self.options.eval_every == 0
                if self.validation is not None and (last or due or evaluated):
                    found = self.evaluate()
                    metrics |= {"validation_loss": found, "perplexity": math.exp(min(found, 700.0))}
                    monitor.note(
                        f"step {number}: validation loss {found:.4f}, perplexity {math.exp(min(found, 700)):.2f}"
                    )
                monitor.step(metrics)
                if self._agree(checkpoints):
                    checkpoints.wait()
                if due or last or self.stopped is not None:
                    self.save(checkpoints, metrics.get("validation_loss"))
            checkpoints.wait()

    def step(self, monitor: Monitor) -> Metrics:
        """One optimizer step. Raises UserError where the loss is no number and `on_nan` is stop."""
        start, number = time.perf_counter(), self.step_number
        rows = self.loader.next_batch(self.options.batch_size // self.strategy.data_size)
        self._check(rows)
        batches = self._batches(rows)
        self._seed(number)
        lr = learning_rate(self.options.schedule, self.options.optim.lr, number, self.steps)
        with monitor.watch(number + 1, self.names(rows)):
            total, count, z = self.strategy.step(self.parts, batches, self.loss, scale=self.scale).tolist()
            tokens = max(1, round(count))
            norm = self.strategy.grad_norm(self.parts) / (tokens * self.scale)
        updated = math.isfinite(total) and math.isfinite(norm)
        if updated:
            clip = self.options.optim.clip
            factor = min(1.0, clip / norm) if clip and norm else 1.0
            self.strategy.scale_grads(self.parts, factor / (tokens * self.scale))
            set_rate(self.optimizer, lr)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step_number += 1
        self._rescale(updated)
        if not updated:
            self._not_a_number(monitor, rows, total)
        self.tokens += tokens
        seconds = time.perf_counter() - start
        each = len(rows) * self.strategy.data_size * self.options.data.seq_len / seconds / self.strategy.size
        weight = self.options.optim.z_loss
        metrics: Metrics = {
            "step": self.step_number,
            "loss": (total - weight * z) / tokens,
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
            metrics["z_loss"] = weight * z / tokens
        if self.scale != 1:
            metrics["scale"] = self.scale
        if not updated:
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

    # Saving and going on

    def save(self, checkpoints: CheckpointManager, validation_loss: float | None = None) -> None:
        """Begin a checkpoint of where the run stands."""
        facts = {
            "validation_loss": validation_loss,
            "data": self.loader.state_dict(),
            "steps": self.steps,
            "tokens": self.tokens,
            "scale": self.scale,
            "good": self.good,
            "seed": self.options.seed,
            **self.facts(),
        }
        checkpoints.save(self.step_number, for_disk(get_state(self.parts, self.optimizer)), facts)

    def resume(self, checkpoints: CheckpointManager, saved: SavedCheckpoint) -> None:
        """Go on from a checkpoint. Raises UserError when it is one of another model or other data."""
        mine = self.facts()
        for what, theirs in ((name, saved.facts.get(name)) for name in mine):
            if theirs != mine[what]:
                raise UserError(
                    f"{saved.path} is a checkpoint of another run: its {what} {_difference(theirs, mine[what])};"
                    " choose another --out, or --resume never."
                )
        self.loader.load_state_dict(saved.facts["data"])
        state = get_state(self.parts, self.optimizer)
        checkpoints.load(saved, for_disk(state))
        set_state(self.parts, self.optimizer, state)
        self.step_number, self.tokens = saved.step, saved.facts["tokens"]
        self.scale, self.good = saved.facts["scale"], saved.facts["good"]

    def facts(self) -> dict[str, Any]:
        """What must be the same to go on: the model, what of it is trained, and by which optimizer."""
        lora = self.options.lora
        return {
            "model": self.config.to_hf(),
            "lora": {"rank": lora.rank, "targets": list(lora.targets), "modules_to_save": list(lora.modules_to_save)}
            if lora.rank
            else None,
            "optimizer": self.options.optim.name,
        }

    # Parts of a step

    def _batches(self, rows: Sequence[PackedRow]) -> list[dict[str, Tensor]]:
        """Microbatches as tensors; rows of one document each need no `documents`, plain causal attention does."""
        size = self.options.micro_batch_size
        batches = [collate(rows[start : start + size]) for start in range(0, len(rows), size)]
        if all(len(row.samples) == 1 and row.documents[-1] == 0 for row in rows):
            for batch in batches:
                del batch["documents"]
        return batches

    def _check(self, rows: Sequence[PackedRow], loader: PackedLoader | None = None) -> None:
        """An id beyond the vocabulary would be read from foreign memory on a GPU."""
        for row in rows:
            if row.ids.max() >= self.config.vocab_size:
                raise UserError(
                    f"{self.names([row], loader)}: token id {row.ids.max()} is beyond the model's vocabulary of"
                    f" {self.config.vocab_size}: the data was made with another tokenizer; prepare it again."
                )

    def _seed(self, step: int) -> None:
        """Dropout by step and place, not by what came before: nothing of it has to be saved.

        Ranks of one tensor-parallel group hold the same activations, and so must draw the same.
        """
        place = (self.strategy.data_rank * self.strategy.options.cp + self.strategy.cp) * self.strategy.options.pp
        torch.manual_seed((self.options.seed * 1_000_003 + step) * 65_537 + place + self.strategy.pp)

    def _rescale(self, updated: bool) -> None:
        """Dynamic scaling of float16's loss, as torch.amp.GradScaler's."""
        if self.options.precision != "fp16-mixed":
            return
        self.good = self.good + 1 if updated else 0
        if not updated:
            self.scale = max(1.0, self.scale / 2)
        elif self.good == SCALE_STEPS:
            self.scale, self.good = self.scale * 2, 0

    def _not_a_number(self, monitor: Monitor, rows: Sequence[PackedRow], total: float) -> None:
        number = self.step_number
        if math.isfinite(total) and self.options.precision == "fp16-mixed" and self.scale > 1:
            monitor.note(f"step {number}: gradients beyond float16, left out; the loss is now scaled by {self.scale:g}")
            return
        what = "the gradient" if math.isfinite(total) else "the loss"
        text = f"step {number}: {what} is not a finite number; samples: {self._culprits(rows)}"
        if self.options.on_nan == "stop":
            raise UserError(
                f"{text}; look at them, lower optim.lr, or give --on-nan skip to leave such steps out."
                " Earlier checkpoints are whole."
            )
        monitor.note(f"{text}; left out")

    def _culprits(self, rows: Sequence[PackedRow]) -> str:
        """Names of the rows whose loss alone is no number; all of the step's where none is."""
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
        """The samples of rows as "store: numbers"."""
        datasets = (loader or self.loader).datasets
        found: dict[int, list[int]] = {}
        for row in rows:
            for store, sample in row.samples:
                found.setdefault(store, []).append(sample)
        said = []
        for store, numbers in found.items():
            more = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
            said.append(f"{datasets[store].prefix} {', '.join(map(str, numbers[:NAMED]))}{more}")
        return "; ".join(said)

    def _memory(self) -> float:
        """Peak memory of this device, GB."""
        if self.strategy.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.strategy.device) / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    def _agree(self, checkpoints: CheckpointManager) -> bool:
        """Whether all ranks have written their part of a save; and if any was told to stop, all stop here."""
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


def _difference(theirs: Any, mine: Any) -> str:
    """The first key in which two mappings differ, in words."""
    if not isinstance(theirs, dict) or not isinstance(mine, dict):
        return f"is {theirs}, not {mine}"
    key = next(key for key in {**theirs, **mine} if theirs.get(key) != mine.get(key))
    return f"has {key} {theirs.get(key)}, not {mine.get(key)}"
