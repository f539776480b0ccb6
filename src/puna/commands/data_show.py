"""`puna data show`: samples of prepared data on the terminal or as a page."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from puna.errors import UserError
from puna.options import CHECKPOINT, argument, option


@dataclass(kw_only=True)
class ShowOptions:
    """Print samples of prepared data: trained tokens in colour, prompts dim, special tokens visible.

    Examples:
      puna data show data/alpaca_train --tokenizer smollm2-135m-instruct
      puna data show data/alpaca_train --samples 20 --html alpaca.html
    """

    prefix: str = argument("prefix of the data, as data/alpaca_train; of a preference both sides are shown")
    tokenizer: str | None = option(None, CHECKPOINT + "; the one that the data were made with when not given")
    samples: int = option(5, "number of samples", minimum=1)
    start: int = option(0, "number of the first", minimum=0)
    max_tokens: int = option(2000, "most tokens of a sample that are shown", minimum=1)
    html: Path | None = option(None, "write a page instead of printing", writes="file")


def run(options: ShowOptions) -> None:
    """The verb: print samples, or write them as a page."""
    from rich.console import Console
    from rich.text import Text

    from puna.data.indexed_dataset import open_datasets
    from puna.data.prepare import load_tokenizer
    from puna.data.show import PICTURES, parts, title, write_page

    datasets = open_datasets(options.prefix)
    data = datasets[0]
    if not 0 <= options.start < len(data):
        raise UserError(f"{data.prefix} has {len(data):,} samples, so --start is between 0 and {len(data) - 1}.")
    made = data.metadata.get("tokenizer", {}).get("source")
    if not (options.tokenizer or made):
        raise UserError(f"{data.prefix} has no metadata that name its tokenizer: name it by --tokenizer.")
    tokenizer = load_tokenizer(options.tokenizer or made)
    data.check_tokenizer(tokenizer)
    samples = range(options.start, min(options.start + options.samples, len(data)))
    if options.html:
        write_page(options.html, datasets, tokenizer, samples, options.max_tokens)
        print(options.html)
        return
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    plain = not console.is_terminal or console.no_color
    for index, data in product(samples, datasets):
        console.print(Text(title(data, tokenizer, index), "bold"))
        line = Text()
        for text, trained in parts(data, tokenizer, index, options.max_tokens):
            shown = text.translate(PICTURES)
            line.append(f"⟦{shown}⟧" if plain and trained else shown, "green" if trained else "dim")
        console.print(line, end="\n\n")
