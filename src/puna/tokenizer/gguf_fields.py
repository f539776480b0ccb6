"""The tokenizer inside a GGUF file: `tokenizer.ggml.*` metadata to `TokenizerSpec` and back (GGUF specification)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken

from puna.errors import UserError
from puna.tokenizer import sentencepiece_model, tiktoken_bpe
from puna.tokenizer.bpe_patterns import ADDS_BOS, NAMES, pre_name
from puna.tokenizer.sentencepiece_model import BYTE, BYTE_PIECE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Piece
from puna.tokenizer.spec import TokenizerSpec, add_tokens, added_token, flatten, set_ends, state, strips

PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
# llama.cpp's defaults for SentencePiece vocabularies without these fields: LLaMA's own ids.
LLAMA_IDS = {"bos": 1, "eos": 2, "unk": 0}
END_OF_TURN = ("<|eot_id|>", "<|im_end|>")


def read_gguf(fields: Mapping[str, Any]) -> TokenizerSpec:
    """Read the metadata of a GGUF file (plain Python values by their full keys)."""
    try:
        return _read(fields)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"The GGUF file's tokenizer fields are malformed ({error!r}); fetch it again.") from error


def _read(fields: Mapping[str, Any]) -> TokenizerSpec:
    kind = fields.get(PREFIX + "model")
    tokens = [str(token) for token in _array(fields, "tokens", None)]
    if kind == "llama":
        scores = [float(score) for score in _array(fields, "scores", len(tokens))]
        spec = _read_spm(fields, tokens, scores)
    elif kind == "gpt2":
        spec = _read_bpe(fields, tokens)
    else:
        raise UserError(
            f"The GGUF file's tokenizer is of kind {kind!r}, but LLaMA models have 'llama' or 'gpt2'; "
            "use the model's Hugging Face files instead."
        )
    for role, key in IDS.items():
        index = fields.get(PREFIX + key, LLAMA_IDS.get(role) if kind == "llama" else None)
        if index is not None:
            if not 0 <= int(index) < len(tokens):
                raise UserError(
                    f"The GGUF file's {PREFIX}{key} is {index}, but it has {len(tokens)} tokens; fetch it again."
                )
            setattr(spec, role, tokens[int(index)])
    spec.add_bos = bool(fields.get(PREFIX + "add_bos_token", spec.add_bos)) and spec.bos is not None
    spec.add_eos = bool(fields.get(PREFIX + "add_eos_token", False)) and spec.eos is not None
    ends = [fields.get(f"{PREFIX}{name}_token_id") for name in ("eot", "eom")]
    spec.stops = tuple(int(index) for index in ends if index is not None)
    if TEMPLATE in fields:
        spec.templates = {"default": str(fields[TEMPLATE])}
    for name in fields.get("tokenizer.chat_templates", ()):
        if f"{TEMPLATE}.{name}" in fields:
            spec.templates[str(name)] = str(fields[f"{TEMPLATE}.{name}"])
    set_ends(spec)
    return spec


def _array(fields: Mapping[str, Any], name: str, length: int | None) -> Sequence[Any]:
    values = fields.get(PREFIX + name)
    if values is None or not len(values) or length not in (None, len(values)):
        size = "no" if values is None else f"{len(values)} entries in"
        wanted = "" if length is None else f" (there are {length} tokens)"
        raise UserError(
            f"The GGUF file has {size} {PREFIX}{name}{wanted}, so its tokenizer cannot be read; fetch it again."
        )
    return values


def _read_spm(fields: Mapping[str, Any], tokens: list[str], scores: list[float]) -> TokenizerSpec:
    types = _types(fields, tokens)
    pieces = [Piece(*piece) for piece in zip(tokens, scores, types, strict=True)]
    backend = sentencepiece_model.build(
        pieces, prefix=bool(fields.get(PREFIX + "add_space_prefix", True)), as_llama_cpp=True
    )
    return TokenizerSpec(backend, add_bos=True, scores=scores)


def _read_bpe(fields: Mapping[str, Any], tokens: list[str]) -> TokenizerSpec:
    types = _types(fields, tokens)
    pre = str(fields.get(PREFIX + "pre", "default"))  # llama.cpp's reading of files from before the field existed
    if len(set(tokens)) != len(tokens):
        raise UserError(
            "The GGUF file has the same token under two ids, so texts have no single encoding; fetch it again."
        )
    # Added tokens after the last ordinary one stay out of the model, as they do in Hugging Face files.
    size = max((i + 1 for i, kind in enumerate(types) if kind in (NORMAL, UNUSED)), default=0)
    merges = [(left, right) for left, _, right in (str(pair).partition(" ") for pair in _array(fields, "merges", None))]
    backend = tiktoken_bpe.build({token: i for i, token in enumerate(tokens[:size])}, merges, pre)
    added = [(t, kind) for t, kind in zip(tokens, types, strict=True) if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
    add_tokens(backend, [added_token(token, kind != USER_DEFINED) for token, kind in added])
    return TokenizerSpec(backend, add_bos=NAMES[pre] in ADDS_BOS)


def _types(fields: Mapping[str, Any], tokens: list[str]) -> list[int]:
    if PREFIX + "token_type" in fields:
        return [int(kind) for kind in _array(fields, "token_type", len(tokens))]
    special = {int(fields.get(PREFIX + key, LLAMA_IDS.get(role, -1))) for role, key in IDS.items()}
    return [
        BYTE if BYTE_PIECE.fullmatch(token) else CONTROL if i in special else NORMAL for i, token in enumerate(tokens)
    ]


def write_gguf(spec: TokenizerSpec) -> dict[str, Any]:
    """The GGUF fields of a tokenizer, from which llama.cpp makes the same ids. Raises UserError where it can't."""
    backend = spec.backend
    model = state(backend.model)
    if model is None or model["type"] != "BPE":
        raise UserError("Only BPE tokenizers can be written to GGUF; keep the checkpoint in the Hugging Face layout.")
    vocab: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    texts = {index: text for text, index in vocab.items()}
    pairs = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    tokens = [texts.get(index, f"[PAD{index}]") for index in range(max(texts) + 1)]
    added = backend.get_added_tokens_decoder()

    def kind(index: int, text: str) -> int:
        if text == spec.unk and text == model["unk_token"]:
            return UNKNOWN
        if index in added:
            return CONTROL if added[index].special else USER_DEFINED
        if model["byte_fallback"] and BYTE_PIECE.fullmatch(text):
            return BYTE
        return NORMAL if index in texts else UNUSED

    fields: dict[str, Any] = {"tokens": tokens, "token_type": [kind(i, text) for i, text in enumerate(tokens)]}
    if any(step["type"] == "ByteLevel" for step in flatten(backend.decoder, "decoders")):
        fields |= _write_bpe(spec, pairs)
    else:
        fields |= _write_spm(spec, pairs, tokens)
    for role, key in IDS.items():
        if (text := getattr(spec, role)) is not None:
            fields[key] = vocab[text]
    for name, texts_of_role in {"eot": END_OF_TURN, "eom": ("<|eom_id|>",)}.items():
        end = next((vocab[text] for text in texts_of_role if vocab.get(text) in added), None)
        if end is not None:
            fields[f"{name}_token_id"] = end
    fields |= {"add_bos_token": spec.add_bos, "add_eos_token": spec.add_eos}
    written = {PREFIX + key: value for key, value in fields.items()}
    if "default" in spec.templates:
        written[TEMPLATE] = spec.templates["default"]
    if others := [name for name in spec.templates if name != "default"]:
        written["tokenizer.chat_templates"] = others
        written |= {f"{TEMPLATE}.{name}": spec.templates[name] for name in others}
    return written


