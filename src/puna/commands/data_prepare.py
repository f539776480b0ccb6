"""`puna data prepare`: raw files to token data."""

from __future__ import annotations

from puna.data.options import PrepareOptions


def run(options: PrepareOptions) -> None:
    """Prepares the data and prints what was written."""
    from puna.data.prepare import prepare
    from puna.data.writer import prefix_of

    metadata = prepare(options)
    for split, counts in metadata["splits"].items():
        numbers = f"{counts['samples']:,} samples, {counts['tokens']:,} tokens, {counts['trained']:,} trained"
        print(f"{prefix_of(options, split)}: {numbers}, longest {counts['longest']:,}")
