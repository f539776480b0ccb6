"""Several ranks on gloo against one process: the same logits, the same answers, and no more of the weights than needed.

Starting ranks costs seconds, so that all layouts and requests of a world size run in one launch (`work`, below), in
float64: there, sums in another order change no token.
"""

import os
import pickle
import sys
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from launching import launch
from puna.engine.block_pool import BlockPool
from puna.engine.engine import Engine, RequestValidator
from puna.engine.runner import make_runner
from puna.engine.sampling_params import SamplingParams
from puna.model.attention import causal
from puna.model.config import ModelConfig
from puna.model_loader import load_model
from puna.parallel.tp_inference import BROADCAST_BYTES, TensorParallel
from puna.quant.registry import SCHEMES
from puna.tokenizer import Tokenizer

BASE = ModelConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=4,
)
LAYOUTS = {
    "mha": BASE,
    "gqa": replace(BASE, num_key_value_heads=4),
    "fewer key heads than 4 ranks": replace(BASE, num_key_value_heads=2),
    "one key head": replace(BASE, num_key_value_heads=1),
    "biases": replace(BASE, num_key_value_heads=2, attention_bias=True, mlp_bias=True),
    "tied": replace(BASE, tie_word_embeddings=True),
    "explicit head_dim": replace(BASE, head_dim=10, num_key_value_heads=2),
    "uneven vocabulary": replace(BASE, vocab_size=131),
    "uneven and tied": replace(BASE, vocab_size=131, tie_word_embeddings=True),
    "5 words": replace(BASE, vocab_size=5),
    "uneven MLP": replace(BASE, intermediate_size=51, mlp_bias=True),
}
QUANTISED = {
    "few key heads": replace(BASE, num_attention_heads=12, num_key_value_heads=4, attention_bias=True),
    "as many key heads": replace(BASE, num_attention_heads=12, num_key_value_heads=12),
    "one key head": LAYOUTS["one key head"],
}
UNKNOWN = 300  # a token whose embedding is not a number


class Weights:
    """A checkpoint in memory, all of it random, that remembers what was read of it."""

    def __init__(self, config: ModelConfig):
        self.config, self.taken = config, []

    def read(self, name, index):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        full = torch.randn(self.config.tensors()[name], generator=generator, dtype=torch.float64)
        if name == "model.embed_tokens.weight":
            full[UNKNOWN : UNKNOWN + 1] = torch.nan  # nothing where the vocabulary is smaller
        self.taken.append((name, full[index].numel()))
        return full[index] * (1 if full.ndim == 1 else full.shape[1] ** -0.5)


def logits(config, tp=None, *, fast=True, quantization=None):
    """Logits [1, 12, vocab] of a whole forward."""
    model = load_model(Weights(config), torch.float64, tp=tp, fast=fast, quantization=quantization)
    ids = torch.arange(12).view(1, -1) * 7 % config.vocab_size
    with torch.inference_mode():
        return model.logits(model(ids, torch.arange(12), causal))


def make_engine(tokenizer, tp=None):
    """An engine so small that prompts come in chunks and requests are preempted; it checks its books at every step."""
    config = replace(BASE, vocab_size=384, num_key_value_heads=2, attention_bias=True)
    model = load_model(Weights(config), torch.float64, tp=tp, fast=True)
    engine = Engine(
        make_runner(model, 20, 4),
        BlockPool(20, 4),
        RequestValidator(384, 72, max_num_batched_tokens=24, max_num_seqs=8),
        tokenizer,
        stop_ids=(5, 17, 40),
        seed=0,
        tp=tp,
    )
    step = engine.step

    def checked():
        done = step()
        engine.scheduler.check()
        return done

    engine.step = checked
    return engine


