"""GGUF both ways: every type in, four types out, names and RoPE order right, and no file that can hurt.

The gguf package, llama.cpp's formulas and llama.cpp itself are the references.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch

from puna.errors import UserError
from puna.model import attention
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.tokenizer import Tokenizer
from puna.weights.checkpoint import Checkpoint, TensorInfo, check_tensors
from puna.weights.convert import convert
from puna.weights.formats.gguf.container import read_gguf, write_file
from puna.weights.formats.gguf.names import gguf_name, hf_name, metadata_from
from puna.weights.formats.gguf.reader import open_gguf
from puna.weights.formats.gguf.writer import write_gguf
from puna.weights.formats.hf import open_hf
from puna.weights.open import open_checkpoint

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
SHAPES = {
    "grouped": {},
    "tied": {"tie_word_embeddings": True},
    "multi-head": {"num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 32},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
    "llama3": {"rope_scaling": LLAMA3 | {"factor": 32.0}, "rope_theta": 500000.0, "tie_word_embeddings": True},
}


def dequantisable() -> list[str]:
    names = []
    for kind, (_, size) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            continue
        names.append(kind.name)
    return names


def tiny_config(**keys) -> ModelConfig:
    return ModelConfig(**({"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
                           "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8} | keys))  # fmt: skip


WORDS = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
         "tokenizer.ggml.tokens": ["a", "b", "ab", "<e>"], "tokenizer.ggml.token_type": [1, 1, 1, 3],
         "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 3,
         "tokenizer.ggml.eot_token_id": 1, "tokenizer.ggml.add_bos_token": False}  # fmt: skip


def in_memory(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Checkpoint:
    """A source of random tensors that no file holds."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in config.tensors().items()}
    return Checkpoint(
        path=Path("somewhere/tiny"), format="hf", config=config, hf_config={}, generation={}, files=[], details={},
        tensors={name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()},
        reader=lambda name, index: tensors[name] if index is None else tensors[name][index],
        load_tokenizer=lambda: Tokenizer.from_gguf(WORDS),
    )  # fmt: skip


def written(source: Checkpoint, tmp_path: Path, dtype=None) -> Path:
    write_gguf(source, tmp_path / "model.gguf", dtype)
    return tmp_path / "model.gguf"


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_hf_to_gguf_and_back_is_bit_equal(shape, dtype, tiny_checkpoint, tmp_path):
    source = open_hf(tiny_checkpoint(torch_dtype=dtype, **SHAPES[shape]))
    back = open_gguf(written(source, tmp_path))
    check_tensors(back)
    assert back.config == source.config
    assert list(back.tensors) == list(source.tensors)
    assert back.hf_config == source.hf_config
    for name in source.tensors:
        assert back.tensors[name] == source.tensors[name]
        assert torch.equal(back.read(name), source.read(name)), name


def test_dtype_is_cast_on_request(tmp_path):
    source = in_memory(tiny_config())
    back = open_gguf(written(source, tmp_path, torch.float16))
    for name, info in source.tensors.items():
        expected = source.read(name).half() if len(info.shape) > 1 else source.read(name)
        assert torch.equal(back.read(name), expected), name


def test_norms_keep_float32_where_half_would_lose(tmp_path):
    source = in_memory(tiny_config(), torch.bfloat16)
    precise = torch.full((32,), 1 + 2**-20)
    source.tensors["model.norm.weight"] = TensorInfo((32,), torch.float32)
    plain, source.reader = source.reader, lambda name, i: precise if name == "model.norm.weight" else plain(name, i)
    back = open_gguf(written(source, tmp_path))
    assert torch.equal(back.read("model.norm.weight"), precise)
    assert back.read("model.layers.0.input_layernorm.weight").dtype == torch.bfloat16


