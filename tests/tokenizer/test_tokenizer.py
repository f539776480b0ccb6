"""The tokenizer of every format equals an independent reference: sentencepiece, tiktoken, transformers, llama.cpp."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from puna.errors import UserError
from puna.tokenizer import Tokenizer
from puna.tokenizer.bpe_patterns import LLAMA3, PRE, pre_name
from puna.tokenizer.tiktoken_bpe import LETTERS, LLAMA3_SPECIAL, build
from puna.weights.formats.gguf.container import read_gguf

CORPUS = [
    "The puna is the high grassland of the Andes, where llamas live; it's cold, isn't it?",
    "    if x == 10:\n\t\treturn [1, 22, 333, 4444]  # a  comment   with    spaces",
    "naïve café, señor, Ærø, нещо на Български, 工作 1314151天～ 😁 🦙🦙",
    "aaaa bbbb ==== ---- ab abc abcabc abcdabcd the then there these those",
] * 8
AWKWARD = [
    "<s>",
    "</s>",
    "<unk>",
    "<|eot_id|>",
    "<|begin_of_text|>",
    "<0x0A>",
    "  ",
    "\n",
    "'s",
    "'LL",
    "🦙",
    "\x00",
    "▁",
]
TEXT = st.lists(
    st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), st.sampled_from(AWKWARD)), max_size=8
)
TEXT = TEXT.map("".join)
quick = settings(max_examples=150, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """Tiny tokenizer files of each format: spm.model, tiktoken.model, tok.bin (llama2.c), and the directory hf/."""
    folder = tmp_path_factory.mktemp("tokenizers")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "spm.model").write_bytes(model.getvalue())

    reference = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    with (folder / "tok.bin").open("wb") as file:  # as llama2.c's tokenizer.py exports it
        file.write(struct.pack("<i", 64))
        for i in range(reference.vocab_size()):
            text = {1: "\n<s>\n", 2: "\n</s>\n"}.get(i, reference.id_to_piece(i)).replace("▁", " ").encode()
            file.write(struct.pack("<fi", reference.get_score(i), len(text)) + text)

    backend = Backend(models.BPE())
    words = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    by_rank = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    tokens = [bytes(LETTERS.index(letter) for letter in text) for text, _ in by_rank]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (folder / "tiktoken.model").write_bytes(b"".join(lines))

    (folder / "hf").mkdir()
    backend.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    bos = ("<|begin_of_text|>", backend.token_to_id("<|begin_of_text|>"))
    backend.post_processor = processors.TemplateProcessing(single=[bos[0], "$A"], special_tokens=[bos])
    backend.save(str(folder / "hf/tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"content": "<|begin_of_text|>", "__type": "AddedToken"},
        "eos_token": "<|end_of_text|>",
        "add_bos_token": True,
        "chat_template": "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}",
        "model_max_length": 123,
        "someone's own key": {"kept": True},
    }
    (folder / "hf/tokenizer_config.json").write_text(json.dumps(config))
    (folder / "hf/generation_config.json").write_text(json.dumps({"eos_token_id": [402, 65]}))
    return folder


def make(made: Path, kind: str) -> Tokenizer:
    match kind:
        case "spm":
            return Tokenizer.from_spm(made / "spm.model")
        case "tiktoken":
            return Tokenizer.from_tiktoken(made / "tiktoken.model")
        case "llama2c":
            return Tokenizer.from_llama2c(made / "tok.bin")
        case "hf":
            return Tokenizer.load(made / "hf")
        case _:
            return Tokenizer.from_gguf(make(made, kind.removeprefix("gguf-")).to_gguf())


KINDS = ["spm", "tiktoken", "llama2c", "hf", "gguf-spm", "gguf-hf"]


# Equal to the references


@pytest.mark.parametrize("kind", ["spm", "bpe"])
def test_llama_cpp_vectors(shared_data, tmp_path, kind):
    folder = shared_data / "tokenizers"
    vectors = folder / f"vectors/ggml-vocab-llama-{kind}.gguf"
    texts = vectors.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    expected = [[int(i) for i in line.split()] for line in vectors.with_suffix(".gguf.out").read_text().split("\n")]
    assert len(texts) == len(expected) == 47
    family = folder / {"spm": "llama2", "bpe": "llama3"}[kind]
    shutil.copy(family / "tokenizer.json", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": {"spm": 1, "bpe": 128000}[kind]}))
    made = {
        "gguf": lambda: Tokenizer.from_gguf(fields_of(vectors)),
        "file": lambda: Tokenizer.load(family / "tokenizer.model"),
        "json": lambda: Tokenizer.load(tmp_path),
    }
    for source, load in made.items():
        tokenizer = load()
        assert [tokenizer.encode(text, bos=False) for text in texts] == expected, source
        assert [tokenizer.decode(ids) for ids in expected] == texts, source
        assert tokenizer.add_bos and tokenizer.encode("a")[0] == tokenizer.bos_id


def fields_of(path: Path) -> dict[str, Any]:
    return read_gguf(path).metadata


def test_the_files_of_a_family_are_one_tokenizer(shared_data):
    model = Tokenizer.load(shared_data / "tokenizers/llama2/tokenizer.model")
    fast = Tokenizer.load(shared_data / "tokenizers/llama2")
    assert model.fingerprint() == fast.fingerprint() == Tokenizer.from_gguf(fast.to_gguf()).fingerprint()


# What llama.cpp's convert_hf_to_gguf.py tells tokenizers apart by: sha256 of the ids of this text.
PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)


def probe_hash(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(str(tokenizer.encode(PROBE)).encode()).hexdigest()


def test_llama3_has_the_hash_that_llama_cpp_knows(shared_data):
    for path in ("tokenizers/llama3", "tokenizers/llama3/tokenizer.model"):
        tokenizer = Tokenizer.load(shared_data / path)
        assert probe_hash(tokenizer) == "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5"


@pytest.mark.slow
def test_smollm2(smollm2):
    tokenizer = Tokenizer.from_gguf(fields_of(smollm2))
    assert [tokenizer.token(i) for i in tokenizer.encode("it's 42")] == ["it", "'s", "Ġ", "4", "2"]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos, tokenizer.stop_ids) == (1, 2, False, (2, 0))
    assert tokenizer.vocab_size == 49152
    assert tokenizer.to_gguf()["tokenizer.ggml.pre"] == "smollm"
    assert probe_hash(tokenizer) == "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249"
    ids = tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    assert ids[:3] == [1, 9690, 198]
    assert tokenizer.decode(ids, skip_special=False).endswith("of France?<|im_end|>\n<|im_start|>assistant\n")


@quick
@given(TEXT)
@pytest.mark.parametrize("kind", ["spm", "llama2c", "gguf-spm"])
def test_ids_equal_sentencepiece(made, kind, text):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(made / "spm.model"))
    tokenizer = cached(made, kind)
    assert tokenizer.encode(text, bos=False, special=False) == reference.encode(text)


@quick
@given(TEXT)
@pytest.mark.parametrize("special", [True, False])
def test_ids_equal_tiktoken(made, special, text):
    ranks = dict(line.split() for line in (made / "tiktoken.model").read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in ranks.items()}
    names = {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIAL)}
    reference = tiktoken.Encoding("made", pat_str=LLAMA3, mergeable_ranks=ranks, special_tokens=names)
    allowed = set(names) if special else set()
    tokenizer = cached(made, "tiktoken")
    assert tokenizer.encode(text, bos=False, special=special) == reference.encode(
        text, allowed_special=allowed, disallowed_special=()
    )


CACHE: dict[tuple[Path, str], Any] = {}


def cached(made: Path, kind: str) -> Tokenizer:
    if (made, kind) not in CACHE:
        CACHE[made, kind] = make(made, kind)
    return CACHE[made, kind]


def transformers_of(made: Path, kind: str) -> Any:
    if (made, f"transformers {kind}") not in CACHE:
        from transformers import AutoTokenizer

        cached(made, kind).save(made / f"saved-{kind}")
        (made / f"saved-{kind}/config.json").write_text('{"model_type": "llama"}')
        CACHE[made, f"transformers {kind}"] = AutoTokenizer.from_pretrained(made / f"saved-{kind}")
    return CACHE[made, f"transformers {kind}"]


@quick
@given(TEXT)
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_what_is_saved_the_same_way(made, kind, text):
    ours, theirs = cached(made, kind), transformers_of(made, kind)
    ids = ours.encode(text, bos=False)
    assert theirs.encode(text, add_special_tokens=False) == ids
    if ids[:1] != [ours.bos_id]:  # where transformers doubles the BOS
        assert theirs.encode(text) == ours.encode(text)
    for skip in (True, False):
        if "\ufffd" not in ours.decode(ids, skip_special=skip):
            assert theirs.decode(ids, skip_special_tokens=skip) == ours.decode(ids, skip_special=skip)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_same_special_tokens_and_template(made, kind):
    ours, theirs = cached(made, kind), transformers_of(made, kind)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert len(theirs) == ours.vocab_size
    assert theirs.chat_template == ours.chat_template


# Text and ids


@quick
@given(TEXT)
@pytest.mark.parametrize("kind", KINDS)
def test_text_comes_back_and_special_names_can_be_plain_text(made, kind, text):
    tokenizer = cached(made, kind)
    ids = tokenizer.encode(text, bos=False, special=False)
    assert not {tokenizer.id(name) for name in ("<s>", "</s>", "<unk>", *LLAMA3_SPECIAL)} & set(ids)
    if "▁" not in text:  # SentencePiece has no way to tell it from a space
        assert tokenizer.decode(ids) == text


@quick
@given(TEXT, st.lists(st.integers(0, 430), max_size=30), st.booleans())
@pytest.mark.parametrize("kind", KINDS)
def test_stream_joins_to_decode_and_never_gives_half_a_character(made, kind, text, noise, skip):
    tokenizer = cached(made, kind)
    for ids in (noise, tokenizer.encode(text)):
        stream = tokenizer.stream(skip_special=skip)
        parts = [stream.push(index) for index in ids]
        assert "".join(parts) + stream.end() == tokenizer.decode(ids, skip_special=skip)
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts) and stream.end() == ""


@quick
@given(st.lists(st.integers(0, 430), max_size=20), st.lists(st.integers(0, 430), max_size=20), st.booleans())
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_decoded_in_the_context_of_those_before_them(made, kind, first, second, skip):
    tokenizer = cached(made, kind)
    stream = tokenizer.stream(skip_special=skip, after=first)
    text = "".join([stream.push(index) for index in second]) + stream.end()
    assert text == tokenizer.decode(second, skip_special=skip, after=first)
    before = tokenizer.decode(first, skip_special=skip)
    if not before.endswith("\ufffd"):  # else a character may reach over the edge
        assert before + text == tokenizer.decode(first + second, skip_special=skip)


def test_a_character_over_the_edge_is_completed(made):
    tokenizer = cached(made, "spm")
    sheep = tokenizer.encode("🐑", bos=False)
    for cut in range(2, len(sheep)):
        assert tokenizer.decode(sheep[cut:], after=sheep[:cut]) == "🐑"
    assert b"".join(tokenizer.token_bytes(index) for index in sheep) == " 🐑".encode()


def test_stream_waits_for_the_rest_of_a_character(made):
    tokenizer = cached(made, "spm")
    llama = tokenizer.encode("🐑", bos=False)[1:]  # four byte tokens after the dummy space
    stream = tokenizer.stream()
    assert [stream.push(index) for index in llama] == ["", "", "", "🐑"]
    assert [stream.push(llama[0]), stream.end()] == ["", "\ufffd"]


@pytest.mark.parametrize("kind, bos", [("spm", "<s>"), ("hf", "<|begin_of_text|>"), ("tiktoken", "<|begin_of_text|>")])
def test_bos_is_never_doubled(made, kind, bos):
    tokenizer = cached(made, kind)
    once = tokenizer.encode("hello")
    assert once[0] == tokenizer.bos_id and tokenizer.encode("hello", bos=False) == once[1:]
    assert tokenizer.encode(bos + "hello").count(tokenizer.bos_id) == 1
    assert tokenizer.encode(bos + "hello", special=False).count(tokenizer.bos_id) == 1
    chat = tokenizer if tokenizer.chat_template else tokenizer.with_template("llama2")
    assert chat.encode_chat([{"role": "user", "content": "hello"}]).count(tokenizer.bos_id) == 1
    assert chat.encode(chat.render([{"role": "user", "content": "hello"}])).count(tokenizer.bos_id) == 1


def test_stop_list_is_the_union_of_all_that_end_a_text(made, tmp_path):
    assert make(made, "hf").stop_ids == (402, 65, 401)
    assert set(make(made, "tiktoken").stop_ids) == {401, 408, 409}  # end_of_text, eom_id, eot_id
    shutil.copytree(made / "hf", tmp_path / "hf")
    (tmp_path / "hf/generation_config.json").unlink()
    (tmp_path / "hf/config.json").write_text('{"eos_token_id": 17}')
    assert Tokenizer.load(tmp_path / "hf").stop_ids == (17, 401, 402)
    fields = make(made, "spm").to_gguf() | {"tokenizer.ggml.eot_token_id": 9}
    assert Tokenizer.from_gguf(fields).stop_ids == (9, 2)


# Directories


@pytest.mark.parametrize("kind", KINDS)
def test_saving_what_was_loaded_is_stable(made, kind, tmp_path):
    tokenizer = cached(made, kind)
    tokenizer.save(tmp_path / "a")
    again = Tokenizer.load(tmp_path / "a")
    again.save(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert again.bos_id == tokenizer.bos_id and again.add_bos == tokenizer.add_bos
    if kind != "hf":  # whose generation_config.json goes with the weights
        assert again.fingerprint() == tokenizer.fingerprint()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoints_own_files_are_kept(made, tmp_path):
    shutil.copytree(made / "hf", tmp_path / "in")
    (tmp_path / "in/chat_template.jinja").write_text("the file wins")
    (tmp_path / "in/additional_chat_templates").mkdir()
    (tmp_path / "in/additional_chat_templates/tool_use.jinja").write_text("with tools")
    tokenizer = Tokenizer.load(tmp_path / "in")
    tokenizer.save(tmp_path / "out")
    before, after = contents(tmp_path / "in"), contents(tmp_path / "out")
    for name in ("tokenizer.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        assert after[name] == before[name]
    kept = json.loads(before["tokenizer_config.json"]) | {"clean_up_tokenization_spaces": False}
    assert json.loads(after["tokenizer_config.json"]) == kept
    user = [{"role": "user", "content": "hi"}]
    assert tokenizer.render(user) == "the file wins" and tokenizer.render(user, tools=[{}]) == "with tools"


@pytest.mark.parametrize("legacy, inner", [(True, "▁b"), (False, "b")])
def test_a_directory_with_tokenizer_model_alone(made, tmp_path, legacy, inner):
    shutil.copy(made / "spm.model", tmp_path / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.load(tmp_path)
    spelled = [tokenizer.token(index) for index in tokenizer.encode("a</s>b")]
    assert spelled == ["<s>", "▁a", "</s>", *([inner] if tokenizer.id(inner) is not None else ["▁", "b"])]
    assert tokenizer.model_file == (made / "spm.model").read_bytes()


def test_tokens_that_stand_beside_the_vocabulary_are_added(made, tmp_path):
    shutil.copy(made / "spm.model", tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text('{"<extra>": 421, "<pad>": 420}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"pad_token": "<pad>", "additional_special_tokens": ["<|im_end|>"]}'
    )
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.pad_id, tokenizer.id("<extra>"), tokenizer.id("<|im_end|>")) == (420, 421, 422)
    assert tokenizer.encode("<extra>") == [1, 421] and tokenizer.stop_ids == (2, 422)
    tokenizer.save(tmp_path / "out")
    assert Tokenizer.load(tmp_path / "out").fingerprint() == tokenizer.fingerprint()
    fields = tokenizer.to_gguf()
    assert Tokenizer.from_gguf(fields).encode("x<extra>") == tokenizer.encode("x<extra>")
    assert fields["tokenizer.ggml.eot_token_id"] == 422


@pytest.mark.parametrize("said, bos", [({}, True), ({"add_bos_token": False}, False)])
def test_a_llama_class_adds_bos_unless_told_otherwise(made, tmp_path, said, bos):
    Tokenizer.from_spm(made / "spm.model").save(tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.post_processor = None
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizerFast"} | said))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("a")[:1] == ([1] if bos else tokenizer.encode("a", bos=False)[:1])
    tokenizer.save(tmp_path / "out")  # where tokenizer.json must say it itself, for the class is no longer there to
    assert Backend.from_file(str(tmp_path / "out/tokenizer.json")).encode("a").ids == tokenizer.encode("a")


# GGUF


@pytest.mark.parametrize("name", PRE)
def test_every_known_pre_tokenizer_is_detected(made, name):
    vocab = {letter: i for i, letter in enumerate(LETTERS)}
    backend = build(vocab | {"it": 256}, [("i", "t")], name)
    detected = {"smaug-bpe": "llama-bpe"}.get(name, name)  # the same where merges lead to every word
    assert pre_name(backend) == detected
    assert pre_name(Backend.from_str(backend.to_str())) == detected
    assert backend.encode("it's 12 ça\n").ids == [256, *"'s 12 ça\n".encode()]


@pytest.mark.parametrize("kind", ["spm", "hf", "tiktoken", "llama2c"])
def test_gguf_fields_come_back_as_the_same_tokenizer(made, kind):
    tokenizer = make(made, kind)
    fields = tokenizer.to_gguf()
    again = Tokenizer.from_gguf(fields)
    assert again.to_gguf() == fields
    assert len(fields["tokenizer.ggml.tokens"]) == len(fields["tokenizer.ggml.token_type"]) == tokenizer.vocab_size
    if kind != "hf":  # generation_config.json has no field in GGUF
        assert again.fingerprint() == tokenizer.fingerprint()


def altered(made: Path, **parts: Any) -> Tokenizer:
    tokenizer = make(made, "hf" if "spm" not in parts else "spm")
    for name, part in parts.items():
        if name != "spm":
            setattr(tokenizer._backend, name, part)
    return tokenizer


def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(made):
    unknown = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("x+"), "isolated"), pre_tokenizers.ByteLevel(False)])
    with pytest.raises(UserError, match=r"no name for this tokenizer's pre-tokenizer .*x\+"):
        altered(made, pre_tokenizer=unknown).to_gguf()
    with pytest.raises(UserError, match="no name"):
        altered(made, normalizer=normalizers.Lowercase()).to_gguf()
    with pytest.raises(UserError, match="normalisation"):
        altered(made, spm=True, normalizer=normalizers.Lowercase()).to_gguf()
    with pytest.raises(UserError, match="no merges"):
        altered(made, model=models.BPE({"a": 0, "b": 1}, [])).to_gguf()
    own_merges = models.BPE({"a": 0, "b": 1, "ab": 2, "aba": 3, "ba": 4}, [("a", "b"), ("ab", "a")])
    lacking = make(made, "spm")
    lacking._backend.model, lacking._spec.scores = own_merges, None  # "b"+"a" is no merge, but has a score
    with pytest.raises(UserError, match="no equal in SentencePiece scores"):
        lacking.to_gguf()


# Bad input


def broken(made: Path, folder: Path, case: str) -> Any:
    """Prepare a bad checkpoint and give the call that must refuse it."""
    hf = folder / "hf"
    shutil.copytree(made / "hf", hf)
    spm_bytes = (made / "spm.model").read_bytes()
    gguf_fields = make(made, "hf").to_gguf()
    match case:
        case "cut json":
            (hf / "tokenizer.json").write_bytes((hf / "tokenizer.json").read_bytes()[:5000])
        case "cut config":
            (hf / "tokenizer_config.json").write_text("{")
        case "list config":
            (hf / "tokenizer_config.json").write_text("[]")
        case "odd config":
            (hf / "tokenizer_config.json").write_text('{"added_tokens_decoder": [1], "chat_template": [{}]}')
        case "odd template":
            (hf / "tokenizer_config.json").write_text('{"chat_template": [{"name": "default"}]}')
        case "gguf ids":
            return lambda: Tokenizer.from_gguf(gguf_fields | {"tokenizer.ggml.eos_token_id": "two"})
        case "no files":
            (hf / "tokenizer.json").unlink()
        case "wrong id":
            (hf / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"999": {"content": "<x>"}}}')
        case "cut spm":
            (folder / "m").write_bytes(spm_bytes[:-7])
            return lambda: Tokenizer.load(folder / "m")
        case "garbage spm":
            (folder / "m").write_bytes(b"\x0a" + bytes(range(200)))
            return lambda: Tokenizer.load(folder / "m")
        case "unigram":
            model = io.BytesIO()
            options = {"model_type": "unigram", "vocab_size": 90, "minloglevel": 2}
            sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=model, **options)
            (folder / "m").write_bytes(model.getvalue())
            return lambda: Tokenizer.load(folder / "m")
        case "cut tiktoken":
            (folder / "m").write_bytes((made / "tiktoken.model").read_bytes()[:500])
            return lambda: Tokenizer.load(folder / "m")
        case "cut llama2c":
            (folder / "m").write_bytes((made / "tok.bin").read_bytes()[:-3])
            return lambda: Tokenizer.from_llama2c(folder / "m")
        case "gguf kind":
            return lambda: Tokenizer.from_gguf(gguf_fields | {"tokenizer.ggml.model": "bert"})
        case "gguf pre":
            return lambda: Tokenizer.from_gguf(gguf_fields | {"tokenizer.ggml.pre": "smollm9"})
        case "gguf no tokens":
            return lambda: Tokenizer.from_gguf({"tokenizer.ggml.model": "llama"})
        case "gguf scores":
            fields = make(made, "spm").to_gguf()
            return lambda: Tokenizer.from_gguf(fields | {"tokenizer.ggml.scores": [0.0]})
        case "gguf merges":
            return lambda: Tokenizer.from_gguf(gguf_fields | {"tokenizer.ggml.merges": ["a zzzz"]})
        case "gguf id":
            return lambda: Tokenizer.from_gguf(gguf_fields | {"tokenizer.ggml.bos_token_id": 99999})
        case "gguf twice":
            tokens = [*gguf_fields["tokenizer.ggml.tokens"][:-1], "a"]
            return lambda: Tokenizer.from_gguf(gguf_fields | {"tokenizer.ggml.tokens": tokens})
        case "missing":
            return lambda: Tokenizer.load(folder / "nowhere")
    return lambda: Tokenizer.load(hf)


@pytest.mark.parametrize(
    "case, says",
    [
        ("cut json", "not a whole tokenizer.json"),
        ("cut config", "not valid JSON"),
        ("list config", "must hold a JSON object"),
        ("odd config", "settings in .* are malformed"),
        ("odd template", "settings in .* are malformed"),
        ("gguf ids", "fields are malformed"),
        ("no files", "neither tokenizer.json nor tokenizer.model"),
        ("wrong id", "disagree on '<x>'"),
        ("cut spm", "not a whole SentencePiece model"),
        ("garbage spm", "not a whole SentencePiece model"),
        ("unigram", "of type unigram"),
        ("cut tiktoken", "not a whole tiktoken file|lacks tokens"),
        ("cut llama2c", "not a whole llama2.c tokenizer"),
        ("gguf kind", "of kind 'bert'"),
        ("gguf pre", "'smollm9' .* is not known .did you mean 'smollm'"),
        ("gguf no tokens", "no tokenizer.ggml.tokens"),
        ("gguf scores", "1 entries in tokenizer.ggml.scores"),
        ("gguf merges", "merges don't fit"),
        ("gguf id", "bos_token_id is 99999"),
        ("gguf twice", "under two ids"),
        ("missing", "no tokenizer at"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(made, tmp_path, case, says):
    with pytest.raises(UserError, match=says) as caught:
        broken(made, tmp_path, case)()
    assert "\n" not in str(caught.value)


def test_a_decoder_of_another_family_is_refused_at_once(made, tmp_path):
    shutil.copytree(made / "hf", tmp_path / "hf")
    backend = Backend.from_file(str(tmp_path / "hf/tokenizer.json"))
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "hf/tokenizer.json"))
    with pytest.raises(UserError, match="decoder .WordPiece. is not one"):
        Tokenizer.load(tmp_path / "hf")


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickled_tokenizer_gives_the_same_ids(made, kind):
    """A worker process gets it pickled, and after its use: special tokens in plain text stay plain text there."""
    tokenizer = make(made, kind)
    ends = tokenizer.token(tokenizer.stop_ids[0]) if tokenizer.stop_ids else "</s>"
    text = "".join(AWKWARD) + f"The puna {ends}is{ends} high.{ends}"

    def ids(used):
        guarded = used.encode_offsets(text, guards=[text.index(ends) + 1])
        return used.encode_plain([text]), used.encode(text), used.encode(text, special=False), guarded, used.stop_ids

    before = ids(tokenizer)
    received = pickle.loads(pickle.dumps(tokenizer))
    assert ids(received) == before and received.fingerprint() == tokenizer.fingerprint()
    assert received.decode(before[1]) == tokenizer.decode(before[1])


def test_bad_requests_are_refused(made):
    tokenizer = cached(made, "hf")
    with pytest.raises(UserError, match="not valid Unicode"):
        tokenizer.encode("half of a pair: \ud800")
    with pytest.raises(UserError, match="no token with id 5000"):
        tokenizer.token(5000)
    with pytest.raises(UserError, match="vocabulary has 399 rows"):
        tokenizer.check_fits(399)
    tokenizer.check_fits(403)
    assert tokenizer.decode([5000]) == "" and tokenizer.id("nothing") is None


def test_fingerprint_sees_every_part(made):
    tokenizer = cached(made, "hf")
    same, other = cached(made, "hf").fingerprint(), tokenizer.with_template("chatml").fingerprint()
    assert same == tokenizer.fingerprint() != other
    assert altered(made, normalizer=normalizers.NFC()).fingerprint() != same
    assert make(made, "gguf-hf").fingerprint() != same  # its stop list is another


def test_added_tokens_beyond_the_models_rows_get_a_note(made, capsys):
    """As the [PAD] of many fine-tunes; what the vocabulary itself has beyond them is refused."""
    tokenizer = cached(made, "hf")
    tokenizer.check_fits(402)
    assert "'<|eot_id|>' (402) beyond the model's 402 rows" in capsys.readouterr().err
    with pytest.raises(UserError, match="use the tokenizer that belongs"):
        make(made, "spm").check_fits(1)


ENDS = ["<|end|>", "<end_of_turn>", "<|endoftext|>", "<EOT>", "</s>", "[EOS]", "<｜end▁of▁sentence｜>", "<turn|>"]


@pytest.mark.parametrize(
    "others, ends", [((), ENDS), (("<|return|>", "<|call|>"), [*ENDS[1:], "<|return|>", "<|call|>"])]
)
def test_ends_of_llama_cpp_by_their_spelling(made, others, ends):
    fields = make(made, "hf").to_gguf()
    names = [*fields["tokenizer.ggml.tokens"], "<|begin|>", *ENDS, *others]
    kinds = fields["tokenizer.ggml.token_type"] + [3] * (1 + len(ENDS) + len(others))
    tokenizer = Tokenizer.from_gguf(
        fields
        | {"tokenizer.ggml.tokens": names, "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.eos_token_id": 403}
    )
    known = ["<|eot_id|>", "<|end_of_text|>", "<|begin|>"]  # the last is eos here
    assert {tokenizer.token(index) for index in tokenizer.stop_ids} == {*known, *ends}
