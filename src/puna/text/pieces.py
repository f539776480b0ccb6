"""Token ids back to text, one at a time: every token is a run of bytes, and text is what the bytes spell so far."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

import tokenizers

from puna.errors import UserError
from puna.text.bpe import BYTES
from puna.text.parts import flatten
from puna.text.spm import BYTE_PIECE


class Pieces:
    """The bytes of every token of a backend. `strips`: one leading space of the whole text is not part of it."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        steps = flatten(backend.decoder, "decoders")
        kinds = {step["type"] for step in steps}
        byte_level = kinds == {"ByteLevel"}
        if not byte_level and (not kinds or kinds - {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}):
            raise UserError(
                f"The tokenizer's decoder ({', '.join(sorted(kinds)) or 'none'}) is not one that LLaMA models use."
            )
        replaced = {"▁": " "} if "Metaspace" in kinds else {}
        for step in steps:
            if step["type"] == "Replace":
                replaced[step["pattern"]["String"]] = step["content"]
        self.strips = "Strip" in kinds or any(
            step["type"] == "Metaspace" and step.get("prepend_scheme") != "never" for step in steps
        )
        added = backend.get_added_tokens_decoder()
        self.special = frozenset(index for index, token in added.items() if token.special)
        self.bytes: dict[int, bytes] = {}
        for text, index in backend.get_vocab(with_added_tokens=True).items():
            if byte_level and index not in added:
                self.bytes[index] = bytes(BYTES[letter] for letter in text if letter in BYTES)
            elif "ByteFallback" in kinds and BYTE_PIECE.fullmatch(text):
                self.bytes[index] = bytes([int(text[3:5], 16)])
            else:
                for old, new in replaced.items():
                    text = text.replace(old, new)
                self.bytes[index] = text.encode()

    def join(self, ids: Iterable[int], *, skip_special: bool) -> str:
        skip = self.special if skip_special else frozenset()
        text = b"".join(self.bytes.get(index, b"") for index in ids if index not in skip).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.strips else text


class Stream:
    """Text from ids as they come. The parts join to `decode` of all ids; a character never comes out in halves.

    `push` costs the same however long the text is. Bytes that may still become a character wait for the next token;
    `end` gives them as U+FFFD.
    """

    def __init__(self, pieces: Pieces, *, skip_special: bool = True) -> None:
        self._pieces = pieces
        self._skip = pieces.special if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = pieces.strips

    def push(self, token: int) -> str:
        if token in self._skip:
            return ""
        return self._out(self._decoder.decode(self._pieces.bytes.get(token, b"")))

    def end(self) -> str:
        return self._out(self._decoder.decode(b"", final=True))

    def _out(self, text: str) -> str:
        if text and self._strip:
            self._strip = False
            return text.removeprefix(" ")
        return text
