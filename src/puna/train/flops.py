"""FLOPs per trained token, counted from shapes, and peak FLOP/s of devices."""

from __future__ import annotations

from puna.model.config import ModelConfig

# Dense 16-bit peak TFLOP/s from the vendors' data sheets, by torch's name of the device.
PEAKS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H800": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10G": 70.0,
    "A10": 125.0,
    "V100": 125.0,
    "T4": 65.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}


def flops_per_token(config: ModelConfig, seq_len: int, *, trained: float = 1.0) -> float:
    """Model FLOPs of forward and backward, recomputation not counted.

    Each weight of a matrix product costs 2 forward, 2 for the gradient of its input and 2 for its own, the last for
    the fraction `trained` of them (close to 0 for LoRA). Attention is counted over the whole row, as usual (PaLM, arXiv
    2204.02311, appendix B), though causal masks and packing halve it or better.
    """
    weights = sum(
        shape[0] * shape[1]
        for name, shape in config.tensors().items()
        if len(shape) == 2 and not name.startswith(("model.embed_tokens", "lm_head"))
    )
    weights += config.vocab_size * config.hidden_size
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seq_len
    return (4 + 2 * trained) * weights + attention


def published_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """The formula behind the published figures of Megatron-style systems: 72 l h^2 (1 + s/6h + V/16lh).

    It assumes a 4h MLP of two matrices and as many key and value heads as query heads: 15 % high for a 34B with grouped
    heads, 8 % low for Llama 3 8B.
    """
    layers, h, vocab = config.num_hidden_layers, config.hidden_size, config.vocab_size
    return 72 * layers * h * h * (1 + seq_len / (6 * h) + vocab / (16 * layers * h))


def peak_tflops(device: str) -> float | None:
    """16-bit peak TFLOP/s of a device by its name, None if unknown."""
    return next((peak for name, peak in PEAKS.items() if name in device), None)
