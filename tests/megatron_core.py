"""Megatron-core's own GPT model on a checkpoint that puna wrote, on a CPU: writes its logits to a file.

Run as `python megatron_core.py CHECKPOINT LOGITS`, in a process of its own: Megatron-core sets up all of it.
"""

import argparse
import contextlib
import sys
from types import SimpleNamespace

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import dot_product_attention
from megatron.core.transformer.transformer_config import TransformerConfig

LOCAL = {  # what its layers without Transformer Engine call their norms
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
IDS = torch.randint(380, (2, 11), generator=torch.Generator().manual_seed(0))


def build(args):
    """The model that the arguments in the file describe."""
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        ffn_hidden_size=args.ffn_hidden_size,
        gated_linear_unit=args.swiglu,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=args.add_bias_linear,
        normalization=args.normalization,
        layernorm_epsilon=args.norm_epsilon,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        position_embedding_type=args.position_embedding_type,
        rotary_base=int(args.rotary_base),
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
    )


def main(checkpoint, out):
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    # Both ask for a GPU, for dropout that isn't there and for the device of the rotary table.
    tracker = SimpleNamespace(fork=contextlib.nullcontext)
    dot_product_attention.tensor_parallel.get_cuda_rng_tracker = lambda: tracker
    torch.cuda.current_device = lambda: "cpu"
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(f"{checkpoint}/release/mp_rank_00/model_optim_rng.pt")
    model = build(state["args"])
    weights = state["model"]
    for theirs, local in LOCAL.items():
        weights = {name.replace(theirs, local): tensor for name, tensor in weights.items()}
    mismatch = model.load_state_dict(weights, strict=False)
    assert not mismatch.unexpected_keys and all("_extra_state" in name for name in mismatch.missing_keys), mismatch
    length = IDS.shape[1]
    mask = ~torch.ones(1, 1, length, length).tril().bool()
    with torch.no_grad():
        torch.save(model.eval()(IDS, torch.arange(length).expand_as(IDS), mask), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