def not_in_gguf(token: AddedToken, index: int) -> UserError:
    """The error for an added token around which llama.cpp would split a text in another way."""
    named = strips(token) + ["normalized"] * token.normalized
    reason = f"has {' and '.join(named)}" if named else "has its own rule for the spaces around it"
    return UserError(
        f"The added token {token.content!r} (id {index}) {reason}, for which GGUF has no field, so llama.cpp would "
        "tokenise the text around it differently; keep the checkpoint in the Hugging Face layout."
    )


def _write_bpe(spec: TokenizerSpec, pairs: list[tuple[str, ...]]) -> dict[str, Any]:
    pre = pre_name(spec.backend)
    if pre is None:
        raise UserError(
            "llama.cpp has no name for this tokenizer's pre-tokenizer "
            f"({json.dumps(state(spec.backend.pre_tokenizer), ensure_ascii=False)[:200]}), "
            "so a GGUF of it would tokenise differently; keep the checkpoint in the Hugging Face layout."
        )
    if not pairs:
        raise UserError(
            "This BPE tokenizer has no merges, which a GGUF file needs; keep the checkpoint in the Hugging Face layout."
        )
    merges = [" ".join(pair) for pair in pairs]
    return {"model": "gpt2", "pre": pre, "merges": merges, "add_space_prefix": False}


def _write_spm(spec: TokenizerSpec, pairs: list[tuple[str, ...]], tokens: list[str]) -> dict[str, Any]:
    backend = spec.backend
    normalizers = [(step["type"], step) for step in flatten(backend.normalizer, "normalizers")]
    known = {"Prepend", "Replace"}
    metaspace = flatten(backend.pre_tokenizer, "pretokenizers")
    if spec.unused or any(step["type"] == "Split" for step in metaspace):
        raise UserError(
            "This tokenizer.model has user-defined or unused pieces, which llama.cpp handles in another way than "
            "SentencePiece does, so a GGUF would tokenise differently; keep the checkpoint in the Hugging Face layout."
        )
    if any(name not in known for name, _ in normalizers) or any(
        step["type"] != "Metaspace" or step.get("split") for step in metaspace
    ):
        raise UserError(
            "llama.cpp has no equal of this tokenizer's text normalisation, "
            "so a GGUF of it would tokenise differently; keep the checkpoint in the Hugging Face layout."
        )
    if any(step["prepend_scheme"] != "never" for step in metaspace):
        raise UserError(
            "This tokenizer puts a space at the start of a text alone (legacy: false), where llama.cpp puts one "
            "behind every special token too, and GGUF has no field for the difference; keep the checkpoint in the "
            "Hugging Face layout, or take llama.cpp's rule by legacy: true in tokenizer_config.json."
        )
    prefix = any(name == "Prepend" for name, _ in normalizers)
    if spec.scores is not None:
        scores = (spec.scores + [0.0] * len(tokens))[: len(tokens)]
    else:
        special = {token.content for token in backend.get_added_tokens_decoder().values()}
        by_piece = sentencepiece_model.scores(backend.get_vocab(with_added_tokens=False), pairs, special)  # type: ignore[arg-type]
        scores = [by_piece.get(token, 0.0) for token in tokens]
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": prefix}
