"""SentencePiece vocabularies: the `tokenizer.model` of LLaMA 1 and 2, and llama2.c's `tok*.bin`.

SentencePiece merges the adjacent pair whose union has the best score. The `tokenizers` library merges by a pair list,
so the pairs are recovered from the scores: every way to split a piece in two, best piece first (as transformers does).
Control and byte pieces never come out of a merge: text that spells `</s>` must not become the token.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Collection, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from puna.errors import UserError
from puna.tokenizer.spec import TokenizerSpec, add_tokens, added_token, read_bytes, set_ends

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # sentencepiece_model.proto; GGUF uses the same
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = "▁"


class Piece(NamedTuple):
    text: str
    score: float
    type: int


def read_spm(path: str | Path, *, legacy: bool = True, prefix_space: bool | None = None) -> TokenizerSpec:
    """Read a SentencePiece BPE model (`ModelProto`).

    `legacy` puts the dummy space before every stretch of text between special tokens, as Meta's code and transformers'
    `legacy=True` do; otherwise only the start of the whole text gets it. `prefix_space` overrides the model's own rule.
    """
    data = read_bytes(Path(path))
    try:
        pieces, trainer, normalizer = _parse(data)
    except (IndexError, struct.error, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path} is not a whole SentencePiece model; fetch it again.") from error
    if not pieces:
        raise UserError(f"{path} holds no pieces, so it is not a SentencePiece model.")
    if trainer.get(3, 1) != 2:
        kind = {1: "unigram", 3: "word", 4: "char"}.get(int(trainer.get(3, 1)), "unknown")
        raise UserError(f"{path} is a SentencePiece model of type {kind}; puna reads BPE, which the LLaMA family uses.")
    prefix = bool(normalizer.get(3, 1)) if prefix_space is None else prefix_space
    before: list[normalizers.Normalizer] = []
    charsmap = normalizer.get(2)
    if isinstance(charsmap, bytes) and charsmap:
        try:
            before.append(normalizers.Precompiled(charsmap))
        except Exception as error:  # the library raises a bare Exception for a bad map
            raise UserError(f"The character map in {path} is broken; fetch the file again.") from error
    if normalizer.get(4, 1):
        before += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]

    def name(field: int, default: int) -> str | None:
        index = _signed(int(trainer.get(field, default)))
        return pieces[index].text if 0 <= index < len(pieces) else None

    spec = TokenizerSpec(
        build(pieces, prefix=prefix, legacy=legacy, before=before),
        bos=name(41, 1),
        eos=name(42, 2),
        unk=name(40, 0),
        pad=name(43, -1),
        add_bos=True,
        scores=[piece.score for piece in pieces],
        files={"tokenizer.model": data},
        unused=unused_as(pieces),
    )
    set_ends(spec)
    return spec


def read_llama2c(path: str | Path) -> TokenizerSpec:
    """Read llama2.c's tokenizer: an int32 (longest piece), then per piece float32 score, int32 length, UTF-8 bytes."""
    data, pieces, offset = read_bytes(Path(path)), list[Piece](), 4
    try:
        while offset < len(data):
            score, length = struct.unpack_from("<fi", data, offset)
            offset += 8 + length
            if not 0 <= length <= len(data) or offset > len(data):
                raise ValueError
            pieces.append(_llama2c_piece(len(pieces), data[offset - length : offset].decode(), score))
    except (struct.error, ValueError) as error:
        raise UserError(f"{path} is not a whole llama2.c tokenizer; fetch it again.") from error
    if len(pieces) < 259:
        raise UserError(f"{path} holds {len(pieces)} pieces, but a llama2.c tokenizer has at least 259.")
    spec = TokenizerSpec(
        build(pieces), bos="<s>", eos="</s>", unk="<unk>", add_bos=True, scores=[p.score for p in pieces]
    )
    set_ends(spec)
    return spec


def _llama2c_piece(index: int, text: str, score: float) -> Piece:
    # llama2.c writes spaces for ▁ and wraps BOS and EOS in newlines, so that printing a story looks right.
    special = {0: ("<unk>", UNKNOWN), 1: ("<s>", CONTROL), 2: ("</s>", CONTROL)}
    if index in special:
        return Piece(special[index][0], score, special[index][1])
    return Piece(text.replace(" ", SPACE), score, BYTE if BYTE_PIECE.fullmatch(text) else NORMAL)