def test_vocabulary_is_padded_to_the_embedding_and_unpadded_again(tmp_path):
    path = written(in_memory(tiny_config()), tmp_path)
    assert read_gguf(path).metadata["tokenizer.ggml.tokens"][3:6] == ["<e>", "[PAD4]", "[PAD5]"]
    assert len(read_gguf(path).metadata["tokenizer.ggml.token_type"]) == 40
    tokenizer = open_gguf(path).tokenizer()
    assert tokenizer.vocab_size == 4 and tokenizer.token(3) == "<e>"


def test_end_tokens_become_a_list(tmp_path):
    source = open_gguf(written(in_memory(tiny_config()), tmp_path))
    assert source.generation == {"bos_token_id": 0, "eos_token_id": [3, 1]}
    assert source.hf_config["eos_token_id"] == [3, 1]


# --- what others find in our files ------------------------------------------------------------------------------------


def test_gguf_package_reads_what_we_write(tmp_path):
    config = tiny_config(attention_bias=True, rope_scaling=LLAMA3, rope_theta=500000.0)
    source = in_memory(config)
    reader = gguf.GGUFReader(written(source, tmp_path))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama" and fields["general.file_type"] == gguf.LlamaFileType.ALL_F32
    assert fields["llama.attention.head_count_kv"] == 2 and fields["llama.rope.dimension_count"] == 8
    assert fields["tokenizer.ggml.pre"] == "smollm" and fields["tokenizer.ggml.add_bos_token"] is False
    assert reader.fields["tokenizer.ggml.eos_token_id"].types == [gguf.GGUFValueType.UINT32]
    assert reader.fields["tokenizer.ggml.token_type"].types[-1] == gguf.GGUFValueType.INT32
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    known = gguf.TensorNameMap(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name in source.tensors:
        stem, _, kind = name.rpartition(".")
        assert gguf_name(name) == f"{known.get_name(stem)}.{kind}" and hf_name(gguf_name(name)) == name
        expected = source.read(name).numpy()
        heads = {"q_proj": 4, "k_proj": 2}.get(stem.rsplit(".")[-1])
        if heads:
            expected = interleave(expected, heads)
        np.testing.assert_array_equal(tensors.pop(gguf_name(name)).data, expected)
    assert list(tensors) == ["rope_freqs.weight"]


@pytest.mark.parametrize("factor, low, high, trained, theta, head", [
    (8.0, 1.0, 4.0, 8192, 500000.0, 128), (32.0, 1.0, 4.0, 8192, 500000.0, 64), (4.0, 2.0, 6.0, 1024, 10000.0, 64),
])  # fmt: skip
def test_llama3_scaling_is_llama_cpps_tensor_and_is_recovered_from_it(
    factor, low, high, trained, theta, head, tmp_path
):
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
               "original_max_position_embeddings": trained}  # fmt: skip
    config = tiny_config(head_dim=head, rope_theta=theta, rope_scaling=scaling)
    path = written(in_memory(config), tmp_path)
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}["rope_freqs.weight"]
    expected = []  # the loop of convert_hf_to_gguf.py
    for freq in (1.0 / theta ** (np.arange(0, head, 2, dtype=np.float32) / head)).tolist():
        wavelength = 2 * math.pi / freq
        if wavelength < trained / high:
            expected.append(1.0)
        elif wavelength > trained / low:
            expected.append(factor)
        else:
            smooth = (trained / wavelength - low) / (high - low)
            expected.append(1 / ((1 - smooth) / factor + smooth))
    np.testing.assert_allclose(stored, expected, rtol=1e-5)
    assert open_gguf(path).config == config

    # Other writers don't name the settings: found from the tensor alone, up to the scale that changes nothing.
    found = open_gguf(strip(path, "puna.rope_scaling")).config.rope_scaling
    assert found["factor"] == factor
    assert found["original_max_position_embeddings"] / found["low_freq_factor"] == pytest.approx(
        trained / low, rel=1e-3
    )
    assert found["high_freq_factor"] / found["low_freq_factor"] == pytest.approx(high / low, rel=1e-3)


