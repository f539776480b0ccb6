"""LoRA adapters in peft's layout: adapter_config.json and adapter_model.safetensors.

Reads LoRA on a LLaMA, modules saved whole, and trained rows of the embedding; other methods (DoRA, trained biases, LoRA
on the embedding ...) are refused by name. Written so that `peft` computes the same as puna.
Layout: https://huggingface.co/docs/peft/developer_guides/checkpoint ("PEFT checkpoint format").
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.errors import UserError
from puna.files import read_json, write_json
from puna.model.config import ModelConfig
from puna.model.linear import Linear
from puna.model.llama import Llama
from puna.model.lora import ALL_LINEAR, LoRA, adapted, lora_tensors, matches, saved
from puna.model.lora_options import LINEARS, LoraOptions
from puna.model.tp_plan import tp_slice
from puna.tokenizer import Tokenizer
from puna.weights.checkpoint import TensorInfo
from puna.weights.formats import safetensors_file, torch_pickle
from puna.weights.formats.hf import EMBEDDING, OUTPUT, has_tokenizer, load_tokenizer, unwrapped

CONFIG, WEIGHTS, OLD_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
# Keys of adapter_config.json that don't change what a trained adapter computes, or that are read below.
KNOWN = (
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "modules_to_save",
    "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "ensure_weight_tying",
    "trainable_token_indices", "megatron_core", "qalora_group_size", "eva_config", "runtime_config",
)  # fmt: skip
# Those that do, with the values under which it is plain LoRA; of other keys, any false value is plain.
PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # the others change the base's weights
}


@dataclass(frozen=True)
class Adapter:
    """An adapter of a checkpoint.

    `tensors`: `model.layers.0.self_attn.q_proj.adapter.a` [r, in] and `.b` [out, r] of the updates, under their Hugging
    Face names those that replace the base's, and `model.embed_tokens.rows` [n, hidden], which replaces single rows.
    `token_rows`: the token ids of these rows, by the name of their matrix. `modules`: the adapted layers. `raw`:
    adapter_config.json. `base`: its name for the model that the adapter was trained on.
    """

    path: Path
    options: LoraOptions
    raw: dict[str, Any]
    token_rows: dict[str, tuple[int, ...]]
    tensors: dict[str, TensorInfo]
    modules: list[str]
    files: list[Path]
    reader: Callable[[str], Tensor]

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU; may be a view of a mapped file."""
        return self.reader(name)

    @property
    def base(self) -> str | None:
        return self.raw.get("base_model_name_or_path")

    @property
    def whole(self) -> dict[str, TensorInfo]:
        """The tensors that replace the base's."""
        return {name: info for name, info in self.tensors.items() if name.endswith((".weight", ".bias"))}

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that was saved with it, if any."""
        return load_tokenizer(self.path) if has_tokenizer(self.path) else None


def read_adapter(path: str | Path) -> Adapter:
    """Opens an adapter's directory. Raises UserError for a damaged adapter and for anything but plain LoRA."""
    path = Path(path).expanduser()
    if not (path / CONFIG).exists():
        raise UserError(f"{path} is not an adapter in peft's layout: it has no {CONFIG}.")
    raw = read_json(path / CONFIG)
    options = _options(path, raw)
    file, stored, read = _open(path)
    names = {_ours(path, name): name for name in stored}
    modules = [name.removesuffix(".adapter.a") for name in names if name.endswith(".adapter.a")]
    if len(names) < len(stored):
        raise UserError(f"{file} holds a tensor twice, under an old and a new name; remove one.")
    return Adapter(
        path=path,
        options=options,
        raw=raw,
        token_rows=_token_rows(path, raw),
        tensors={ours: stored[name] for ours, name in names.items()},
        modules=modules,
        files=[path / CONFIG, file],
        reader=lambda name: read(names[name]),
    )


