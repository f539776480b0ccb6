"""Hugging Face tokenizer directories, in and out.

What comes from a checkpoint goes back unchanged: tokenizer.json byte for byte unless something had to be added to it,
and unknown keys of tokenizer_config.json. The one thing changed on purpose is `tokenizer_class`: transformers rebuilds
`LlamaTokenizer` from its vocabulary with other rules for spaces (4 and 5 differ), but reads `PreTrainedTokenizerFast`
from tokenizer.json as it stands.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from puna.errors import UserError
from puna.files import write_bytes
from puna.tokenizer.sentencepiece_model import read_spm
from puna.tokenizer.spec import TokenizerSpec, add_tokens, read_bytes, read_json, set_ends
from puna.tokenizer.tiktoken_bpe import read_tiktoken

ROLES = ("bos", "eos", "unk", "pad")
BOS_BY_CLASS = {"LlamaTokenizer", "CodeLlamaTokenizer"}  # these add a BOS unless told otherwise
LLAMA_NAMES = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}  # what these call their tokens when no file says
TEMPLATE_FILE, TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"


def read_model(path: Path, config: dict[str, Any] | None = None) -> TokenizerSpec:
    """Read a file called `tokenizer.model`: a SentencePiece model (LLaMA 1, 2) or a tiktoken file (Llama 3)."""
    config = config or {}
    with path.open("rb") as file:
        first = file.read(1)
    if first != b"\x0a":  # protobuf's first byte, where a tiktoken file has base64
        return read_tiktoken(path)
    prefix = config.get("add_prefix_space")
    return read_spm(path, legacy=config.get("legacy") is not False, prefix_space=prefix)


def read_directory(folder: Path) -> TokenizerSpec:
    """Read a tokenizer from a directory with tokenizer.json, or with tokenizer.model alone."""
    try:
        return _read(folder, read_json(folder / "tokenizer_config.json"))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"The tokenizer settings in {folder} are malformed ({error!r}); fetch them again.") from error


def _read(folder: Path, config: dict[str, Any]) -> TokenizerSpec:
    fast, model = folder / "tokenizer.json", folder / "tokenizer.model"
    if fast.is_file():
        data = read_bytes(fast)
        parts = TokenizerSpec(_backend(data, fast), files={"tokenizer.json": data})
        if model.is_file():
            parts.files["tokenizer.model"] = read_bytes(model)
    elif model.is_file():
        parts = read_model(model, config)
    else:
        raise UserError(f"{folder} has neither tokenizer.json nor tokenizer.model, so text cannot be encoded.")
    parts.config = config
    if not fast.is_file():
        _add_listed(parts, read_json(folder / "added_tokens.json"))
    _add_listed(parts, {_text(token): int(i) for i, token in config.get("added_tokens_decoder", {}).items()}, config)
    _name_special(parts, config, folder)
    _set_bos_rule(parts, config)
    parts.templates = _templates(folder, config, parts.files)
    return parts


def _backend(data: bytes, path: Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(data.decode())
    except Exception as error:  # the library raises a bare Exception for whatever is wrong in the file
        raise UserError(f"{path} is not a whole tokenizer.json ({error}); fetch it again.") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _text(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def _add_listed(parts: TokenizerSpec, listed: dict[str, int], config: dict[str, Any] | None = None) -> None:
    """Add tokens that stand beside tokenizer.json only; the ids must follow on those that exist."""
    special = {
        _text(token)
        for token in (config or {}).get("added_tokens_decoder", {}).values()
        if isinstance(token, dict) and token.get("special")
    }
    for text, index in sorted(listed.items(), key=lambda item: item[1]):
        if parts.backend.token_to_id(text) is None:
            _add(parts, text, text in special)
        if parts.backend.token_to_id(text) != index:
            raise UserError(
                f"The tokenizer's files disagree on {text!r}: id {index} is declared, "
                f"but it would get {parts.backend.token_to_id(text)}; fetch the checkpoint again."
            )


def _add(parts: TokenizerSpec, text: str, special: bool) -> None:
    add_tokens(parts.backend, [(text, special)])
    parts.files.pop("tokenizer.json", None)  # it no longer says everything


def _name_special(parts: TokenizerSpec, config: dict[str, Any], folder: Path) -> None:
    """Set bos, eos, unk and pad, and the end tokens that config.json and generation_config.json list."""
    generation, model = read_json(folder / "generation_config.json"), read_json(folder / "config.json")
    listed_apart = read_json(path := folder / "special_tokens_map.json")
    if listed_apart:
        parts.files[path.name] = read_bytes(path)
    config = listed_apart | config
    special = {token.content for token in parts.backend.get_added_tokens_decoder().values() if token.special}
    for role in ROLES:
        key = f"{role}_token"
        named = config.get(key)
        if named is not None:
            setattr(parts, role, _text(named))
        elif key in config:
            setattr(parts, role, None)
        elif getattr(parts, role) is None:
            listed = _ids(model.get(f"{role}_token_id"))
            usual = LLAMA_NAMES.get(role) if LLAMA_NAMES.get(role) in special else None
            setattr(parts, role, parts.backend.id_to_token(listed[0]) if listed else usual)
        text = getattr(parts, role)
        if text is not None and parts.backend.token_to_id(text) is None:
            _add(parts, text, True)  # transformers adds a named token that the vocabulary lacks, too
    for key in ("additional_special_tokens", "extra_special_tokens"):
        others = config.get(key) or []
        for text in map(_text, others.values() if isinstance(others, dict) else others):
            if parts.backend.token_to_id(text) is None:
                _add(parts, text, True)
    parts.stops = tuple(dict.fromkeys(_ids(generation.get("eos_token_id")) + _ids(model.get("eos_token_id"))))


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [index for index in values if isinstance(index, int) and index >= 0]


def _set_bos_rule(parts: TokenizerSpec, config: dict[str, Any]) -> None:
    """Find out whether BOS and EOS are added, and make tokenizer.json say the same."""
    backend = parts.backend
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a").ids
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    before, after = whole[:at], whole[at + len(plain) :]
    by_class = str(config.get("tokenizer_class", "")).removesuffix("Fast") in BOS_BY_CLASS
    if before and parts.bos is None:
        parts.bos = backend.id_to_token(before[0])
    bos = backend.token_to_id(parts.bos) if parts.bos else None
    eos = backend.token_to_id(parts.eos) if parts.eos else None
    said_bos, said_eos = config.get("add_bos_token"), config.get("add_eos_token")
    decided = said_bos is not None or by_class  # then the post-processor in the file counts for nothing
    if not decided and (before not in ([], [bos]) or after not in ([], [eos])):
        wrong = [backend.id_to_token(index) for index in before + after]
        raise UserError(
            f"tokenizer.json adds {wrong} to every text, but bos_token is {parts.bos!r} and eos_token {parts.eos!r}; "
            "make tokenizer_config.json agree with it."
        )
    add_bos = said_bos if said_bos is not None else by_class or bool(before)
    add_eos = said_eos if said_eos is not None else not decided and after == [eos]
    parts.add_bos, parts.add_eos = bool(add_bos) and bos is not None, bool(add_eos) and eos is not None
    if before != [bos] * parts.add_bos or after != [eos] * parts.add_eos:
        set_ends(parts)
        parts.files.pop("tokenizer.json", None)


def _templates(folder: Path, config: dict[str, Any], files: dict[str, bytes]) -> dict[str, str]:
    """The chat templates by name. A .jinja file comes before tokenizer_config.json, as in transformers."""
    value = config.get("chat_template")
    if isinstance(value, str):
        found = {"default": value}
    else:
        found = {entry["name"]: entry["template"] for entry in value or []}
    paths = [folder / TEMPLATE_FILE, *sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))]
    for path in (path for path in paths if path.is_file()):
        name = "default" if path.parent == folder else path.stem
        files[str(path.relative_to(folder))] = data = read_bytes(path)
        try:
            found[name] = data.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text; fetch it again.") from error
    return found


def write_directory(parts: TokenizerSpec, folder: Path) -> None:
    """Write the files from which transformers 4 and 5 make the same tokenizer. Each appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"tokenizer.json": parts.backend.to_str(pretty=True).encode()} | parts.files
    config = parts.config | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.setdefault("clean_up_tokenization_spaces", False)
    config.pop("auto_map", None)  # it names code of the checkpoint, which is neither needed nor run
    for role in ROLES:
        named = getattr(parts, role)
        if named is not None and (config.get(f"{role}_token") is None or _text(config[f"{role}_token"]) != named):
            config[f"{role}_token"] = named
    if not parts.config:
        config |= {"add_bos_token": parts.add_bos, "add_eos_token": parts.add_eos}
        named = {f"{role}_token": getattr(parts, role) for role in ROLES if getattr(parts, role)}
        files.setdefault("special_tokens_map.json", _json(named))
    if parts.templates and not any(name.endswith(".jinja") for name in files):
        several = [{"name": name, "template": source} for name, source in parts.templates.items()]
        config["chat_template"] = parts.templates["default"] if list(parts.templates) == ["default"] else several
    files["tokenizer_config.json"] = _json(config)
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_bytes(folder / name, data)


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
