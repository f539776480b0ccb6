"""`puna info`: the facts are right, from every format, and no weight is read for them."""

from __future__ import annotations

import json
import shutil

import pytest

from puna.cli import main
from puna.commands.info import size, text
from puna.model.presets import PRESETS
from puna.weights.convert import convert
from puna.weights.describe import describe, preset
from puna.weights.open import open_checkpoint


@pytest.mark.parametrize("form", ["hf", "gguf", "meta", "presharded"])
def test_facts_of_every_format(form, tiny_checkpoint, tmp_path, capsys):
    source = tiny_checkpoint(tie_word_embeddings=True, torch_dtype="bfloat16")
    path = convert(source, tmp_path / "model", form, ranks=2 if form in ("meta", "presharded") else 1).path
    assert main(["info", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["format"] == form and facts["preset"] is None
    assert facts["parameters"] == 384 * 64 + 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 3 + 2 * 64) + 64
    assert facts["memory"]["bfloat16"] == 2 * facts["parameters"]
    assert facts["kv_cache"] == {"per_token": 2 * 2 * 2 * 16 * 2, "full_context": 2 * 2 * 2 * 16 * 2 * 512}
    assert facts["config"]["num_key_value_heads"] == 2
    assert facts["dtypes"]["bfloat16"] >= 15
    assert facts["tokenizer"]["stops"] == {"<|im_end|>": 2, "<|endoftext|>": 0} and facts["tokenizer"]["tokens"] == 384
    assert facts["manifest"]["source"]["format"] == "hf"
    assert main(["info", str(path)]) == 0
    said = capsys.readouterr().out
    for expected in (form, "384", "4 heads of 16, 2 key/value heads", "tied", "byte-level BPE (smollm)",
                     "<|im_end|> (2)", "{% for message in messages %}", "verified against it"):  # fmt: skip
        assert expected in said
    assert max(map(len, said.splitlines())) < 250


def test_no_weight_is_read(tiny_checkpoint):
    with open_checkpoint(tiny_checkpoint()) as source:
        source.reader = None
        assert "21 in float32" in text(describe(source))


def test_quantised_types_are_counted(tiny_checkpoint, tmp_path):
    convert(tiny_checkpoint(), tmp_path / "q8.gguf", "gguf", "q8_0")
    with open_checkpoint(tmp_path / "q8.gguf") as source:
        facts = describe(source)
    assert facts["quantised"] and facts["details"]["types"] == {"Q8_0": 16, "F32": 5}


def test_a_tokenizer_that_does_not_fit_is_told_and_the_rest_too(tiny_checkpoint, tmp_path, capsys):
    shutil.copytree(tiny_checkpoint(vocab_size=300), tmp_path / "model")
    assert main(["info", str(tmp_path / "model")]) == 0
    said = capsys.readouterr().out
    assert "not usable: The tokenizer has ids up to 383" in said and "4 heads of 16" in said
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    main(["info", str(tmp_path / "model")])
    assert "tokenizer   none" in capsys.readouterr().out


@pytest.mark.parametrize("name", PRESETS)
def test_published_shapes_are_recognised(name):
    found = preset(PRESETS[name])
    assert found is not None and PRESETS[found].tensors() == PRESETS[name].tensors()


def test_rope_scaling_is_told(tiny_checkpoint):
    with open_checkpoint(tiny_checkpoint(rope_scaling={"rope_type": "linear", "factor": 4.0})) as source:
        assert "linear scaling (factor 4.0)" in text(describe(source))


def test_smollm2(smollm2):
    with open_checkpoint(smollm2) as source:
        said = text(describe(source))
    assert "smollm2-135m" in said and "134,515,008" in said and "210 in Q4_1" in said


@pytest.mark.parametrize("nbytes, said", [
    (0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (98_362_432, "98.36 MB"), (16.06e9, "16.06 GB"), (3e12, "3 TB"),
])  # fmt: skip
def test_size(nbytes, said):
    assert size(nbytes) == said


def test_files_of_ranks_are_all_counted(tiny_checkpoint, tmp_path, capsys):
    convert(tiny_checkpoint(), tmp_path / "mg", "megatron", tp=2)
    capsys.readouterr()
    assert main(["info", str(tmp_path / "mg"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    sizes = {str(path.relative_to(tmp_path / "mg")): path.stat().st_size for path in (tmp_path / "mg").rglob("*.pt")}
    assert len(sizes) == 2 and facts["files"].items() >= sizes.items()