def build(
    pieces: list[Piece],
    *,
    prefix: bool = True,
    legacy: bool = True,
    before: list[normalizers.Normalizer] | None = None,
    as_llama_cpp: bool = False,
) -> tokenizers.Tokenizer:
    """The backend of a SentencePiece BPE vocabulary. `before`: normalizers that run ahead of the handling of spaces.

    SentencePiece emits a user-defined piece whole, wherever it occurs in the text, and continues after it as after any
    other piece. `as_llama_cpp`: handle it as a special token instead, with a space before the text that follows.
    """
    own_rule = (UNKNOWN, CONTROL, USER_DEFINED) if as_llama_cpp else (UNKNOWN, CONTROL)
    added = [added_token(piece.text, piece.type != USER_DEFINED) for piece in pieces if piece.type in own_rule]
    user_defined = [] if as_llama_cpp else [piece.text for piece in pieces if piece.type == USER_DEFINED and piece.text]
    # Added tokens after the last ordinary piece stay out of the model, as they do in Hugging Face files.
    ordinary = (NORMAL, UNUSED, BYTE, UNKNOWN) if as_llama_cpp else (NORMAL, UNUSED, BYTE, UNKNOWN, USER_DEFINED)
    size = max((i + 1 for i, piece in enumerate(pieces) if piece.type in ordinary), default=0)
    vocab = {piece.text: i for i, piece in enumerate(pieces[:size])}
    if len({piece.text for piece in pieces}) != len(pieces):
        raise UserError("The tokenizer has the same piece under two ids; fetch it again.")
    unknown = next((piece.text for piece in pieces if piece.type == UNKNOWN), None)
    model = models.BPE(
        vocab=vocab,
        merges=merges(pieces, (NORMAL, UNUSED, USER_DEFINED) if as_llama_cpp else (NORMAL, UNUSED)),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=sum(piece.type == BYTE for piece in pieces) == 256,
    )
    backend = tokenizers.Tokenizer(model)
    steps = list(before or [])
    words: list[pre_tokenizers.PreTokenizer] = []
    if legacy:
        steps += [normalizers.Prepend(SPACE)] if prefix else []
        backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    else:
        if steps:
            backend.normalizer = normalizers.Sequence(steps)
        words.append(pre_tokenizers.Metaspace(SPACE, "first" if prefix else "never", split=False))
    if user_defined:
        words += _isolate(model, vocab, user_defined)
        model.ignore_merges = True  # so that an isolated piece is one token; no merges lead to it
        backend.model = model
    if words:
        backend.pre_tokenizer = words[0] if len(words) == 1 else pre_tokenizers.Sequence(words)
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    add_tokens(backend, added)
    return backend


def _isolate(model: models.BPE, vocab: dict[str, int], pieces: list[str]) -> list[pre_tokenizers.PreTokenizer]:
    """Pre-tokenizers that split a text at the user-defined `pieces`.

    What is between two of them may spell a control or byte piece, or a word that no merges lead to, and would be taken
    whole. The second step splits such a text where the merges leave two tokens.
    """
    longest_first = "|".join(re.escape(piece) for piece in sorted(pieces, key=len, reverse=True))
    split: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Split(Regex(longest_first), "isolated")]
    merging = tokenizers.Tokenizer(model)
    wrong = {}
    for text, index in vocab.items():
        encoding = merging.encode(text, add_special_tokens=False)
        if encoding.ids != [index] and text not in pieces:
            wrong[text] = sorted({end for _, end in encoding.offsets if 0 < end < len(text)})
    cuts = [
        f"{re.escape(text[:cut])}(?={re.escape(text[cut:])}\\z)"
        for text, ends in wrong.items()
        if (cut := next((end for end in ends if text[:end] not in wrong and text[end:] not in wrong), 0))
    ]
    if cuts:
        split.append(pre_tokenizers.Split(Regex(f"\\A(?:{'|'.join(cuts)})"), "isolated"))
    return split


def merges(pieces: list[Piece], types: Collection[int] = (NORMAL,)) -> list[tuple[str, str]]:
    """The merge list that orders pairs as the scores do; the pairs of one piece are in the order of their ids."""
    ids = {piece.text: i for i, piece in enumerate(pieces) if piece.type in types}
    ranked = []
    for text, index in ids.items():
        pairs = [(text[:i], text[i:]) for i in range(1, len(text)) if text[:i] in ids and text[i:] in ids]
        pairs.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        ranked += [(pieces[index].score, *pair) for pair in pairs]
    ranked.sort(key=lambda merge: merge[0], reverse=True)  # stable, so this is the list in Llama 2's own tokenizer.json
    return [(left, right) for _, left, right in ranked]