def check_adapter(adapter: Adapter, config: ModelConfig) -> None:
    """Raises UserError, naming tensors, unless the adapter is whole and fits a model of this shape.

    `config` is the base's; where the adapter brings a larger vocabulary, with that size.
    """
    shapes = config.tensors() | {OUTPUT: (config.vocab_size, config.hidden_size)}
    linears = [name.removesuffix(".weight") for name, shape in shapes.items()
               if len(shape) == 2 and name != EMBEDDING]  # fmt: skip
    wanted: dict[str, tuple[int, ...]] = {}
    for module in linears:
        if _targeted(adapter, module):
            rank, (rows, columns) = adapter.options.rank_of(module), shapes[f"{module}.weight"]
            wanted |= {f"{module}.adapter.a": (rank, columns), f"{module}.adapter.b": (rows, rank)}
    wanted |= {name: shapes[name] for name in shapes if _kept_whole(adapter, name)}
    for name, ids in adapter.token_rows.items():
        wanted[rows_name(name)] = (len(ids), config.hidden_size)
        if config.tie_word_embeddings and name == OUTPUT:
            raise UserError(
                f"{adapter.path} trains rows of lm_head apart from the embedding that this model ties it to."
            )
        if max(ids) >= config.vocab_size:
            raise UserError(
                f"{adapter.path} trains the row of token {max(ids)}, and this model has {config.vocab_size} tokens."
            )
    optional = {name: shapes[name] for name in (EMBEDDING, OUTPUT)}  # stored with an enlarged vocabulary
    for name, info in adapter.tensors.items():
        if name not in wanted | optional:
            module = name.partition(".adapter.")[0].removesuffix(".weight").removesuffix(".rows")
            known = f"{module}.weight" in shapes
            problem = f"{CONFIG} doesn't name it" if known else f"this model has no {module}{_base(adapter)}"
            raise UserError(f"{adapter.path} holds {_theirs(name)}, but {problem}.")
        if 0 in info.shape:
            raise UserError(
                f"{adapter.path}: {_theirs(name)} is empty, as adapters are that were saved from sharded parameters"
                " (ZeRO-3, FSDP); gather them and save the adapter again."
            )
        if info.shape != (wanted | optional)[name]:
            raise UserError(
                f"{adapter.path}: {_theirs(name)} has shape {list(info.shape)}, this model needs"
                f" {list((wanted | optional)[name])}: the adapter was trained on another model{_base(adapter)}."
            )
    missing = [_theirs(name) for name in wanted if name not in adapter.tensors]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"{adapter.path} lacks {', '.join(missing[:3])}{more}, which {CONFIG} names.")
    if not adapter.tensors:
        raise UserError(f"{adapter.path} holds no tensors, so it changes nothing.")


def attach(
    model: Llama,
    adapter: Adapter,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    *,
    rank: int = 0,
    size: int = 1,
) -> None:
    """Put the updates into a model, unmerged; `rank` of `size`: only the part of a tensor-parallel rank.

    The tensors that the adapter replaces must be in the model already (`merge.replaced`).
    """
    for module in adapter.modules:
        parts = []
        for name in (f"{module}.adapter.a", f"{module}.adapter.b"):
            part = adapter.read(name)[tp_slice(name, adapter.tensors[name].shape, model.config, rank, size)]
            # A copy even where nothing is converted: the reader gives views of a file.
            parts.append(part.to(device, dtype, copy=True).contiguous())
        a, b = parts
        linear = model.get_submodule(module.removeprefix("model."))
        assert isinstance(linear, Linear)
        scale, dropout = adapter.options.scale_of(module), adapter.options.dropout
        linear.adapter = LoRA(a, b, scale, dropout).requires_grad_(False).train(model.training)


