"""Adapters in peft's layout: peft loads ours, we load theirs, with equal logits; merged is unmerged; misfits are named.

The peers are transformers and peft; every comparison is in float32 on tiny random models.
"""

import pytest
import torch
from safetensors.torch import load_file

from puna.build import load_model
from puna.model.attend import causal
from puna.model.lora import LoraOptions, add_lora, lora_tensors, saved
from puna.weights.merge import merge
from puna.weights.peft import read_adapter, write_adapter
from puna.weights.source import open_source

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = torch.randint(300, (2, 17), generator=torch.Generator().manual_seed(5))
PLAIN = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "down_proj"]}
ADAPTERS = {
    "plain": PLAIN,
    "rslora": PLAIN | {"use_rslora": True},
    "every layer": PLAIN | {"target_modules": "all-linear"},
    "regex": PLAIN | {"target_modules": r".*\.1\.(mlp|self_attn)\.(up|gate|o)_proj"},
    "patterns": PLAIN | {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {r".*\.down_proj": 3}},
    "some layers": PLAIN | {"layers_to_transform": [1], "exclude_modules": ["v_proj"]},
    "saved whole": PLAIN | {"modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "a saved MLP": PLAIN | {"modules_to_save": ["mlp"]},
    "output layer": PLAIN | {"target_modules": ["k_proj", "lm_head"]},
}


def logits(model):
    positions = torch.arange(IDS.shape[1]).expand(IDS.shape)
    with torch.inference_mode():
        return model.logits(model(IDS, positions, causal))


def unmerged(source, adapter):
    return load_model(source, torch.float32, adapter=adapter)


def merged(source, adapter):
    return load_model(merge(source, adapter), torch.float32)


def their_logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def theirs(base, folder, settings, *, vocab_size=None):
    """An adapter with random numbers in it as peft saves it, and its logits."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM.from_pretrained(base, torch_dtype=torch.float32)
    if vocab_size is not None:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    model = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1, mean=1.0 * ("norm" in name))
    model.save_pretrained(folder, save_embedding_layers=vocab_size is not None or "auto")
    return their_logits(model)


def random_adapter(config, options, seed=0):
    """Trained tensors of an adapter, from the contract of `write_adapter` alone."""
    torch.manual_seed(seed)
    tensors = {name: torch.randn(shape) * 0.1 for name, shape in lora_tensors(config, options).items()}
    whole = saved(config, options)
    return tensors | {
        name: torch.randn(shape) * 0.1 for name, shape in config.tensors().items() if name.rpartition(".")[0] in whole
    }


@pytest.mark.parametrize("name", ADAPTERS)
def test_theirs_loads_in_ours(name, tiny_checkpoint, tmp_path):
    base = tiny_checkpoint()
    expected = theirs(base, tmp_path / "a", ADAPTERS[name])
    with open_source(base) as source:
        adapter = read_adapter(tmp_path / "a")
        assert (logits(unmerged(source, adapter)) - expected).abs().max() < 1e-5
        assert (logits(merged(source, adapter)) - expected).abs().max() < 1e-5
        assert (logits(load_model(source, torch.float32)) - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    "settings",
    [PLAIN, PLAIN | {"modules_to_save": ["lm_head", "embed_tokens"]}, PLAIN | {"target_modules": ["q_proj", "lm_head"]}]
    + [PLAIN | {"modules_to_save": [name]} for name in ("lm_head", "embed_tokens")],
    ids=["plain", "both saved", "output layer", "output saved", "embedding saved"],
)
def test_theirs_on_a_tied_model(settings, tiny_checkpoint, tmp_path):
    """What makes embedding and output layer differ unties them."""
    base = tiny_checkpoint(tie_word_embeddings=True)
    expected = theirs(base, tmp_path / "a", settings)
    with open_source(base) as source:
        adapter = read_adapter(tmp_path / "a")
        assert (logits(unmerged(source, adapter)) - expected).abs().max() < 1e-5
        assert (logits(merged(source, adapter)) - expected).abs().max() < 1e-5
        untied = "lm_head" in settings["target_modules"] or "modules_to_save" in settings
        assert merge(source, adapter).config.tie_word_embeddings is not untied


@pytest.mark.parametrize("tied", [False, True])
def test_theirs_with_added_tokens(tied, tiny_checkpoint, tmp_path):
    base = tiny_checkpoint(tie_word_embeddings=tied)
    with open_source(base) as source:
        size = source.config.vocab_size + 5
        expected = theirs(base, tmp_path / "a", PLAIN, vocab_size=size)
        adapter = read_adapter(tmp_path / "a")
        assert merge(source, adapter).config.vocab_size == size
        assert expected.shape[-1] == size
        assert (logits(unmerged(source, adapter)) - expected).abs().max() < 1e-5
        assert (logits(merged(source, adapter)) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        LoraOptions(rank=4, alpha=12),
        LoraOptions(rank=4, alpha=12, rslora=True, targets=r".*\.0\..*_proj"),
        LoraOptions(rank=4, targets=("up_proj",), modules_to_save=("norm", "lm_head", "embed_tokens")),
        LoraOptions(rank=4, targets=("up_proj", "down_proj"), modules_to_save=("layers.1.mlp.up_proj",)),
        LoraOptions(rank=4, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.0.mlp.up_proj": 7}),
    ],
    ids=["plain", "rslora, one layer", "saved whole", "one saved", "patterns"],
)
def test_ours_loads_in_theirs(options, tied, tiny_checkpoint, tmp_path):
    base = tiny_checkpoint(tie_word_embeddings=tied)
    with open_source(base) as source:
        tensors = random_adapter(source.config, options)
        write_adapter(tmp_path / "a", tensors, source.config, options, base=str(base), tokenizer=source.tokenizer())
        adapter = read_adapter(tmp_path / "a")
        ours = logits(unmerged(source, adapter))
        assert merge(source, adapter).config.tie_word_embeddings is tied
    model = transformers.LlamaForCausalLM.from_pretrained(base, torch_dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "a").eval()
    stored = load_file(tmp_path / "a/adapter_model.safetensors")
    loaded = peft.get_peft_model_state_dict(model)
    assert stored.keys() == loaded.keys() and all(torch.equal(stored[name], loaded[name]) for name in stored)
    assert (ours - their_logits(model)).abs().max() < 1e-5


def test_an_untrained_adapter_of_ours_changes_nothing(tiny_checkpoint, tmp_path):
    options = LoraOptions(rank=4)
    with open_source(tiny_checkpoint()) as source:
        model = load_model(source, torch.float32)
        before = logits(model)
        add_lora(model, options)
        tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
        write_adapter(tmp_path / "a", tensors, source.config, options)
        assert torch.equal(logits(merged(source, read_adapter(tmp_path / "a"))), before)
