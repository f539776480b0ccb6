"""Byte-level BPE vocabularies: the tiktoken `tokenizer.model` of Llama 3, and the backend of a GGUF vocabulary."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from puna.errors import UserError, nearest
from puna.tokenizer.bpe_patterns import DIGIT, GPT2, IGNORE_MERGES, NAMES, NFC, PRE
from puna.tokenizer.spec import TokenizerSpec, add_tokens, added_token, read_bytes, set_ends

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
    add_tokens(backend, [added_token(text, True) for text in LLAMA3_SPECIAL])
    spec = TokenizerSpec(
        backend,
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        add_bos=True,
        files={"tokenizer.model": read_bytes(Path(path))},
    )
    set_ends(spec)
    return spec


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
    if pre in NFC:
        backend.normalizer = normalizers.NFC()
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
