"""The layout of Megatron checkpoints: the names of three generations, and each rank's slices of every tensor.

One description serves both ways: a rank's tensor is made up of pieces, rows or columns of Hugging Face's tensors. q, k
and v lie in one matrix, per key/value head its query heads, then it (Megatron's `num_query_groups`); gate and up too,
except in AscendSpeed's plain form. The vocabulary is padded to a multiple of the ranks; RoPE is rotate-half, as here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from puna.errors import UserError
from puna.model.config import ModelConfig
from puna.model.tp_plan import chunk
from puna.weights.checkpoint import Index
from puna.weights.formats.hf import EMBEDDING, OUTPUT
from puna.weights.sharded import Shape

# What a file calls the parts of a layer, by the naming that we write.
ASCENDSPEED = {
    "input_norm": "input_layernorm",
    "qkv": "self_attention.query_key_value",
    "dense": "self_attention.dense",
    "post_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.dense_h_to_4h",
    "gate_up": "mlp.proj",
    "down": "mlp.dense_4h_to_h",
}
LEGACY = ASCENDSPEED | {
    "input_norm": "input_norm",
    "post_norm": "post_attention_norm",
    "gate_up": "mlp.dense_h_to_4h",
}
CORE = {
    "input_norm": "self_attention.linear_qkv.layer_norm",
    "qkv": "self_attention.linear_qkv",
    "dense": "self_attention.linear_proj",
    "post_norm": "mlp.linear_fc1.layer_norm",
    "gate_up": "mlp.linear_fc1",
    "down": "mlp.linear_fc2",
}
NAMINGS = {"ascendspeed": ASCENDSPEED, "legacy": LEGACY, "core": CORE}
# What files of other versions call the same, and Megatron-core without Transformer Engine.
ROLES = {name: role for names in (LEGACY, CORE, ASCENDSPEED) for role, name in names.items()} | {
    "pre_mlp_layernorm": "post_norm",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
IGNORED = re.compile(r"(^|\.)(_extra_state|(rotary_emb|rotary_pos_emb)\.inv_freq)$")
BODY = r"(?:language_model\.)?(?:(?:encoder|transformer|decoder)\.)?"
ENDS = {
    rf"{BODY}embedding\.word_embeddings": "embedding",
    rf"{BODY}final_(?:layer)?norm": "final_norm",
    rf"{BODY}output_layer|lm_head(?:\.lm_head)?|word_embeddings_for_head": "output",
}


@dataclass(frozen=True)
class Slice:
    """Where a part of Hugging Face's tensor `name` lies: at `here` in the rank's tensor, at `there` in the whole."""

    name: str
    here: Index
    there: Index
    padding: bool = False  # copies of other rows that pad the vocabulary


@dataclass(frozen=True)
class RankTensor:
    """A rank's tensor: its shape and the slices that it is made of."""

    shape: Shape
    pieces: tuple[Slice, ...]


