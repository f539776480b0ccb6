"""The registry of formats: what is written once there, and read by the command line and the docs."""

from __future__ import annotations

from pathlib import Path

import pytest

from puna.commands.convert import ConvertOptions
from puna.commands.lora_merge import LoraMergeOptions
from puna.errors import UserError
from puna.options import help_text
from puna.weights.convert import Target
from puna.weights.formats import registry

DOCS = Path(__file__).parents[2] / "docs"


def test_the_docs_table_is_the_registrys() -> None:
    text = (DOCS / "convert.md").read_text()
    rows = [f"| `{fmt.name}` | yes | {'yes' if fmt.write else 'no'} | {fmt.summary} |" for fmt in registry.FORMATS]
    assert "\n".join(rows) in text


@pytest.mark.parametrize("options", [ConvertOptions, LoraMergeOptions])
def test_help_names_every_format_that_is_written_and_its_options(options) -> None:
    text = " ".join(help_text("x", options).split())
    assert ", ".join(fmt.name for fmt in registry.writable()) in text
    for entry, formats in registry.write_options():
        assert f"{registry.names(formats)}: {entry.metadata['help']}" in text


def test_names_and_aliases_find_their_format() -> None:
    for fmt in registry.FORMATS:
        assert all(registry.find(name) is fmt for name in (fmt.name, *fmt.aliases))
    assert registry.find("ranks").name == "presharded"
    with pytest.raises(UserError, match="There is no format 'ggguf'.*did you mean 'gguf'"):
        registry.find("ggguf")


def test_a_target_takes_the_options_of_its_format_alone() -> None:
    assert Target.of("ranks", ranks=3, tp=1).options.ranks == 3
    with pytest.raises(UserError, match="puna reads llama2c and doesn't write it; it writes hf, presharded"):
        Target.of("llama2c")
    with pytest.raises(UserError, match="--pp is an option of megatron, not of gguf"):
        Target.of("gguf", pp=2)
    with pytest.raises(TypeError, match="no write option tpp"):
        Target.of("gguf", tpp=2)
