"""Hugging Face directories: what transformers writes we read, what we write transformers reads, the rest is refused."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from puna.errors import UserError
from puna.files import map_file
from puna.model.attention import causal
from puna.model_loader import load_model
from puna.weights.checkpoint import TensorInfo
from puna.weights.formats import safetensors_file
from puna.weights.formats.hf import HFOptions, write_hf
from puna.weights.open import open_checkpoint

CONFIGS = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 8},
    "bfloat16": {"torch_dtype": "bfloat16"},
}


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def put(folder: Path, tensors: dict[str, torch.Tensor], like: Path, **config) -> Path:
    """A checkpoint of these tensors with the config of `like`, changed."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    said = json.loads((like / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def assert_holds(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    with open_checkpoint(folder) as source:
        assert source.tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert source.tensors[name] == TensorInfo(tuple(tensor.shape), tensor.dtype)
            assert torch.equal(source.read(name), tensor), name


def our_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with open_checkpoint(folder) as source, torch.inference_mode():
        model = load_model(source, torch.float32)
        return model.logits(model(ids, torch.arange(ids.shape[1]).expand(ids.shape), causal))


def their_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_are_those_of_transformers(tiny_checkpoint, config) -> None:
    folder, ids = tiny_checkpoint(**config), torch.randint(384, (2, 12))
    assert (our_logits(folder, ids) - their_logits(folder, ids)).abs().max() < 2e-5


