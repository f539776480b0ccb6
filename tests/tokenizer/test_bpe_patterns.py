"""The pre-tokenizers by their GGUF names split texts as llama.cpp's expressions do, and are found again on export."""

from __future__ import annotations

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from puna.tokenizer import Tokenizer
from puna.tokenizer.bpe_patterns import CASED_LETTERS, GPT2, NAMES, PRE, pre_name
from puna.tokenizer.tiktoken_bpe import BYTES, LETTERS, build

# As llama.cpp spells them (src/llama-vocab.cpp), for an engine without inline flags and nested classes.
CASES = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
CL100K = CASES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBER| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+CASES|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*CASES"
SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PORO = " ?[^(\\s|.,!?…。，、।۔،)]+"
JAIS2 = "|".join(rf"\s{{{n}}}(?!\S)" for n in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2"))
SPELLED = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "llama-bpe": (CL100K.replace("NUMBER", r"\p{N}{1,3}"),),
    "smaug-bpe": (CL100K.replace("NUMBER", r"\p{N}{1,3}"),),
    "gpt-2": (GPT2,),
    "smollm": (r"\p{N}", GPT2),
    "qwen2": (CL100K.replace("NUMBER", r"\p{N}"),),
    "hunyuan": (CL100K.replace("NUMBER", r"\p{N}"),),
    "tekken": (CASED.replace("CASES", "") + r"|\p{N}" + SLASH,),
    "gpt-4o": (CASED.replace("CASES", CASES + "?") + r"|\p{N}{1,3}" + SLASH,),
    "deepseek-llm": (
        r"[\r\n]",
        rf"\s?[{CASED_LETTERS}]+",
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+$",
        r"[一-龥ࠀ-一가-\ud7ff]+",
        r"\p{N}+",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}"),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[一-龥\u3040-\u309f\u30a0-\u30ff]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    ),
    "poro-chat": (PORO,),
    "viking": (PORO, r"\p{N}"),
    "superbpe": (r"\p{N}+", r"(?=(\d{3})+(?!\d))"),
    "seed-coder": (
        CASES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "bailingmoe": (
        r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
    "minicpm5": (r"\p{N}{1,3}", CL100K.replace("NUMBER", r"\p{N}+")),
    "jais-2": (
        CL100K.replace("NUMBER", r"\p{N}{1,3}").replace(r"|\s+(?!\S)|\s+", f"|{JAIS2}|\\s{{1}}"),
    ),
}  # fmt: skip
ASCII = {"tekken", "gpt-4o"}  # llama.cpp tells upper from lower case among ASCII letters alone
PARTS = st.sampled_from(
    ["it's", "WE'LL", " ", "  ", "\n", "\r\n\n", "\t", "12345", "1,234.5", "naïve", "ÇA", "人工智能", "かな", "한국어",
     "🦙", "...", "(x|y)", "`~", "/path", "a/b", "ﬀ", "Ⅷ", "½", "e\u0301", "#include", "x\u3000y", "。", "I'm"]
)  # fmt: skip
TEXT = st.lists(st.one_of(PARTS, st.text(st.characters(max_codepoint=0x24F), max_size=6)), max_size=8)


def split(text: str, expressions: tuple[str, ...]) -> list[str]:
    """llama.cpp, unicode_regex_split: each expression cuts what the one before it left; what it skips is a word too."""
    words = [text]
    for expression in expressions:
        cut = []
        for word in words:
            start = 0
            for match in regex.finditer(expression, word):
                cut += [word[start : match.start()], match.group()]
                start = match.end()
            cut.append(word[start:])
        words = [word for word in cut if word]
    return words


@pytest.mark.parametrize("name", SPELLED)
@given(parts=TEXT)
def test_words_are_llama_cpps(name, parts):
    text = "".join(parts)
    if name in ASCII:
        text = text.encode("ascii", "ignore").decode()
    backend = build({letter: i for i, letter in enumerate(LETTERS)}, [], name)
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert [bytes(BYTES[letter] for letter in word).decode() for word in words] == split(text, SPELLED[name])


def test_every_list_is_compared():
    assert SPELLED.keys() == PRE.keys() == set(NAMES.values())


@pytest.mark.parametrize(
    "name",
    ["deepseek-llm", "deepseek-v3", "smaug-bpe", "poro-chat", "viking", "superbpe", "trillion", "megrez", "seed-coder",
     "gpt-4o", "llama4", "gigachat", "a.x-4.0"],
)  # fmt: skip
def test_a_gguf_of_each_name_is_read(name):
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": [*LETTERS, "it"],
        "tokenizer.ggml.token_type": [1] * 257,
        "tokenizer.ggml.merges": ["i t"],
    }
    tokenizer = Tokenizer.from_gguf(fields)
    assert tokenizer.encode("it") == [256] and not tokenizer.add_bos
    written = tokenizer.to_gguf()["tokenizer.ggml.pre"]
    assert PRE[written] == PRE[NAMES[name]]


def word_by_word(*steps) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def isolated(expression: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(expression), "isolated")


def test_spellings_of_hugging_face_files_are_found():
    """DeepSeek LLM's digits one by one, line breaks as characters, BLOOM's nested class."""
    vocab = {letter: i for i, letter in enumerate(LETTERS)}
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend = build(vocab, [], "deepseek-llm")
    backend.pre_tokenizer = word_by_word(
        isolated("[\r\n]"), *(isolated(expression) for expression in PRE["deepseek-llm"][1:-1]), digits
    )
    assert pre_name(backend) == "deepseek-llm"
    joined = build(vocab | {"12": 256}, [("1", "2")], "deepseek-llm")
    joined.pre_tokenizer = backend.pre_tokenizer
    assert pre_name(joined) is None  # llama.cpp would take "12" as one token
    backend.pre_tokenizer = word_by_word(isolated(" ?[^(\\s|[.,!?…。，、।۔،])]+"), digits)
    assert pre_name(backend) == "viking"
    seed = PRE["seed-coder"][0].replace(r"\r\n", "\r\n")
    backend.pre_tokenizer = word_by_word(isolated(seed))
    assert pre_name(backend) == "seed-coder"


@pytest.mark.parametrize("ignores, name", [(True, "llama-bpe"), (False, "smaug-bpe")])
def test_the_name_says_whether_merges_are_ignored(ignores, name):
    """No merges lead to "abc": with them ignored it is one token, else three."""
    backend = build({letter: i for i, letter in enumerate(LETTERS)} | {"abc": 256}, [], name)
    backend.model.ignore_merges = ignores
    assert pre_name(backend) == name
    assert backend.encode("abc").ids == ([256] if ignores else list(b"abc"))
    backend.pre_tokenizer = build({}, [], "seed-coder").pre_tokenizer
    assert pre_name(backend) == (None if ignores else "seed-coder")
