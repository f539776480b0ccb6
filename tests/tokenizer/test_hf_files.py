"""Hugging Face tokenizer files: added tokens with their attributes, empty names, and files that must be bounded."""

from __future__ import annotations

import io
import json
import random

import pytest
import sentencepiece
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from conftest import CORPUS, write_tokenizer
from puna.errors import UserError
from puna.tokenizer import Tokenizer, spec

CONFIG = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
NEW = ("<|turn|>", "<|note|>", "<tool>", "word")
TEXTS = [
    f"a{before}{token}{after}b {token}" for token in NEW for before in ("", " ", "\n") for after in ("", " ", "\n")
]


@pytest.fixture(scope="module")
def spm(tmp_path_factory) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines() * 8),
        model_writer=model,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


def write(folder, spm=None, config=None, **files) -> Tokenizer:
    """Writes a directory with the vocabulary of `spm`, or with a tokenizer.json, and loads it."""
    folder.mkdir(exist_ok=True)
    if spm:
        (folder / "tokenizer.model").write_bytes(spm)
    else:
        write_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return Tokenizer.load(folder)


def attributes(seed: int) -> dict[str, bool]:
    names = ("lstrip", "rstrip", "single_word", "normalized", "special")
    chance = random.Random(seed)
    return {name: chance.random() < 0.5 for name in names}


def llama(spm: bytes, folder, **settings):
    """transformers' LlamaTokenizer of a tokenizer.model (it reads the file itself where protobuf is installed)."""
    from transformers import LlamaTokenizer

    backend = json.loads(write(folder / "bare", spm, CONFIG)._backend.to_str())
    vocab, merges = backend["model"]["vocab"], [tuple(pair) for pair in backend["model"]["merges"]]
    return LlamaTokenizer(vocab=vocab, merges=merges, legacy=False, **settings)


@pytest.mark.parametrize("source", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("seed", range(6))
def test_added_tokens_decoder_is_read_as_transformers_reads_it(spm, tmp_path, source, seed):
    from transformers import AutoTokenizer

    config = (
        CONFIG | {"legacy": False} if source == "tokenizer.model" else {"tokenizer_class": "PreTrainedTokenizerFast"}
    )
    bare = write(tmp_path / "bare", spm if source == "tokenizer.model" else None, config)
    known = {bare.id(name): {"content": name, "special": True, "normalized": False} for name in bare.special_tokens}
    new = {
        bare.vocab_size + i: {"content": text} | attributes(10 * seed + i)
        for i, text in enumerate(text for text in NEW if bare.id(text) is None)
    }
    config["added_tokens_decoder"] = {
        str(index): {"lstrip": False, "rstrip": False, "single_word": False} | token
        for index, token in (known | new).items()
    }
    ours = write(tmp_path / "made", spm if source == "tokenizer.model" else None, config)
    if source == "tokenizer.model":
        decoder = {index: AddedToken(**token) for index, token in (known | new).items()}
        theirs = llama(spm, tmp_path, added_tokens_decoder=decoder)
    else:
        theirs = AutoTokenizer.from_pretrained(tmp_path / "made")
    expected = [theirs.encode(text, add_special_tokens=False) for text in TEXTS]
    assert [ours.encode(text, bos=False) for text in TEXTS] == expected

    ours.save(tmp_path / "saved")
    assert [Tokenizer.load(tmp_path / "saved").encode(text, bos=False) for text in TEXTS] == expected
    (tmp_path / "saved/config.json").write_text('{"model_type": "llama"}')
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert [again.encode(text, add_special_tokens=False) for text in TEXTS] == expected


@pytest.mark.parametrize("lstrip, rstrip", [(False, False), (False, True), (True, False), (True, True)])
def test_special_tokens_map_is_read_as_transformers_reads_it(spm, tmp_path, lstrip, rstrip):
    token = {"content": "<|turn|>", "lstrip": lstrip, "rstrip": rstrip, "normalized": True, "single_word": False}
    config = CONFIG | {"legacy": False, "eos_token": "<old>", "additional_special_tokens": ["<tool>"]}
    ours = write(tmp_path / "made", spm, config, special_tokens_map={"eos_token": token, "pad_token": "<pad>"})
    added = AddedToken(**token, special=True)
    theirs = llama(spm, tmp_path, eos_token=added, pad_token="<pad>", extra_special_tokens=["<tool>"])
    assert (ours.eos_id, ours.pad_id) == (theirs.eos_token_id, theirs.pad_token_id)
    for text in TEXTS:
        assert ours.encode(text, bos=False) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("attribute", ["lstrip", "rstrip", "single_word"])
def test_gguf_refuses_attributes_that_it_has_no_field_for(spm, tmp_path, attribute):
    index = write(tmp_path / "bare", spm, CONFIG).vocab_size
    decoder = {str(index): {"content": "<|turn|>", "special": True, attribute: True}}
    tokenizer = write(tmp_path / "made", spm, CONFIG | {"added_tokens_decoder": decoder})
    with pytest.raises(UserError, match=rf"'<\|turn\|>' .*{attribute}"):
        tokenizer.to_gguf()


@pytest.mark.parametrize("empty", ["", {"content": ""}])
@pytest.mark.parametrize("kind", ["LLaMATokenizer", "LlamaTokenizer", None])
def test_empty_names_say_nothing(spm, tmp_path, empty, kind):
    """As in the first LLaMA checkpoints."""
    config = {"bos_token": empty, "eos_token": empty, "unk_token": empty, "tokenizer_class": kind}
    tokenizer = write(tmp_path / "made", spm, config, special_tokens_map={"bos_token": empty, "pad_token": empty})
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.pad_id) == (1, 2, 0, None)
    assert tokenizer.add_bos and not tokenizer.add_eos and tokenizer.stop_ids == (2,)
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").encode("hi") == tokenizer.encode("hi")


