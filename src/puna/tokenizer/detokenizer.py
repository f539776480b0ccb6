"""Token ids back to text, one at a time: every token is a run of bytes, and text is what the bytes spell so far."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from functools import cached_property

import tokenizers

from puna.errors import UserError
from puna.tokenizer.sentencepiece_model import BYTE_PIECE
from puna.tokenizer.spec import flatten
from puna.tokenizer.tiktoken_bpe import BYTES

SPACES = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}  # what SentencePiece vocabularies decode by


class Detokenizer:
    """The bytes of every token of a backend. `strips`: one leading space of the whole text is not part of it."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        steps = flatten(backend.decoder, "decoders")
        self._kinds = {"Regex" if "Regex" in step.get("pattern", ()) else step["type"] for step in steps}
        if self._kinds != {"ByteLevel"} and (not self._kinds or self._kinds - SPACES):
            named = ", ".join(sorted(self._kinds)) or "none"
            raise UserError(f"The tokenizer's decoder ({named}) is not one that LLaMA models use.")
        self._replaced = {"▁": " "} if "Metaspace" in self._kinds else {}
        self._replaced |= {step["pattern"]["String"]: step["content"] for step in steps if step["type"] == "Replace"}
        self.strips = "Strip" in self._kinds or any(
            step["type"] == "Metaspace" and step.get("prepend_scheme") != "never" for step in steps
        )
        added = backend.get_added_tokens_decoder()
        self.special = frozenset(index for index, token in added.items() if token.special)
        self._added, self._backend = frozenset(added), backend

    @cached_property
    def table(self) -> dict[int, bytes]:
        """The bytes by id; built when first needed, for a vocabulary of 128k takes some tenths of a second."""
        vocab = self._backend.get_vocab(with_added_tokens=True)
        return {index: self._spell(index, text) for text, index in vocab.items()}

    def _spell(self, index: int, text: str) -> bytes:
        if "ByteLevel" in self._kinds and index not in self._added:
            return bytes(BYTES[letter] for letter in text if letter in BYTES)
        if "ByteFallback" in self._kinds and BYTE_PIECE.fullmatch(text):
            return bytes([int(text[3:5], 16)])
        for old, new in self._replaced.items():
            text = text.replace(old, new)
        return text.encode()

    def join(self, ids: Iterable[int], *, skip_special: bool) -> str:
        skip = self.special if skip_special else frozenset()
        text = b"".join(self.table.get(index, b"") for index in ids if index not in skip).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.strips else text


class Stream:
    """Text from ids as they come. The parts join to `decode` of all ids; a character never comes out in halves.

    `push` costs the same however long the text is. Bytes that may still become a character wait for the next token;
    `end` gives them as U+FFFD.
    """

    def __init__(self, pieces: Detokenizer, *, skip_special: bool = True) -> None:
        self._pieces = pieces
        self._skip = pieces.special if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = pieces.strips

    def push(self, token: int) -> str:
        if token in self._skip:
            return ""
        return self._out(self._decoder.decode(self._pieces.table.get(token, b"")))

    def end(self) -> str:
        return self._out(self._decoder.decode(b"", final=True))

    def _out(self, text: str) -> str:
        if text and self._strip:
            self._strip = False
            return text.removeprefix(" ")
        return text
