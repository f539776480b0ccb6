"""Documents of running text, and WikiText's articles."""

from __future__ import annotations

import re
from collections.abc import Sequence

from puna.data.handlers.handler import Handler, require_text
from puna.data.records import TITLE
from puna.data.samples import Row, Sample, Text
from puna.data.sources import BadRow


def text(row: Row, field: str = "text") -> list[Sample | BadRow]:
    return [Sample(Text(require_text(row, field)))]


def wikitext_clean(row: Row) -> list[Sample | BadRow]:
    return [Sample(Text(detokenize(require_text(row, "text"))))]


def is_wikitext(rows: Sequence[Row]) -> bool:
    """Whether the first line that isn't blank is the heading of an article."""
    first = next((str(row["text"]).strip() for row in rows if str(row.get("text") or "").strip()), "")
    return bool(TITLE.fullmatch(first.partition("\n")[0].strip()))


def detokenize(text: str) -> str:
    """WikiText with normal punctuation, by the rules of Megatron-LM's and MindFormers' clean_wikitext."""
    text = text.replace("s '", "s'")
    text = re.sub(r"/' [0-9]/", r"/'[0-9]/", text)
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    for mark in ":;.!?,":
        text = text.replace(f" {mark} ", f"{mark} ")
    text = re.sub(r"\(\s*([^\)]*?)\s*\)", r"(\1)", text)
    text = re.sub(r"\[\s*([^\]]*?)\s*\]", r"[\1]", text)
    text = re.sub(r"{\s*([^}]*?)\s*}", r"{\1}", text)
    text = re.sub(r"\"\s*([^\"]*?)\s*\"", r'"\1"', text)
    text = re.sub(r"'\s*([^']*?)\s*'", r"'\1'", text)
    for spaced, close in (
        ("= = = =", "===="),
        ("= = =", "==="),
        ("= =", "=="),
        (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    ):
        text = text.replace(spaced, close)
    return text.replace(" \n", "\n").replace("\n ", "\n").replace(" N ", " 1 ").replace(" 's", "'s")


TEXT = Handler(
    "text",
    text,
    "text",
    fields=("text",),
    sample="a document; `--text-field` names another field",
    needs_template=False,
    uses_text_field=True,
)
WIKITEXT = Handler(
    "wikitext",
    text,
    "text",
    fields=("text",),
    sample="an article of WikiText, verbatim",
    detect=is_wikitext,
    documents="article",
    needs_template=False,
)
WIKITEXT_CLEAN = Handler(
    "wikitext-clean",
    wikitext_clean,
    "text",
    fields=("text",),
    sample="an article of WikiText with normal punctuation",
    auto=False,
    documents="article",
    needs_template=False,
)
