"""Hugging Face tokenizer directories, in and out.

What comes from a checkpoint goes back unchanged: tokenizer.json byte for byte unless something had to be added to it,
and unknown keys of tokenizer_config.json. The one thing changed on purpose is `tokenizer_class`: transformers rebuilds
`LlamaTokenizer` from its vocabulary with other rules for spaces (4 and 5 differ), but reads `PreTrainedTokenizerFast`
from tokenizer.json unchanged.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from puna.errors import UserError
from puna.files import write_bytes
from puna.tokenizer.panics import panics_refused
from puna.tokenizer.sentencepiece_model import read_spm
from puna.tokenizer.spec import (
    TokenizerSpec,
    add_tokens,
    check_count,
    read_bytes,
    read_json,
    same_attributes,
    set_ends,
)
from puna.tokenizer.tiktoken_bpe import read_tiktoken

ROLES = ("bos", "eos", "unk", "pad")
TOKEN_KEYS = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
BOS_BY_CLASS = {"LlamaTokenizer", "LLaMATokenizer", "CodeLlamaTokenizer"}  # these add a BOS unless told otherwise
LLAMA_NAMES = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}  # the tokens of these classes when no file names them
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
        with panics_refused(hush=True):
            return _read(folder, read_json(folder / "tokenizer_config.json"))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"The tokenizer settings in {folder} are malformed ({error!r}); fetch them again.") from error


def _read(folder: Path, config: dict[str, Any]) -> TokenizerSpec:
    fast, model = folder / "tokenizer.json", folder / "tokenizer.model"
    if fast.is_file():
        data = read_bytes(fast)
        spec = TokenizerSpec(_backend(data, fast), source=fast.name, files={fast.name: data})
        if model.is_file():
            spec.files["tokenizer.model"] = read_bytes(model)
    elif model.is_file():
        spec = read_model(model, config)
        spec.source = model.name
    else:
        raise UserError(f"{folder} has neither tokenizer.json nor tokenizer.model, so text cannot be encoded.")
    spec.config = config
    listed_apart = read_json(path := folder / "special_tokens_map.json")
    if listed_apart:
        spec.files[path.name] = read_bytes(path)
    if "added_tokens_decoder" not in config:  # with it, transformers does not look at special_tokens_map.json
        config = config | {key: value for key, value in listed_apart.items() if value != ""}
    named = [name for key, value in config.items() if key.endswith("_token") and (name := _text(value))]
    named += _extra(config)
    if not fast.is_file():
        apart = read_json(folder / "added_tokens.json")
        _add_listed(spec, {int(index): _added(text, special=text in named) for text, index in apart.items()})
    listed = config.get("added_tokens_decoder", {})
    _add_listed(spec, {int(index): _added(token, special=_text(token) in named) for index, token in listed.items()})
    _name_special(spec, config, folder)
    _set_bos_rule(spec, config)
    spec.templates = _templates(folder, spec.config, spec.files)
    return spec


def _backend(data: bytes, path: Path) -> tokenizers.Tokenizer:
    check_count(data.count(b'"single_word"'))  # a key of every added token; registering a million takes long
    try:
        backend = tokenizers.Tokenizer.from_str(data.decode())
    except Exception as error:  # the library raises a bare Exception for whatever is wrong in the file
        raise UserError(f"{path} is not a whole tokenizer.json ({error}); fetch it again.") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _text(token: Any) -> str:
    """The spelling of a token that is given as a string or with its attributes; empty for anything else."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _added(token: Any, *, special: bool) -> AddedToken:
    """The added token of a string or of {"content": ..., "lstrip": ..., ...}; `special` is the default."""
    attributes = token if isinstance(token, dict) else {}
    special = bool(special or attributes.get("special"))
    strips = {key: bool(attributes.get(key)) for key in ("single_word", "lstrip", "rstrip")}
    return AddedToken(_text(token), **strips, normalized=bool(attributes.get("normalized", False)), special=special)


def _extra(config: dict[str, Any]) -> list[str]:
    """The spellings of the special tokens without a role."""
    return [_text(token) for token in _extra_tokens(config)]


def _extra_tokens(config: dict[str, Any]) -> list[Any]:
    tokens: list[Any] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = config.get(key) or []
        tokens += value.values() if isinstance(value, dict) else value
    return tokens


def _add_listed(spec: TokenizerSpec, listed: dict[int, AddedToken]) -> None:
    """Add the tokens that a file lists by id, with their attributes, which override those in tokenizer.json."""
    _add(spec, [token for _, token in sorted(listed.items())])
    for index, token in listed.items():
        if token.content and spec.backend.token_to_id(token.content) != index:
            raise UserError(
                f"The tokenizer's files disagree on {token.content!r}: id {index} is declared, "
                f"but it would get {spec.backend.token_to_id(token.content)}; fetch the checkpoint again."
            )


def _add(spec: TokenizerSpec, tokens: list[AddedToken]) -> None:
    """Register tokens with their attributes, unless the backend has them so."""
    if spec.source != "tokenizer.json":  # the normalizer is ours then and would add a space
        tokens = [AddedToken(**{**token.__getstate__(), "normalized": False}) for token in tokens]
    known = {token.content: token for token in spec.backend.get_added_tokens_decoder().values()}
    new = [token for token in tokens if token.content not in known or not same_attributes(token, known[token.content])]
    if new:
        add_tokens(spec.backend, new)
        spec.files.pop("tokenizer.json", None)  # it no longer holds every token


