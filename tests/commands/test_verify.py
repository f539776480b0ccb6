"""`puna verify`: says "the same" of what is, across formats, and finds what was changed, where it was changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from puna.cli import main
from puna.commands.verify import text
from puna.errors import UserError
from puna.weights.compare import compare, verify
from puna.weights.convert import convert
from puna.weights.open import open_checkpoint


@pytest.fixture
def pair(tiny_checkpoint, tmp_path):
    """`pair(**config) -> (a, b)`: a tiny checkpoint and a copy of it to spoil."""

    def make(**config) -> tuple[Path, Path]:
        original = tiny_checkpoint(**config)
        shutil.copytree(original, tmp_path / "b")
        return original, tmp_path / "b"

    return make


def change(directory: Path, name: str, edit) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors[name] = edit(tensors[name].clone())
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def set_keys(file: Path, **keys) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


@pytest.mark.parametrize("form, dtype", [("hf", "auto"), ("gguf", "auto"), ("meta", "auto"), ("presharded", "auto")])
def test_a_conversion_is_the_same_model(form, dtype, tiny_checkpoint, tmp_path):
    source = tiny_checkpoint(attention_bias=form != "meta")
    convert(source, tmp_path / "to", form, dtype, ranks=2 if form in ("meta", "presharded") else 1, verify=False)
    report = verify(source, tmp_path / "to")
    assert report.same and not report.rounded and not report.close
    assert report.logits.max_difference == 0 and report.logits.top1 == 1
    assert set(report.layers.values()) == {0.0} and list(report.layers)[-1] == "lm_head"
    assert text(report).endswith("\nThe same model.")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_no_difference_whichever_side_is_rounded(dtype, tiny_checkpoint, tmp_path):
    source = tiny_checkpoint()
    convert(source, tmp_path / "to", "hf", dtype, verify=False)
    for report in (verify(source, tmp_path / "to"), verify(tmp_path / "to", source)):
        assert report.same and len(report.rounded) == report.tensors
        assert report.logits.max_difference == 0  # both run in the rounded numbers


def test_quantised_is_close_and_a_tighter_tolerance_says_otherwise(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint()
    convert(source, tmp_path / "q8.gguf", "gguf", "q8_0", verify=False)
    report = verify(source, tmp_path / "q8.gguf")
    assert report.same and report.tolerance == 0.02
    assert all(0.002 < found.relative < 0.01 for found in report.close)
    assert 0 < report.logits.mean_kl < 0.01
    tight = verify(source, tmp_path / "q8.gguf", 0.001)
    assert not tight.same and len(tight.different) == len(report.close)


@pytest.mark.parametrize("name, layer", [
    ("model.embed_tokens.weight", "model.embed_tokens"),
    ("model.layers.0.mlp.down_proj.weight", "model.layers.0"),
    ("model.layers.1.self_attn.k_proj.weight", "model.layers.1"),
    ("model.norm.weight", "model.norm"),
    ("lm_head.weight", "lm_head"),
])  # fmt: skip
def test_the_first_layer_that_differs_is_named(name, layer, pair):
    a, b = pair()
    change(b, name, lambda tensor: tensor.mul_(1.01))
    report = verify(a, b)
    assert not report.same and report.first_layer == layer
    assert [found.name for found in report.different] == [name]
    assert report.different[0].relative == pytest.approx(0.01, rel=1e-3)
    assert f"first layer that does is {layer}." in text(report) and name in text(report)


def test_one_wrong_number_is_found(pair):
    a, b = pair()
    name = "model.layers.1.mlp.up_proj.weight"

    def edit(tensor: torch.Tensor) -> torch.Tensor:
        tensor[17, 23] += 0.5
        return tensor

    change(b, name, edit)
    (found,) = verify(a, b).different
    assert found.max_difference == pytest.approx(0.5) and found.unequal == pytest.approx(1 / (96 * 64))


def test_nan_differs_from_a_number(pair):
    a, b = pair()
    change(b, "model.norm.weight", lambda tensor: tensor.fill_(float("nan")))
    assert verify(a, b).first_layer == "model.norm"


def test_rows_left_in_the_other_rope_order_are_found(pair):
    a, b = pair()
    change(b, "model.layers.0.self_attn.q_proj.weight",
           lambda tensor: tensor.view(4, 2, 8, 64).transpose(1, 2).reshape(64, 64))  # fmt: skip
    report = verify(a, b)
    assert report.first_layer == "model.layers.0"
    assert [found.name for found in report.different] == ["model.layers.0.self_attn.q_proj.weight"]


def test_another_config_with_the_same_tensors_differs_in_its_first_layer(pair):
    a, b = pair()
    set_keys(b / "config.json", rope_theta=500000.0)
    report = verify(a, b)
    assert report.config == {"rope_theta": (10000.0, 500000.0)} and not report.different
    assert report.first_layer == "model.layers.0"
    assert "with tensors that don't" in text(report)


def test_another_shape_is_told_and_logits_are_skipped_with_the_reason(tiny_checkpoint):
    report = verify(tiny_checkpoint(), tiny_checkpoint(intermediate_size=128, num_hidden_layers=1))
    assert set(report.config) == {"intermediate_size", "num_hidden_layers"}
    assert "model.layers.0.mlp.up_proj.weight" in report.shapes and "model.layers.1.mlp.up_proj.weight" in report.only_a
    assert report.skipped["logits"] == "the tensors don't match"


def test_tokenizer_template_and_stop_tokens_are_compared(pair):
    a, b = pair()
    set_keys(b / "tokenizer_config.json", chat_template="{{ messages[0]['content'] }}", eos_token="<|endoftext|>")
    report = verify(a, b, logits=False)
    assert not report.same
    assert {"chat_template", "chat prompt", "eos_id"} <= set(report.tokenizer)
    (b / "tokenizer.json").unlink()
    assert verify(a, b, logits=False).tokenizer == {"tokenizer": ("present", None)}


def test_ids_are_compared(pair):
    a, b = pair()
    tokenizer = json.loads((b / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False
    tokenizer["model"]["merges"].insert(0, ["9", "9"])
    tokenizer["model"]["vocab"]["99"] = len(tokenizer["model"]["vocab"])
    (b / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert any(name.startswith("ids of") for name in verify(a, b, logits=False).tokenizer)


def test_no_more_than_slices_are_read(tiny_checkpoint, monkeypatch):
    """Models larger than memory: no read asks for a whole matrix."""
    monkeypatch.setattr("puna.weights.compare.CHUNK", 1024)
    monkeypatch.setattr("puna.weights.layerwise.STEP", 1024)
    with open_checkpoint(tiny_checkpoint()) as a, open_checkpoint(tiny_checkpoint()) as b:
        reader, sizes = a.reader, []
        a.reader = lambda name, index: sizes.append((read := reader(name, index)).numel()) or read
        assert compare(a, b).same
    assert max(sizes) <= 1024


def test_the_verb_prints_a_verdict_and_exits_by_it(pair, capsys):
    a, b = pair()
    assert main(["verify", str(a), str(b)]) == 0
    assert capsys.readouterr().out.endswith("The same model.\n")
    change(b, "lm_head.weight", lambda tensor: tensor.neg_())
    assert main(["verify", str(a), str(b), "--json"]) == 3
    said = json.loads(capsys.readouterr().out)
    assert said["same"] is False and said["first_layer"] == "lm_head"
    assert said["different"][0]["relative"] == pytest.approx(2)
    assert main(["verify", str(a), str(b), "--no-logits"]) == 3
    assert "skipped" in capsys.readouterr().out
    assert main(["verify", str(a), str(b), "--tolerance", "2"]) == 2
    assert main(["verify", str(a), str(a.parent / "nothing-here")]) == 2


def test_a_path_that_is_not_there_names_the_nearest(pair):
    a, b = pair()
    with pytest.raises(UserError, match=f"did you mean '{b}'"):
        verify(a, b.with_name("bb"))
