"""Small training runs for tests: token data of a tiny vocabulary, and `puna train` on it in this process."""

from pathlib import Path

import numpy as np

from puna.commands.train import run
from puna.data.indexed_dataset import IndexedDatasetBuilder
from puna.options import parse
from puna.train.monitor import read_metrics
from puna.train.options import TrainOptions

VOCAB, LENGTH = 96, 32


def write_stores(folder: Path) -> list[str]:
    """Prefixes of text, of text for validation, and of instructions with masked prompts, with samples of any length."""
    generator = np.random.default_rng(0)
    names = [str(folder / name) for name in ("text", "held", "talk")]
    for name in names[:2]:
        with IndexedDatasetBuilder(f"{name}_text_document", np.uint16) as writer:
            for _ in range(60):
                start = generator.integers(0, VOCAB)
                writer.add((start + np.arange(generator.integers(2, 40))) % VOCAB)
    with (
        IndexedDatasetBuilder(f"{names[2]}_input_ids_document", np.int32) as ids,
        IndexedDatasetBuilder(f"{names[2]}_labels_document", np.int32) as labels,
    ):
        for _ in range(40):
            tokens = generator.integers(0, VOCAB, generator.integers(4, 30))
            ids.add(tokens)
            labels.add(np.where(np.arange(len(tokens)) < len(tokens) * generator.uniform(0, 0.9), -100, tokens))
    return names


def words(stores: list[str], out: Path, **changes) -> list[str]:
    """The options of a run of a tiny random model as the command line gives them; None leaves one out."""
    given = {
        "out": out, "steps": 12, "batch_size": 3, "micro_batch_size": 1, "precision": "fp32", "eval_every": 4,
        "model.name": "tiny", "model.weights": "random", "model.vocab_size": VOCAB, "data.train": stores[0],
        "data.validation": stores[1], "data.seq_len": LENGTH, "optim.lr": 1e-2, "checkpoint.every": 3,
        "checkpoint.export_dtype": "float32", "device": "cpu",
    } | changes  # fmt: skip
    return [f"--{name}={value}" for name, value in given.items() if value is not None]


def start(stores: list[str], out: Path, **changes) -> int:
    """Run `puna train` with these options; its exit code."""
    return run(parse("train", TrainOptions, words(stores, out, **changes)))


def losses(out: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(out)}
