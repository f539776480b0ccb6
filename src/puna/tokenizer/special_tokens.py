"""Special tokens spelled in a text: which are recognised, and encoding with some of them as plain text.

A conversation is one text, made of the template's own and of untrusted messages. Only the template writes special
tokens: where a message, a tool or its arguments spell one, it stays plain text. `SpecialSpellings.mark` inserts a mark
into untrusted text wherever a special token could arise; in the rendered text the marks become positions, the guards. A
special token that spans a guard is plain text.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Iterator
from functools import cached_property
from typing import Any

import tokenizers
from tokenizers import AddedToken

Offsets = list[tuple[int, int]]


class SpecialSpellings:
    """The spellings of a backend's special tokens."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        added = [token for _, token in sorted(backend.get_added_tokens_decoder().items())]
        self._added = [token for token in added if token.content]
        self._special = {token.content for token in self._added if token.special}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """Matches any added token: from left to right, the longest first."""
        ordered = sorted(self._added, key=lambda token: len(token.content), reverse=True)
        forms = (_alone(token) if token.single_word else re.escape(token.content) for token in ordered)
        return re.compile("|".join(forms) if ordered else r"(?!)")

    @cached_property
    def _edges(self) -> tuple[set[str], set[str], int]:
        """The proper prefixes and suffixes of special tokens, and the length of the longest."""
        begins = {text[:i] for text in self._special for i in range(1, len(text))}
        ends = {text[i:] for text in self._special for i in range(1, len(text))}
        return begins, ends, max(map(len, self._special), default=1) - 1

    def mark(self, value: Any, mark: str) -> Any:
        """Plain data with `mark` in every string of it, wherever a special token is spelled, begins or ends."""
        match value:
            case str():
                return self._mark_text(value, mark)
            case list():
                return [self.mark(item, mark) for item in value]
            case dict():
                return {self._mark_inside(key, mark): self.mark(item, mark) for key, item in value.items()}
            case _:
                return value

    def _mark_inside(self, text: str, mark: str) -> str:
        def within(match: re.Match[str]) -> str:
            return match[0][:1] + mark + match[0][1:] if match[0] in self._special else match[0]

        return self._pattern.sub(within, text)

    def _mark_text(self, text: str, mark: str) -> str:
        begins, ends, longest = self._edges
        body = text.strip()
        at_begin = any(body[:n] in ends for n in range(1, min(longest, len(body)) + 1)) or self._is_inner(body)
        at_end = any(body[-n:] in begins for n in range(1, min(longest, len(body)) + 1))
        lead, trail = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :] if body else ""
        return lead + mark * at_begin + self._mark_inside(body, mark) + mark * at_end + trail

    def _is_inner(self, text: str) -> bool:
        """Whether a special token contains the text. Words are left to templates, which write `'<|' + role + '|>'`."""
        return not re.fullmatch(r"[\w-]*", text) and any(text in token for token in self._special)

    def occurrences(self, text: str, guards: Collection[int]) -> Iterator[tuple[int, int, bool]]:
        """(start, end, whether it counts) of the special tokens that a text spells."""
        start = 0
        while match := self._pattern.search(text, start):
            counts = not any(match.start() < guard < match.end() for guard in guards)
            if match[0] in self._special:
                yield match.start(), match.end(), counts
            start = match.end() if counts else match.start() + 1

    def encode(self, text: str, guards: Collection[int]) -> tuple[list[int], Offsets]:
        """Ids and offsets of a text, without BOS and EOS. A special token that spans a guard is plain text."""
        matches = list(self.occurrences(text, guards))
        if all(counts for _, _, counts in matches):
            encoding = self._backend.encode(text, add_special_tokens=False)
            return encoding.ids, encoding.offsets
        secret, backend, ids = self._renamed
        parts, moved, last = [], list[int](), 0
        for start, end, counts in matches:
            if counts:
                parts += [text[last:start], secret, text[start:end]]
                moved.append(start + len(secret) * len(moved))
                last = end
        encoding = backend.encode("".join([*parts, text[last:]]), add_special_tokens=False)

        def back(position: int) -> int:
            shift = sum(min(max(0, position - start), len(secret)) for start in moved)
            return position - shift

        offsets = [(back(start), back(end)) for start, end in encoding.offsets]
        return [ids.get(index, index) for index in encoding.ids], offsets

    @cached_property
    def _renamed(self) -> tuple[str, tokenizers.Tokenizer, dict[int, int]]:
        """(secret, a tokenizer of the same model whose special tokens begin with the secret, its ids -> ids)."""
        secret = "\U0010fffd" + secrets.token_hex(16)
        backend = front(self._backend)
        for token in self._added:
            attributes = token.__getstate__()
            if token.special:
                attributes |= {"content": secret + token.content, "normalized": False}
            backend.add_tokens([AddedToken(**attributes)])
        names = {token.content: secret + token.content if token.special else token.content for token in self._added}
        ids = {backend.token_to_id(name): self._backend.token_to_id(text) for text, name in names.items()}
        return secret, backend, ids  # type: ignore[return-value]  # all of them are known


def _alone(token: AddedToken) -> str:
    return rf"(?<!\w){re.escape(token.content)}(?!\w)"


def front(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A tokenizer of the same model (shared, not copied), normalizer and pre-tokenizer, without added tokens."""
    copy = tokenizers.Tokenizer(backend.model)
    for name in ("normalizer", "pre_tokenizer"):
        if (step := getattr(backend, name)) is not None:
            setattr(copy, name, step)
    return copy


def new_mark(*texts: str) -> str:
    """A character that none of the texts contains."""
    while any((mark := chr(0xF0000 + secrets.randbelow(0xFFFE))) in text for text in texts):
        pass
    return mark


def take_marks(text: str, mark: str) -> tuple[str, list[int]]:
    """The text without its marks, and where they were."""
    parts = text.replace(json.dumps(mark)[1:-1], mark).split(mark)  # `tojson` may have escaped them
    guards, length = [], 0
    for part in parts[:-1]:
        length += len(part)
        guards.append(length)
    return "".join(parts), guards
