"""What every tokenizer format is read into: the common ground between the loaders, the writers and `Tokenizer`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, processors

from puna.errors import UserError

MAX_FILE_BYTES = 512 << 20  # no tokenizer file comes near it; a bad one must not fill the memory


@dataclass
class TokenizerSpec:
    """The pieces of one tokenizer. Token names are strings; `None` means that the checkpoint has no such token."""

    backend: tokenizers.Tokenizer
    bos: str | None = None
    eos: str | None = None
    unk: str | None = None
    pad: str | None = None
    add_bos: bool = False
    add_eos: bool = False
    stops: tuple[int, ...] = ()  # end tokens that the checkpoint declares beside `eos`
    templates: dict[str, str] = field(default_factory=dict)  # name ("default", "tool_use", ...) -> Jinja source
    template_name: str = "checkpoint"
    scores: list[float] | None = None  # SentencePiece scores by id, where the checkpoint carries them
    config: dict[str, Any] = field(default_factory=dict)  # tokenizer_config.json, unknown keys included
    files: dict[str, bytes] = field(default_factory=dict)  # the checkpoint's own files, written back unchanged


def read_bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB, so it is no tokenizer file.")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read the tokenizer file {path}: {error.strerror or error}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, `{}` when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_bytes(path))
    except ValueError as error:
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


def add_tokens(backend: tokenizers.Tokenizer, tokens: Iterable[tuple[str, bool]]) -> None:
    """Register (text, special) tokens, which then match before any other rule. Those already known keep their id."""
    backend.add_tokens([AddedToken(text, special=special, normalized=False) for text, special in tokens])


def set_ends(parts: TokenizerSpec) -> None:
    """Make the backend itself add BOS and EOS by the parts' rule, for the readers of the saved tokenizer.json."""
    before = [parts.bos] if parts.add_bos and parts.bos else []
    after = [parts.eos] if parts.add_eos and parts.eos else []
    single = [*before, "$A", *after]
    pair = single + [f"{token}:1" for token in [*before, "$B", *after]]
    special = [(token, parts.backend.token_to_id(token)) for token in dict.fromkeys(before + after)]
    parts.backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