def _name_special(spec: TokenizerSpec, config: dict[str, Any], folder: Path) -> None:
    """Set bos, eos, unk and pad, register every token with a role, and read the end tokens of the model's configs.

    An empty name is ignored, as in the first LLaMA checkpoints: the vocabulary's own token has the role.
    """
    generation, model = read_json(folder / "generation_config.json"), read_json(folder / "config.json")
    special = {token.content for token in spec.backend.get_added_tokens_decoder().values() if token.special}
    for role in ROLES:
        key = f"{role}_token"
        if name := _text(config.get(key)):
            setattr(spec, role, name)
        elif key in config and config[key] is None:
            setattr(spec, role, None)
        elif getattr(spec, role) is None:
            listed = _ids(model.get(f"{role}_token_id"))
            usual = LLAMA_NAMES.get(role) if LLAMA_NAMES.get(role) in special else None
            setattr(spec, role, spec.backend.id_to_token(listed[0]) if listed else usual)
    others = [key for key in config if key.endswith("_token") and key not in TOKEN_KEYS]
    tokens = [config.get(key) for key in (*TOKEN_KEYS, *others)] + _extra_tokens(config)
    known = {token.content for token in spec.backend.get_added_tokens_decoder().values()}
    _add(spec, [_added(token, special=True) for token in tokens if _text(token) not in known])
    spec.stops = tuple(dict.fromkeys(_ids(generation.get("eos_token_id")) + _ids(model.get("eos_token_id"))))


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [index for index in values if isinstance(index, int) and index >= 0]


def _set_bos_rule(spec: TokenizerSpec, config: dict[str, Any]) -> None:
    """Determine whether BOS and EOS are added, and make tokenizer.json do the same.

    add_bos_token and add_eos_token come first, then a LLaMA class, then what tokenizer.json adds by itself.
    """
    backend = spec.backend
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a").ids
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    before, after = whole[:start], whole[start + len(plain) :]
    by_class = str(config.get("tokenizer_class", "")).removesuffix("Fast") in BOS_BY_CLASS
    if before and spec.bos is None:
        spec.bos = backend.id_to_token(before[0])
    bos = backend.token_to_id(spec.bos) if spec.bos else None
    eos = backend.token_to_id(spec.eos) if spec.eos else None
    bos_setting, eos_setting = config.get("add_bos_token"), config.get("add_eos_token")
    decided = bos_setting is not None or by_class  # then the post-processor in the file counts for nothing
    if spec.source == "tokenizer.json" and not decided and (before not in ([], [bos]) or after not in ([], [eos])):
        wrong = [backend.id_to_token(index) for index in before + after]
        raise UserError(
            f"tokenizer.json adds {wrong} to every text, but bos_token is {spec.bos!r} and eos_token {spec.eos!r}; "
            "make tokenizer_config.json agree with it."
        )
    add_bos = bos_setting if bos_setting is not None else by_class or bool(before)
    add_eos = eos_setting if eos_setting is not None else not decided and after == [eos]
    spec.add_bos, spec.add_eos = bool(add_bos) and bos is not None, bool(add_eos) and eos is not None
    if before != [bos] * spec.add_bos or after != [eos] * spec.add_eos:
        set_ends(spec)
        spec.files.pop("tokenizer.json", None)


def _templates(folder: Path, config: dict[str, Any], files: dict[str, bytes]) -> dict[str, str]:
    """The chat templates by name. A .jinja file comes before tokenizer_config.json, as in transformers."""
    value = config.get("chat_template")
    if isinstance(value, str):
        templates = {"default": value}
    else:
        templates = {entry["name"]: entry["template"] for entry in value or []}
    paths = [folder / TEMPLATE_FILE, *sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))]
    for path in (path for path in paths if path.is_file()):
        name = "default" if path.parent == folder else path.stem
        files[str(path.relative_to(folder))] = data = read_bytes(path)
        try:
            templates[name] = data.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text; fetch it again.") from error
    return templates


def write_directory(spec: TokenizerSpec, folder: Path) -> None:
    """Write the files from which transformers 4 and 5 make the same tokenizer. Each appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"tokenizer.json": spec.backend.to_str(pretty=True).encode()} | spec.files
    config = spec.config | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.setdefault("clean_up_tokenization_spaces", False)
    config.pop("auto_map", None)  # it names code of the checkpoint, which is neither needed nor run
    for role in ROLES:
        named = getattr(spec, role)
        if named is not None and _text(config.get(f"{role}_token")) != named:
            config[f"{role}_token"] = named
    if listed := config.get("added_tokens_decoder"):
        config["added_tokens_decoder"] = listed | _attributes(spec, listed)
    if not spec.config:
        config |= {"add_bos_token": spec.add_bos, "add_eos_token": spec.add_eos}
        named = {f"{role}_token": getattr(spec, role) for role in ROLES if getattr(spec, role)}
        files.setdefault("special_tokens_map.json", _json(named))
    if spec.templates and not any(name.endswith(".jinja") for name in files):
        several = [{"name": name, "template": source} for name, source in spec.templates.items()]
        config["chat_template"] = spec.templates["default"] if list(spec.templates) == ["default"] else several
    files["tokenizer_config.json"] = _json(config)
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_bytes(folder / name, data)


def _attributes(spec: TokenizerSpec, listed: dict[str, Any]) -> dict[str, Any]:
    """The entries of added_tokens_decoder that differ from the backend's: transformers prefers this file."""
    added = {str(index): token for index, token in spec.backend.get_added_tokens_decoder().items()}
    pairs = [(index, added[index], _added(token, special=False)) for index, token in listed.items() if index in added]
    return {index: ours.__getstate__() for index, ours, theirs in pairs if not same_attributes(ours, theirs)}


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