REQUESTS = {
    "greedy": ([1, 2, 3, 4, 5, 6, 7, 8, 9], {"max_tokens": 20, "logprobs": 2}),
    "the same prefix": ([1, 2, 3, 4, 5, 6, 7, 8, 10], {"max_tokens": 9}),
    "a prompt of several steps": (list(range(50, 100)), {"max_tokens": 6, "prompt_logprobs": 1}),
    "sampled": ([11, 12], {"max_tokens": 20, "temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 3}),
    "without a seed": ([11, 12], {"max_tokens": 12, "temperature": 1.3}),
    "three answers": ([21, 22, 23], {"max_tokens": 12, "temperature": 1.0, "n": 3, "seed": 4}),
    "penalties": ([31, 32], {"max_tokens": 20, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "min_tokens": 9}),
    "beams": ([41, 42], {"max_tokens": 9, "num_beams": 3, "n": 2}),
    "sampled beams": ([43, 44], {"max_tokens": 9, "num_beams": 3, "temperature": 0.8, "seed": 5}),
    "bias": ([51], {"max_tokens": 8, "logit_bias": {60: 9.0}, "ignore_eos": True}),
    "stop strings": ([61], {"max_tokens": 40, "temperature": 1.5, "seed": 6, "stop": ("e", "a"), "ignore_eos": True}),
    "not a number": ([71, UNKNOWN, 72], {"max_tokens": 8}),
    "aborted": ([81, 82], {"max_tokens": 60, "ignore_eos": True}),
}


def serve(engine):
    """Every request's output, by name; some come late, one is aborted, all share one small cache."""
    waiting, outputs, steps = list(REQUESTS), {}, 0
    engine.add(list(range(100, 130)), SamplingParams(max_tokens=0, prompt_logprobs=0), id="scored")
    while waiting or engine.busy:
        for name in waiting[:2]:
            prompt, options = REQUESTS[name]
            engine.add(prompt, SamplingParams(**options), id=name)
        del waiting[:2]
        outputs |= {out.id: asdict(out) for out in engine.step().finished}
        steps += 1
        if steps == 12:
            engine.abort("aborted")
    engine.stop()
    return outputs


def state(engine):
    """What all ranks must agree on at the end."""
    scheduler = engine.scheduler
    return vars(scheduler.pool), scheduler.hit_tokens, scheduler.preemptions, engine.computed_tokens


def work(folder, checkpoint):
    """What each rank does in the launch of its world size; what it found goes into a file."""
    tp = TensorParallel.start("cpu")
    found = {"logits": {}, "plain": {}, "taken": {}}
    for name, config in LAYOUTS.items():
        found["logits"][name] = logits(config, tp)
        weights = Weights(config)
        load_model(weights, torch.float64, tp=tp)
        found["taken"][name] = weights.taken
    found["plain"] = logits(LAYOUTS["biases"], tp, fast=False)
    found["quantised"] = {
        (scheme, name): logits(config, tp, quantization=scheme)
        for scheme in SCHEMES
        for name, config in QUANTISED.items()
    }
    sizes = (0, 1, 500, BROADCAST_BYTES - 20, BROADCAST_BYTES - 10, BROADCAST_BYTES, 10 * BROADCAST_BYTES)
    found["shared"] = [tp.broadcast_object(os.urandom(1) * size if tp.rank == 0 else "ignored") for size in sizes]
    found["least"] = tp.all_reduce_min(10 - tp.rank)
    engine = make_engine(Tokenizer.load(checkpoint), tp)
    if tp.rank == 0:
        found["outputs"] = serve(engine)
    else:
        engine.run_worker()
    found["state"] = state(engine)
    Path(folder, f"{tp.rank}.pickle").write_bytes(pickle.dumps(found))


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def found(request, tmp_path_factory, tiny_checkpoint):
    """What each rank of one launch found."""
    folder = tmp_path_factory.mktemp("ranks")
    for rank in launch(request.param, __file__, folder, tiny_checkpoint()):
        assert rank.code == 0, rank.err
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(request.param)]


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_equal_those_of_one_process_on_every_rank(found, name):
    expected = logits(LAYOUTS[name])
    assert expected.isfinite().all() and expected.std() > 0.1
    for rank in found:
        torch.testing.assert_close(rank["logits"][name], expected, rtol=0, atol=1e-12)


def test_unfused_layers_split_too(found):
    for rank in found:
        torch.testing.assert_close(rank["plain"], logits(LAYOUTS["biases"]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_weights_are_those_of_one_process(found, name, scheme):
    """Scales belong to whole rows, also where input features are split: fused, in float64, no rank differs."""
    expected = logits(QUANTISED[name], quantization=scheme)
    assert (expected - logits(QUANTISED[name])).abs().max() > 1e-6, "nothing was quantised"
    for rank in found:
        torch.testing.assert_close(rank["quantised"][scheme, name], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_reads_its_part_of_the_weights_and_no_more(found, name):
    config, size = LAYOUTS[name], len(found)
    for i, (tensor, shape) in enumerate(config.tensors().items()):
        assert {rank["taken"][name][i][0] for rank in found} == {tensor}
        elements = [rank["taken"][name][i][1] for rank in found]
        copies = 1
        if "norm" in tensor or tensor.endswith(("o_proj.bias", "down_proj.bias")):
            copies = size
        elif "k_proj" in tensor or "v_proj" in tensor:
            copies = max(1, size // config.num_key_value_heads)
        assert sum(elements) == copies * torch.Size(shape).numel(), tensor
        assert max(elements) - min(elements) <= config.hidden_size, tensor


def test_every_request_is_answered_as_by_one_process(found, tiny_checkpoint):
    engine = make_engine(Tokenizer.load(tiny_checkpoint()))
    expected = serve(engine)
    outputs = found[0]["outputs"]
    assert outputs.keys() == expected.keys() == REQUESTS.keys() | {"scored"}
    assert engine.scheduler.preemptions > 0 and engine.scheduler.hit_tokens > 0
    for name, want in expected.items():
        got = outputs[name]
        assert got["error"] == want["error"] and (name == "not a number") == bool(got["error"])
        same_logprobs(got["prompt_logprobs"], want["prompt_logprobs"])
        assert len(got["outputs"]) == len(want["outputs"])
        for one, other in zip(got["outputs"], want["outputs"], strict=True):
            for key in ("token_ids", "text", "finish_reason", "stop_reason", "index"):
                assert one[key] == other[key], f"{name}: {key}"
            same_logprobs(one["logprobs"], other["logprobs"])
            assert one["score"] == pytest.approx(other["score"], abs=1e-6)


def same_logprobs(got, want):
    """(token, logprob, likeliest ones) of each position, or None for both."""
    assert (got is None) == (want is None)
    for (token, level, top), (other, expected, likeliest) in zip(got or [], want or [], strict=True):
        assert token == other and level == pytest.approx(expected, abs=1e-6)
        assert [id for id, _ in top] == [id for id, _ in likeliest]


def test_the_requests_meet_what_they_are_there_for(found):
    reasons = {
        name: [answer["finish_reason"] for answer in out["outputs"]] for name, out in found[0]["outputs"].items()
    }
    assert "abort" in reasons["aborted"] and len(reasons["three answers"]) == 3 and len(reasons["beams"]) == 2
    assert found[0]["outputs"]["stop strings"]["outputs"][0]["stop_reason"] in ("e", "a")
    assert len(found[0]["outputs"]["scored"]["prompt_logprobs"]) == 29


def test_all_ranks_keep_the_same_books(found):
    assert all(rank["state"] == found[0]["state"] for rank in found)
    assert not any(found[0]["state"][0]["users"]), "a block is still used"


def test_what_is_shared_is_rank_0s_in_any_size(found):
    assert all(rank["shared"] == found[0]["shared"] for rank in found)
    assert [rank["least"] for rank in found] == [11 - len(found)] * len(found)


if __name__ == "__main__":
    work(*sys.argv[1:])
