"""`TokenizerSpec`, the common form between the readers, the writers and `Tokenizer`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, processors

from puna.errors import UserError

MAX_FILE_BYTES = 512 << 20  # no tokenizer file comes near it; a bad one must not fill the memory
MAX_ADDED = 200_000  # added tokens; speech models have some 70,000, and a million take half a minute to register


@dataclass
class TokenizerSpec:
    """One tokenizer. Tokens are given by their spelling; `None` means that the checkpoint has no such token."""

    backend: tokenizers.Tokenizer
    source: str = ""  # "tokenizer.json" or "tokenizer.model", where the vocabulary was read from such a file
    bos: str | None = None
    eos: str | None = None
    unk: str | None = None
    pad: str | None = None
    add_bos: bool = False
    add_eos: bool = False
    stops: tuple[int, ...] = ()  # ids of the end tokens that the checkpoint declares beside `eos`
    templates: dict[str, str] = field(default_factory=dict)  # name ("default", "tool_use", ...) -> Jinja source
    template_name: str = "checkpoint"
    scores: list[float] | None = None  # SentencePiece scores by id, where the checkpoint carries them
    unused: dict[int, list[int]] = field(default_factory=dict)  # id that is never emitted -> the ids emitted instead
    config: dict[str, Any] = field(default_factory=dict)  # tokenizer_config.json, unknown keys included
    files: dict[str, bytes] = field(default_factory=dict)  # the checkpoint's own files, written back unchanged


def read_bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB, so it is not a tokenizer file.")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read the tokenizer file {path}: {error.strerror or error}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, `{}` when it is missing."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object; fetch it again.")
    return value


def state(component: Any) -> dict[str, Any] | None:
    """The JSON form of a normalizer, pre-tokenizer, decoder or model of the `tokenizers` library."""
    return None if component is None else json.loads(component.__getstate__())


def flatten(component: Any, children: str) -> list[dict[str, Any]]:
    """The steps of a component: those of a `Sequence` (under the key `children`), or the one component itself."""

    def steps(node: dict[str, Any] | None) -> list[dict[str, Any]]:
        if node is None:
            return []
        return [step for child in node[children] for step in steps(child)] if node["type"] == "Sequence" else [node]

    return steps(state(component))


def added_token(text: str, special: bool) -> AddedToken:
    """A token that matches its spelling in the raw text, before any other rule."""
    return AddedToken(text, special=special, normalized=False)


def add_tokens(backend: tokenizers.Tokenizer, tokens: Sequence[AddedToken]) -> None:
    """Register added tokens. Those already known keep their id and get the new attributes.

    Raises UserError for more than `MAX_ADDED` of them.
    """
    check_count(len(tokens))
    backend.add_tokens([token for token in tokens if token.content])


def check_count(added: int) -> None:
    if added > MAX_ADDED:
        raise UserError(
            f"The tokenizer has {added:,} added tokens, more than the {MAX_ADDED:,} that are read; "
            "use the tokenizer of the original checkpoint."
        )


def same_attributes(a: AddedToken, b: AddedToken) -> bool:
    """Whether two added tokens match and count the same way; `==` of the library compares the spelling alone."""
    return bool(a.__getstate__() == b.__getstate__())


def strips(token: AddedToken) -> list[str]:
    """The names of the attributes by which an added token reaches beyond its spelling."""
    return [name for name in ("lstrip", "rstrip", "single_word") if getattr(token, name)]


def probes(token: str) -> list[str]:
    """Texts that show the attributes of an added token: in a word, with a space before or behind, at a line break."""
    return [f"a{before}{token}{after}b" for before, after in (("", ""), (" ", ""), ("", " "), ("\n", "\n"))]


def set_ends(spec: TokenizerSpec) -> None:
    """Make the backend itself add BOS and EOS by the rule of `spec`, for the readers of the saved tokenizer.json."""
    before = [spec.bos] if spec.add_bos and spec.bos else []
    after = [spec.eos] if spec.add_eos and spec.eos else []
    single = [*before, "$A", *after]
    pair = single + [f"{token}:1" for token in [*before, "$B", *after]]
    special = [(token, spec.backend.token_to_id(token)) for token in dict.fromkeys(before + after)]
    spec.backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
