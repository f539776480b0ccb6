"""Megatron checkpoints: read as they are written elsewhere, written as they are read there, at any cut, bit for bit.

The reference for names and order is a converter of its own below, after AscendSpeed's description of its layout, and,
where it is installed, Megatron-core's model itself.
"""

import argparse
import enum
import importlib.util
import io
import json
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from launching import SECONDS
from puna.cli import main
from puna.errors import UserError
from puna.files import read_json
from puna.model.attention import causal
from puna.model_loader import load_model
from puna.weights.convert import convert
from puna.weights.open import open_checkpoint

GQA = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}


def weights(folder):
    return load_file(folder / "model.safetensors")


def reference(source, folder, tp, pp, *, kv, merge_mlp=False, pad_to=None):
    """AscendSpeed's converter in its own words: chunks of q, k, v, then per key/value head [q, ..., k, v]."""
    state, config = weights(source), json.loads((source / "config.json").read_text())
    layers, head, heads = config["num_hidden_layers"], config["head_dim"], config["num_attention_heads"]

    def rows(name, rank):
        return state[name].chunk(tp, 0)[rank].clone()

    def columns(name, rank):
        return state[name].chunk(tp, 1)[rank].clone()

    def padded(name):
        weight = state[name]
        return torch.cat([weight, weight[-(pad_to - len(weight)) :]]) if pad_to else weight

    def qkv(stem, rank):
        q, k, v = (rows(f"{stem}.self_attn.{n}_proj.weight", rank).unflatten(0, (-1, head)) for n in "qkv")
        q = q.unflatten(0, (kv // tp, heads // kv))
        return torch.cat([q, k[:, None], v[:, None]], 1).flatten(0, 2)

    for rank in range(tp):
        for stage in range(pp):
            encoder, model = {}, {"embedding": {"word_embeddings": {"weight": {}}}, "output_layer": {}}
            if stage == 0:
                model["embedding"]["word_embeddings"]["weight"] = (
                    padded("model.embed_tokens.weight").chunk(tp)[rank].clone()
                )
            if stage == pp - 1:
                encoder["final_layernorm.weight"] = state["model.norm.weight"].clone()
                model["output_layer"]["weight"] = padded("lm_head.weight").chunk(tp)[rank].clone()
            for local in range(layers // pp):
                stem, to = f"model.layers.{stage * layers // pp + local}", f"layers.{local}"
                gate, up = (rows(f"{stem}.mlp.{name}_proj.weight", rank) for name in ("gate", "up"))
                encoder[f"{to}.self_attention.query_key_value.weight"] = qkv(stem, rank)
                encoder[f"{to}.self_attention.dense.weight"] = columns(f"{stem}.self_attn.o_proj.weight", rank)
                if merge_mlp:
                    encoder[f"{to}.mlp.proj.weight"] = torch.cat([gate, up])
                else:
                    encoder |= {f"{to}.mlp.gate_proj.weight": gate, f"{to}.mlp.dense_h_to_4h.weight": up}
                encoder[f"{to}.mlp.dense_4h_to_h.weight"] = columns(f"{stem}.mlp.down_proj.weight", rank)
                for name in ("input_layernorm", "post_attention_layernorm"):
                    encoder[f"{to}.{name}.weight"] = state[f"{stem}.{name}.weight"].clone()
            home = folder / "release" / (f"mp_rank_{rank:02d}" if pp == 1 else f"mp_rank_{rank:02d}_{stage:03d}")
            home.mkdir(parents=True)
            saved = {"checkpoint_version": 3.0, "model": {"language_model": {**model, "encoder": encoder}}}
            torch.save(saved, home / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("release\n")


def files(folder):
    """Every tensor of every rank, by its path through the dictionaries."""
    found = {}

    def walk(state, place):
        for key, value in state.items():
            if isinstance(value, dict):
                walk(value, f"{place}/{key}")
            elif torch.is_tensor(value):
                found[f"{place}/{key}"] = value

    for file in sorted(folder.glob("release/*/model_optim_rng.pt")):
        with torch.serialization.safe_globals([argparse.Namespace]):
            walk(torch.load(file)["model"], file.parent.name)
    return found


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize("merge_mlp", [False, True])
def test_written_as_ascendspeed_writes_it(tp, pp, merge_mlp, tiny_checkpoint, tmp_path):
    source = tiny_checkpoint(**GQA)
    reference(source, tmp_path / "theirs", tp, pp, kv=4, merge_mlp=merge_mlp, pad_to=512 if tp > 1 else None)
    convert(source, tmp_path / "ours", "megatron", tp=tp, pp=pp, merge_mlp=merge_mlp)
    ours, theirs = files(tmp_path / "ours"), files(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_read_as_ascendspeed_writes_it(tiny_checkpoint, tmp_path):
    """Which says nothing of what model it is: config and tokenizer go beside it."""
    source = tiny_checkpoint(**GQA)
    reference(source, tmp_path / "theirs", 2, 2, kv=4, pad_to=512)
    with pytest.raises(UserError, match=r"doesn't say what model it is: .*put the model's config.json"):
        open_checkpoint(tmp_path / "theirs")
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / file, tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "hf")
    before, after = weights(source), weights(tmp_path / "hf")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert main(["info", str(tmp_path / "theirs")]) == 0


MODELS = {
    "grouped heads": GQA,
    "multi-head": GQA | {"num_key_value_heads": 8},
    "padded": GQA | {"vocab_size": 387},
    "tied": GQA | {"tie_word_embeddings": True, "vocab_size": 391},
    "biases": GQA | {"attention_bias": True, "mlp_bias": True},
    "bfloat16": GQA | {"torch_dtype": "bfloat16", "head_dim": 16, "vocab_size": 385},
    "llama 3.1": GQA
    | {
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
}


@pytest.mark.parametrize("names", ["ascendspeed", "legacy", "core"])
@pytest.mark.parametrize("model", MODELS)
def test_there_and_elsewhere_and_back_is_the_same_to_the_bit(model, names, tiny_checkpoint, tmp_path):
    source = tiny_checkpoint(**MODELS[model])
    convert(source, tmp_path / "2x2", "megatron", tp=2, pp=2, names=names)
    done = convert(
        tmp_path / "2x2", tmp_path / "4x1", "megatron", tp=4, pp=1, names=names, make_vocab_size_divisible_by=32
    )
    assert done.manifest["result"]["details"] == {
        "tp": 4,
        "pp": 1,
        "padded_vocab_size": 512 if "vocab_size" in MODELS[model] else 384,
    }
    convert(tmp_path / "4x1", tmp_path / "hf")
    before, after = weights(source), weights(tmp_path / "hf")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert {**read_json(tmp_path / "hf/config.json")} == {**read_json(source / "config.json")}
    with open_checkpoint(source) as a, open_checkpoint(tmp_path / "4x1") as b:
        for name, info in a.tensors.items():  # slices too
            index = tuple(slice(n // 5, n // 2 + 1) for n in info.shape)
            assert torch.equal(a.read(name, index), b.read(name, index)), name


@pytest.mark.parametrize("names", ["legacy", "core"])
@pytest.mark.parametrize("model", MODELS)
def test_the_arguments_in_the_files_say_what_model_it_is(model, names, tiny_checkpoint, tmp_path):
    source = tiny_checkpoint(**MODELS[model])
    convert(source, tmp_path / "mg", "megatron", tp=2, pp=2, names=names)
    for file in (tmp_path / "mg").glob("*.json"):
        file.unlink()
    with open_checkpoint(source) as ours, open_checkpoint(tmp_path / "mg") as found:
        assert found.config == ours.config
        assert found.tokenizer() is None


def test_padding_repeats_the_last_rows(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint(vocab_size=387)
    convert(source, tmp_path / "mg", "megatron", tp=2)
    found, embedding = files(tmp_path / "mg"), weights(source)["model.embed_tokens.weight"]
    parts = [found[f"mp_rank_{rank:02d}/language_model/embedding/word_embeddings/weight"] for rank in range(2)]
    assert torch.equal(torch.cat(parts), torch.cat([embedding, embedding[-125:]]))  # to 512, as 2 x 128 divides it
    convert(source, tmp_path / "wide", "megatron", tp=2, make_vocab_size_divisible_by=1000)
    parts = [files(tmp_path / "wide")[f"mp_rank_{rank:02d}/language_model/output_layer/weight"] for rank in range(2)]
    assert all(len(part) == 1000 for part in parts) and all(part.isfinite().all() for part in parts)


def without_config(folder, source, *, tokenizer):
    """As Megatron-LM leaves it: arguments in the files, at most a tokenizer beside them, only the padded size known."""
    convert(source, folder, "megatron", tp=2, names="core")
    for file in folder.glob("release/*/*.pt"):
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(file)
        del state["args"].vocab_size
        torch.save(state, file)
    (folder / "config.json").unlink()
    if not tokenizer:
        (folder / "tokenizer.json").unlink()


def test_the_size_of_the_vocabulary_comes_from_the_tokenizer_or_the_user(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint(vocab_size=384)
    without_config(tmp_path / "with", source, tokenizer=True)
    without_config(tmp_path / "without", source, tokenizer=False)
    with open_checkpoint(tmp_path / "with") as found:
        assert found.config.vocab_size == 384 and found.details["padded_vocab_size"] == 512
    with open_checkpoint(tmp_path / "without") as found:
        assert found.config.vocab_size == 512
    assert main(["convert", str(tmp_path / "without"), str(tmp_path / "hf"), "--to", "hf", "--vocab-size", "384"]) == 0
    before, after = weights(source), weights(tmp_path / "hf")
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(UserError, match="512 rows in its vocabulary, of which 513"):
        convert(tmp_path / "without", tmp_path / "more", vocab_size=513)


def test_older_names_are_read(tiny_checkpoint, tmp_path):
    """Those of the first AscendSpeed, of Megatron-LM before `encoder`, of Megatron-core without Transformer Engine."""
    source = tiny_checkpoint(**GQA)
    convert(source, tmp_path / "mg", "megatron", tp=2, pp=2)
    renamed(tmp_path / "mg", tmp_path / "old", {
        "encoder.": "", "self_attention": "attention", "dense_h_to_4h": "up_proj", "dense_4h_to_h": "down_proj",
        "language_model.output_layer": "lm_head.lm_head",
    })  # fmt: skip
    convert(source, tmp_path / "te", "megatron", tp=2, pp=2, names="core")
    renamed(tmp_path / "te", tmp_path / "local", {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    })  # fmt: skip
    for folder in ("old", "local"):
        with open_checkpoint(source) as a, open_checkpoint(tmp_path / folder) as b:
            assert all(torch.equal(a.read(name), b.read(name)) for name in a.tensors)


def renamed(source, folder, words):
    """The checkpoint with flat keys in which words are replaced, and states beside the weights that must not matter."""
    shutil.copytree(source, folder)
    for file in folder.glob("release/*/*.pt"):
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(file)
        flat = {}

        def walk(part, place, flat=flat):
            for key, value in part.items():
                walk(value, f"{place}{key}.") if isinstance(value, dict) else flat.update({f"{place}{key}": value})

        walk(state["model"], "")
        for old, new in words.items():
            flat = {key.replace(old, new): value for key, value in flat.items()}
        flat |= {"decoder.layers.0.self_attention.linear_qkv._extra_state": io.BytesIO(b"scales")}
        flat |= {"language_model.layers.0.attention.rotary_emb.inv_freq": torch.ones(4)}
        torch.save({**state, "model": flat}, file)


def test_a_checkpoint_of_a_running_training_is_read(tiny_checkpoint, tmp_path, monkeypatch):
    """With iterations, optimizer, random states, and enums of code that isn't there when puna reads it."""
    source = tiny_checkpoint(**GQA)
    convert(source, tmp_path / "mg", "megatron", pp=2, names="core")
    (tmp_path / "mg/release").rename(tmp_path / "mg/iter_0000120")
    (tmp_path / "mg/latest_checkpointed_iteration.txt").write_text("120")
    module = types.ModuleType("megatron.core.enums")
    module.ModelType = enum.Enum("ModelType", ["encoder_or_decoder"], module="megatron.core.enums")
    with monkeypatch.context() as patch:
        for name in ("megatron", "megatron.core", "megatron.core.enums"):
            patch.setitem(sys.modules, name, module)
        for file in (tmp_path / "mg").glob("iter*/*/*.pt"):
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(file)
            state["args"].model_type, state["args"].exit_signal = module.ModelType(1), signal.SIGTERM
            state |= {"optimizer": {"exp_avg": torch.ones(9)}, "rng_state": [{"np_rng_state": np.random.get_state()}]}
            torch.save(state, file)
    with open_checkpoint(source) as a, open_checkpoint(tmp_path / "mg") as b:
        assert all(torch.equal(a.read(name), b.read(name)) for name in a.tensors)


class Code:
    """What runs when it is unpickled."""

    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("call", "named"),
    [((print, ("hello",)), "print"), ((exec, ("1/0",)), "exec"), ((subprocess.getoutput, ("true",)), "getoutput")],
)
def test_a_file_that_could_run_code_is_refused_and_not_run(call, named, tiny_checkpoint, tmp_path, capfd):
    convert(tiny_checkpoint(), tmp_path / "mg", "megatron", names="core")
    file = tmp_path / "mg/release/mp_rank_00/model_optim_rng.pt"
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(file)
    state["args"].hook = Code(call)
    torch.save(state, file)
    with pytest.raises(UserError, match=f"{named}, not only for tensors, and could run code; puna reads"):
        open_checkpoint(tmp_path / "mg")
    assert "hello" not in capfd.readouterr().out


def edit(folder, change, pattern="release/*/*.pt"):
    for file in sorted(folder.glob(pattern)):
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(file)
        change(state)
        torch.save(state, file)


def encoder(state):
    return state["model"]["language_model"]["encoder"]


LAST = "release/mp_rank_01_001"
FILE = f"{LAST}/model_optim_rng.pt"
TRACKER = "latest_checkpointed_iteration.txt"


def remove(*places):
    return lambda mg: [shutil.rmtree(folder) for place in places for folder in mg.glob(place)]


def with_tensor(name, size=64):
    return lambda mg: edit(mg, lambda state: encoder(state).update({name: torch.ones(size)}))


def with_config(**changes):
    return lambda mg: (mg / "config.json").write_text(json.dumps(read_json(mg / "config.json") | changes))


BAD = {
    r"has ranks for 2 x 2 \(tensor x pipeline\) and lacks mp_rank_01_001": remove(LAST),
    "saved by 2 tensor-parallel ranks, as its files say, and has 1": remove("release/mp_rank_01*"),
    "saved by 2 pipeline-parallel ranks, as its files say, and has 1": remove("release/*_001"),
    "lacks release": remove("release"),
    "has no mp_rank_00": remove("release/*"),
    "mp_rank_01_001 lacks model_optim_rng.pt": lambda mg: (mg / FILE).unlink(),
    "cut off or damaged": lambda mg: (mg / FILE).write_bytes((mg / FILE).read_bytes()[:-500]),
    "damaged or not a file of torch.save": lambda mg: (mg / FILE).write_bytes(b"PK"),
    "lacks iter_0000300": lambda mg: (mg / TRACKER).write_text("300"),
    "neither 'release' nor the number": lambda mg: (mg / TRACKER).write_text("../x"),
    "is of a model of experts": lambda mg: (mg / LAST).rename(mg / f"{LAST}_000"),
    "lacks layer 1's down.weight": lambda mg: edit(mg, lambda s: encoder(s).pop("layers.1.mlp.dense_4h_to_h.weight")),
    "mlp.router.weight, which a LLaMA doesn't have": with_tensor("layers.0.mlp.router.weight"),
    "layer 0's dense.bias, which the config doesn't": with_tensor("layers.0.self_attention.dense.bias"),
    "the copies of model.layers.2.input_layernorm.weight differ": lambda mg: edit(
        mg, lambda state: encoder(state)["layers.0.input_norm.weight"].add_(1), FILE
    ),
    "holds no 'model'": lambda mg: edit(mg, lambda state: state.pop("model"), FILE),
    r"layer 0's qkv.weight has shape \[64, 64\], which for 2 tensor-parallel": with_config(num_key_value_heads=8),
    "more layers than the 3": with_config(num_hidden_layers=3),
    "is missing model.layers.4": with_config(num_hidden_layers=5),
    "embedding.weight has shape": with_config(vocab_size=600),
}


@pytest.mark.parametrize("said", BAD)
def test_bad_input_is_named(said, tiny_checkpoint, tmp_path):
    convert(tiny_checkpoint(**GQA), tmp_path / "mg", "megatron", tp=2, pp=2, names="legacy")
    BAD[said](tmp_path / "mg")
    with pytest.raises(UserError, match=said):
        open_checkpoint(tmp_path / "mg")


def test_ranks_of_another_size_without_arguments(tiny_checkpoint, tmp_path):
    """AscendSpeed's files don't say how many they are; their shapes do."""
    convert(tiny_checkpoint(**GQA), tmp_path / "mg", "megatron", tp=4)
    for rank in ("mp_rank_02", "mp_rank_03"):
        shutil.rmtree(tmp_path / "mg/release" / rank)
    with pytest.raises(UserError, match=r"which for 2 tensor-parallel ranks .* must be .*ranks are missing"):
        open_checkpoint(tmp_path / "mg")


@pytest.mark.parametrize("backend", ["torch_dist", "zarr", None])
def test_a_distributed_checkpoint_is_named_with_the_way_out(backend, tmp_path):
    folder = tmp_path / "iter_0000010"
    folder.mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    (folder / "__0_0.distcp").write_bytes(b"x")
    if backend:
        (folder / "metadata.json").write_text(json.dumps({"sharded_backend": backend}))
    with pytest.raises(UserError, match=f"in the {backend or 'torch_dist'} format.* --ckpt-format torch"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tp": 3}, "4 key/value heads can't be cut for 3 .*choose one of 1, 2, 4"),
        ({"tp": 8}, "4 key/value heads can't be cut for 8"),
        ({"tp": 0}, "--tp must be at least 1"),
        ({"pp": 3}, "4 layers can't be split into 3 pipeline stages: choose one of 1, 2, 4"),
        ({"names": "cor"}, "only ascendspeed, legacy, core .did you mean 'core'"),
        ({"make_vocab_size_divisible_by": 0}, "--make-vocab-size-divisible-by must be at least 1"),
        ({"make_vocab_size_divisible_by": 10**12}, "of 384 tokens to 1000000000000; choose"),
        ({"to": "hf", "tp": 2}, "--tp is an option of megatron, not of hf"),
        ({"dtype": "q8_0"}, "q8_0 is a data type of gguf, not of megatron"),
        ({"ranks": 2}, "--ranks is an option of presharded and meta, not of megatron"),
    ],
)
def test_a_cut_that_does_not_divide_is_refused_with_those_that_do(options, said, tiny_checkpoint, tmp_path):
    with pytest.raises(UserError, match=said):
        convert(tiny_checkpoint(**GQA), tmp_path / "mg", **({"to": "megatron"} | options))
    assert not list(tmp_path.iterdir())


def test_what_the_arguments_can_not_say_is_refused(tiny_checkpoint, tmp_path):
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}
    with pytest.raises(UserError, match="no word for this model's RoPE scaling"):
        convert(tiny_checkpoint(rope_scaling=yarn), tmp_path / "mg", "megatron", names="core")
    with pytest.raises(UserError, match="biases in only one"):
        convert(tiny_checkpoint(attention_bias=True), tmp_path / "mg", "megatron", names="legacy")
    convert(tiny_checkpoint(rope_scaling=yarn, attention_bias=True), tmp_path / "mg", "megatron")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"normalization": "LayerNorm"}, "normalization='LayerNorm', which is no LLaMA"),
        ({"rotary_interleaved": True}, "rotary_interleaved=True"),
        ({"num_experts": 8}, "num_experts=8"),
        ({"num_layers": None}, "its files lack num_layers"),
        ({"hidden_size": "64"}, "hidden_size='64', which is no number"),
    ],
)
def test_arguments_of_another_architecture_are_refused(args, said, tiny_checkpoint, tmp_path):
    convert(tiny_checkpoint(), tmp_path / "mg", "megatron", names="core")
    (tmp_path / "mg/config.json").unlink()
    edit(tmp_path / "mg", lambda state: vars(state["args"]).update(args))
    with pytest.raises(UserError, match=said):
        open_checkpoint(tmp_path / "mg")


def test_an_output_layer_that_differs_from_its_embedding_is_refused(tiny_checkpoint, tmp_path):
    convert(tiny_checkpoint(**MODELS["tied"]), tmp_path / "mg", "megatron", tp=2, pp=2)
    edit(tmp_path / "mg", lambda s: s["model"]["word_embeddings_for_head"]["weight"].add_(1), "release/*_001/*.pt")
    with pytest.raises(UserError, match="copies of model.embed_tokens.weight differ, its output.weight"):
        open_checkpoint(tmp_path / "mg")


def test_virtual_stages_are_read_in_the_order_of_the_model(tiny_checkpoint, tmp_path):
    """Each of 2 ranks holds 2 pieces of the pipeline: layers 0 and 2, 1 and 3."""
    source = tiny_checkpoint(**GQA)
    convert(source, tmp_path / "mg", "megatron", pp=4, names="core")
    folder = tmp_path / "mg/release"
    for stage in range(2):
        file, other = (folder / f"mp_rank_00_{n:03d}/model_optim_rng.pt" for n in (stage, stage + 2))
        with torch.serialization.safe_globals([argparse.Namespace]):
            state, more = torch.load(file), torch.load(other)
        state["args"].pipeline_model_parallel_size = 2
        torch.save(state | {"model0": state.pop("model"), "model1": more["model"]}, file)
        shutil.rmtree(other.parent)
    with open_checkpoint(source) as a, open_checkpoint(tmp_path / "mg") as b:
        assert all(torch.equal(a.read(name), b.read(name)) for name in a.tensors)


@pytest.mark.full
@pytest.mark.parametrize("model", ["grouped heads", "multi-head", "padded", "tied"])
def test_megatron_core_computes_the_same(model, tiny_checkpoint, tmp_path):
    """Its own GPT model takes every tensor of our file, and gives our logits."""
    if importlib.util.find_spec("megatron") is None:
        pytest.skip("needs megatron-core, of the extra `bench`")
    source = tiny_checkpoint(**MODELS[model])
    convert(source, tmp_path / "mg", "megatron", names="core")
    script = Path(__file__).parents[1] / "megatron_core.py"
    subprocess.run([sys.executable, script, tmp_path / "mg", tmp_path / "logits.pt"], check=True, timeout=SECONDS)
    ids = torch.randint(380, (2, 11), generator=torch.Generator().manual_seed(0))
    with open_checkpoint(source) as opened, torch.inference_mode():
        ours = load_model(opened, torch.float32)
        logits = ours.logits(ours(ids, torch.arange(11).expand(2, 11), causal))
    theirs = torch.load(tmp_path / "logits.pt")[..., : logits.shape[-1]]
    assert (logits - theirs).abs().max() < 1e-5


def test_it_runs_from_where_it_lies(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint(**GQA)
    convert(source, tmp_path / "mg", "megatron", tp=2, pp=2)
    ids, positions = torch.randint(300, (2, 9)), torch.arange(9).expand(2, 9)
    logits = []
    for path in (source, tmp_path / "mg"):
        with open_checkpoint(path) as opened, torch.inference_mode():
            model = load_model(opened, torch.float32)
            logits.append(model.logits(model(ids, positions, causal)))
    assert torch.equal(*logits)
