"""What a training run can be told, by groups: the keys of a run's YAML file. Imports no torch."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

from puna.model.lora_options import LoraOptions
from puna.options import group, option
from puna.parallel.mesh import MeshOptions

Precision = Literal["bf16-mixed", "bf16", "fp16-mixed", "fp32", "fp64"]


@dataclass(kw_only=True)
class TrainModelOptions:
    """The model that is trained."""

    name: str = option(MISSING, "checkpoint (path, Hub id, alias), or with weights: random also a preset (llama2-7b)")
    revision: str | None = option(None, "branch, tag or commit of a Hugging Face id")
    weights: Literal["auto", "random"] = option("auto", "random: train from scratch, in the shape of `name`")
    tokenizer: str | None = option(None, "where the tokenizer is, when `name` is a preset; goes into the result")
    vocab_size: int | None = option(None, "random weights alone: as many ids; the preset's own when not given")
    context: int | None = option(None, "random weights alone: longest sequence; the preset's own when not given")


@dataclass(kw_only=True)
class TrainDataOptions:
    """The data, as `puna data prepare` wrote it."""

    train: tuple[str, ...] = option(MISSING, "prefixes of token stores")
    weights: tuple[float, ...] = option((), "share of each store in the mixture; by their size when not given")
    validation: tuple[str, ...] = option((), "prefixes of token stores for validation")
    seq_len: int = option(2048, "tokens in a row")
    packing: Literal["best_fit", "concat", "none"] = option("best_fit", "how samples are put into rows")
    long: Literal["error", "cut", "drop"] = option("error", "what becomes of a sample that is longer than a row")
    seed: int = option(0, "of the shuffle")


@dataclass(kw_only=True)
class OptimOptions:
    """How weights change."""

    name: Literal["adamw", "adamw8bit", "adafactor"] = option("adamw", "adamw8bit keeps its state in 8 bits (torchao)")
    lr: float = option(3e-4, "peak learning rate")
    betas: tuple[float, ...] = option((0.9, 0.95), "decay of AdamW's two averages")
    eps: float = option(1e-8, "AdamW's epsilon")
    weight_decay: float = option(0.1, "decoupled; norms and biases never decay")
    decay_embeddings: bool = option(True, "apply weight decay to embeddings and output layer too")
    state: Literal["fp32", "bf16"] = option("fp32", "data type of AdamW's averages")
    clip: float = option(1.0, "largest norm of the gradient; 0 never clips")
    z_loss: float = option(0.0, "weight of the squared log of the softmax' sum, which keeps logits small (1e-4)")


@dataclass(kw_only=True)
class ScheduleOptions:
    """How the learning rate goes over the run."""

    name: Literal["constant", "linear", "cosine", "cosine_restarts", "polynomial", "wsd"] = option(
        "cosine", "wsd: warm up, stay, decay"
    )
    warmup_steps: int | None = option(None, "steps from 0 to the peak; warmup_ratio when not given")
    warmup_ratio: float = option(0.0, "the same as a share of all steps")
    min_lr: float = option(0.0, "where it ends")
    cycles: int = option(1, "cosine_restarts: how often it starts again")
    power: float = option(1.0, "polynomial: the exponent")
    decay_ratio: float = option(0.1, "wsd: share of all steps that decays")


@dataclass(frozen=True, kw_only=True)
class TrainLoraOptions(LoraOptions):
    """LoRA: low-rank updates of frozen weights."""

    init: Path | None = option(None, "continue training this adapter, whose rank, alpha and targets are taken over")


@dataclass(kw_only=True)
class CheckpointOptions:
    """What is saved, and taken up again."""

    every: int = option(500, "steps between checkpoints; 0 saves at the end alone")
    keep: int = option(2, "how many of the newest stay, beside the best by validation loss")
    asynchronous: bool = option(True, "write checkpoints in the background while training continues")
    export_dtype: Literal["float32", "bfloat16", "float16"] = option("bfloat16", "of the result's weights")


@dataclass(kw_only=True)
class LogOptions:
    """What is shown and written down."""

    every: int = option(1, "steps between lines of metrics.jsonl")
    tensorboard: bool = option(False, "also write TensorBoard's files (pip install 'puna[train]')")
    wandb: str | None = option(None, "also log to this Weights & Biases project (pip install wandb)")
    peak_tflops: float | None = option(None, "the device's peak for MFU, where puna doesn't know it")
    spike: float = option(2.0, "name a step whose loss is above the recent mean by this much")
    stall: float = option(300.0, "name a step that takes longer than this many seconds")


@dataclass(kw_only=True)
class TrainOptions:
    """Train a model, in full or with LoRA, on one device or many.

    Training starts from random weights or from a checkpoint. The run is a YAML file; every key can be given on the
    command line too. Under torchrun, or `puna launch`, the ranks share the work as the mesh says. A run that was
    stopped goes on where it was when it is started again.

    Examples:
      puna train run.yaml
      puna train run.yaml --steps 100 --optim.lr 1e-5 --out runs/second
      torchrun --nproc-per-node 2 -m puna train run.yaml --mesh.tp 2
    """

    out: Path = option(MISSING, "folder of the run: metrics, checkpoints, report, and at the end `model` or `adapter`")
    steps: int | None = option(None, "optimizer steps; `epochs` over the data when not given")
    epochs: float = option(1.0, "how often the data is seen, when steps is not given")
    batch_size: int = option(8, "rows in a step, over all devices")
    micro_batch_size: int = option(1, "rows that a device computes at once; the rest of its share is accumulated")
    precision: Precision = option(
        "bf16-mixed", "bf16-mixed and fp16-mixed keep weights in float32 and compute in 16 bits; bf16 holds all in 16"
    )
    recompute: Literal["none", "selective", "full"] = option(
        "none", "activations computed again in the backward pass to save memory: of attention, or of whole layers"
    )
    compile: bool = option(False, "compile the model's blocks (torch.compile)")
    loss_chunk: int = option(1024, "tokens whose logits exist at once")
    device: str = option("auto", "cpu, cuda; auto takes a GPU when there is one")
    seed: int = option(0, "of random weights and dropout")
    resume: str = option("auto", "auto: from the newest whole checkpoint in `out`, if any; never; or a checkpoint")
    on_nan: Literal["stop", "skip"] = option("stop", "a step whose loss or gradient is not finite: stop, or skip it")
    max_skipped: int = option(10, "with on_nan skip: stop after this many skipped steps in a row")
    eval_every: int = option(100, "steps between validations; 0 validates at the end alone")
    eval_rows: int = option(64, "rows of a validation")
    model: TrainModelOptions = group(TrainModelOptions)
    data: TrainDataOptions = group(TrainDataOptions)
    optim: OptimOptions = group(OptimOptions)
    schedule: ScheduleOptions = group(ScheduleOptions)
    mesh: MeshOptions = group(MeshOptions)
    lora: TrainLoraOptions = group(TrainLoraOptions, rank=0)  # rank 0 trains all weights
    checkpoint: CheckpointOptions = group(CheckpointOptions)
    log: LogOptions = group(LogOptions)
