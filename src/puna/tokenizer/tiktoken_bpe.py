"""Byte-level BPE vocabularies: the tiktoken `tokenizer.model` of Llama 3, and the pre-tokenizers by their GGUF names.

The split of text into words before BPE is a list of regular expressions, each applied to what the one before it left.
llama.cpp knows the lists by name (`tokenizer.ggml.pre`); `PRE` states those of LLaMA-architecture models.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from puna.errors import UserError, nearest
from puna.tokenizer.spec import TokenizerSpec, add_tokens, flatten, read_bytes, set_ends

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# llama.cpp's regex engine has no inline flags, so its files spell the cases out.
CONTRACTIONS_SPELLED = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + TAIL
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + TAIL
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGIT, CJK = r"\p{N}", "[一-龥ࠀ-一가-퟿]+"

# llama.cpp, src/llama-vocab.cpp, llm_tokenizer_bpe; digits and GPT-2's words as Hugging Face files state them.
PRE: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "llama-bpe": (LLAMA3,),
    "gpt-2": (GPT2,),
    "smollm": (DIGIT, GPT2),
    "qwen2": (QWEN2,),
    "tekken": (TEKKEN,),
    "deepseek-coder": ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, DIGIT),
}
# Names of the same list, so that a file under any of them is read.
SAME = {
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "gpt-2": ("phi-2", "mpt", "olmo", "jais"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "qwen2": ("stablelm2", "deepseek-r1-qwen"),
}
NAMES = {name: name for name in PRE} | {other: name for name, others in SAME.items() for other in others}
# A word that is in the vocabulary is taken whole, even where no merges lead to it (tiktoken's rule).
IGNORE_MERGES = {"llama-bpe", "tekken"}

# The 256 tokens after the ranks of Llama 3's file, as Llama 3.1's tokenizer.json names them.
LLAMA3_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
)


def byte_letters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


LETTERS = byte_letters()
BYTES = {letter: byte for byte, letter in enumerate(LETTERS)}


def read_tiktoken(path: str | Path) -> TokenizerSpec:
    """Read Llama 3's `tokenizer.model`: lines of a base64 token and its rank. Merges are recovered from the ranks."""
    ranks: dict[bytes, int] = {}
    try:
        for line in read_bytes(Path(path)).splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error) as error:
        raise UserError(f"{path} is not a whole tiktoken file; fetch it again.") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise UserError(f"{path} lacks tokens or single bytes, so texts cannot be encoded; fetch it again.")
    names = {token: "".join(LETTERS[byte] for byte in token) for token in ranks}
    merges = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(names[left], names[right]) for left, right in pairs]
    vocab = {names[token]: rank for token, rank in ranks.items()}
    backend = build(vocab, merges, "llama-bpe")
    add_tokens(backend, [(text, True) for text in LLAMA3_SPECIAL])
    parts = TokenizerSpec(
        backend,
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        add_bos=True,
        files={"tokenizer.model": read_bytes(Path(path))},
    )
    set_ends(parts)
    return parts


def build(vocab: dict[str, int], merges: Iterable[tuple[str, str]], pre: str) -> tokenizers.Tokenizer:
    """The backend of a byte-level vocabulary with the pre-tokenizer of that GGUF name. Unknown names are refused."""
    if pre not in NAMES:
        raise UserError(
            f"The pre-tokenizer {pre!r} (tokenizer.ggml.pre) is not known{nearest(pre, NAMES)}; "
            "use the model's Hugging Face files instead."
        )
    pre = NAMES[pre]
    try:
        model = models.BPE(vocab=vocab, merges=list(merges), ignore_merges=pre in IGNORE_MERGES)
    except Exception as error:  # the library raises a bare Exception for a merge that names no token
        raise UserError(f"The tokenizer's merges don't fit its vocabulary ({error}); fetch the file again.") from error
    backend = tokenizers.Tokenizer(model)
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()  # GGUF has no field for it; every Qwen2 tokenizer has it
    steps: list[pre_tokenizers.PreTokenizer] = [_split(pattern) for pattern in PRE[pre] if pattern != GPT2]
    last_is_gpt2 = PRE[pre][-1] == GPT2
    if not last_is_gpt2 and GPT2 in PRE[pre]:
        steps.insert(PRE[pre].index(GPT2), _split(GPT2))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=last_is_gpt2))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    if pattern == DIGIT:
        return pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def pre_name(backend: tokenizers.Tokenizer) -> str | None:
    """The GGUF name of a byte-level tokenizer's pre-tokenizer, None where llama.cpp has no equal."""
    found = patterns(backend)
    name = next((name for name, expected in PRE.items() if expected == found), None)
    allowed = ("NFC",) if name == "qwen2" else ()
    if any(step["type"] not in allowed for step in flatten(backend.normalizer, "normalizers")):
        return None
    if getattr(backend.model, "ignore_merges", False) and name not in IGNORE_MERGES:
        return None
    return name


def patterns(backend: tokenizers.Tokenizer) -> tuple[str, ...] | None:
    """The regular expressions that split text into words, one after the other; None for any other kind of step."""
    found: list[str] = []
    steps = flatten(backend.pre_tokenizer, "pretokenizers")
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    for step in steps:
        match step:
            case {"type": "ByteLevel", "use_regex": True}:
                found.append(GPT2)
            case {"type": "ByteLevel"}:
                pass
            case {"type": "Digits", "individual_digits": each}:
                found.append(DIGIT if each else r"\p{N}+")
            case {"type": "Split", "pattern": {"Regex": regex}} if _isolates(step):
                found.append(regex.replace(CONTRACTIONS_SPELLED, CONTRACTIONS))
            case _:
                return None
    return tuple(found)


def _isolates(step: dict[str, Any]) -> bool:
    # "Keep the matches, drop the rest" is the same where the expression matches every character, as all of ours do.
    return (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True))
