"""The tensor-parallel plan: the slice of each tensor that a rank holds.

`TP_PLAN` names the dimension in which a weight is split, `tp_slice` gives a rank's slice of it. Splitting modules,
reading a rank's slices of a file, per-rank checkpoints, LoRA adapters and the KV cache all use it. Two rules chunk a
dimension:

- `chunk`, chunks that differ by one at most: inference and every per-rank checkpoint, where every rank must have rows
  and sizes need no padding;
- `dtensor_chunk`, equal chunks with the last ones smaller: training, since FSDP2 and torch.distributed.checkpoint
  require the `Shard` placement of torch's DTensor.

They agree wherever the ranks divide the dimension. No torch here: the planner and the command line read it too.
"""

from __future__ import annotations

from collections.abc import Iterable

from puna.errors import UserError
from puna.model.config import ModelConfig

Index = tuple[slice, ...]

# Module name -> which dimension of its weight is split: "col" the output (rows of the stored matrix), "row" the input,
# "vocab" the vocabulary. Modules that are not named here (norms) are replicated on every rank.
TP_PLAN: dict[str, str] = {
    "q_proj": "col",
    "k_proj": "col",
    "v_proj": "col",
    "o_proj": "row",
    "gate_proj": "col",
    "up_proj": "col",
    "down_proj": "row",
    "embed_tokens": "vocab",
    "lm_head": "vocab",
}


def chunk(total: int, rank: int, size: int) -> slice:
    """Rank `rank`'s part of `total` items in `size` parts that differ by one at most, the larger ones first."""
    part, larger = divmod(total, size)
    start = rank * part + min(rank, larger)
    return slice(start, start + part + (rank < larger))


def dtensor_chunk(total: int, rank: int, size: int) -> slice:
    """Rank `rank`'s part of `total` items as DTensor's `Shard` and `torch.chunk` cut them.

    All parts have ceil(total / size) items but the last ones, which are smaller or empty.
    """
    part = -(-total // size)
    start = min(rank * part, total)
    return slice(start, min(start + part, total))


def dtensor_slice(shape: tuple[int, ...], cuts: Iterable[tuple[int, int, int]]) -> Index:
    """A rank's slice of a tensor that DTensor cuts several times, each time what the cut before has left.

    `cuts`: (dimension, rank, size), outermost first.
    """
    index = [slice(0, length) for length in shape]
    for dimension, rank, size in cuts:
        start, stop = index[dimension].start, index[dimension].stop
        part = dtensor_chunk(stop - start, rank, size)
        index[dimension] = slice(start + part.start, start + part.stop)
    return tuple(index)


def check_tp(config: ModelConfig, size: int) -> None:
    """Raises UserError when the model cannot be split over `size` ranks."""
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    sizes = [n for n in range(1, heads + 1) if heads % n == 0 and (kv % n == 0 or n % kv == 0)]
    if size not in sizes:
        raise UserError(
            f"{heads} attention heads and {kv} key/value heads cannot be split over {size} ranks;"
            f" use one of {', '.join(map(str, sizes))}."
        )
    if min(config.intermediate_size, config.vocab_size) < size:
        raise UserError(f"This model is too small for {size} ranks; use fewer.")


def has_replicated_heads(module: str, config: ModelConfig, size: int) -> bool:
    """Whether this projection (`k_proj`, `v_proj`) has fewer heads than ranks, so that several ranks hold the same."""
    return module in ("k_proj", "v_proj") and config.num_key_value_heads < size


def tp_slice(name: str, shape: tuple[int, ...], config: ModelConfig, rank: int, size: int) -> Index:
    """The part of tensor `name` (full `shape`) that rank `rank` of `size` holds, as an index into the full tensor.

    With fewer key/value heads than ranks, each head is held by size / heads consecutive ranks. The bias of a "row"
    layer is replicated (it is added after the reduction). Of a LoRA update (`q_proj.adapter.a` [r, in] and `.b`
    [out, r]) the factor that meets the split dimension is cut: B of a "col" or "vocab" layer, A of a "row" layer.
    """
    full = tuple(slice(0, n) for n in shape)
    *_, module, parameter = name.replace(".adapter.", ".").split(".")
    split = TP_PLAN.get(module)
    if size == 1 or split is None or parameter == ("b" if split == "row" else "a"):
        return full
    if split == "row":
        return full if parameter == "bias" else (*full[:1], chunk(shape[1], rank, size))
    if has_replicated_heads(module, config, size):
        head = rank * config.num_key_value_heads // size
        return (slice(head * config.head_dim, (head + 1) * config.head_dim), *full[1:])
    return (chunk(shape[0], rank, size), *full[1:])


def kv_heads_per_rank(config: ModelConfig, size: int) -> int:
    """Key/value heads that each of `size` ranks computes and caches; at least one, which several ranks then share."""
    return max(1, config.num_key_value_heads // size)