def strip(path: Path, key: str) -> Path:
    """A copy of a file without one metadata key."""
    file = read_gguf(path)
    copy = path.with_name("stripped.gguf")
    tensors = {name: (tensor.shape, tensor.type) for name, tensor in file.tensors.items()}
    metadata = {name: value for name, value in file.metadata.items() if name != key}
    write_file(copy, metadata, tensors, lambda name: [np.ascontiguousarray(file.tensors[name].rows())])
    return copy


def test_q8_0_is_the_gguf_packages_and_within_its_bound(tmp_path):
    source = in_memory(tiny_config(head_dim=8, hidden_size=64, intermediate_size=48))  # 48 is no multiple of 32
    path = written(source, tmp_path, "q8_0")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    back = open_gguf(path)
    assert back.details["quantised"] and back.hf_config["torch_dtype"] == "float32"
    for name, info in source.tensors.items():
        value, tensor = source.read(name), stored[gguf_name(name)]
        if len(info.shape) == 1:
            assert tensor.tensor_type.name == "F32"
        elif "down_proj" in name:
            assert tensor.tensor_type.name == "F16"
        else:
            rows = to_llama_cpp(value.numpy(), name, back.config)
            np.testing.assert_array_equal(tensor.data, gguf.quantize(rows, gguf.GGMLQuantizationType.Q8_0))
            block = value.unflatten(-1, (-1, 32))
            bound = block.abs().amax(-1, keepdim=True) * (0.5 / 127 + 2**-11)
            assert (back.read(name).unflatten(-1, (-1, 32)) - block).abs().le(bound).all(), name


def to_llama_cpp(weight: np.ndarray, name: str, config: ModelConfig) -> np.ndarray:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    return interleave(weight, heads) if heads else weight


# --- every type in ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", dequantisable())
def test_every_type_reads_as_the_gguf_package_dequantises_it(kind, tmp_path):
    """Random bytes for the matrices; slices read equal slices of the whole."""
    config = tiny_config(vocab_size=48, hidden_size=256, intermediate_size=512, head_dim=64)
    number = gguf.GGMLQuantizationType[kind]
    raw: dict[str, np.ndarray] = {}
    rng = np.random.default_rng()
    for name, shape in config.tensors().items():
        if len(shape) == 1:
            raw[gguf_name(name)] = np.ones(shape, np.float32)
        else:
            size = gguf.quant_shape_to_byte_shape(shape, number)
            raw[gguf_name(name)] = rng.integers(0, 256, size, np.uint8)
    shapes = {gguf_name(name): (shape, kind if len(shape) > 1 else "F32") for name, shape in config.tensors().items()}
    metadata = {"general.architecture": "llama", **metadata_from(config)}
    write_file(tmp_path / "any.gguf", metadata, shapes, lambda name: [raw[name]])
    with np.errstate(all="ignore"):
        source = open_gguf(tmp_path / "any.gguf")
        for name, shape in config.tensors().items():
            if len(shape) == 1:
                continue
            stored = raw[gguf_name(name)]
            view = stored if kind not in ("F32", "F16") else stored.view(np.float32 if kind == "F32" else np.float16)
            dequantised = gguf.dequantize(view, number)
            whole = source.read(name)
            np.testing.assert_array_equal(to_llama_cpp(whole.float().numpy(), name, config), dequantised)
            columns = sorted(rng.integers(0, shape[1], 2) + [0, 1])
            for index in [(slice(64, 128),), (slice(1, 40, 3), slice(*columns)), (slice(None), slice(128, 256))]:
                part = source.read(name, index)
                torch.testing.assert_close(part, whole[index], rtol=0, atol=0, equal_nan=True)


