"""Samples as the model will see them, trained tokens in colour, the rest dim.

The first thing to look at before a training: it shows a wrong template, a missing end token or a masked answer.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from itertools import groupby, product
from pathlib import Path

import numpy as np

from puna.data.indexed_dataset import IGNORED, SIDES, Dataset
from puna.files import write_bytes
from puna.tokenizer import Tokenizer

# Control characters of a sample must not reach the terminal: each is shown as a picture
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
<p>{about} Trained tokens are <mark>marked</mark>.</p>
{samples}
</html>
"""


def title(data: Dataset, tokenizer: Tokenizer, index: int) -> str:
    """One line about a sample: its numbers of tokens, and of special tokens that are spelled in plain text."""
    ids, labels = data.sample(index)
    side = "".join(f", {name}" for name in SIDES if data.prefix.endswith(f"_{name}"))
    counts = f"sample {index:,}{side}: {len(ids):,} tokens, {int((labels != IGNORED).sum()):,} trained"
    names = tokenizer.special_tokens
    text = tokenizer.decode(ids.tolist(), skip_special=False)
    written = len(re.findall("|".join(map(re.escape, names)), text)) if names else 0
    special = {tokenizer.id(name) for name in names}
    spelled = written - sum(index in special for index in ids.tolist())
    return f"{counts}, {spelled:,} special tokens spelled as plain text" if spelled > 0 else counts


def parts(data: Dataset, tokenizer: Tokenizer, index: int, limit: int) -> Iterator[tuple[str, bool]]:
    """(text, whether it is trained) of the runs of a sample, special tokens included; at most `limit` tokens."""
    ids, labels = data.sample(index)
    stream = tokenizer.stream(skip_special=False)
    runs = groupby(
        zip(ids[:limit].tolist(), np.asarray(labels[:limit] != IGNORED).tolist(), strict=True), lambda t: t[1]
    )
    for trained, run in runs:
        yield "".join(stream.push(token) for token, _ in run), trained
    yield stream.end() + (f" … {len(ids) - limit:,} more tokens" if len(ids) > limit else ""), False


def write_page(path: Path, datasets: list[Dataset], tokenizer: Tokenizer, samples: range, limit: int) -> None:
    """Writes samples as an HTML page; those of several datasets alternate."""
    blocks = []
    for index, data in product(samples, datasets):
        pieces = [
            f"<mark>{html.escape(text)}</mark>" if trained else html.escape(text)
            for text, trained in parts(data, tokenizer, index, limit)
        ]
        blocks.append(f"<h2>{html.escape(title(data, tokenizer, index))}</h2>\n<pre>{''.join(pieces)}</pre>")
    data = datasets[0]
    made = ", ".join(f"{key} {data.metadata[key]}" for key in ("handler", "loss") if data.metadata.get(key))
    about = f"{len(data):,} samples{f' ({made})' if made else ''}."
    page = PAGE.format(title=html.escape(data.prefix), about=html.escape(about), samples="\n".join(blocks))
    write_bytes(path, page.encode(errors="replace"))