@pytest.mark.parametrize("max_shard", [5_000_000_000, 60_000], ids=["single", "sharded"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_transformers_reads_what_we_write(tiny_checkpoint, tmp_path, config, max_shard) -> None:
    from transformers import AutoTokenizer

    folder, ids = tiny_checkpoint(**config), torch.randint(384, (2, 12))
    with open_checkpoint(folder) as source:
        write_hf(source, tmp_path / "out", options=HFOptions(max_shard / 1e9))
    assert_holds(tmp_path / "out", state_of(folder))
    assert torch.equal(their_logits(tmp_path / "out", ids), their_logits(folder, ids))
    text = "The puna is high. 42 llamas, señor!"
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(folder)
    assert theirs(text).input_ids == ours(text).input_ids and theirs.chat_template == ours.chat_template
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == 1 if max_shard > 1e9 else len(files) > 2 and all(f.stat().st_size < 102_000 for f in files)


def test_reads_the_shards_that_transformers_writes(tiny_checkpoint, tmp_path) -> None:
    from transformers import LlamaForCausalLM

    folder = tiny_checkpoint()
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_holds(tmp_path, state_of(folder))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_reads_bin_files(tiny_checkpoint, tmp_path, zipped) -> None:
    folder = tiny_checkpoint()
    state = state_of(folder)
    shutil.copy(folder / "config.json", tmp_path)
    names = list(state)
    index = {}
    for number, part in enumerate((names[:7], names[7:]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({n: state[n] for n in part}, tmp_path / file, _use_new_zipfile_serialization=zipped)
        index |= dict.fromkeys(part, file)
    assert_holds(tmp_path, state)  # without an index too
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    assert_holds(tmp_path, state)
    torch.save({}, tmp_path / "pytorch_model.bin")
    shutil.copy(folder / "model.safetensors", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read when there are safetensors")
    assert_holds(tmp_path, state)


def test_a_slice_reads_only_its_part_of_the_file(tiny_checkpoint) -> None:
    folder = tiny_checkpoint()
    with open_checkpoint(folder) as source:
        for name, tensor in state_of(folder).items():
            for _ in range(3):
                index = tuple(slice(*sorted(torch.randint(n + 1, (2,)).tolist())) for n in tensor.shape)
                assert torch.equal(source.read(name, index), tensor[index])
        part = source.read("lm_head.weight", (slice(8, 16),))
        source.close()
        with pytest.raises(ValueError, match="closed"):
            source.read("lm_head.weight")
        assert torch.equal(part, state_of(folder)["lm_head.weight"][8:16])
        assert part.untyped_storage().nbytes() == (folder / "model.safetensors").stat().st_size  # a view of the file


@pytest.mark.skipif(sys.platform != "linux", reason="a mapping that reserves no memory is Linux's")
def test_a_file_may_be_larger_than_the_memory(tmp_path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.seek((1 << 40) - 1)
        file.write(b"\7")
    mapped = map_file(tmp_path / "sparse")
    assert mapped.shape == (1 << 40,) and mapped[-1] == 7
    mapped[-2] = 3
    assert map_file(tmp_path / "sparse")[-2] == 0  # a write into a mapping doesn't reach the file


def test_a_directory_without_weights_is_said_so(tiny_checkpoint, tmp_path) -> None:
    shutil.copy(tiny_checkpoint() / "config.json", tmp_path)
    with pytest.raises(UserError, match="config.json and no weights"):
        open_checkpoint(tmp_path)


def test_old_keys_are_dropped_or_found(tiny_checkpoint, tmp_path) -> None:
    plain, tied = tiny_checkpoint(), tiny_checkpoint(tie_word_embeddings=True)
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    assert_holds(put(tmp_path / "a", state_of(plain) | frequencies, plain), state_of(plain))

    state = state_of(tied)
    embedding = state["model.embed_tokens.weight"]
    assert_holds(put(tmp_path / "b", state | {"lm_head.weight": embedding.clone()}, tied), state)
    only_output = {n: t for n, t in state.items() if "embed" not in n} | {"lm_head.weight": embedding}
    assert_holds(put(tmp_path / "c", only_output, tied), state)
    with pytest.raises(UserError, match="tie_word_embeddings"):
        open_checkpoint(put(tmp_path / "d", state | {"lm_head.weight": embedding + 1}, tied))


def test_tensors_that_do_not_fit_the_config_are_named(tiny_checkpoint, tmp_path) -> None:
    folder = tiny_checkpoint()
    state, norm = state_of(folder), "model.layers.1.input_layernorm.weight"
    with pytest.raises(UserError, match=rf"is missing {norm}\.$"):
        open_checkpoint(put(tmp_path / "a", {n: t for n, t in state.items() if n != norm}, folder))
    with pytest.raises(UserError, match=r"doesn't: model.layers.1.adapter.weight\.$"):
        open_checkpoint(put(tmp_path / "b", state | {"model.layers.1.adapter.weight": torch.ones(3)}, folder))
    with pytest.raises(UserError, match=rf"{norm} has shape \[63\], the config says \[64\]"):
        open_checkpoint(put(tmp_path / "c", state | {norm: torch.ones(63)}, folder))
    with pytest.raises(UserError, match="quantised.*lm_head.weight is torch.int8"):
        open_checkpoint(put(tmp_path / "d", state | {"lm_head.weight": torch.ones(384, 64, dtype=torch.int8)}, folder))
    with pytest.raises(UserError, match="and 13 more"):
        open_checkpoint(put(tmp_path / "e", state, folder, num_hidden_layers=4))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("wrong", ["</s>", -1, 10**9, True, [2, "</s>"], 2.0, {"id": 2}])
def test_end_tokens_that_are_none_are_refused(tiny_checkpoint, tmp_path, name, wrong) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint(), tmp_path / "copy"))
    said = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps(said | {"eos_token_id": wrong}))
    with pytest.raises(UserError, match=f"{name}: eos_token_id must be ids below"):
        open_checkpoint(folder)


def test_bad_configs_are_refused(tiny_checkpoint, tmp_path) -> None:
    folder = tiny_checkpoint()
    with pytest.raises(UserError, match="'mistral'"):
        open_checkpoint(put(tmp_path / "a", state_of(folder), folder, model_type="mistral"))
    with pytest.raises(UserError, match="'hidden_size'"):
        open_checkpoint(put(tmp_path / "b", state_of(folder), folder, hidden_size=None))
    (tmp_path / "b/config.json").write_text('{"model_type": "llama"')
    with pytest.raises(UserError, match="config.json is damaged"):
        open_checkpoint(tmp_path / "b")


def test_the_index_is_not_trusted(tiny_checkpoint, tmp_path) -> None:
    folder = tiny_checkpoint()
    state = state_of(folder)
    put(tmp_path, state, folder)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    index = tmp_path / "model.safetensors.index.json"

    def say(file: str, names=tuple(state)) -> None:
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))

    say("model-00001-of-00001.safetensors")
    assert_holds(tmp_path, state)
    for outside in ("../model.safetensors", "/etc/passwd", str(folder / "model.safetensors"), "config.json"):
        say(outside)
        with pytest.raises(UserError, match="not a weight file of this directory"):
            open_checkpoint(tmp_path)
    say("model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match="lacks model-00002-of-00002.safetensors"):
        open_checkpoint(tmp_path)
    say("model-00001-of-00001.safetensors", [*state, "model.layers.7.mlp.up_proj.weight"])
    with pytest.raises(UserError, match="lacks model.layers.7.mlp.up_proj.weight"):
        open_checkpoint(tmp_path)
    index.write_text("{}")
    with pytest.raises(UserError, match="no weight_map"):
        open_checkpoint(tmp_path)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('a checkpoint ran code')",)


def test_a_pickle_that_wants_to_run_code_is_refused(tiny_checkpoint, tmp_path) -> None:
    shutil.copy(tiny_checkpoint() / "config.json", tmp_path)
    torch.save({"model.norm.weight": torch.ones(64), "bomb": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle asks for .*exec.* could run code"):
        open_checkpoint(tmp_path)
    torch.save({"model.norm.weight": torch.ones(64), "step": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="'step', which is not a plain tensor"):
        open_checkpoint(tmp_path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 1), st.booleans())
def test_a_cut_off_weight_file_is_refused(tiny_checkpoint, tmp_path, share, pickled) -> None:
    folder = tiny_checkpoint()
    state = state_of(folder)
    put(tmp_path, state, folder)
    file = tmp_path / ("pytorch_model.bin" if pickled else "model.safetensors")
    if pickled:
        torch.save(state, file)
        (tmp_path / "model.safetensors").unlink()
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * (len(whole) - 1))])
    with pytest.raises(UserError, match="cut off|damaged|fetch"):
        open_checkpoint(tmp_path)
    file.unlink()


def one(shape: list, *place: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": place}


def header(entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


BAD_HEADERS = {
    "overlap": header({"a": one([4], 0, 16), "b": one([4], 8, 24)}) + bytes(24),
    "hole": header({"a": one([1], 4, 8)}) + bytes(8),
    "beyond": header({"a": one([4], 0, 16)}) + bytes(8),
    "longer": header({"a": one([1], 0, 4)}) + bytes(8),
    "other size": header({"a": one([2], 0, 4)}) + bytes(4),
    "negative": header({"a": one([-1, -1], 0, 4)}) + bytes(4),
    "huge": header({"a": one([1 << 40, 1 << 40], 0, 4, dtype="U8")}) + bytes(4),
    "dtype": header({"a": one([1], 0, 4, dtype="F3")}) + bytes(4),
    "text": header({"a": one(["1"], 0, 4)}) + bytes(4),
    "list": header([1]) + bytes(4),
    "nested": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "not json": struct.pack("<Q", 4) + b"abcd",
    "long header": struct.pack("<Q", 1 << 60) + b"{}",
    "empty": b"",
}


@pytest.mark.parametrize("content", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_an_impossible_safetensors_header_is_refused(tmp_path, content) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="x.safetensors is|as F3, a data type"):
        safetensors_file.open_file(tmp_path / "x.safetensors")


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 400), st.binary(min_size=1, max_size=3))
def test_damage_in_a_header_never_goes_further_than_a_sentence(tmp_path, at, damage) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"one": torch.ones(3, 5), "two": torch.ones(7, dtype=torch.bfloat16)}, file)
    whole = file.read_bytes()
    file.write_bytes(whole[:at] + damage + whole[at + len(damage) :])
    try:
        mapped = safetensors_file.open_file(file)
    except UserError:
        return
    assert sum(mapped.read(name).nbytes for name in mapped.tensors) <= len(whole)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from(list(safetensors_file.DTYPES.values())), st.lists(st.integers(0, 5), max_size=3))
    )
)
def test_the_safetensors_package_agrees(tmp_path, wanted) -> None:
    state = {f"tensor {i} é": torch.randint(0, 2, shape).to(dtype) for i, (dtype, shape) in enumerate(wanted)}
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    save_file(state, theirs)
    safetensors_file.write_file(
        ours, {n: TensorInfo(tuple(t.shape), t.dtype) for n, t in state.items()}, state.__getitem__
    )
    ours_read, theirs_read = load_file(ours), safetensors_file.open_file(theirs)
    for name, tensor in state.items():
        for copy in (ours_read[name], theirs_read.read(name)):
            assert copy.shape == tensor.shape and copy.dtype == tensor.dtype
            assert torch.equal(copy.view(torch.uint8) if tensor.dim() else copy.float(),
                               tensor.view(torch.uint8) if tensor.dim() else tensor.float())  # fmt: skip
