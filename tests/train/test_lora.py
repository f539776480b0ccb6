"""LoRA in training: its options, and going on from an adapter."""

import json
import shutil

import pytest
import torch

from puna.errors import UserError
from puna.model.lora_options import LoraOptions
from puna.options import parse
from puna.train.monitor import read_metrics
from puna.train.options import TrainOptions
from puna.weights.adapter import read_adapter
from training_runs import start, words

SHORT = {"steps": 3, "checkpoint.every": 0, "eval_every": 0, "model.weights": "auto", "model.vocab_size": None}
PATTERNS = {
    "lora.rank": 4, "lora.alpha": 6, "lora.targets": "q_proj,up_proj,down_proj", "lora.rslora": "true",
    "lora.rank_pattern": "{up_proj: 2}", "lora.alpha_pattern": "{layers.0.mlp.up_proj: 3}",
}  # fmt: skip


def options(**changes):
    return parse("train", TrainOptions, words(["a", "b"], "out", **changes)).lora


def test_defaults_are_the_library_s():
    lora, plain = options(**{"lora.rank": 16}), LoraOptions()
    assert {name: getattr(lora, name) for name in vars(plain)} == vars(plain)
    assert options().rank == 0 and plain.alpha == 32


def test_patterns_and_lists_are_options():
    lora = options(**PATTERNS)
    assert lora.targets == ("q_proj", "up_proj", "down_proj")
    assert lora.rank_of("model.layers.1.mlp.up_proj") == 2 and lora.rank_of("model.layers.1.mlp.down_proj") == 4
    assert lora.scale_of("model.layers.0.mlp.up_proj") == pytest.approx(3 / 2**0.5)
    assert options(**{"lora.rank": 4, "lora.targets": r".*\.(q|v)_proj"}).targets == (r".*\.(q|v)_proj",)
    assert options(**{"lora.rank": 4, "lora.targets": r".*\.\d{1,2}\..*_proj"}).targets == (r".*\.\d{1,2}\..*_proj",)


@pytest.fixture(scope="module")
def first(stores, tiny_checkpoint, tmp_path_factory):
    """A run that trained an adapter with patterns and a module of its own."""
    out = tmp_path_factory.mktemp("runs") / "first"
    given = SHORT | PATTERNS | {"lora.modules_to_save": "norm", "model.name": tiny_checkpoint()}
    assert start(stores, out, **given) == 0
    return out


def tensors(folder):
    adapter = read_adapter(folder)
    return {name: adapter.read(name).clone() for name in adapter.tensors}


def test_a_run_begins_with_the_tensors_of_its_adapter(stores, first, tiny_checkpoint, tmp_path):
    """A step at rate 0 leaves them, and its validation loss is the last one of the run before."""
    out = tmp_path / "second"
    given = SHORT | {"steps": 1, "schedule.warmup_steps": 1, "lora.init": first / "adapter"}
    assert start(stores, out, **given, **{"model.name": tiny_checkpoint()}) == 0
    mine, theirs = tensors(out / "adapter"), tensors(first / "adapter")
    assert set(mine) == set(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)
    losses = [read_metrics(folder)[-1]["validation_loss"] for folder in (out, first)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    configs = [json.loads((folder / "adapter/adapter_config.json").read_text()) for folder in (out, first)]
    assert configs[0] == configs[1]


def test_and_trains_on(stores, first, tiny_checkpoint, tmp_path):
    out = tmp_path / "second"
    given = SHORT | {"lora.init": first / "adapter", "lora.dropout": 0.1, "model.name": tiny_checkpoint()}
    assert start(stores, out, **given) == 0
    mine, theirs = tensors(out / "adapter"), tensors(first / "adapter")
    assert all(not torch.equal(mine[name], theirs[name]) for name in mine)
    assert start(stores, out, **given) == 0  # resumes at its end
    assert all(torch.equal(tensors(out / "adapter")[name], mine[name]) for name in mine)


def test_an_adapter_of_peft_is_gone_on_from(stores, tiny_checkpoint, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = tiny_checkpoint()
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=3, lora_alpha=5, target_modules=["v_proj", "o_proj"], layers_to_transform=[1]),
    )
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(tmp_path / "peft")
    given = SHORT | {"steps": 1, "schedule.warmup_steps": 1, "lora.init": tmp_path / "peft", "model.name": base}
    assert start(stores, tmp_path / "run", **given) == 0
    mine, theirs = tensors(tmp_path / "run/adapter"), tensors(tmp_path / "peft")
    assert set(mine) == set(theirs) and len(mine) == 4
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lora.rank": 8}, "lora.rank is 8, but the adapter .* has 4: leave the option out"),
        ({"lora.alpha": 16}, "lora.alpha is 16"),
        ({"lora.targets": "q_proj"}, "lora.targets is "),
        ({"lora.init": "nowhere"}, "nowhere"),
        ({"model.weights": "random"}, "not of random weights"),
    ],
)
def test_an_adapter_and_options_that_contradict_it(stores, first, tiny_checkpoint, tmp_path, changes, says):
    given = SHORT | {"lora.init": first / "adapter", "model.name": tiny_checkpoint()} | changes
    with pytest.raises(UserError, match=says):
        start(stores, tmp_path / "run", **given)


def test_a_pattern_of_an_adapter_that_matches_nothing_is_dropped(stores, first, tiny_checkpoint, tmp_path):
    """peft accepts it; the run's own options must not hold one."""
    shutil.copytree(first / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    content = json.loads(file.read_text())
    content["rank_pattern"]["query_key_value"] = 3
    file.write_text(json.dumps(content))
    given = SHORT | {"steps": 1, "schedule.warmup_steps": 1, "lora.init": tmp_path / "adapter"}
    assert start(stores, tmp_path / "run", **given, **{"model.name": tiny_checkpoint()}) == 0
    mine, theirs = tensors(tmp_path / "run/adapter"), tensors(first / "adapter")
    assert set(mine) == set(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    "given",
    [
        {"alpha": 8}, {"dropout": 0.1}, {"rslora": "true"}, {"targets": "q_proj"}, {"modules_to_save": "norm"},
        {"rank_pattern": "{q_proj: 8}"}, {"alpha_pattern": "{q_proj: 8}"},
    ],
)  # fmt: skip
def test_options_of_lora_need_a_rank(stores, tiny_checkpoint, tmp_path, given):
    changes = {f"lora.{name}": value for name, value in given.items()} | {"model.name": tiny_checkpoint()}
    with pytest.raises(UserError, match=f"^lora.{next(iter(given))} needs lora.rank"):
        start(stores, tmp_path / "run", **SHORT, **changes)
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_another_model_is_refused(stores, first, tiny_checkpoint, tmp_path):
    given = SHORT | {"lora.init": first / "adapter", "model.name": tiny_checkpoint(intermediate_size=80)}
    with pytest.raises(UserError, match="was trained on another model"):
        start(stores, tmp_path / "run", **given)
