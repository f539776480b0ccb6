"""Adapters in peft's layout: peft loads ours, we load theirs, with equal logits; merged is unmerged; misfits are named.

The peers are transformers and peft; every comparison is in float32 on tiny random models.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_ranks import IDS, logits
from launching import launch
from puna.cli import main
from puna.errors import UserError
from puna.files import manifest_path, read_json
from puna.llm import LLM
from puna.loading import load
from puna.model.linear import Linear
from puna.model.lora import LoraOptions, add_lora, lora_tensors, saved
from puna.model_loader import load_model
from puna.weights.adapter import read_adapter, write_adapter
from puna.weights.merge import merge, merge_adapter
from puna.weights.open import open_checkpoint
from puna.weights.verification import VerificationError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # of the peers, about themselves
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
    "token rows": PLAIN | {"trainable_token_indices": [7, 3, 30]},
    "token rows of both": PLAIN | {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [9, 8, 300]}},
}


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
    with open_checkpoint(base) as source:
        adapter = read_adapter(tmp_path / "a")
        assert (logits(unmerged(source, adapter)) - expected).abs().max() < 1e-5
        assert (logits(merged(source, adapter)) - expected).abs().max() < 1e-5
        assert (logits(load_model(source, torch.float32)) - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    "settings",
    [PLAIN, PLAIN | {"modules_to_save": ["lm_head", "embed_tokens"]}, PLAIN | {"target_modules": ["q_proj", "lm_head"]}]
    + [PLAIN | {"modules_to_save": [name]} for name in ("lm_head", "embed_tokens")]
    + [PLAIN | {"trainable_token_indices": [7, 3, 30]}],
    ids=["plain", "both saved", "output layer", "output saved", "embedding saved", "token rows"],
)
def test_theirs_on_a_tied_model(settings, tiny_checkpoint, tmp_path):
    """What makes embedding and output layer differ unties them."""
    base = tiny_checkpoint(tie_word_embeddings=True)
    expected = theirs(base, tmp_path / "a", settings)
    with open_checkpoint(base) as source:
        adapter = read_adapter(tmp_path / "a")
        assert (logits(unmerged(source, adapter)) - expected).abs().max() < 1e-5
        assert (logits(merged(source, adapter)) - expected).abs().max() < 1e-5
        untied = "lm_head" in settings["target_modules"] or "modules_to_save" in settings
        assert merge(source, adapter).config.tie_word_embeddings is not untied


@pytest.mark.parametrize("tied", [False, True])
def test_theirs_with_added_tokens(tied, tiny_checkpoint, tmp_path):
    base = tiny_checkpoint(tie_word_embeddings=tied)
    with open_checkpoint(base) as source:
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
    with open_checkpoint(base) as source:
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
    with open_checkpoint(tiny_checkpoint()) as source:
        model = load_model(source, torch.float32)
        before = logits(model)
        add_lora(model, options)
        tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
        write_adapter(tmp_path / "a", tensors, source.config, options)
        assert torch.equal(logits(merged(source, read_adapter(tmp_path / "a"))), before)


def test_an_adapter_is_merged_when_a_model_is_loaded_to_generate(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint()
    expected = theirs(base, tmp_path / "a", ADAPTERS["every layer"])
    with LLM(base, adapter=tmp_path / "a", device="cpu", kv_cache_tokens=256) as llm:
        scored = llm.score(IDS.tolist())
        assert type(llm.model.layers["0"].self_attn.qkv_proj) is Linear  # fused like any
    for row, ids, score in zip(expected.log_softmax(-1), IDS, scored, strict=True):
        wanted = row[:-1].gather(-1, ids[1:, None]).flatten()
        assert (torch.tensor(score.logprobs[1:]) - wanted).abs().max() < 1e-4


def test_an_unmerged_adapter_runs_between_fused_layers(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint()
    expected = theirs(base, tmp_path / "a", PLAIN)
    with open_checkpoint(base) as source:
        model = load_model(source, torch.float32, adapter=read_adapter(tmp_path / "a"), fast=True)
    assert model.layers["0"].self_attn.qkv_proj is None and model.layers["0"].mlp.gate_up_proj is not None
    assert (logits(model) - expected).abs().max() < 1e-5


def test_a_loaded_model_carries_its_adapter_and_the_adapters_tokenizer(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint()
    expected = theirs(base, tmp_path / "a", PLAIN)
    with open_checkpoint(base) as source:
        source.tokenizer().with_template("llama2").save(tmp_path / "a")
    model, tokenizer = load(base, adapter=tmp_path / "a", device="cpu")
    assert (logits(model) - expected).abs().max() < 1e-5
    assert "[INST]" in tokenizer.render([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("name", ["every layer", "saved whole"])
def test_a_slice_of_a_merged_weight_is_that_slice_to_the_bit(name, tiny_checkpoint, tmp_path):
    """Else a proof that reads in slices, or ranks that load theirs, would see another model."""
    base = tiny_checkpoint(intermediate_size=777, hidden_size=96, head_dim=24)
    theirs(base, tmp_path / "a", ADAPTERS[name])
    with open_checkpoint(base) as source:
        whole = merge(source, read_adapter(tmp_path / "a"))
        for tensor, info in whole.tensors.items():
            full = whole.read(tensor)
            assert full.shape == info.shape and full.dtype == info.dtype
            for start, stop in ((0, 1), (3, info.shape[0]), (250, 521), (5, 5)):
                assert torch.equal(whole.read(tensor, (slice(start, stop),)), full[start:stop])
            if full.dim() == 2:
                assert torch.equal(whole.read(tensor, (slice(2, 300), slice(7, 33))), full[2:300, 7:33])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merging_into_half_precision_rounds_once(dtype, tiny_checkpoint, tmp_path):
    base = tiny_checkpoint(torch_dtype=dtype)
    theirs(base, tmp_path / "a", PLAIN)
    adapter = read_adapter(tmp_path / "a")
    name = "model.layers.1.mlp.down_proj"
    with open_checkpoint(base) as source:
        a, b = (adapter.read(f"{name}.adapter.{side}").double() for side in "ab")
        exact = source.read(f"{name}.weight").double() + 3 * b @ a
        model = load_model(merge(source, adapter), getattr(torch, dtype))
    error = (model.layers["1"].mlp.down_proj.weight.double() - exact).abs()
    half_ulp = torch.finfo(getattr(torch, dtype)).eps / 2
    assert (error <= 1.001 * half_ulp * exact.abs() + 1e-7).all() and error.any()


def edit(folder, **changes):
    said = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(said))


def edit_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(change(tensors), folder / "adapter_model.safetensors")


def without(tensors, word):
    return {name: tensor for name, tensor in tensors.items() if word not in name}


def wider(tensors):
    return {name: torch.cat([t, t], -1) if "1.self_attn.q_proj.lora_A" in name else t for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda a: edit(a, use_dora=True), "use_dora=True, which puna does not implement"),
        (lambda a: edit(a, bias="all"), "bias='all'"),
        (lambda a: edit(a, init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (lambda a: edit(a, fan_in_fan_out=True), "fan_in_fan_out=True"),
        (lambda a: edit(a, trainable_token_indices=[1]), "lacks .*trainable_tokens_delta"),
        (lambda a: edit(a, peft_type="IA3"), "peft_type 'IA3'"),
        (lambda a: edit(a, target_modules=None), "names no target_modules"),
        (lambda a: edit(a, r="many"), "rank must be a positive integer"),
        (lambda a: edit(a, r=8), r"lora_A.weight has shape \[4, 96\], this model needs \[8, 96\]"),
        (lambda a: edit(a, rank_pattern=3), "damaged"),
        (lambda a: edit(a, target_modules="(q_proj"), "damaged regular expression"),
        (
            lambda a: edit(a, target_modules=["q_proj", "v_proj", "up_proj"]),
            "down_proj.lora_A.weight, but adapter_config.json doesn.t name it",
        ),
        (
            lambda a: edit(a, target_modules=[*PLAIN["target_modules"], "up_proj"]),
            "lacks .*up_proj.lora_A.* and 1 more",
        ),
        (lambda a: edit(a, modules_to_save=["lm_head"]), "lacks base_model.model.lm_head.weight"),
        (
            lambda a: edit_tensors(a, lambda t: without(t, "1.self_attn.q_proj.lora_B")),
            "lacks .*1.self_attn.q_proj.lora_B",
        ),
        (lambda a: edit_tensors(a, wider), r"q_proj.lora_A.weight has shape \[4, 128\]"),
        (
            lambda a: edit_tensors(a, lambda t: t | {"base_model.model.x.lora_magnitude_vector": torch.ones(3)}),
            "magnitude",
        ),
        (
            lambda a: edit_tensors(a, lambda t: t | {"base_model.model.model.visual.weight": torch.ones(3)}),
            "visual.weight",
        ),
        (lambda a: (a / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
        (lambda a: (a / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda a: (a / "adapter_config.json").write_text("{"), "isn't JSON"),
    ],
)
def test_what_is_not_an_adapter_of_this_model_is_refused_by_name(spoil, said, tiny_checkpoint, tmp_path):
    base = tiny_checkpoint()
    theirs(base, tmp_path / "a", PLAIN)
    spoil(tmp_path / "a")
    with open_checkpoint(base) as source, pytest.raises(UserError, match=said):
        merge(source, read_adapter(tmp_path / "a"))


@pytest.mark.parametrize("wrapped", ["_orig_mod.{}", "module._orig_mod.{}", "base_model.model._orig_mod.{}"])
def test_names_of_wrappers_are_stripped(wrapped, tiny_checkpoint, tmp_path):
    base = tiny_checkpoint()
    expected = theirs(base, tmp_path / "a", PLAIN)
    file = tmp_path / "a/adapter_model.safetensors"
    save_file({wrapped.format(name): tensor for name, tensor in load_file(file).items()}, file)
    with open_checkpoint(base) as source:
        assert (logits(unmerged(source, read_adapter(tmp_path / "a"))) - expected).abs().max() < 1e-5


def test_token_rows_are_the_same_bits_in_any_slice(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint()
    theirs(base, tmp_path / "a", ADAPTERS["token rows"])
    with open_checkpoint(base) as source:
        result, name = merge(source, read_adapter(tmp_path / "a")), "model.embed_tokens.weight"
        whole = result.read(name)
        assert (whole != source.read(name)).any(1).nonzero().flatten().tolist() == [3, 7, 30]
        for index in ((slice(5, 31),), (slice(0, 4), slice(8, 20)), (slice(7, 8), slice(0, 1))):
            assert torch.equal(result.read(name, index), whole[index])


@pytest.mark.parametrize("ids", [{"q_proj": [1]}, [3, 3], [-1], ["a"], {"embed_tokens": []}, [1 << 40]])
def test_token_rows_that_cannot_be_are_refused(ids, tiny_checkpoint, tmp_path):
    theirs(tiny_checkpoint(), tmp_path / "a", PLAIN)
    edit(tmp_path / "a", trainable_token_indices=ids)
    with pytest.raises(UserError, match="trainable_token_indices="):
        read_adapter(tmp_path / "a")


def test_an_adapter_of_another_size_of_model_is_refused_by_name(tiny_checkpoint, tmp_path):
    theirs(tiny_checkpoint(num_hidden_layers=3), tmp_path / "deeper", PLAIN)
    theirs(tiny_checkpoint(hidden_size=32, head_dim=8), tmp_path / "narrower", PLAIN)
    with open_checkpoint(tiny_checkpoint()) as source:
        with pytest.raises(UserError, match=r"holds .*model.layers.2.*, but this model has no model.layers.2"):
            merge(source, read_adapter(tmp_path / "deeper"))
        with pytest.raises(UserError, match=r"has shape \[32, 4\], this model needs \[64, 4\]: .*another model"):
            merge(source, read_adapter(tmp_path / "narrower"))


def test_a_cut_file_is_refused(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint()
    theirs(base, tmp_path / "a", PLAIN)
    file = tmp_path / "a/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(UserError, match="cut off"):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize(
    ("to", "dtype", "stored"),
    [
        ("hf", "auto", "float32"),
        ("hf", "auto", "bfloat16"),
        ("gguf", "q8_0", "float32"),
        ("meta", "float16", "bfloat16"),
    ],
)
def test_lora_merge_writes_a_checkpoint_that_is_model_and_adapter(to, dtype, stored, tiny_checkpoint, tmp_path, capsys):
    base = tiny_checkpoint(torch_dtype=stored)
    theirs(base, tmp_path / "a", ADAPTERS["saved whole"])
    dst = tmp_path / ("out.gguf" if to == "gguf" else "out")
    words = ["lora", "merge", str(base), str(tmp_path / "a"), str(dst), "--to", to, "--dtype", dtype]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert out == f"{dst}\n"
    assert (
        "merged: an adapter of rank 4 into 6 layers, 7 tensors replaced; before rounding its logits are within" in err
    )
    said = read_json(manifest_path(dst))["adapter"]
    assert said["alpha"] == 12 and said["name"] == "a" and said["difference"] < 1e-5
    assert str(tmp_path) not in json.dumps(read_json(manifest_path(dst))["source"])
    with open_checkpoint(base) as source, open_checkpoint(dst) as result:
        wanted = stored if dtype == "auto" else dtype
        assert wanted == "q8_0" or result.hf_config["torch_dtype"] == wanted
        expected = logits(unmerged(source, read_adapter(tmp_path / "a")))
        limit = 1e-5 if wanted == "float32" else 0.3
        assert (logits(load_model(result, torch.float32)) - expected).abs().max() < limit
        assert result.tokenizer().encode("a llama") == source.tokenizer().encode("a llama")


def test_lora_merge_refuses_to_write_over_what_it_reads(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint()
    theirs(base, tmp_path / "a", PLAIN)
    with pytest.raises(UserError, match="choose another destination"):
        merge_adapter(base, tmp_path / "a", tmp_path / "a", overwrite=True)
    assert read_adapter(tmp_path / "a").modules


def test_a_sum_that_is_not_the_adapters_is_not_written(tiny_checkpoint, tmp_path, monkeypatch):
    base = tiny_checkpoint()
    theirs(base, tmp_path / "a", PLAIN)
    monkeypatch.setattr("puna.weights.merge.merge", lambda source, adapter: spoiled(merge(source, adapter)))
    with pytest.raises(VerificationError, match="with its adapter"):
        merge_adapter(base, tmp_path / "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def spoiled(source):
    def read(name, index):
        tensor = source.read(name, index)
        return tensor * 1.01 if name.endswith("1.mlp.down_proj.weight") else tensor

    return replace(source, reader=read)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.full)])
def test_ranks_compute_what_one_process_does(size, tiny_checkpoint, tmp_path):
    """With fewer key/value heads than 4 ranks."""
    base = tiny_checkpoint(vocab_size=387)
    folders = {name: tmp_path / name for name in ("every layer", "output layer", "saved whole")}
    for name, folder in folders.items():
        theirs(base, folder, ADAPTERS[name])
    for rank in launch(size, Path(__file__).parents[1] / "adapter_ranks.py", base, *folders.values()):
        assert rank.code == 0, rank.err
    with open_checkpoint(base) as source:
        for folder in folders.values():
            adapter = read_adapter(folder)
            expected = logits(load_model(source, torch.float64, adapter=adapter))
            quantised = logits(load_model(source, torch.float64, adapter=adapter, quantization="int8"))
            for rank in range(size):
                apart, one, int8 = torch.load(folder / f"{rank}.pt")
                assert (int8 - quantised).abs().max() < 1e-12
                assert (apart - expected).abs().max() < 1e-12
                assert (one - expected).abs().max() < 1e-5  # summed in float32
