"""LoRA modules in a model: what they compute, which layers get one, how they start, how they are split."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from puna.errors import UserError
from puna.model.attention import causal
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.model.lora import LINEARS, LoRA, LoraOptions, adapted, add_lora, initial, lora_tensors, saved
from puna.model.tp_plan import TP_PLAN, tp_slice
from puna.model_loader import random_model
from puna.options import parse
from puna.train.options import TrainOptions

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=4,
)
IDS = torch.arange(20).view(2, 10) * 3 % CONFIG.vocab_size
POSITIONS = torch.arange(10).expand(2, 10)


def run(model: Llama) -> torch.Tensor:
    return model.logits(model(IDS, POSITIONS, causal))


def stir(model: Llama) -> None:
    """Updates start as zero; random ones show what they do."""
    for name, parameter in model.named_parameters():
        if name.endswith("adapter.b"):
            nn.init.normal_(parameter, std=0.3)


def test_an_update_is_the_low_rank_product():
    a, b, x = torch.randn(4, 16).double(), torch.randn(24, 4).double(), torch.randn(2, 5, 16).double()
    assert torch.allclose(LoRA(a, b, 0.5)(x), x @ (0.5 * b @ a).T, atol=1e-12)


def test_factors_compute_in_the_type_of_the_activations_and_learn_in_their_own():
    lora = LoRA(torch.randn(4, 16), torch.randn(24, 4), 2.0)
    y = lora(torch.randn(3, 16, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and lora.a.grad.dtype == torch.float32


def test_dropout_acts_on_the_input_in_training_alone():
    lora, x = LoRA(torch.eye(64), torch.eye(64), 1.0, dropout=0.5), torch.ones(200, 64)
    kept = lora.train()(x)
    assert set(kept.unique().tolist()) == {0.0, 2.0} and 0.4 < (kept == 0).float().mean() < 0.6
    assert torch.equal(lora.eval()(x), x)


def test_a_model_with_updates_is_the_model_with_their_products_added_to_its_weights():
    torch.manual_seed(0)
    model, merged = (random_model(CONFIG, torch.float64, seed=1) for _ in range(2))
    names = add_lora(model, LoraOptions(rank=4, alpha=12, targets=(*LINEARS, "lm_head")))
    assert len(names) == 7 * 3 + 1
    assert torch.equal(run(model), run(merged))  # B is zero
    stir(model)
    for name in names:
        adapter = model.get_submodule(name.removeprefix("model.")).adapter
        weight = merged.get_submodule(name.removeprefix("model.")).weight
        weight += 12 / 4 * (adapter.b.double() @ adapter.a.double())
    assert (run(model) - run(merged)).abs().max() < 1e-12
    assert (run(model) - run(random_model(CONFIG, torch.float64, seed=1))).abs().max() > 0.1


def test_scales():
    options = LoraOptions(rank=16, alpha=32, rank_pattern={"layers.1.mlp.up_proj": 4}, alpha_pattern={r".*\.k_proj": 8})
    assert options.scale_of("model.layers.0.mlp.up_proj") == 2
    assert options.scale_of("model.layers.1.mlp.up_proj") == 8
    assert options.scale_of("model.layers.11.mlp.up_proj") == 2
    assert options.scale_of("model.layers.0.self_attn.k_proj") == 0.5
    rooted = replace(options, rslora=True)
    assert rooted.scale_of("model.layers.0.mlp.up_proj") == 32 / math.sqrt(16)
    assert lora_tensors(CONFIG, options)["model.layers.1.mlp.up_proj.adapter.a"] == (4, 32)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q_proj",), [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]),
        (("layers.1.mlp.up_proj", "lm_head"), ["model.layers.1.mlp.up_proj", "lm_head"]),
        (r".*\.[02]\..*\.(k|v)_proj", [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 2) for n in "kv"]),
        ("all-linear", adapted(CONFIG, LoraOptions())),
    ],
)
def test_targets_by_name_or_regular_expression(targets, expected):
    assert adapted(CONFIG, LoraOptions(targets=targets)) == expected


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"targets": ("q_proj", "query_key_value")}, "query_key_value.*there are q_proj, k_proj"),
        ({"targets": ("qproj",)}, "no linear layer 'qproj' .did you mean 'q_proj'"),
        ({"targets": r".*\.9\.mlp.*"}, "no linear layer"),
        ({"targets": ("embed_tokens",)}, "no linear layer 'embed_tokens'"),
        ({"targets": ("q_proj(",)}, "nor a regular expression"),
        ({"targets": ()}, "needs targets"),
        ({"modules_to_save": ("lmhead",)}, "no module 'lmhead' .did you mean 'lm_head'"),
        ({"rank": 0}, "rank must be"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank must be"),
        ({"rank_pattern": {"qproj": 8}}, "'qproj' matches no layer .did you mean 'q_proj'"),
        ({"alpha_pattern": {"layers.9.mlp.up_proj": 8}}, "matches no layer .did you mean 'layers.2.mlp.up_proj'"),
        ({"alpha_pattern": {"embedding": 8}}, "matches no layer; there are q_proj, k_proj"),
        ({"rank_pattern": {"k_proj": 8}, "targets": ("q_proj",)}, "'k_proj' .*: add it to the targets"),
        ({"rank_pattern": {"k_proj(": 8}}, "'k_proj\\(' is not a regular expression"),
        ({"alpha": 0}, "alpha must be"),
        ({"dropout": 1.0}, "dropout must be"),
    ],
)
def test_what_can_not_be_meant_is_refused(wrong, said):
    with pytest.raises(UserError, match=said):
        add_lora(random_model(CONFIG, torch.float32), LoraOptions(**wrong))


def test_only_updates_and_modules_to_save_learn():
    model = random_model(CONFIG, torch.float32)
    add_lora(model, LoraOptions(targets=("q_proj", "lm_head"), modules_to_save=("lm_head", "norm", "embed_tokens")))
    run(model).square().mean().backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    whole = {"lm_head.weight", "norm.weight", "embed_tokens.weight"}
    assert learning == whole | {f"layers.{i}.self_attn.q_proj.adapter.{part}" for i in range(3) for part in "ab"}
    assert learning == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_tied_output_layer_is_saved_with_its_embedding():
    tied = replace(CONFIG, tie_word_embeddings=True)
    assert saved(tied, LoraOptions(modules_to_save=("lm_head",))) == ["model.embed_tokens", "lm_head"]
    assert saved(CONFIG, LoraOptions(modules_to_save=("lm_head",))) == ["lm_head"]


def test_updates_start_as_kaiming_and_zero_by_their_name_and_the_seed_alone():
    shape = (64, 1024)
    a = initial("model.layers.0.self_attn.q_proj.adapter.a", shape, 3)
    reference = nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5))
    assert abs(a.std() / reference.std() - 1) < 0.02 and a.abs().max() <= 1024**-0.5
    assert not initial("model.layers.0.self_attn.q_proj.adapter.b", (8, 64), 3).any()
    assert not torch.equal(a, initial("model.layers.0.self_attn.q_proj.adapter.a", shape, 4))
    assert not torch.equal(a, initial("model.layers.1.self_attn.q_proj.adapter.a", shape, 3))
    few, more = (random_model(CONFIG, torch.float32) for _ in range(2))
    add_lora(few, LoraOptions(targets=("up_proj",)), seed=3)
    add_lora(more, LoraOptions(), seed=3)
    assert torch.equal(few.layers["1"].mlp.up_proj.adapter.a, more.layers["1"].mlp.up_proj.adapter.a)


def test_a_model_on_meta_takes_no_memory():
    with torch.device("meta"):
        model = Llama(CONFIG)
    add_lora(model, LoraOptions())
    made = {f"model.{name}": tuple(p.shape) for name, p in model.named_parameters() if "adapter" in name}
    assert made == lora_tensors(CONFIG, LoraOptions()) and all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("size", [2, 4, 8])
def test_split_updates_sum_up_to_the_whole_ones(size):
    """Each rank's part of an update, by the plan, gives its part of a split output, or a part of the sum."""
    torch.manual_seed(0)
    shapes = CONFIG.tensors()
    tensors = lora_tensors(CONFIG, LoraOptions(rank=3, targets=(*LINEARS, "lm_head")))
    for name in (name for name in tensors if name.endswith(".a")):
        module = name.removesuffix(".adapter.a")
        whole = shapes[f"{module}.weight"]
        other = f"{module}.adapter.b"
        a, b = torch.randn(tensors[name]).double(), torch.randn(tensors[other]).double()
        total = torch.zeros(whole).double()
        for rank in range(size):
            place = tp_slice(f"{module}.weight", whole, CONFIG, rank, size)
            of_a = a[tp_slice(name, tensors[name], CONFIG, rank, size)]
            of_b = b[tp_slice(other, tensors[other], CONFIG, rank, size)]
            total[place] = of_b @ of_a
            cut = "b" if TP_PLAN[module.split(".")[-1]] == "row" else "a"
            assert (of_a if cut == "a" else of_b).shape == tensors[f"{module}.adapter.{cut}"]
        assert torch.allclose(total, b @ a, atol=1e-12), name


def test_regular_expressions_need_the_whole_name():
    with pytest.raises(UserError, match="no linear layer"):
        adapted(CONFIG, LoraOptions(targets=r"layers\.0.*"))


def test_names_joined_by_commas_are_several():
    options = parse(
        "train",
        TrainOptions,
        ["--out", "x", "--model.name", "m", "--data.train", "d", "--lora.targets", "q_proj,v_proj"],
    )
    assert options.lora.targets == LoraOptions(targets="q_proj,v_proj").targets == ("q_proj", "v_proj")
    assert LoraOptions(targets=r".*\.\d{1,2}\.mlp\..*").targets == (r".*\.\d{1,2}\.mlp\..*",)