def write_adapter(
    dst: Path,
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    options: LoraOptions,
    *,
    base: str | None = None,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes the directory `dst`, which must not exist yet, in peft's layout.

    `tensors`: the trained tensors, unsplit: `model.layers.0.self_attn.q_proj.adapter.a` and so on, and the modules to
    save under their Hugging Face names. `config` and `options` are those of the training, `base` is the base's
    name or path.
    """
    modules, whole = adapted(config, options), saved(config, options)
    stored = {_theirs(name): tensors[name] for name in lora_tensors(config, options)}
    for name in (*config.tensors(), *([OUTPUT] if config.tie_word_embeddings else [])):
        if name.rpartition(".")[0] in whole:
            stored[_theirs(name)] = tensors[EMBEDDING if config.tie_word_embeddings and name == OUTPUT else name]
    dst.mkdir()
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()}
    safetensors_file.write_file(dst / WEIGHTS, infos, stored.__getitem__)
    write_json(
        dst / CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "revision": None,
            "inference_mode": True,
            "r": options.rank,
            "lora_alpha": options.alpha,
            "lora_dropout": options.dropout,
            "use_rslora": options.rslora,
            "use_dora": False,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "target_modules": _shortest(modules, config, lambda name, end: f".{name}".endswith(f".{end}")),
            "modules_to_save": _shortest(whole, config, str.endswith) or None,
            "rank_pattern": dict(options.rank_pattern),
            "alpha_pattern": dict(options.alpha_pattern),
            "layers_to_transform": None,
            "layers_pattern": None,
        },
    )
    if tokenizer is not None:
        tokenizer.save(dst)


def _open(path: Path) -> tuple[Path, dict[str, TensorInfo], Callable[[str], Tensor]]:
    """The weight file, its tensors and their reader."""
    if (path / WEIGHTS).exists():
        mapped = safetensors_file.open_file(path / WEIGHTS)
        return path / WEIGHTS, mapped.tensors, mapped.read
    if (path / OLD_WEIGHTS).exists():
        state = torch_pickle.load_file(path / OLD_WEIGHTS)
        infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
        return path / OLD_WEIGHTS, infos, state.__getitem__
    raise UserError(f"{path} has a {CONFIG} and no weights beside it: {WEIGHTS} is missing.")


def _options(path: Path, raw: dict[str, Any]) -> LoraOptions:
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{path / CONFIG} has peft_type {raw.get('peft_type')!r}; puna reads LORA alone.")
    for key, value in raw.items():
        if key in KNOWN or (value in PLAIN[key] if key in PLAIN else not value):
            continue
        raise UserError(f"{path / CONFIG} asks for {key}={value!r}, which puna does not implement.")
    targets = raw.get("target_modules")
    if not targets:
        raise UserError(f"{path / CONFIG} names no target_modules.")
    patterns = [raw.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
    for pattern in (key for each in patterns if isinstance(each, dict) for key in each):
        try:
            re.compile(pattern)
        except re.error:
            raise UserError(f"{path / CONFIG} has the damaged regular expression {pattern!r} in a pattern.") from None
    try:
        return LoraOptions(
            rank=raw.get("r", 8),
            alpha=raw.get("lora_alpha", 8),
            dropout=float(raw.get("lora_dropout") or 0.0),
            rslora=bool(raw.get("use_rslora")),
            targets=(targets,) if isinstance(targets, str) else tuple(map(str, targets)),
            modules_to_save=tuple(map(str, raw.get("modules_to_save") or ())),
            rank_pattern=dict(patterns[0]),
            alpha_pattern=dict(patterns[1]),
        )
    except (TypeError, ValueError):
        raise UserError(f"{path / CONFIG} is damaged: its values are not those of a LoRA adapter.") from None


def _token_rows(path: Path, raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The token ids whose rows the adapter replaces, by the name of their matrix."""
    given = raw.get("trainable_token_indices") or {}
    rows: dict[str, tuple[int, ...]] = {}
    for module, ids in (given if isinstance(given, dict) else {"embed_tokens": given}).items():
        name = next((each for each in (EMBEDDING, OUTPUT) if f".{each}".endswith(f".{module}.weight")), None)
        valid = isinstance(ids, list) and all(type(index) is int and 0 <= index < 1 << 31 for index in ids)
        if name is None or not valid or not ids or len(set(ids)) < len(ids):
            raise UserError(
                f"{path / CONFIG} asks for trainable_token_indices={given!r}; puna reads lists of different"
                " token ids of embed_tokens and lm_head."
            )
        rows[name] = tuple(ids)
    return rows


def rows_name(matrix: str) -> str:
    """The name in `Adapter.tensors` of the rows that replace some of a matrix."""
    return matrix.removesuffix(".weight") + ".rows"


def _ours(path: Path, name: str) -> str:
    """`model.layers.0.self_attn.q_proj.adapter.a`, `model.embed_tokens.rows`, or the Hugging Face name of a tensor that
    is saved whole."""
    plain = re.sub(r"\.(modules_to_save|modules_to_save\.default|base_layer)\.weight$", ".weight", name)
    plain = unwrapped(plain)
    if found := re.fullmatch(r"(.+)\.token_adapter\.trainable_tokens_delta(?:\.default)?", plain):
        return f"{found[1]}.rows"
    if found := re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", plain):
        return f"{found[1]}.adapter.{found[2].lower()}"
    if plain == name or "lora_" in plain or not plain.endswith((".weight", ".bias")):
        raise UserError(f"{path} holds {name}, which is not part of plain LoRA; puna does not implement it.")
    return plain


def _theirs(name: str) -> str:
    if name.endswith(".rows"):
        return f"{PREFIX}{name.removesuffix('.rows')}.token_adapter.trainable_tokens_delta"
    module, found, side = name.partition(".adapter.")
    return f"{PREFIX}{module}.lora_{side.upper()}.weight" if found else f"{PREFIX}{name}"


def _targeted(adapter: Adapter, module: str) -> bool:
    """Whether adapter_config.json says that this linear layer is adapted, by peft's rules."""
    listed, excluded = adapter.options.targets, adapter.raw.get("exclude_modules") or ()
    if ALL_LINEAR in listed:
        listed = LINEARS
    barred = [excluded] if isinstance(excluded, str) else excluded
    layers = adapter.raw.get("layers_to_transform")
    try:
        chosen = any(matches(each, module) for each in listed) and not any(matches(each, module) for each in barred)
    except re.error:
        raise UserError(f"{adapter.path / CONFIG} holds a damaged regular expression for its modules.") from None
    if chosen and layers not in (None, []):
        index = re.search(r"\.(\d+)\.", module)
        chosen = index is not None and int(index[1]) in ([layers] if isinstance(layers, int) else layers)
    return chosen and not _kept_whole(adapter, f"{module}.weight")


def _kept_whole(adapter: Adapter, tensor: str) -> bool:
    """Whether modules_to_save names the tensor's module or one around it; peft compares the ends of their names."""
    parts = tensor.split(".")[:-1]
    around = [".".join(parts[: n + 1]) for n in range(len(parts))]
    return any(name.endswith(end) for end in adapter.options.modules_to_save for name in around)


def _shortest(modules: list[str], config: ModelConfig, found: Callable[[str, str], bool]) -> list[str]:
    """Names for peft that mean `modules` and no others: the last word where that is enough, else the whole name."""
    every = {name.rpartition(".")[0] for name in config.tensors()} | {"lm_head"}
    names: dict[str, None] = {}
    for module in modules:
        word = module.split(".")[-1]
        same = {name for name in every if found(name, word)}
        names[word if same <= set(modules) else module] = None
    return list(names)


def _base(adapter: Adapter) -> str:
    return f" (its base is {adapter.base})" if adapter.base else ""