def unused_as(pieces: list[Piece]) -> dict[int, list[int]]:
    """Unused piece -> the pieces that replace it: SentencePiece merges to it, then undoes the last merge."""
    ids = {piece.text: i for i, piece in enumerate(pieces) if piece.type in (NORMAL, UNUSED, USER_DEFINED)}
    return {i: _used(piece.text, pieces, ids) for i, piece in enumerate(pieces) if piece.type == UNUSED}


def _used(text: str, pieces: list[Piece], ids: dict[str, int]) -> list[int]:
    """Source: sentencepiece, src/bpe_model.cc, `Model::SampleEncode` (`rev_merge` and `resegment`)."""
    symbols, merged_from = list(text), dict[str, tuple[str, str]]()
    while True:
        pairs = [(left, right) for left, right in pairwise(symbols) if left + right in ids]
        merged_from |= {left + right: (left, right) for left, right in pairs}
        if not pairs:
            break
        best = max(range(len(symbols) - 1), key=lambda i: (_score(symbols[i] + symbols[i + 1], pieces, ids), -i))
        symbols[best : best + 2] = [symbols[best] + symbols[best + 1]]

    def used(symbol: str) -> list[int]:
        index = ids.get(symbol)
        if index is not None and pieces[index].type == UNUSED and symbol in merged_from:
            return [i for part in merged_from[symbol] for i in used(part)]
        return [] if index is None else [index]

    return [index for symbol in symbols for index in used(symbol)]


def _score(text: str, pieces: list[Piece], ids: dict[str, int]) -> float:
    return pieces[ids[text]].score if text in ids else -math.inf


def scores(vocab: dict[str, int], pairs: list[tuple[str, str]], special: set[str]) -> dict[str, float]:
    """The reverse of `merges`: piece -> score, 0 for pieces that no pair makes.

    UserError where no scores give the same order, that is, where SentencePiece would merge what the list doesn't.
    """
    order: dict[str, float] = {}
    last = None
    for left, right in pairs:
        merged = left + right
        if merged in order and merged != last:
            raise _no_scores()
        last = merged
        order.setdefault(merged, -float(len(order)))
    known = set(pairs)
    ordinary = {text for text in vocab if text not in special and not BYTE_PIECE.fullmatch(text)}
    for text in ordinary:
        for i in range(1, len(text)):
            pair = (text[:i], text[i:])
            if pair[0] in ordinary and pair[1] in ordinary and pair not in known:
                raise _no_scores()
    return {text: order.get(text, 0.0) for text in vocab}


def _no_scores() -> UserError:
    return UserError(
        "This tokenizer's merge list has no equal in SentencePiece scores, so a GGUF of it would tokenise differently; "
        "keep the checkpoint in the Hugging Face layout."
    )


def _parse(data: bytes) -> tuple[list[Piece], dict[int, int | bytes | float], dict[int, int | bytes | float]]:
    """ModelProto -> (pieces, trainer_spec, normalizer_spec), the specs by field number; the last of a field wins."""
    pieces, trainer, normalizer = list[Piece](), dict[int, int | bytes | float](), dict[int, int | bytes | float]()
    for field, value in _fields(data):
        if field == 1 and isinstance(value, bytes):
            piece = dict(_fields(value))
            text = piece.get(1, b"")
            if not isinstance(text, bytes):
                raise ValueError
            pieces.append(Piece(text.decode(), float(piece.get(2, 0.0)), int(piece.get(3, NORMAL))))
        elif field == 2 and isinstance(value, bytes):
            trainer |= dict(_fields(value))
        elif field == 3 and isinstance(value, bytes):
            normalizer |= dict(_fields(value))
    return pieces, trainer, normalizer


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes | float]]:
    """The (number, value) pairs of a protobuf message: varints, 32- and 64-bit values, and length-delimited bytes."""
    offset = 0

    def varint() -> int:
        nonlocal offset
        value = shift = 0
        while True:
            byte = data[offset]
            offset += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError

    while offset < len(data):
        key = varint()
        value: int | bytes | float
        match key & 7:
            case 0:
                value = varint()
            case 1:
                (value,), offset = struct.unpack_from("<d", data, offset), offset + 8
            case 5:
                (value,), offset = struct.unpack_from("<f", data, offset), offset + 4
            case 2:
                length = varint()
                value, offset = data[offset : offset + length], offset + length
                if offset > len(data):
                    raise ValueError
            case _:
                raise ValueError
        yield key >> 3, value


def _signed(value: int) -> int:
    # A negative int32 is encoded as a 64-bit two's complement.
    return value - (1 << 64) if value >> 63 else value
