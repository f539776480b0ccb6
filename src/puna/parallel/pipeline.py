"""Pipeline parallelism: the stack of layers cut into stages, run by the schedules of torch.distributed.pipelining."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from puna.model.llama import Llama
from puna.model.tp_plan import chunk
from puna.parallel.mesh import MeshOptions, check_microbatches
from puna.parallel.model_part import Loss, ModelPart

Batch = dict[str, Tensor]


def split_stage(model: Llama, stage: int, stages: int) -> Llama:
    """Stage `stage` of `stages` of a model on the meta device: other stages' modules are deleted, names stay."""
    part = copy.deepcopy(model)
    mine = range(model.config.num_hidden_layers)[chunk(model.config.num_hidden_layers, stage, stages)]
    for layer in list(part.layers):
        if int(layer) not in mine:
            del part.layers[layer]
    if stage > 0:
        part.embed_tokens = None  # type: ignore[assignment]
    if stage < stages - 1:
        part.norm = part.lm_head = None  # type: ignore[assignment]
    return part


class Pipeline:
    """This rank's stages (rank, rank + pp, ...) and the schedules that run them; `dtype` is what stages exchange."""

    def __init__(
        self,
        parts: Sequence[ModelPart],
        options: MeshOptions,
        group: dist.ProcessGroup,
        dtype: torch.dtype,
        hidden_size: int,
    ) -> None:
        self.parts, self.options, self.group = parts, options, group
        self.dtype, self.hidden_size = dtype, hidden_size
        self.indices = [group.rank() + turn * options.pp for turn in range(options.virtual_stages)]
        self.schedules: dict[tuple[int, ...], Any] = {}
        self.sums: list[Tensor] = []
        self.scale = 1.0

    def step(self, microbatches: list[Batch], loss: Loss, scale: float) -> list[Tensor]:
        """Forward and backward of all microbatches: the loss sums of each on the last stage, elsewhere none."""
        check_microbatches(self.options, len(microbatches))
        for part in self.parts:
            part.loss = loss
        self.sums, self.scale = [], scale
        batch = {name: torch.cat([one[name] for one in microbatches]) for name in microbatches[0]}
        ids = batch.pop("ids")
        schedule = self._schedule(len(microbatches), microbatches[0]["ids"])
        schedule.step(*([ids] if 0 in self.indices else []), target=batch["labels"], return_outputs=False, **batch)
        return self.sums

    def evaluate(self, microbatches: list[Batch], loss: Loss) -> list[Tensor]:
        """The loss sums, computed stage by stage without gradients."""
        sums, sent = [], []
        for part, index in zip(self.parts, self.indices, strict=True):
            part.loss = loss
            for batch in microbatches:
                x, rest = batch["ids"], {name: value for name, value in batch.items() if name != "ids"}
                if index > 0:
                    x = self._hidden(x)
                    dist.recv(x, group=self.group, group_src=(index - 1) % self.options.pp)
                out = part(x, **rest)
                if index == self.options.stages - 1:
                    sums.append(out)
                else:
                    out = out.contiguous()
                    sent.append((out, dist.isend(out, group=self.group, group_dst=(index + 1) % self.options.pp)))
        for _, work in sent:
            assert work is not None
            work.wait()
        return sums

    def _schedule(self, microbatches: int, ids: Tensor) -> Any:
        key = (microbatches, *ids.shape)
        if key in self.schedules:
            return self.schedules[key]
        hidden = self._hidden(ids).to("meta").requires_grad_()
        last = self.options.stages - 1
        stages = [
            PipelineStage(
                part,
                index,
                self.options.stages,
                ids.device,
                input_args=ids.to("meta") if index == 0 else hidden,
                output_args=torch.empty((), device="meta") if index == last else hidden,
                group=self.group,
            )
            for part, index in zip(self.parts, self.indices, strict=True)
        ]
        schedules = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}
        stage: Any = stages if self.options.pp_schedule == "interleaved" else stages[0]
        # scale_grads would divide by the number of microbatches
        schedule = schedules[self.options.pp_schedule](stage, microbatches, loss_fn=self._loss, scale_grads=False)
        self.schedules[key] = schedule
        return schedule

    def _loss(self, sums: Tensor, _: Tensor) -> Tensor:
        """The last stage has computed the sums; keep them, and return the one that is minimised."""
        self.sums.append(sums.detach())
        return sums[0] * self.scale

    def _hidden(self, ids: Tensor) -> Tensor:
        """An empty tensor for the hidden states of a microbatch between two stages."""
        rows, length = ids.shape
        parts = self.options.tp if self.options.sequence_parallel else 1
        return torch.empty(rows, length // parts, self.hidden_size, dtype=self.dtype, device=ids.device)
