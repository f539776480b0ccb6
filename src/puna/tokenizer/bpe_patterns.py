"""The pre-tokenizers of byte-level BPE vocabularies: the regular expressions that split text into words, by GGUF name.

The split is a list of regular expressions, each applied to what the one before left. llama.cpp knows the lists by name
(`tokenizer.ggml.pre`); `PRE` states those of LLaMA-architecture models. Source: llama.cpp, src/llama-vocab.cpp,
`llm_tokenizer_bpe`; where llama.cpp rewrites an expression for its own engine, the one of the Hugging Face files.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import tokenizers

from puna.tokenizer.spec import flatten

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORD, BREAKS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|", r"\s*[\r\n]+|\s+(?!\S)|\s+"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|" + BREAKS
LLAMA3 = CONTRACTIONS + WORD + r"\p{N}{1,3}" + TAIL
QWEN2 = CONTRACTIONS + WORD + r"\p{N}" + TAIL
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*")
TAIL_WITH_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + BREAKS
TEKKEN = "|".join(CASED) + r"|\p{N}" + TAIL_WITH_SLASH
GPT4O = "|".join(f"{word}{CONTRACTIONS}?" for word in CASED) + r"|\p{N}{1,3}" + TAIL_WITH_SLASH
DIGIT, DIGITS, CJK = r"\p{N}", r"\p{N}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
# Different spellings of one expression in files: llama.cpp's regex engine has no inline flags, for one.
FORMS = {
    "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])": CONTRACTIONS,
    " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+": BLOOM,
    "\r": r"\r",
    "\n": r"\n",
}
# The cased letters that DeepSeek LLM's tokenizer.json lists (those of Unicode 11 that have two cases).
CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15"
    "\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
    "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113"
    "\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184"
    "\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e"
    "\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
DEEPSEEK_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + BREAKS
)
BAILING = (
    "'(?i:[sdmt]|ll|ve|re)" + WORD.replace("]?", "]?+") + r"\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SEED_CODER = CONTRACTIONS + WORD + r"\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|" + BREAKS
SPACES_OF_JAIS2 = "|".join([rf"\s{{{2**i}}}(?!\S)" for i in range(9, 1, -1)] + [r"\s{1,2}(?!\S)|\s{1}"])

PRE: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, DIGITS, "[0-9][0-9][0-9]"),
    "llama-bpe": (LLAMA3,),
    "smaug-bpe": (LLAMA3,),
    "gpt-2": (GPT2,),
    "smollm": (DIGIT, GPT2),
    "qwen2": (QWEN2,),
    "hunyuan": (QWEN2,),
    "tekken": (TEKKEN,),
    "gpt-4o": (GPT4O,),
    "deepseek-llm": (
        r"[\r\n]",
        rf"\s?[{CASED_LETTERS}]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        CJK,
        DIGITS,
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, DIGIT),
    "deepseek-v3": (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", DEEPSEEK_V3),
    "poro-chat": (BLOOM,),
    "viking": (BLOOM, DIGIT),
    "superbpe": (DIGITS, r"(?=(\d{3})+(?!\d))"),
    "seed-coder": (SEED_CODER,),
    "bailingmoe": (BAILING,),
    "minicpm5": (r"\p{N}{1,3}", CONTRACTIONS + WORD + DIGITS + TAIL),
    "jais-2": (CONTRACTIONS + WORD + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|" + SPACES_OF_JAIS2,),
}
# Other names of the same list, so that a file under any of them is read.
SAME = {
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    "smaug-bpe": ("dbrx", "glm4", "chatglm-bpe"),
    "gpt-2": (
        "phi-2",
        "mpt",
        "olmo",
        "jais",
        "gigachat",
        "a.x-4.0",
        "mellum",
        "modern-bert",
        "exaone4",
        "trillion",
        "granite-docling",
    ),  # fmt: skip
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    "qwen2": ("stablelm2", "deepseek-r1-qwen", "megrez", "kormo", "f2llmv2"),
    "hunyuan": ("solar-open", "grok-2"),
    "gpt-4o": ("llama4", "kanana2", "talkie", "minimax-m2"),
    "deepseek-v3": ("hunyuan-dense", "joyai-llm", "hy_v4"),
    "poro-chat": ("bloom", "gpt3-finnish"),
    "bailingmoe": ("bailingmoe2", "llada-moe"),
}
NAMES = {name: name for name in PRE} | {other: name for name, others in SAME.items() for other in others}
# A word that is in the vocabulary is taken whole, even where no merges lead to it (tiktoken's rule).
IGNORE_MERGES = {"llama-bpe", "tekken", "minicpm5"}
ADDS_BOS = {"llama-bpe", "tekken"}  # the default without a field in the file
NFC = {"qwen2"}  # GGUF has no field for the normalizer that these tokenizers have


def pre_name(backend: tokenizers.Tokenizer) -> str | None:
    """The GGUF name of a byte-level tokenizer's pre-tokenizer, None where llama.cpp has no equal."""
    expressions = patterns(backend)
    normalizers = {step["type"] for step in flatten(backend.normalizer, "normalizers")}
    ignores_merges = bool(getattr(backend.model, "ignore_merges", False))
    names = [name for name, expected in PRE.items() if expected == expressions]
    if not names and expressions and expressions[-1] == DIGIT and not _joins_digits(backend):
        # DeepSeek LLM's own file takes digits one by one, llama.cpp all in a row: the same where no token joins two.
        names = [name for name, expected in PRE.items() if expected == (*expressions[:-1], DIGITS)]
    names = [name for name in names if normalizers == ({"NFC"} if name in NFC else set())]
    exact = [name for name in names if (name in IGNORE_MERGES) == ignores_merges]
    if exact == names or not names:
        return names[0] if names else None
    # llama.cpp decides about merges by the name. Where merges lead to every word, both rules give the same ids.
    return names[0] if _merges_lead_everywhere(backend) else next(iter(exact), None)


def patterns(backend: tokenizers.Tokenizer) -> tuple[str, ...] | None:
    """The regular expressions that split text into words, one after the other; None where a step has another form."""
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
                found.append(DIGIT if each else DIGITS)
            case {"type": "Split", "pattern": {"Regex": regex}} if _isolates(step):
                for form, ours in FORMS.items():
                    regex = regex.replace(form, ours)
                found.append(regex)
            case _:
                return None
    return tuple(found)


def _isolates(step: dict[str, Any]) -> bool:
    # "Keep the matches, drop the rest" is the same where the expression matches every character, as all of ours do.
    return (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True))


def _joins_digits(backend: tokenizers.Tokenizer) -> bool:
    words = (backend.decode([index]) for index in backend.get_vocab(with_added_tokens=False).values())
    return any(a.isnumeric() and b.isnumeric() for word in words for a, b in pairwise(word))


def _merges_lead_everywhere(backend: tokenizers.Tokenizer) -> bool:
    model = tokenizers.Tokenizer(backend.model)  # no pre-tokenizer, and merges are not ignored for what follows
    ignores, backend.model.ignore_merges = backend.model.ignore_merges, False
    try:
        vocab = backend.get_vocab(with_added_tokens=False)
        return all(model.encode(word).ids == [index] for word, index in vocab.items())
    finally:
        backend.model.ignore_merges = ignores
