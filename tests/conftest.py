"""What the tests share: a tiny random checkpoint, the optional real data, and one thread per test worker."""

from __future__ import annotations

import json
import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: workers that each start a thread per core slow one another down many times over.
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is slow, and that is not a fault of what is tested.
settings.register_profile("puna", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("puna")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = """The puna is the high grassland of the Andes where llamas live. Once upon a time there was a little llama.
What is the capital of France? It's Paris, isn't it? 1, 2, 3, 42 and 1999; naive café, señor, Ærø.
def add(a, b):\n    return a + b\nHello, world! User and assistant talk; the system listens."""


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data that stands beside a development checkout; the test skips where it is absent."""
    folder = Path(__file__).parents[1].parent / "shared/data"
    if not folder.is_dir():
        pytest.skip("needs the real data in ../shared/data")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF of SmolLM2-135M-Instruct from the cache; the test skips where it was not pulled."""
    from puna.errors import UserError
    from puna.weights.hub import resolve

    try:
        return resolve("smollm2-135m-instruct")
    except UserError:
        pytest.skip("needs `puna pull smollm2-135m-instruct`")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """`tiny_checkpoint(**config) -> Path`: an HF directory with random float32 weights and a small BPE tokenizer.

    Keyword arguments replace keys of config.json; `seed` changes the weights. The same call gives the same directory,
    so tests must not write into it.
    """
    made: dict[str, Path] = {}

    def make(*, seed: int = 0, **config) -> Path:
        key = json.dumps([seed, config], sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("tiny")
            write_checkpoint(made[key], seed, config)
        return made[key]

    return make


def write_checkpoint(folder: Path, seed: int, overrides: dict) -> None:
    vocab_size = write_tokenizer(folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    } | overrides
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_weights(folder / "model.safetensors", seed, config)


def write_weights(path: Path, seed: int, config: dict) -> None:
    import torch
    from safetensors.torch import save_file

    hidden, middle, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    linears = {
        "self_attn.q_proj": (q, hidden, config["attention_bias"]),
        "self_attn.k_proj": (kv, hidden, config["attention_bias"]),
        "self_attn.v_proj": (kv, hidden, config["attention_bias"]),
        "self_attn.o_proj": (hidden, q, config["attention_bias"]),
        "mlp.gate_proj": (middle, hidden, config["mlp_bias"]),
        "mlp.up_proj": (middle, hidden, config["mlp_bias"]),
        "mlp.down_proj": (hidden, middle, config["mlp_bias"]),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        for name, (rows, columns, bias) in linears.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"model.layers.{layer}.{name}.bias"] = (rows,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        tensors[name] = 1 + 0.1 * noise if name.endswith("norm.weight") else noise * shape[-1] ** -0.5
    dtype = getattr(torch, config["torch_dtype"])
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def write_tokenizer(folder: Path) -> int:
    """A byte-level BPE tokenizer with ChatML, as SmolLM2 has; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines() * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return tokenizer.get_vocab_size()
