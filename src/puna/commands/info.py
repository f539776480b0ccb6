"""`puna info X`: describes a checkpoint from its headers, without reading weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from puna.options import CHECKPOINT, argument, option

LINE = 100  # characters of a line of text


@dataclass(kw_only=True)
class InfoOptions:
    """Describe a checkpoint: format, shape, data types, tokenizer, template, size in memory.

    Examples:
      puna info smollm2-135m-instruct
      puna info ./my-model --json
    """

    model: str = argument(CHECKPOINT)
    revision: str | None = option(None, "branch, tag or commit of a Hugging Face id")
    json: bool = option(False, "print JSON")


def run(options: InfoOptions) -> None:
    """The verb: prints what the checkpoint is, for people or as JSON."""
    from puna.weights.describe import describe
    from puna.weights.open import open_checkpoint

    with open_checkpoint(options.model, revision=options.revision) as source:
        facts = describe(source)
    print(json.dumps(facts, indent=2, ensure_ascii=False) if options.json else text(facts))


def text(facts: dict[str, Any]) -> str:
    """The facts for people, one to a line."""
    config, files, cache, memory = facts["config"], facts["files"], facts["kv_cache"], facts["memory"]
    types = facts["details"].get("types") or facts["dtypes"]
    count = f"{len(files)} file{'s' if len(files) > 1 else ''}"
    bias = [name for name in ("attention", "mlp") if config[f"{name}_bias"]]
    rows = {
        "format": f"{facts['format']}, {count}, {size(sum(files.values()))}",
        "model": f"llama, {facts['preset'] or 'of no published shape'}",
        "parameters": f"{facts['parameters']:,}" + (", output tied to the embedding" * config["tie_word_embeddings"]),
        "shape": f"{config['num_hidden_layers']} layers, hidden {config['hidden_size']}, feed-forward"
        f" {config['intermediate_size']}, vocabulary {config['vocab_size']}"
        + (f", biases in {' and '.join(bias)}" if bias else ""),
        "attention": f"{config['num_attention_heads']} heads of {config['head_dim']},"
        f" {config['num_key_value_heads']} key/value heads",
        "rope": f"base {config['rope_theta']:g}, " + _scaling(config["rope_scaling"]),
        "context": f"{config['max_position_embeddings']:,} tokens",
        "tensors": ", ".join(f"{number} in {kind}" for kind, number in types.items()),
        "in memory": f"{size(memory['float32'])} in float32, {size(memory['bfloat16'])} in bfloat16 or float16",
        "KV cache": f"{size(cache['per_token'])} a token in 16 bits, {size(cache['full_context'])} for the context",
        **_tokenizer_rows(facts["tokenizer"]),
        "generation": ", ".join(f"{key} {value}" for key, value in facts["generation"].items()),
        "converted": _manifest(facts["manifest"]),
        "files": ", ".join(f"{name} {size(nbytes)}" for name, nbytes in list(files.items())[:6])
        + (f" and {len(files) - 6} more" if len(files) > 6 else ""),
    }
    return "\n".join([facts["path"], *(f"{name:<12}{value}" for name, value in rows.items() if value)])


def _tokenizer_rows(tokenizer: dict[str, Any] | None) -> dict[str, str]:
    if tokenizer is None:
        return {"tokenizer": "none"}
    if "problem" in tokenizer:
        return {"tokenizer": f"not usable: {tokenizer['problem']}"}
    bos = f", BOS {tokenizer['bos']} {'' if tokenizer['add_bos'] else 'not '}added" if tokenizer["bos"] else ""
    first = next((line for line in (tokenizer["chat_template"] or "").splitlines() if line.strip()), "")
    return {
        "tokenizer": f"{tokenizer['kind']}, {tokenizer['tokens']} tokens{bos}",
        "template": f"{tokenizer['template']}: {first[:LINE]}{'...' * (len(first) > LINE)}" if first else "none",
        "stops at": ", ".join(f"{token} ({index})" for token, index in tokenizer["stops"].items()) or "nothing",
    }


def _scaling(scaling: dict[str, Any] | None) -> str:
    if not scaling:
        return "no scaling"
    rest = ", ".join(f"{key} {value}" for key, value in scaling.items() if key != "rope_type")
    return f"{scaling['rope_type']} scaling ({rest})"


def _manifest(manifest: dict[str, Any] | None) -> str:
    if manifest is None:
        return ""
    source = manifest.get("source") or {}
    verification = manifest.get("verification", manifest.get("proof"))  # its former name
    verified = "verified against it" if isinstance(verification, dict) else "not verified"
    return f"from {source.get('name')} ({source.get('format')}) by puna {manifest.get('puna')}, {verified}"


def size(nbytes: float) -> str:
    """Bytes for people, in decimal units."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} TB"
