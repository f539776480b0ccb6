"""Every recipe in configs/ is one that `puna train` takes, on the devices that it names."""

import math
import re
from pathlib import Path

import pytest

from puna.commands.train import asdict, check
from puna.model.lora import LoraOptions, adapted
from puna.model.presets import PRESETS
from puna.options import parse
from puna.parallel.mesh import MeshOptions, check_batch, check_model, resolve
from puna.train.options import TrainOptions

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SHAPES = {
    "meta-llama/Llama-2-7b-hf": "llama2-7b",
    "meta-llama/Llama-2-13b-hf": "llama2-13b",
    "meta-llama/Llama-2-70b-hf": "llama2-70b",
    "codellama/CodeLlama-34b-hf": "codellama-34b",
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
    mesh = resolve(MeshOptions(**asdict(options.mesh)), devices)
    assert math.prod((mesh.pp, mesh.dp_replicate, mesh.dp_shard, mesh.cp, mesh.tp)) == devices
    shape = PRESETS[SHAPES[options.model.name]]
    check_model(shape, mesh)
    assert check_batch(mesh, options.batch_size, options.micro_batch_size, options.data.seq_len) >= 1
    assert options.data.seq_len <= shape.max_position_embeddings
    if options.lora.rank:
        assert adapted(shape, LoraOptions(**asdict(options.lora)))
    assert options.out == Path("runs") / path.stem


@pytest.mark.parametrize(
    ("name", "tp", "pp", "rows", "batch", "lr", "floor"),
    [
        ("llama2-7b-pretrain", 8, 1, 4, 16, 1.25e-5, 1.25e-6),
        ("llama2-13b-pretrain", 8, 1, 2, 256, 1e-6, 1e-8),
        ("codellama-34b-pretrain", 8, 2, 2, 512, 1.5e-4, 1e-5),
        ("llama2-70b-pretrain", 8, 8, 2, 1024, 1.5e-4, 1e-5),
    ],
)
def test_the_published_hyper_parameters(name, tp, pp, rows, batch, lr, floor):
    options = parse("train", TrainOptions, [str(RECIPES[0].parent / f"{name}.yaml")])
    assert (options.mesh.tp, options.mesh.pp, options.micro_batch_size, options.batch_size) == (tp, pp, rows, batch)
    assert (options.optim.lr, options.schedule.min_lr, options.data.seq_len) == (lr, floor, 4096)