def test_an_expression_that_exhausts_the_library_is_one_sentence(tmp_path, capfd):
    backend = Backend(models.BPE({"a": 0, "b": 1}, []))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("(a+)+$"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    bad = "a" * 40 + "b"
    for call in (tokenizer.encode, tokenizer.encode_offsets, lambda text: tokenizer.encode_plain([text])):
        with pytest.raises(UserError, match="regular expressions fail on this text"):
            call(bad)
    assert tokenizer.encode("ab") == [0, 1]
    assert capfd.readouterr().err == ""


def test_the_number_of_added_tokens_is_bounded(spm, tmp_path, monkeypatch):
    monkeypatch.setattr(spec, "MAX_ADDED", 5)
    write_tokenizer(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    size = max(data["model"]["vocab"].values()) + len(data["added_tokens"]) + 1
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    data["added_tokens"] += [{"id": size + i, "content": f"<t{i}>"} | token for i in range(6)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="added tokens, more than the 5 that are read"):
        Tokenizer.load(tmp_path)
    decoder = {str(340 + i): {"content": f"<t{i}>"} for i in range(6)}
    with pytest.raises(UserError, match="6 added tokens, more than the 5"):
        write(tmp_path / "listed", spm, CONFIG | {"added_tokens_decoder": decoder})


def test_gguf_says_that_it_cannot_hold_legacy_false(spm, tmp_path):
    with pytest.raises(UserError, match="legacy: false"):
        write(tmp_path / "new", spm, CONFIG | {"legacy": False}).to_gguf()
    exact = write(tmp_path / "none", spm, CONFIG | {"legacy": False, "add_prefix_space": False})
    assert Tokenizer.from_gguf(exact.to_gguf()).encode("a</s>b  c") == exact.encode("a</s>b  c")
    old = write(tmp_path / "old", spm, CONFIG | {"legacy": True})
    assert Tokenizer.from_gguf(old.to_gguf()).encode("a</s>b  c") == old.encode("a</s>b  c")


def test_fingerprint_sees_attributes(spm, tmp_path):
    token = {"content": "<|turn|>", "special": True}
    index = str(write(tmp_path / "bare", spm, CONFIG).vocab_size)
    prints = {
        write(tmp_path / name, spm, CONFIG | {"added_tokens_decoder": {index: token | {name: True}}}).fingerprint()
        for name in ("lstrip", "rstrip", "single_word", "special")
    }
    assert len(prints) == 4


def test_json_that_nests_too_deeply_is_one_sentence(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is not valid JSON"):
        Tokenizer.load(tmp_path)
