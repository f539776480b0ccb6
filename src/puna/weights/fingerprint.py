"""A fingerprint of a checkpoint, for outputs that must not be mixed with those of another model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from puna.files import sha256
from puna.model.presets import PRESETS
from puna.weights.open import open_checkpoint


def checkpoint_fingerprint(ref: str, *, revision: str | None = None, adapter: Path | None = None) -> str:
    """SHA-256, in hexadecimal, over config, generation_config, tokenizer, and the first row of every tensor.

    Fine-tuning changes rows everywhere, so that a sample of each tensor tells models of one shape apart without reading
    all of their weights. An adapter's files are hashed whole. A preset without a checkpoint is its name.
    """
    content = hashlib.sha256()
    if ref in PRESETS and not Path(ref).exists():
        content.update(ref.encode())
    else:
        with open_checkpoint(ref, revision=revision) as source:
            tokenizer = source.tokenizer()
            facts = [asdict(source.config), source.generation, tokenizer.fingerprint() if tokenizer else None]
            content.update(json.dumps(facts, sort_keys=True, default=str).encode())
            for name, shape in source.config.tensors().items():
                rows = slice(0, shape[0] if len(shape) == 1 else 1)
                tensor = source.read(name, (rows, *(slice(0, size) for size in shape[1:])))
                content.update(f"{name} {tensor.dtype} ".encode() + str(tensor.float().flatten().tolist()).encode())
    if adapter is not None:
        for file in sorted(Path(adapter).glob("adapter_*")):
            content.update(f"{file.name} {sha256(file)} ".encode())
    return content.hexdigest()
