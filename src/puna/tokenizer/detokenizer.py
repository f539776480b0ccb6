"""Token ids back to text, whole or one at a time: a token is a run of bytes, and text is what the bytes spell."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from functools import cached_property

import tokenizers

from puna.errors import UserError
from puna.tokenizer.sentencepiece_model import BYTE_PIECE
from puna.tokenizer.spec import flatten
from puna.tokenizer.tiktoken_bpe import BYTES

SPACES = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}  # the decoder steps of SentencePiece vocabularies
LONGEST_CHARACTER = 4  # bytes in UTF-8


class Detokenizer:
    """The bytes of every token of a backend. `strips`: one leading space of the whole text is removed."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        steps = flatten(backend.decoder, "decoders")
        self._steps = {"Regex" if "Regex" in step.get("pattern", ()) else step["type"] for step in steps}
        if self._steps != {"ByteLevel"} and (not self._steps or self._steps - SPACES):
            named = ", ".join(sorted(self._steps)) or "none"
            raise UserError(f"The tokenizer's decoder ({named}) is not one that LLaMA models use.")
        self._replaced = {"▁": " "} if "Metaspace" in self._steps else {}
        self._replaced |= {step["pattern"]["String"]: step["content"] for step in steps if step["type"] == "Replace"}
        self.strips = "Strip" in self._steps or any(
            step["type"] == "Metaspace" and step.get("prepend_scheme") != "never" for step in steps
        )
        added = backend.get_added_tokens_decoder()
        self.special = frozenset(index for index, token in added.items() if token.special)
        self._added, self._backend = frozenset(added), backend

    @cached_property
    def table(self) -> dict[int, bytes]:
        """The bytes by id; built on first use, since a vocabulary of 128k takes some tenths of a second."""
        vocab = self._backend.get_vocab(with_added_tokens=True)
        return {index: self._spell(index, text) for text, index in vocab.items()}

    def _spell(self, index: int, text: str) -> bytes:
        if "ByteLevel" in self._steps and index not in self._added:
            return bytes(BYTES[letter] for letter in text if letter in BYTES)
        if "ByteFallback" in self._steps and BYTE_PIECE.fullmatch(text):
            return bytes([int(text[3:5], 16)])
        for old, new in self._replaced.items():
            text = text.replace(old, new)
        return text.encode()

    def decode(self, ids: Iterable[int], *, skip_special: bool, after: Sequence[int] = ()) -> str:
        """The text that `ids` add to that of `after`. Invalid UTF-8 becomes U+FFFD."""
        stream = IncrementalDetokenizer(self, skip_special=skip_special, after=after)
        return stream.push_all(ids) + stream.end()


class IncrementalDetokenizer:
    """Streaming detokenizer. The texts join to `Detokenizer.decode` of all ids; characters are never split.

    `after`: preceding ids, such as the prompt's. A leading space of the first new id is then kept, and bytes that
    complete a character of theirs give that character. `push` takes constant time. Bytes that may still become a
    character wait for the next token; `end` gives them as U+FFFD.
    """

    def __init__(self, detokenizer: Detokenizer, *, skip_special: bool = True, after: Sequence[int] = ()) -> None:
        self._table = detokenizer.table
        self._skip = detokenizer.special if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        before = self._last_bytes(after)
        self._decoder.decode(before)
        self._strip = detokenizer.strips and not before

    def push(self, token: int) -> str:
        """The text that this token completes."""
        text = self._decoder.decode(self._bytes(token))
        return self._text(text) if self._strip else text

    def push_all(self, ids: Iterable[int]) -> str:
        """The text that these tokens complete."""
        return self._text(self._decoder.decode(b"".join(map(self._bytes, ids))))

    def end(self) -> str:
        """The bytes of an unfinished character, as U+FFFD."""
        return self._text(self._decoder.decode(b"", final=True))

    def _bytes(self, token: int) -> bytes:
        return b"" if token in self._skip else self._table.get(token, b"")

    def _last_bytes(self, ids: Sequence[int]) -> bytes:
        """The last bytes of a text, from the beginning of a character on; empty where the ids have no text."""
        last = b""
        for token in reversed(ids):
            last = self._bytes(token) + last
            if len(last) >= LONGEST_CHARACTER:
                break
        start = next((i for i in range(len(last)) if last[i] & 0xC0 != 0x80), 0)
        return last[start:]

    def _text(self, text: str) -> str:
        if text and self._strip:
            self._strip = False
            return text.removeprefix(" ")
        return text
