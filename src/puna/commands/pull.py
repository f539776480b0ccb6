"""`puna pull`: a model into the local cache."""

from __future__ import annotations

from dataclasses import dataclass

from puna.options import argument, option


@dataclass(kw_only=True)
class PullOptions:
    """Fetch a model into the local cache and print its path.

    Examples:
      puna pull smollm2-135m-instruct
      puna pull meta-llama/Llama-3.2-1B-Instruct --revision main
    """

    model: str = argument("an alias (smollm2-135m-instruct) or a Hugging Face id (org/name)")
    revision: str | None = option(None, "branch, tag or commit of a Hugging Face id")


def run(options: PullOptions) -> None:
    """Prints the path of the fetched model."""
    from puna.weights.hub import pull

    print(pull(options.model, options.revision))
