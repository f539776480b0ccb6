"""Every recipe in configs/ is one that `puna train` takes, on the devices that it names."""

import math
import re
from operator import attrgetter
from pathlib import Path

import pytest

from puna.model.lora import adapted
from puna.model.presets import PRESETS
from puna.options import parse
from puna.parallel.mesh import check_batch, check_model, resolve
from puna.train.build import check
from puna.train.options import TrainOptions

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SHAPES = {
    "meta-llama/Llama-2-7b-hf": "llama2-7b",
    "meta-llama/Llama-2-13b-hf": "llama2-13b",
    "meta-llama/Llama-2-70b-hf": "llama2-70b",
    "codellama/CodeLlama-34b-Instruct-hf": "codellama-34b",
    "meta-llama/Meta-Llama-3-8B": "llama3-8b",
    "meta-llama/Meta-Llama-3-8B-Instruct": "llama3-8b",
    "meta-llama/Llama-3.1-8B": "llama3.1-8b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama3.1-8b",
    "smollm2-135m-instruct": "smollm2-135m",
    "tiny": "tiny",
}


def test_there_is_one_for_every_published_run():
    names = {path.stem for path in RECIPES}
    published = {"llama2-7b-pretrain", "llama2-13b-pretrain", "codellama-34b-pretrain", "llama2-70b-pretrain"}
    published |= {f"llama2-{size}-{how}" for size in ("7b", "13b") for how in ("full", "lora")}
    published |= {"llama3-8b-pretrain", "llama3-8b-full", "llama3.1-8b-pretrain", "llama3.1-8b-full"}
    assert published <= names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path):
    options = parse("train", TrainOptions, [str(path)])
    check(options)
    devices = int(re.search(r"^# (\d+) devices?: puna ", path.read_text(), re.MULTILINE)[1])
    mesh = resolve(options.mesh, devices)
    assert math.prod((mesh.pp, mesh.dp_replicate, mesh.dp_shard, mesh.cp, mesh.tp)) == devices
    shape = PRESETS[SHAPES[options.model.name]]
    check_model(shape, mesh)
    assert check_batch(mesh, options.batch_size, options.micro_batch_size, options.data.seq_len) >= 1
    assert options.data.seq_len <= shape.max_position_embeddings
    if options.lora.rank:
        assert adapted(shape, options.lora)
    assert options.out == Path("runs") / path.stem


COSINE = {"schedule.name": "cosine"}
# AscendSpeed, examples/llama2: what its scripts say, and Megatron's defaults where they say nothing
PRETRAIN = COSINE | {
    "data.seq_len": 4096, "mesh.tp": 8, "mesh.sequence_parallel": True, "precision": "bf16-mixed", "optim.clip": 1.0,
}  # fmt: skip
LARGE = PRETRAIN | {
    "micro_batch_size": 2, "optim.lr": 1.5e-4, "schedule.min_lr": 1e-5, "optim.weight_decay": 0.01,
    "schedule.warmup_ratio": 0.01, "optim.betas": (0.9, 0.999), "optim.eps": 1e-8,
}  # fmt: skip
SMALL = PRETRAIN | {
    "micro_batch_size": 4, "batch_size": 16, "optim.lr": 1.25e-5, "schedule.min_lr": 1.25e-6, "steps": 50000,
    "optim.weight_decay": 0.1, "optim.betas": (0.9, 0.95), "optim.eps": 1e-8, "schedule.warmup_ratio": 0.01,
    "mesh.pp": 1, "recompute": "none", "model.name": "meta-llama/Llama-2-7b-hf",
}  # fmt: skip
# MindFormers, docs/model_cards/llama2.md and configs/llama2
FINE_TUNE = COSINE | {
    "data.seq_len": 2048, "epochs": 2, "optim.betas": (0.9, 0.999), "optim.eps": 1e-8, "optim.weight_decay": 0.0,
    "optim.clip": 1.0, "schedule.min_lr": 0.0, "schedule.warmup_ratio": 0.03, "mesh.tp": 1,
}  # fmt: skip
FULL = FINE_TUNE | {"optim.lr": 1e-5, "mesh.dp_shard": 2, "mesh.pp": 4, "lora.rank": 0, "micro_batch_size": 1}
LORA = FINE_TUNE | {
    "optim.lr": 1e-4, "lora.rank": 16, "lora.alpha": 16, "lora.dropout": 0.05,
    "lora.targets": ("q_proj", "k_proj", "v_proj", "o_proj"),
}  # fmt: skip
PUBLISHED = {
    "llama2-7b-pretrain": SMALL,
    "llama2-7b-lora-tp8": SMALL | {
        "lora.rank": 16, "lora.alpha": 32, "lora.dropout": 0.0,
        "lora.targets": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    },
    "llama2-13b-pretrain": PRETRAIN | {
        "micro_batch_size": 2, "batch_size": 256, "optim.lr": 1e-6, "schedule.min_lr": 1e-8, "optim.eps": 1e-5,
        "schedule.warmup_steps": 1000, "steps": 5000, "optim.weight_decay": 0.1, "optim.betas": (0.9, 0.95),
        "mesh.pp": 1, "model.name": "meta-llama/Llama-2-13b-hf",
    },
    "codellama-34b-pretrain": LARGE | {
        "batch_size": 512, "mesh.pp": 2, "model.name": "codellama/CodeLlama-34b-Instruct-hf",
        "model.tokenizer": "meta-llama/Llama-2-70b-hf",
    },
    "llama2-70b-pretrain": LARGE | {"batch_size": 1024, "mesh.pp": 8, "model.name": "meta-llama/Llama-2-70b-hf"},
    "llama2-7b-full": FULL,
    "llama2-13b-full": FULL,
    "llama2-7b-lora": LORA,
    "llama2-13b-lora": LORA,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_hyper_parameters(name):
    options = parse("train", TrainOptions, [str(RECIPES[0].parent / f"{name}.yaml")])
    assert {key: attrgetter(key)(options) for key in PUBLISHED[name]} == PUBLISHED[name]
