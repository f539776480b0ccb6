"""The quantisation schemes by name. A new one is a file that ends in its record, and one line here."""

from __future__ import annotations

from collections.abc import Iterator

from puna.errors import UserError, nearest
from puna.model.linear import Linear
from puna.model.llama import Llama
from puna.quant.int8 import INT8
from puna.quant.scheme import QuantScheme

SCHEMES: dict[str, QuantScheme] = {scheme.name: scheme for scheme in (INT8,)}


def choose_scheme(name: str) -> QuantScheme:
    """The scheme of that name. Raises UserError for an unknown one."""
    if name not in SCHEMES:
        hint = nearest(name, SCHEMES) or f"; use one of {', '.join(SCHEMES)}"
        raise UserError(f"There is no quantization {name!r}{hint}.")
    return SCHEMES[name]


def quantised_layers(model: Llama) -> Iterator[tuple[str, Linear]]:
    """The linear layers that are quantised, by name: all but the output layer."""
    for name, module in model.named_modules():
        if isinstance(module, Linear) and module is not model.lm_head:
            yield name, module
