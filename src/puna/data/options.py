"""Options of data preparation. Imports no torch."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

from puna.data.handlers.registry import HANDLERS
from puna.options import CHECKPOINT, argument, option


@dataclass(kw_only=True)
class PrepareOptions:
    """Tokenise raw files into training data.

    Writes Megatron's .bin/.idx, and their metadata as JSON. Reads .jsonl, .json, .csv, .txt, .parquet and .arrow, plain
    or as .gz or .zst: files, folders, globs, and datasets of the Hugging Face Hub. After a kill the same command
    resumes.

    Examples:
      puna data prepare corpus/*.txt --out data/corpus --tokenizer smollm2-135m-instruct
      puna data prepare alpaca.json --out data/alpaca --tokenizer ./llama2-7b --template alpaca
      puna data prepare chats.jsonl.gz --out data/chats --tokenizer smollm2-135m-instruct --loss last
      puna data prepare HuggingFaceFW/fineweb --subset sample-10BT --out data/web --tokenizer ./llama3-8b
    """

    src: tuple[str, ...] = argument("files, folders, globs or Hub datasets (org/name)")
    out: Path = option(
        MISSING, "prefix of what is written: OUT_train_text_document.bin, OUT.json and so on", writes="prefix"
    )
    tokenizer: str = option(MISSING, CHECKPOINT + ", or a tokenizer file; its template is used too")
    handler: str = option("auto", f"format of the rows: {', '.join(HANDLERS)}; auto detects it by their fields")
    template: str | None = option(
        None, "chat template: a built-in (chatml, llama2, llama3, alpaca, vicuna) or a Jinja file"
    )
    template_values: dict[str, str] | None = option(
        None, "variables for the template, as in '{date_string: 26 Jul 2024}'"
    )
    loss: Literal["all", "last"] = option("all", "which answers of a conversation are trained")
    text_field: str = option("text", "handler text: the field of the document")
    documents: Literal["line", "paragraph", "file"] = option("line", "unit of text files that is a document")
    append_eos: bool = option(True, "end every document with the EOS token")
    special_tokens: bool = option(False, "recognise special tokens that documents spell, as rendered conversations do")
    validation: float = option(
        0.01, "fraction of the samples, by their hash, held out for validation; 0 for no split", minimum=0
    )
    workers: int | None = option(None, "processes; all cores when not given", minimum=1)
    engine: Literal["local", "ray"] = option(
        "local", "ray: as a Ray Data job on the cluster that this machine belongs to"
    )
    subset: str | None = option(None, "Hub datasets: the subset (configuration)")
    split: str = option("train", "Hub datasets: the split")
    revision: str | None = option(None, "Hub datasets: branch, tag or commit")
    overwrite: bool = option(False, "replace the data of that name")
