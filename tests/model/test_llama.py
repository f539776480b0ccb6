"""The model against transformers' LlamaForCausalLM on random weights: every architecture switch and RoPE type."""

import itertools

import pytest
import torch

from puna.errors import UserError
from puna.model.attention import causal
from puna.model.config import ModelConfig
from puna.model.llama import Llama

ROPE = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn-full": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
        "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def pair(seed, rope="default", **changes):
    """transformers' model with random weights, and ours with the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "max_position_embeddings": 48,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_theta": 1e4,
        **changes,
    }
    if ROPE[rope]:
        shape["rope_scaling"] = dict(ROPE[rope])
    theirs = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            torch.nn.init.normal_(p, std=0.08) if p.ndim > 1 else torch.nn.init.uniform_(p, 0.8, 1.2)
    config = ModelConfig.from_hf({"model_type": "llama", **shape})
    return theirs, ours_from(theirs, config)


def ours_from(theirs, config):
    model = Llama(config)
    model.load_state_dict({k.removeprefix("model."): v.clone() for k, v in theirs.state_dict().items()})
    model.tie()
    return model.eval()


def logits(model, ids):
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return model.logits(model(ids, positions, causal))


HEADS = [(8, 8, 8), (8, 4, 8), (8, 2, 16), (8, 1, 8), (4, 2, 24)]  # heads, kv heads, head_dim
SHAPES = [
    {
        "num_attention_heads": h,
        "num_key_value_heads": kv,
        "head_dim": d,
        "tie_word_embeddings": tied,
        "attention_bias": ab,
        "mlp_bias": mb,
        "rope_theta": theta,
    }
    for (h, kv, d), tied, ab, mb, theta in itertools.product(
        HEADS, (False, True), (False, True), (False, True), (1e4, 1e6)
    )
]
assert len(SHAPES) == 80


@torch.no_grad()
def check(seed, rope, shape):
    theirs, ours = pair(seed, rope, **shape)
    ids = torch.randint(0, 96, (2, 90))  # beyond max_position_embeddings 48, so that dynamic RoPE stretches
    diff = (theirs(ids).logits - logits(ours, ids)).abs().max()
    assert diff < 2e-5, f"{rope} {shape}: {diff:.1e}"


@pytest.mark.parametrize("rope", ROPE)
def test_float32_logits_equal_transformers(rope):
    """Each RoPE type on a tenth of the shapes, each shape at least once over the types."""
    for i in range(list(ROPE).index(rope), len(SHAPES), len(ROPE)):
        check(i, rope, SHAPES[i])


@pytest.mark.full
@pytest.mark.parametrize("rope", ROPE)
def test_float32_logits_equal_transformers_full_grid(rope):
    for i, shape in enumerate(SHAPES):
        check(1000 + i, rope, shape)


@torch.no_grad()
@pytest.mark.parametrize("shape", [{}, {"num_key_value_heads": 2, "tie_word_embeddings": True, "hidden_size": 128}])
def test_bfloat16_error_is_no_larger_than_transformers(shape):
    """Mean absolute error of bf16 logits against float32, median over 8 seeds."""
    ours_error, theirs_error = [], []
    for seed in range(8):
        theirs, ours = pair(seed, num_hidden_layers=4, **shape)
        ids = torch.randint(0, 96, (4, 48))
        exact = theirs(ids).logits
        ours_error.append((logits(ours.bfloat16(), ids).float() - exact).abs().mean().item())
        theirs_error.append((theirs.bfloat16()(ids).logits.float() - exact).abs().mean().item())
    assert sorted(ours_error)[4] <= sorted(theirs_error)[4]


@torch.no_grad()
def test_dynamic_rope_fixed_for_a_length_does_not_depend_on_the_forward():
    _, model = pair(0, "dynamic")
    model.fix_rope(90)
    ids = torch.randint(0, 96, (1, 90))
    assert torch.allclose(logits(model, ids)[:, :20], logits(model, ids[:, :20]), atol=1e-5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[
            (key, value)
            for key in ("hidden_size", "num_attention_heads")
            for value in ("32", 0, 4.5, True, -1, 1 << 31)
        ],
        *[(key, value) for key in ("num_key_value_heads", "head_dim") for value in ("2", 4.5, -8)],
        *[("rope_theta", value) for value in ("ten", 0, -1.0, float("nan"), float("inf"), 10**400, [1])],
        *[("rms_norm_eps", value) for value in ("small", 0, -1, float("nan"), None, True)],
        *[("rope_scaling", value) for value in ("llama3", [1], 2, {"rope_type": ["linear"]})],
        *[("factor", value) for value in (-3, 0, "four", float("nan"))],
        ("high_freq_factor", 1.0),
        ("original_max_position_embeddings", 8192.0),
        ("tie_word_embeddings", "false"),
    ],
)
def test_a_config_with_a_value_of_the_wrong_kind_is_refused_by_its_key(key, value):
    whole = {"model_type": "llama", **ModelConfig(96, 64, 112, 2, 8, 4, 8).to_hf()}
    inner = key in ROPE["llama3"]
    said = whole | ({"rope_scaling": ROPE["llama3"] | {key: value}} if inner else {key: value})
    with pytest.raises(UserError, match="RoPE type" if isinstance(value, dict) else key):
        ModelConfig.from_hf(said)


def test_float64_runs_in_float64():
    _, model = pair(0)
    model = model.double()
    with torch.no_grad():
        assert logits(model, torch.randint(0, 96, (1, 5))).dtype == torch.float64


def test_state_dict_names_are_hugging_face_names():
    for tied in (False, True):
        theirs, ours = pair(0, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
        shapes = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
        if tied:
            shapes.pop("lm_head.weight")
        assert ours.config.tensors() == shapes
