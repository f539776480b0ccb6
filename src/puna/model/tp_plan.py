"""How a LLaMA model is split over the ranks of a tensor-parallel group. The one place where this is said.

Splitting modules, reading a rank's slice of a file, and writing or merging per-rank checkpoints all ask here.
"""

from __future__ import annotations

from puna.errors import UserError
from puna.model.config import ModelConfig

# Module name -> which dimension of its weight is split: "col" the output (rows of the stored matrix), "row" the input,
# "vocab" the vocabulary. What is not named (norms) is held whole by every rank.
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
    part, more = divmod(total, size)
    start = rank * part + min(rank, more)
    return slice(start, start + part + (rank < more))


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
        raise UserError(f"this model is too small for {size} ranks; use fewer.")


def tp_slice(name: str, shape: tuple[int, ...], config: ModelConfig, rank: int, size: int) -> tuple[slice, ...]:
    """The part of tensor `name` (full `shape`) that rank `rank` of `size` holds, as an index into the full tensor.

    With fewer key/value heads than ranks, each head is held by size / heads neighbouring ranks. The bias of a "row"
    layer is whole on every rank (it is added after the reduction). Of a LoRA update (`q_proj.adapter.a` [r, in] and
    `.b` [out, r]) the side that meets the split one is cut: B of a "col" or "vocab" layer, A of a "row" layer.
    """
    whole = tuple(slice(0, n) for n in shape)
    *_, module, kind = name.replace(".adapter.", ".").split(".")
    how = TP_PLAN.get(module)
    if size == 1 or how is None or kind == ("b" if how == "row" else "a") or (how == "row" and kind == "bias"):
        return whole
    if how == "row":
        return (*whole[:1], chunk(shape[1], rank, size))
    if module in ("k_proj", "v_proj") and config.num_key_value_heads < size:
        head = rank * config.num_key_value_heads // size
        return (slice(head * config.head_dim, (head + 1) * config.head_dim), *whole[1:])
    return (chunk(shape[0], rank, size), *whole[1:])
