"""`puna info X`: what a checkpoint is, from its headers; no weight is read."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from typing import Any

from puna.errors import UserError
from puna.files import manifest_path, read_json
from puna.model.config import ModelConfig
from puna.model.presets import PRESETS
from puna.option_sets import InfoOptions
from puna.tokenizer import Tokenizer
from puna.weights.checkpoint import Checkpoint, open_checkpoint

HALF = 2  # bytes of a number in bfloat16 and float16
KINDS = {"llama": "SentencePiece", "gpt2": "byte-level BPE"}  # tokenizer.ggml.model
LINE = 100  # characters of a line of text


def run(options: InfoOptions) -> None:
    """The verb: prints what the checkpoint is, for people or as JSON."""
    with open_checkpoint(options.model, revision=options.revision) as source:
        facts = describe(source)
    print(json.dumps(facts, indent=2, ensure_ascii=False) if options.json else text(facts))


def describe(source: Checkpoint) -> dict[str, Any]:
    """The facts about an open checkpoint, fit for JSON. Sizes are in bytes."""
    config = source.config
    stored: Counter[str] = Counter()
    tensors: Counter[str] = Counter()
    for info in source.tensors.values():
        stored[str(info.dtype).removeprefix("torch.")] += info.nbytes
        tensors[str(info.dtype).removeprefix("torch.")] += 1
    parameters = config.num_parameters()
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * HALF
    manifest = manifest_path(source.path)
    return {
        "path": str(source.path),
        "format": source.format,
        "files": {file.name: file.stat().st_size for file in source.files},
        "preset": preset(config),
        "parameters": parameters,
        "config": asdict(config),
        "dtypes": dict(tensors),
        "quantised": bool(source.details.get("quantised")),
        "memory": {"float32": 4 * parameters, "bfloat16": HALF * parameters, "float16": HALF * parameters},
        "kv_cache": {"per_token": cache, "full_context": cache * config.max_position_embeddings},
        "tokenizer": _tokenizer(source),
        "generation": source.generation,
        "details": source.details,
        "manifest": read_json(manifest) if manifest.exists() else None,
    }


def preset(config: ModelConfig) -> str | None:
    """The published model whose shape this is; context length and the norms' epsilon may be other."""
    for name, known in PRESETS.items():
        context, epsilon = known.max_position_embeddings, known.rms_norm_eps
        if replace(config, max_position_embeddings=context, rms_norm_eps=epsilon) == known:
            return name
    return None


def _tokenizer(source: Checkpoint) -> dict[str, Any] | None:
    try:
        tokenizer = source.tokenizer()
        if tokenizer is None:
            return None
        tokenizer.check_fits(source.config.vocab_size)
    except UserError as error:
        return {"problem": str(error)}
    return {
        "kind": _kind(tokenizer),
        "tokens": tokenizer.vocab_size,
        "bos": None if tokenizer.bos_id is None else tokenizer.token(tokenizer.bos_id),
        "add_bos": tokenizer.add_bos,
        "stops": {tokenizer.token(index): index for index in tokenizer.stop_ids},
        "template": tokenizer.template_name,
        "chat_template": tokenizer.chat_template,
        "fingerprint": tokenizer.fingerprint(),
    }


def _kind(tokenizer: Tokenizer) -> str:
    try:
        fields = tokenizer.to_gguf()
    except UserError:
        return "one that GGUF has no name for"
    pre = fields.get("tokenizer.ggml.pre", "default")
    return KINDS[fields["tokenizer.ggml.model"]] + ("" if pre == "default" else f" ({pre})")


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
    proven = "proven equal to it" if isinstance(manifest.get("proof"), dict) else "without proof"
    return f"from {source.get('name')} ({source.get('format')}) by puna {manifest.get('puna')}, {proven}"


def size(nbytes: float) -> str:
    """Bytes for people, in decimal units."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} TB"
