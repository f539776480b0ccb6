"""The options of `puna train` by groups: the keys of a run's YAML file. Imports no torch."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

from puna.model.lora_options import LoraOptions
from puna.options import MAX_SEED, group, option
from puna.parallel.mesh import MeshOptions

Precision = Literal["bf16-mixed", "bf16", "fp16-mixed", "fp32", "fp64"]


@dataclass(kw_only=True)
class TrainModelOptions:
    """The model that is trained."""

    name: str = option(MISSING, "checkpoint (path, Hub id, alias); with weights: random also a preset (llama2-7b)")
    revision: str | None = option(None, "branch, tag or commit of a Hugging Face id")
    weights: Literal["auto", "random"] = option("auto", "auto: those of the checkpoint; random: train from scratch")
    tokenizer: str | None = option(None, "tokenizer of the result: a path or checkpoint; the model's when not given")
    vocab_size: int | None = option(None, "random weights: vocabulary size; the preset's when not given", minimum=1)
    context: int | None = option(None, "random weights: longest sequence; the preset's when not given", minimum=1)


@dataclass(kw_only=True)
class TrainDataOptions:
    """Token data, as written by `puna data prepare`."""

    train: tuple[str, ...] = option(MISSING, "prefixes of the training data")
    weights: tuple[float, ...] = option((), "weight of each prefix in the mixture; by size when not given", above=0)
    validation: tuple[str, ...] = option((), "prefixes of the validation data")
    seq_len: int = option(2048, "tokens per row", minimum=1)
    packing: Literal["best_fit", "concat", "none"] = option("best_fit", "how samples are packed into rows")
    long: Literal["error", "cut", "drop"] = option("error", "treatment of samples longer than a row")
    seed: int = option(0, "seed of the shuffle", minimum=0, maximum=MAX_SEED)


@dataclass(kw_only=True)
class OptimOptions:
    """Optimizer."""

    name: Literal["adamw", "adamw8bit", "adafactor"] = option("adamw", "adamw8bit keeps its state in 8 bits (torchao)")
    lr: float = option(3e-4, "peak learning rate")
    betas: tuple[float, ...] = option((0.9, 0.95), "AdamW's beta1 and beta2")
    eps: float = option(1e-8, "AdamW's epsilon")
    weight_decay: float = option(0.1, "decoupled weight decay; norms and biases have none")
    decay_embeddings: bool = option(True, "apply weight decay to embeddings and output layer too")
    state: Literal["fp32", "bf16"] = option("fp32", "data type of AdamW's state")
    clip: float = option(1.0, "largest gradient norm; 0 turns clipping off")
    z_loss: float = option(0.0, "coefficient of the z-loss, the squared logsumexp of the logits (1e-4)")


@dataclass(kw_only=True)
class ScheduleOptions:
    """Learning-rate schedule."""

    name: Literal["constant", "linear", "cosine", "cosine_restarts", "polynomial", "wsd"] = option(
        "cosine", "wsd: warm-up, stable, decay"
    )
    warmup_steps: int | None = option(None, "steps of linear warm-up; warmup_ratio when not given")
    warmup_ratio: float = option(0.0, "warm-up as a fraction of all steps")
    min_lr: float = option(0.0, "final learning rate")
    cycles: int = option(1, "cosine_restarts: number of cycles")
    power: float = option(1.0, "polynomial: exponent")
    decay_ratio: float = option(0.1, "wsd: decay as a fraction of all steps")


@dataclass(frozen=True, kw_only=True)
class TrainLoraOptions(LoraOptions):
    """LoRA: low-rank updates of frozen weights."""

    init: Path | None = option(None, "continue training this adapter, whose rank, alpha and targets are taken over")


@dataclass(kw_only=True)
class CheckpointOptions:
    """Checkpointing."""

    every: int = option(500, "steps between checkpoints; 0 saves at the end only", minimum=0)
    keep: int = option(2, "number of newest checkpoints kept, beside the best by validation loss", minimum=1)
    asynchronous: bool = option(True, "write checkpoints in the background while training continues")
    export_dtype: Literal["float32", "bfloat16", "float16"] = option("bfloat16", "data type of the resulting model")


@dataclass(kw_only=True)
class LogOptions:
    """Logging."""

    every: int = option(1, "steps between lines of metrics.jsonl; the loss of a line is their mean", minimum=1)
    tensorboard: bool = option(False, "write TensorBoard files too (pip install 'puna[train]')")
    wandb: str | None = option(None, "log to this Weights & Biases project too (pip install wandb)")
    peak_tflops: float | None = option(None, "peak TFLOP/s of the device for MFU, where puna doesn't know it", above=0)
    spike: float = option(2.0, "report a step whose loss exceeds the recent mean by this much", above=0)
    stall: float = option(300.0, "report a step that takes longer than this many seconds", above=0)


@dataclass(kw_only=True)
class TrainOptions:
    """Train a model, in full or with LoRA, on one device or many.

    Training starts from random weights, a checkpoint or an adapter. The run is a YAML file; every key is an option of
    the command line too. Under torchrun or `puna launch` the ranks form the device mesh. The same command resumes a
    run that was stopped.

    Examples:
      puna train run.yaml
      puna train run.yaml --steps 100 --optim.lr 1e-5 --out runs/second
      torchrun --nproc-per-node 2 -m puna train run.yaml --mesh.tp 2
    """

    out: Path = option(MISSING, "folder of the run: metrics, checkpoints, report and the resulting model or adapter")
    steps: int | None = option(None, "optimizer steps; by epochs when not given", minimum=1)
    epochs: float = option(1.0, "passes over the data when steps is not given", above=0)
    batch_size: int = option(8, "rows per optimizer step, over all devices", minimum=1)
    micro_batch_size: int = option(1, "rows per forward pass of a device; gradients are accumulated", minimum=1)
    precision: Precision = option(
        "bf16-mixed", "bf16-mixed and fp16-mixed keep weights in float32 and compute in 16 bits; bf16 keeps all in 16"
    )
    recompute: Literal["none", "selective", "full"] = option(
        "none", "activation checkpointing: of attention (selective) or of whole layers (full)"
    )
    compile: bool = option(False, "compile the model's blocks (torch.compile)")
    loss_chunk: int = option(1024, "tokens per chunk of the loss; only their logits are in memory", minimum=1)
    device: str = option("auto", "cpu or cuda; auto takes a GPU when there is one")
    seed: int = option(0, "seed of random weights and dropout", minimum=0, maximum=MAX_SEED)
    resume: str = option("auto", "auto: from the newest complete checkpoint in `out`; never; or the path of one")
    on_nan: Literal["stop", "skip"] = option("stop", "action after a step with a non-finite loss or gradient")
    max_skipped: int = option(10, "with on_nan skip: stop after this many skipped steps in a row", minimum=1)
    eval_every: int = option(100, "steps between validations; 0 validates at checkpoints and at the end", minimum=0)
    eval_rows: int = option(64, "rows per validation", minimum=1)
    model: TrainModelOptions = group(TrainModelOptions)
    data: TrainDataOptions = group(TrainDataOptions)
    optim: OptimOptions = group(OptimOptions)
    schedule: ScheduleOptions = group(ScheduleOptions)
    mesh: MeshOptions = group(MeshOptions)
    lora: TrainLoraOptions = group(TrainLoraOptions, rank=0)  # rank 0 trains all weights
    checkpoint: CheckpointOptions = group(CheckpointOptions)
    log: LogOptions = group(LogOptions)
