"""`puna data show`: samples as the model will see them, what is trained in colour, the rest dim.

The first thing to look at before a run: a wrong template, a missing end token or a masked answer is seen at once.
"""

from __future__ import annotations

import html
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from puna.data.indexed_dataset import IGNORED, Dataset, open_dataset
from puna.data.prepare import load_tokenizer
from puna.errors import UserError
from puna.option_sets import ShowOptions
from puna.tokenizer import Tokenizer

# Control characters of a sample must not reach the terminal: each has a picture
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
  body {{ font: 15px/1.5 ui-monospace, monospace; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }}
  h2 {{ font-size: 1em; margin: 2em 0 .5em; color: #555 }}
  pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; margin: 0; color: #888 }}
  mark {{ background: #d9f2dd; color: #0a5c1e }}
  @media (prefers-color-scheme: dark) {{
    body {{ background: #161616; color: #ddd }} pre {{ color: #888 }} mark {{ background: #12351c; color: #8fe3a5 }}
  }}
</style>
<h1>{title}</h1>
<p>{about} What is trained is <mark>marked</mark>.</p>
{samples}
</html>
"""


def run(options: ShowOptions) -> None:
    """The verb: print samples, or write them as a page."""
    data = open_dataset(options.prefix)
    if not 0 <= options.start < len(data):
        raise UserError(f"{data.prefix} has {len(data):,} samples, so --start is between 0 and {len(data) - 1}")
    made = data.card.get("tokenizer", {}).get("source")
    if not (options.tokenizer or made):
        raise UserError(f"{data.prefix} has no card that names its tokenizer: name it by --tokenizer")
    tokenizer = load_tokenizer(options.tokenizer or made)
    data.check_tokenizer(tokenizer)
    samples = range(options.start, min(options.start + options.samples, len(data)))
    if options.html:
        _write_page(options.html, data, tokenizer, samples, options.max_tokens)
        print(options.html)
        return
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    plain = not console.is_terminal or console.no_color
    for index in samples:
        console.print(Text(title(data, index), "bold"))
        line = Text()
        for text, trained in parts(data, tokenizer, index, options.max_tokens):
            shown = text.translate(PICTURES)
            line.append(f"⟦{shown}⟧" if plain and trained else shown, "green" if trained else "dim")
        console.print(line, end="\n\n")


def title(data: Dataset, index: int) -> str:
    """One line on a sample."""
    ids, labels = data.sample(index)
    return f"sample {index:,}: {len(ids):,} tokens, {int((labels != IGNORED).sum()):,} trained"


def parts(data: Dataset, tokenizer: Tokenizer, index: int, limit: int) -> Iterator[tuple[str, bool]]:
    """(text, whether it is trained) of the runs of a sample, special tokens as they stand; at most `limit` tokens."""
    ids, labels = data.sample(index)
    stream = tokenizer.stream(skip_special=False)
    runs = groupby(
        zip(ids[:limit].tolist(), np.asarray(labels[:limit] != IGNORED).tolist(), strict=True), lambda t: t[1]
    )
    for trained, run in runs:
        yield "".join(stream.push(token) for token, _ in run), trained
    yield stream.end() + (f" … {len(ids) - limit:,} more tokens" if len(ids) > limit else ""), False


def _write_page(path: Path, data: Dataset, tokenizer: Tokenizer, samples: range, limit: int) -> None:
    blocks = []
    for index in samples:
        pieces = [
            f"<mark>{html.escape(text)}</mark>" if trained else html.escape(text)
            for text, trained in parts(data, tokenizer, index, limit)
        ]
        blocks.append(f"<h2>{html.escape(title(data, index))}</h2>\n<pre>{''.join(pieces)}</pre>")
    made = ", ".join(f"{key} {data.card[key]}" for key in ("handler", "loss") if data.card.get(key))
    about = f"{len(data):,} samples{f' ({made})' if made else ''}."
    page = PAGE.format(title=html.escape(data.prefix), about=html.escape(about), samples="\n".join(blocks))
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(page, encoding="utf-8", errors="replace")
    beside.replace(path)