def test_split_files_are_read_by_any_part_and_by_their_directory(tmp_path):
    source = in_memory(tiny_config())
    whole = read_gguf(written(source, tmp_path))
    folder = tmp_path / "split"
    folder.mkdir()
    names = list(whole.tensors)
    parts = [folder / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    for number, (part, own) in enumerate(zip(parts, (names[:4], names[4:]), strict=True)):
        split = {"split.no": number, "split.count": 2, "split.tensors.count": len(names)}
        write_file(part, (whole.metadata if number == 0 else {}) | split,
                   {name: (whole.tensors[name].shape, "F32") for name in own},
                   lambda name: [np.ascontiguousarray(whole.tensors[name].rows())])  # fmt: skip
    for path in (*parts, folder):
        back = open_gguf(path)
        assert len(back.files) == 2
        assert all(torch.equal(back.read(name), source.read(name)) for name in source.tensors)
    parts[1].unlink()
    with pytest.raises(UserError, match="m-00002-of-00002.gguf is not beside it"):
        open_gguf(parts[0])


# --- metadata, read as llama.cpp reads it -----------------------------------------------------------------------------


@pytest.mark.parametrize("changes, scaling", [
    ({"llama__rope__scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ({"llama__rope__scaling__factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
    ({"llama__rope__scaling__factor": 2.0, "llama__rope__scale_linear": 4.0}, {"rope_type": "linear", "factor": 2.0}),
    ({"llama__rope__scaling__type": "none", "llama__rope__scaling__factor": 4.0}, None),
    ({"llama__rope__scaling__type": "linear"}, None),
    ({"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 0.0}, None),
    ({"llama__rope__scaling__type": "yarn", "llama__rope__scale_linear": 4.0}, {"rope_type": "yarn", "factor": 4.0}),
    ({"llama__rope__scaling__type": "yarn", "llama__rope__scaling__finetuned": True}, None),
])  # fmt: skip
def test_rope_scaling_is_read_by_llama_cpps_rules(changes, scaling, tmp_path):
    assert open_checkpoint(edited(tmp_path, **changes)).config.rope_scaling == scaling


@pytest.mark.parametrize("changes", [
    {"llama__rope__scaling__type": "ntk"}, {"llama__rope__scaling__alpha": 2.0},
    {"llama__rope__dimension_sections": [4]},
])  # fmt: skip
def test_rope_scaling_that_is_not_understood_is_refused(changes, tmp_path):
    with pytest.raises(UserError, match="which puna doesn't implement"):
        open_checkpoint(edited(tmp_path, **changes))


@pytest.mark.parametrize("config", [
    {"rms_norm_eps": 1.2345678901e-5, "rope_theta": 123456.789},
    {"rope_scaling": {"rope_type": "yarn", "factor": 3.3, "finetuned": True, "truncate": True, "mscale": 1.0}},
])  # fmt: skip
def test_a_config_that_gguf_rounds_or_names_otherwise_is_converted(config, tiny_checkpoint, tmp_path):
    convert(tiny_checkpoint(**config), tmp_path / "x.gguf", "gguf")


# --- tokenizers -------------------------------------------------------------------------------------------------------


def test_three_end_tokens_beside_the_spelled_ones_are_carried_and_more_are_refused(tiny_checkpoint, tmp_path):
    done = convert(tiny_checkpoint(eos_token_id=[2, 40, 41]), tmp_path / "x.gguf", "gguf")
    with open_checkpoint(done.path) as result:
        assert {2, 40, 41} <= set(result.tokenizer().stop_ids)
    for to in ("meta", "hf"):
        convert(done.path, tmp_path / to, to)
    with pytest.raises(UserError, match="GGUF can't carry all end tokens"):
        convert(tiny_checkpoint(eos_token_id=[2, 40, 41, 42]), tmp_path / "y.gguf", "gguf")
    assert not list(tmp_path.glob("*y.gguf*"))


def spm_checkpoint(like: Path, folder: Path, **settings) -> Path:
    """The weights of `like` beside a SentencePiece tokenizer.model alone."""
    import io

    import sentencepiece

    model, texts = io.BytesIO(), [f"the {word} of the llama" for word in ("king", "wool", "grass", "hill", "song")] * 9
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=300, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2)  # fmt: skip
    shutil.copytree(like, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"} | settings))
    return folder


def test_space_rules_that_llama_cpp_lacks_are_refused_before_anything_is_written(tiny_checkpoint, tmp_path):
    convert(spm_checkpoint(tiny_checkpoint(), tmp_path / "old", legacy=True), tmp_path / "x.gguf", "gguf")
    folder = spm_checkpoint(tiny_checkpoint(), tmp_path / "new", legacy=False)
    with pytest.raises(UserError, match="legacy: true in tokenizer_config.json"):
        convert(folder, tmp_path / "y.gguf", "gguf")
    convert(folder, tmp_path / "hf", "hf")
    assert not list(tmp_path.glob("*y.gguf*"))


def test_tokens_beyond_the_embedding_are_left_out(tmp_path):
    source = in_memory(tiny_config(vocab_size=3))
    assert open_gguf(written(source, tmp_path)).tokenizer().vocab_size == 3


# --- bad input --------------------------------------------------------------------------------------------------------


def edited(tmp_path: Path, **changes) -> Path:
    """A good file with other metadata (dots of a key are underscores twice)."""
    path = written(in_memory(tiny_config()), tmp_path)
    file = read_gguf(path)
    metadata = file.metadata | {key.replace("__", "."): value for key, value in changes.items()}
    tensors = {name: (tensor.shape, tensor.type) for name, tensor in file.tensors.items()}
    write_file(tmp_path / "edited.gguf", {key: value for key, value in metadata.items() if value is not None}, tensors,
               lambda name: [np.ascontiguousarray(file.tensors[name].rows())])  # fmt: skip
    return tmp_path / "edited.gguf"


@pytest.mark.parametrize("changes, said", [
    ({"general__architecture": "qwen2"}, "architecture .qwen2., which puna doesn't implement"),
    ({"llama__expert_count": 8}, "llama.expert_count = 8"),
    ({"llama__attention__head_count": None}, "lacks llama.attention.head_count"),
    ({"llama__attention__head_count": [4]}, "per layer"),
    ({"llama__attention__layer_norm_rms_epsilon": float("nan")}, "rms_epsilon = nan, which must be"),
    ({"llama__rope__dimension_count": 4}, "rope.dimension_count = 4"),
    ({"llama__rope__scaling__type": "longrope"}, "RoPE scaling .longrope."),
    ({"llama__embedding_length": 48}, "doesn't fit its config"),
    ({"llama__block_count": 2**32 - 1}, "4,294,967,295 layers and holds 12 tensors"),
    ({"llama__block_count": 2}, "is missing model.layers.1."),
])  # fmt: skip
def test_what_is_not_implemented_is_refused_by_name(changes, said, tmp_path):
    with pytest.raises(UserError, match=said):
        open_checkpoint(edited(tmp_path, **changes))


def test_a_type_that_cannot_be_dequantised_is_refused_by_name(tmp_path):
    config = tiny_config(hidden_size=256, head_dim=64)
    shapes = {gguf_name(name): (shape, "F32") for name, shape in config.tensors().items()}
    shapes["blk.0.attn_q.weight"] = ((256, 256), "Q8_K")
    sizes = {name: 292 * 256 if kind == "Q8_K" else 4 * math.prod(shape) for name, (shape, kind) in shapes.items()}
    metadata = {"general.architecture": "llama", **metadata_from(config)}
    write_file(tmp_path / "k.gguf", metadata, shapes, lambda name: [np.zeros(sizes[name], np.uint8)])
    with pytest.raises(UserError, match="blk.0.attn_q.weight is stored as Q8_K"):
        open_gguf(tmp_path / "k.gguf")


def test_truncated_anywhere_is_one_sentence(tmp_path):
    path = written(in_memory(tiny_config()), tmp_path)
    whole = path.read_bytes()
    data = min(tensor.offset for tensor in read_gguf(path).tensors.values())
    cuts = [0, 3, 4, 7, 8, 16, 23, 24, data - 1, data, len(whole) - 64, *random.sample(range(24, len(whole) - 32), 60)]
    for cut in cuts:
        (tmp_path / "cut.gguf").write_bytes(whole[:cut])
        with pytest.raises(UserError) as caught:
            open_gguf(tmp_path / "cut.gguf")
        assert "\n" not in str(caught.value)


def test_damaged_headers_are_refused_or_read_never_crash(tmp_path):
    path = written(in_memory(tiny_config(rope_scaling=LLAMA3)), tmp_path)
    whole = path.read_bytes()
    data = min(tensor.offset for tensor in read_gguf(path).tensors.values())
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 1, 4))):
            damaged[rng.randrange(4, data + 16)] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        try:
            open_checkpoint(tmp_path / "damaged.gguf").close()
        except UserError as error:
            assert "\n" not in str(error)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error


@pytest.mark.parametrize("source, dtype, said", [
    (in_memory(tiny_config(rope_scaling={"rope_type": "dynamic", "factor": 2.0})), None, "dynamic RoPE scaling"),
    (in_memory(tiny_config(rope_scaling={"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.5})), None,
     "attention_factor of yarn"),
    (in_memory(tiny_config(), torch.float64), None, "in torch.float64"),
])  # fmt: skip
def test_what_gguf_cannot_carry_is_refused_by_name(source, dtype, said, tmp_path):
    with pytest.raises(UserError, match=said):
        written(source, tmp_path, dtype)


def test_values_beyond_float16_are_refused(tmp_path):
    source = in_memory(tiny_config())
    source.read("lm_head.weight")[3, 3] = 70000
    with pytest.raises(UserError, match="lm_head.weight has values beyond"):
        written(source, tmp_path, torch.float16)


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path):
    source = in_memory(tiny_config())
    source.load_tokenizer = lambda: None
    with pytest.raises(UserError, match="has no tokenizer"):
        written(source, tmp_path)


# --- real weights -----------------------------------------------------------------------------------------------------


def load(source: Checkpoint, change=lambda name, tensor: tensor) -> Llama:
    model = Llama(source.config)
    state = {name.removeprefix("model."): change(name, source.read(name).float()) for name in source.tensors}
    model.load_state_dict(state, strict=False)
    model.tie()
    return model


@torch.inference_mode()
def logits(model: Llama, ids: list[int]) -> torch.Tensor:
    batch = torch.tensor([ids])
    return model.logits(model(batch, torch.arange(len(ids))[None], attention.causal))[0]


@pytest.mark.slow
def test_smollm2_perplexity_and_what_the_interleaved_order_does_to_it(smollm2, shared_data):
    source = open_gguf(smollm2)
    text = (shared_data / "wikitext2/valid.txt").read_text()[:4000]
    ids = source.tokenizer().encode(text, bos=False)[:256]

    def perplexity(model: Llama) -> float:
        return math.exp(torch.nn.functional.cross_entropy(logits(model, ids)[:-1], torch.tensor(ids[1:])).item())

    def left_interleaved(name: str, tensor: torch.Tensor) -> torch.Tensor:
        heads = {"q_proj": 9, "k_proj": 3}.get(name.split(".")[-2])
        return torch.from_numpy(interleave(tensor.numpy(), heads)) if heads else tensor

    assert perplexity(load(source)) == pytest.approx(15.1, abs=0.1)
    assert perplexity(load(source, left_interleaved)) == pytest.approx(245, abs=5)


@pytest.mark.slow
def test_smollm2_answers(smollm2):
    source = open_gguf(smollm2)
    tokenizer, model = source.tokenizer(), load(source)
    ids = tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    answer: list[int] = []
    while len(answer) < 20 and not (answer and answer[-1] in tokenizer.stop_ids):
        answer.append(int(logits(model, ids + answer)[-1].argmax()))
    assert tokenizer.decode(answer).strip() == "The capital of France is Paris."


PROBES = ["Hello, world!", "it's 1234 o'clock", "  two spaces\n\nand\ttabs", "naïve café, señor Ærø",
          "日本語 и кириллица 🦙", "def f(x):\n    return x + 1", "<|im_start|>user", "I'LL 3.14 100,000"]  # fmt: skip


@pytest.fixture
def open_llama_cpp():
    """`open_llama_cpp(path)`: a file as llama.cpp reads it, with `encode(text, special)` and `logits(ids)`."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs the bench extra: pip install llama-cpp-python")

    def opened(path: Path) -> SimpleNamespace:
        f32 = llama_cpp.GGML_TYPE_F32
        llama = llama_cpp.Llama(
            str(path), n_ctx=128, n_threads=1, logits_all=True, type_k=f32, type_v=f32, verbose=False
        )

        def encode(text: str, special: bool) -> list[int]:
            return llama.tokenize(text.encode(), add_bos=False, special=special)

        def scores(ids: list[int]) -> torch.Tensor:
            llama.reset()
            llama.eval(ids)
            return torch.tensor(llama.scores[: len(ids)])

        return SimpleNamespace(encode=encode, logits=scores)

    return opened


@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_reads_our_files_and_agrees(shape, tiny_checkpoint, open_llama_cpp, tmp_path):
    source = open_hf(tiny_checkpoint(**SHAPES[shape]))
    theirs = open_llama_cpp(written(source, tmp_path))
    tokenizer = source.tokenizer()
    for text in PROBES:
        for special in (True, False):
            assert theirs.encode(text, special) == tokenizer.encode(text, bos=False, special=special), text
    ids = torch.randint(0, source.config.vocab_size, (100,)).tolist()
    torch.testing.assert_close(theirs.logits(ids), logits(load(source), ids), rtol=1e-3, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama2", "llama3"])
def test_llama_cpp_tokenises_as_we_do_with_the_real_vocabularies(family, shared_data, open_llama_cpp, tmp_path):
    tokenizer = Tokenizer.load(shared_data / "tokenizers" / family)
    source = in_memory(tiny_config(vocab_size=tokenizer.vocab_size + 8))
    source.load_tokenizer = lambda: tokenizer
    path = written(source, tmp_path, torch.float16)
    theirs, back = open_llama_cpp(path), open_gguf(path).tokenizer()
    for text in PROBES:
        for special in (True, False):
            ids = tokenizer.encode(text, bos=False, special=special)
            assert theirs.encode(text, special) == ids == back.encode(text, bos=False, special=special), text
    assert (back.bos_id, back.add_bos, set(back.stop_ids)) == (
        tokenizer.bos_id,
        tokenizer.add_bos,
        set(tokenizer.stop_ids),
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 1e-4), ("q8_0", 0.02)])
def test_llama_cpp_agrees_on_smollm2_that_went_through_us(dtype, tolerance, smollm2, open_llama_cpp, tmp_path):
    """In KL divergence, nats a token; llama.cpp rounds activations to float16 and to 8 bits where the weights are."""
    source = open_gguf(smollm2)
    theirs = open_llama_cpp(written(source, tmp_path, dtype))
    tokenizer = source.tokenizer()
    for text in PROBES:
        assert theirs.encode(text, True) == tokenizer.encode(text, bos=False), text
    ids = tokenizer.encode("".join(PROBES), bos=False)[:100]
    ours, other = (scores.log_softmax(-1) for scores in (logits(load(source), ids), theirs.logits(ids)))
    assert (ours.exp() * (ours - other)).sum(-1).mean() < tolerance
