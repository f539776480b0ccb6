"""Samples as the model will see them, what is trained in colour, the rest dim.

The first thing to look at before a run: a wrong template, a missing end token or a masked answer is seen at once.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np

from puna.data.indexed_dataset import IGNORED, Dataset
from puna.files import write_bytes
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


def write_page(path: Path, data: Dataset, tokenizer: Tokenizer, samples: range, limit: int) -> None:
    """Writes samples as an HTML page."""
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
    write_bytes(path, page.encode(errors="replace"))