@dataclass(frozen=True)
class MegatronLayout:
    """The split of a model over `tp` ranks, with `vocab` rows of the padded embedding, gate and up `fused` or apart."""

    config: ModelConfig
    tp: int
    vocab: int
    fused: bool

    def __post_init__(self) -> None:
        """Raises UserError when Megatron's layout has no such cut."""
        config = self.config
        if self.tp < 1 or config.num_key_value_heads % self.tp:
            works = [n for n in range(1, config.num_key_value_heads + 1) if config.num_key_value_heads % n == 0]
            raise UserError(
                f"{config.num_key_value_heads} key/value heads can't be cut for {self.tp} tensor-parallel ranks of"
                f" Megatron: choose one of {', '.join(map(str, works))}"
            )
        if config.intermediate_size % self.tp:
            raise UserError(f"{config.intermediate_size} rows of the MLP can't be cut for {self.tp} ranks evenly")

    def ends(self, rank: int, *, first: bool, last: bool) -> dict[str, RankTensor]:
        """Embedding, final norm and output layer of a rank, by role: those that a stage of the pipeline holds."""
        parts = {}
        if first:
            parts["embedding.weight"] = self.vocabulary(EMBEDDING, rank)
        if last:
            parts["final_norm.weight"] = _whole("model.norm.weight", (self.config.hidden_size,))
        if last and not (first and self.config.tie_word_embeddings):
            parts["output.weight"] = self.vocabulary(EMBEDDING if self.config.tie_word_embeddings else OUTPUT, rank)
        return parts

    def layer(self, index: int, rank: int) -> dict[str, RankTensor]:
        """The tensors of the model's layer `index` that a rank holds, by role."""
        config, stem = self.config, f"model.layers.{index}"
        d, ffn = config.hidden_size, config.intermediate_size
        heads = config.num_attention_heads * config.head_dim
        parts = {
            "input_norm.weight": _whole(f"{stem}.input_layernorm.weight", (d,)),
            "post_norm.weight": _whole(f"{stem}.post_attention_layernorm.weight", (d,)),
            "qkv.weight": self._qkv(stem, "weight", rank),
            "dense.weight": self._columns(f"{stem}.self_attn.o_proj.weight", d, heads, rank),
            "down.weight": self._columns(f"{stem}.mlp.down_proj.weight", d, ffn, rank),
        }
        kinds = ["weight", *(["bias"] if config.mlp_bias else [])]
        for kind in kinds:
            width = (d,) if kind == "weight" else ()
            names = [f"{stem}.mlp.{name}_proj.{kind}" for name in ("gate", "up")]
            if self.fused:
                parts[f"gate_up.{kind}"] = self._rows(names, ffn, width, rank)
            else:
                for role, name in zip(("gate", "up"), names, strict=True):
                    parts[f"{role}.{kind}"] = self._rows([name], ffn, width, rank)
        if config.attention_bias:
            parts["qkv.bias"] = self._qkv(stem, "bias", rank)
            parts["dense.bias"] = _whole(f"{stem}.self_attn.o_proj.bias", (d,))
        if config.mlp_bias:
            parts["down.bias"] = _whole(f"{stem}.mlp.down_proj.bias", (d,))
        return parts

    def _qkv(self, stem: str, kind: str, rank: int) -> RankTensor:
        """Per key/value head: its query heads' rows, its key's, its value's."""
        config, head = self.config, self.config.head_dim
        width = (config.hidden_size,) if kind == "weight" else ()
        groups = chunk(config.num_key_value_heads, rank, self.tp)
        repeats = config.num_attention_heads // config.num_key_value_heads
        pieces, row = [], 0
        for group in range(groups.start, groups.stop):
            for name, rows in (("q", repeats * head), ("k", head), ("v", head)):
                there = (slice(group * rows, (group + 1) * rows), *_all(width))
                here = (slice(row, row + rows), *_all(width))
                pieces.append(Slice(f"{stem}.self_attn.{name}_proj.{kind}", here, there))
                row += rows
        return RankTensor((row, *width), tuple(pieces))

    def _rows(self, names: list[str], rows: int, width: Shape, rank: int) -> RankTensor:
        """A rank's rows of one matrix, or of several one after the other."""
        part, there = rows // self.tp, (chunk(rows, rank, self.tp), *_all(width))
        pieces = [Slice(name, (slice(n * part, (n + 1) * part), *_all(width)), there) for n, name in enumerate(names)]
        return RankTensor((len(names) * part, *width), tuple(pieces))

    def _columns(self, name: str, rows: int, columns: int, rank: int) -> RankTensor:
        part, there = columns // self.tp, (slice(0, rows), chunk(columns, rank, self.tp))
        return RankTensor((rows, part), (Slice(name, _all((rows, part)), there),))

    def vocabulary(self, name: str, rank: int) -> RankTensor:
        """A rank's rows of the vocabulary, and, beyond its end, copies of its last rows in their order."""
        size, part, width = self.config.vocab_size, self.vocab // self.tp, (self.config.hidden_size,)
        mine = chunk(self.vocab, rank, self.tp)
        start, stop = mine.start, mine.stop
        pieces, row = [], start
        while row < stop:
            source = row if row < size else (row - (self.vocab - size)) % size
            rows = min(stop - row, size - source)
            here, there = (slice(at, at + rows) for at in (row - start, source))
            pieces.append(Slice(name, (here, *_all(width)), (there, *_all(width)), padding=row >= size))
            row += rows
        return RankTensor((part, *width), tuple(pieces))


def padded_vocab(size: int, multiple: int, tp: int) -> int:
    """Rows of the embedding: the smallest multiple of `multiple` x `tp` that holds `size` tokens."""
    if multiple < 1:
        raise UserError("the vocabulary can be made divisible by a number above 0 only")
    return -(-size // (multiple * tp)) * multiple * tp


def role_of(key: str) -> tuple[int | None, str] | None:
    """(layer within its file, role) of a tensor by its key, names joined by dots; None for what holds no weights.

    Raises KeyError for a name that no LLaMA has in any generation.
    """
    if IGNORED.search(key):
        return None
    stem, _, kind = key.rpartition(".")
    if kind == "layer_norm_weight":
        stem, kind = f"{stem}.layer_norm", "weight"
    for pattern, end in ENDS.items():
        if re.fullmatch(pattern, stem):
            return None, f"{end}.{kind}"
    found = re.fullmatch(rf"{BODY}layers\.(\d+)\.(.+)", stem)
    if not found:
        raise KeyError(key)
    name = re.sub("^attention", "self_attention", found[2])
    return int(found[1]), f"{ROLES[name]}.{kind}"


def key_of(naming: str, layer: int | None, role: str, *, tied: bool) -> tuple[str, ...]:
    """Where a file of this naming keeps a tensor: the keys of nested dictionaries, one after the other."""
    role, _, kind = role.partition(".")
    core = naming == "core"
    if layer is not None:
        name = f"layers.{layer}.{NAMINGS[naming][role]}.{kind}".replace(".layer_norm.weight", ".layer_norm_weight")
        return (f"decoder.{name}",) if core else ("language_model", "encoder", name)
    if role == "final_norm":
        if core:
            return ("decoder.final_layernorm.weight",)
        return "language_model", "encoder", f"final_{'layernorm' if naming == 'ascendspeed' else 'norm'}.weight"
    if role == "embedding":
        nested = ("language_model", "embedding", "word_embeddings", kind)
        return ("embedding.word_embeddings.weight",) if core else nested
    if core:
        return ("output_layer.weight",)
    return ("word_embeddings_for_head", kind) if tied else ("language_model", "output_layer", kind)


def flattened(state: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """The leaves of nested dictionaries, their keys joined by dots."""
    if isinstance(state, dict):
        for key, value in state.items():
            yield from flattened(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, state


def _whole(name: str, shape: Shape) -> RankTensor:
    return RankTensor(shape, (Slice(name, _all(shape), _all(shape)),))


def _all(shape: Shape) -> Index:
    return tuple(slice(0, n) for n in shape)
