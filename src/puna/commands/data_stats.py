"""`puna data stats`: totals and lengths of prepared data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from puna.options import argument, option


@dataclass(kw_only=True)
class StatsOptions:
    """Print totals and sample lengths of prepared data.

    Examples:
      puna data stats data/alpaca_train data/alpaca_validation
      puna data stats data/corpus_train --plot lengths.png --seq-len 2048
    """

    prefix: tuple[str, ...] = argument("prefixes of the data")
    plot: Path | None = option(None, "draw the lengths as a histogram (PNG)", writes="file")
    seq_len: int | None = option(
        None, "also count the rows of this length that the samples pack into", minimum=1, maximum=2**31 - 1
    )


def run(options: StatsOptions) -> None:
    """Prints a table with a column for each dataset, two for preference data, and draws the lengths if asked to."""
    from puna.data.indexed_dataset import open_datasets
    from puna.data.stats import facts, plot

    datasets = [data for prefix in options.prefix for data in open_datasets(prefix)]
    columns = [facts(data, options.seq_len) for data in datasets]
    rows = [["", *(Path(data.prefix).name for data in datasets)]]
    rows += [[name, *(column[name] for column in columns)] for name in columns[0]]
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([f"{row[0]:<{widths[0]}}", *cells]).rstrip())
    if options.plot:
        plot(datasets, options.plot)
        print(options.plot)
