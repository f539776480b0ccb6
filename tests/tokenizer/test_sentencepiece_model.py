"""SentencePiece's rules for the types of pieces, compared with the sentencepiece library on models trained here."""

from __future__ import annotations

import io

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import CORPUS
from puna.errors import UserError
from puna.tokenizer import Tokenizer
from puna.tokenizer.sentencepiece_model import UNUSED, _fields

DEFINED = ["<|turn|>", "ll", "<a>", "<a>b", "the llama"]
CONTROL = ["<ctl>", "<pad>"]
PIECES = [*DEFINED, *CONTROL, "<s>", "</s>", "<unk>", "<0x0A>", "<", ">", " ", "  ", "▁", "\n", "the", "llamas",
          "live", "a", "é", "🦙", "Once upon a time", "puna"]  # fmt: skip
TEXT = st.lists(st.one_of(st.sampled_from(PIECES), st.text(st.characters(max_codepoint=0x24F), max_size=3)), max_size=9)
TEXT = TEXT.map("".join)


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def with_unused(model: bytes, unused: set[str]) -> bytes:
    """The model with the type of some pieces set to UNUSED (sentencepiece_model.proto: pieces are field 1, type 3)."""
    out = b""
    for number, value in _fields(model):
        assert isinstance(value, bytes)
        if number == 1 and dict(_fields(value)).get(1, b"").decode() in unused:
            value += varint(3 << 3) + varint(UNUSED)
        out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


@pytest.fixture(scope="module", params=["prefix", "no prefix", "unused"])
def model(request, tmp_path_factory):
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines() * 8),
        model_writer=trained,
        model_type="bpe",
        vocab_size=370,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=request.param != "no prefix",
        user_defined_symbols=[] if request.param == "unused" else DEFINED,
        control_symbols=CONTROL,
        minloglevel=2,
    )
    data = trained.getvalue()
    if request.param == "unused":
        whole = sentencepiece.SentencePieceProcessor(model_proto=data)
        pieces = [whole.id_to_piece(index) for index in range(len(whole))]
        data = with_unused(data, {piece for piece in pieces[260:] if 1 < len(piece) < 4})
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    path.write_bytes(data)
    return path, sentencepiece.SentencePieceProcessor(model_proto=data), Tokenizer.load(path)


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(text=TEXT)
def test_ids_are_sentencepieces(model, text):
    _, reference, tokenizer = model
    assert tokenizer.encode(text, bos=False, special=False) == reference.encode(text)
    assert tokenizer.encode_plain([text]) == [reference.encode(text)]


@settings(max_examples=50, suppress_health_check=list(HealthCheck))
@given(text=TEXT)
def test_each_stretch_between_control_tokens_is_a_text_of_its_own(model, text):
    """As Meta's code has it."""
    _, reference, tokenizer = model
    text = "".join(char for char in text if char not in "<>")
    expected = [*reference.encode(text), reference.piece_to_id("<ctl>"), *reference.encode(text)]
    assert tokenizer.encode(f"{text}<ctl>{text}", bos=False) == expected


def test_the_pieces_go_through_hugging_face_files(model, tmp_path):
    _, reference, tokenizer = model
    text = "the llamas<|turn|>live</s>  the llama <a>b<|turn|>"
    tokenizer.save(tmp_path)
    if not tokenizer._spec.unused:  # which tokenizer.json has no rule for
        assert Tokenizer.load(tmp_path).encode(text) == tokenizer.encode(text)
    assert tokenizer.decode(reference.encode(text)) == text
    with pytest.raises(UserError, match="user-defined or unused pieces"):
        tokenizer.to_gguf()
