"""A model with its loss in one process: gradients against transformers, packing, accumulation, types, recomputation."""

from dataclasses import replace

import pytest
import torch
import transformers

from puna.errors import UserError
from puna.model.llama import Llama
from puna.model.lora import LoraOptions, add_lora
from puna.model.presets import PRESETS
from puna.parallel.strategy import ParallelStrategy
from puna.train.loss import chunked_loss

CONFIG = replace(PRESETS["tiny-gqa"], rope_theta=500.0)


def loss(hidden, labels, head):
    total, count, z = chunked_loss(hidden, labels, head.weight, chunk=7)
    return torch.stack((total, count.to(total.dtype), z))


@pytest.fixture(scope="module")
def twin():
    """transformers' model of the same shape, with random weights."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(**CONFIG.to_hf())
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa").float()


def prepared(twin, lora=None, **options):
    strategy = ParallelStrategy.single()
    with torch.device("meta"):
        model = Llama(CONFIG)
        if lora:
            add_lora(model, lora)
    parts = strategy.prepare(model, **options)
    weights = twin.state_dict()

    def read(name, index):
        if name in weights:
            return weights[name][index]
        return torch.ones([part.stop for part in index]) * 0.01

    strategy.load(parts, read)
    return strategy, parts


def rows(lengths, seed=0):
    """Packed rows of documents of these lengths, all of which add up to the same, and each document alone."""
    generator = torch.Generator().manual_seed(seed)
    batch = {"ids": [], "labels": [], "positions": [], "documents": []}
    documents = []
    for row in lengths:
        parts = []
        for number, length in enumerate(row):
            ids = torch.randint(0, CONFIG.vocab_size, (length,), generator=generator)
            labels = ids.roll(-1)
            labels[-1] = -100
            labels[: int(torch.randint(0, length, (), generator=generator))] = -100
            place = torch.arange(length)
            parts.append({"ids": ids, "labels": labels, "positions": place, "documents": torch.full_like(ids, number)})
        documents += parts
        for name in batch:
            batch[name].append(torch.cat([part[name] for part in parts]))
    return {name: torch.stack(tensors) for name, tensors in batch.items()}, documents


def gradients(strategy, parts, microbatches):
    """(sums, {name: gradient}) of a step, divided by the trained tokens."""
    for parameter in strategy.parameters(parts).values():
        parameter.grad = None
    sums = strategy.step(parts, microbatches, loss)
    strategy.scale_grads(parts, 1 / float(sums[1]))
    return sums, {name: p.grad for name, p in strategy.parameters(parts).items() if p.grad is not None}


def same(found, expected, close):
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=close)


def hf_gradients(twin, documents):
    """Loss and gradients of transformers' model on each document alone, divided by all trained tokens."""
    twin.zero_grad()
    total = count = 0
    for document in documents:
        logits = twin(input_ids=document["ids"][None]).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits, document["labels"], reduction="sum")
        count += (document["labels"] != -100).sum()
    (total / count).backward()
    return total.item(), {name: p.grad.clone() for name, p in twin.named_parameters()}


@pytest.mark.parametrize("lengths", [[[24], [24]], [[5, 19], [24], [1, 8, 15]]], ids=["whole rows", "packed"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_gradients_equal_those_of_transformers(twin, lengths, recompute):
    strategy, parts = prepared(twin, recompute_blocks=recompute)
    batch, documents = rows(lengths)
    sums, found = gradients(strategy, parts, [batch])
    total, expected = hf_gradients(twin, documents)
    assert sums[0] == pytest.approx(total, abs=1e-3)
    same(found, expected, 1e-5)


def test_rows_without_documents_are_plainly_causal(twin):
    strategy, parts = prepared(twin)
    batch, documents = rows([[24], [24]])
    del batch["documents"]
    same(gradients(strategy, parts, [batch])[1], hf_gradients(twin, documents)[1], 1e-5)


def test_accumulation_equals_one_batch_with_uneven_tokens(twin):
    strategy, parts = prepared(twin)
    batch, _ = rows([[24], [2, 22], [10, 14], [24]])
    batch["labels"][1, :23] = -100
    batch["labels"][2] = -100
    sums, expected = gradients(strategy, parts, [batch])
    several = [{name: tensor[i : i + 1] for name, tensor in batch.items()} for i in range(4)]
    more, found = gradients(strategy, parts, several)
    torch.testing.assert_close(more, sums)
    same(found, expected, 1e-6)
    torch.testing.assert_close(strategy.evaluate(parts, several, loss), sums)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_bfloat16_products_leave_float32_weights_and_gradients(twin, recompute):
    strategy, parts = prepared(twin, compute_dtype=torch.bfloat16, recompute_blocks=recompute)
    batch, documents = rows([[5, 19], [24], [1, 8, 15]])
    _, found = gradients(strategy, parts, [batch])
    _, expected = hf_gradients(twin, documents)
    for name, gradient in found.items():
        assert gradient.dtype == strategy.parameters(parts)[name].dtype == torch.float32
        assert (gradient - expected[name]).norm() < 0.03 * expected[name].norm(), name


def test_bfloat16_weights(twin):
    strategy, parts = prepared(twin, dtype=torch.bfloat16)
    batch, documents = rows([[5, 19], [24]])
    _, found = gradients(strategy, parts, [batch])
    _, expected = hf_gradients(twin, documents)
    for name, gradient in found.items():
        assert gradient.dtype == torch.bfloat16
        assert (gradient - expected[name]).norm() < 0.05 * expected[name].norm(), name


def test_frozen_weights_are_stored_as_they_are_used(twin):
    options = LoraOptions(rank=2, targets=("q_proj", "down_proj"), modules_to_save=("norm",))
    strategy, parts = prepared(twin, options, compute_dtype=torch.bfloat16)
    batch, _ = rows([[24]])
    _, found = gradients(strategy, parts, [batch])
    weights = strategy.parameters(parts)
    assert found and all(".adapter." in name or name == "model.norm.weight" for name in found)
    assert {weights[name].dtype for name in found} == {torch.float32}
    assert {weights[name].dtype for name in weights.keys() - found.keys()} == {torch.bfloat16}


@pytest.mark.full
def test_compiled_blocks_have_the_same_gradients(twin):
    strategy, parts = prepared(twin, compile_blocks=True)
    batch, documents = rows([[5, 19], [24]])
    _, found = gradients(strategy, parts, [batch])
    same(found, hf_gradients(twin, documents)[1], 1e-5)


def test_the_norm_of_all_gradients(twin):
    strategy, parts = prepared(twin)
    batch, _ = rows([[24]])
    _, found = gradients(strategy, parts, [batch])
    assert strategy.grad_norm(parts) == pytest.approx(
        torch.cat([g.flatten() for g in found.values()]).double().norm().item()
    )


def test_what_is_trained_leaves_by_its_checkpoint_name(twin):
    strategy, parts = prepared(twin)
    full = dict(strategy.full_state(parts))
    assert full.keys() == CONFIG.tensors().keys()
    assert all(torch.equal(tensor, twin.state_dict()[name]) for name, tensor in full.items())
    strategy, parts = prepared(twin, LoraOptions(rank=2, targets=("q_proj",)))
    assert all(name.endswith(("adapter.a", "adapter.b")) for name, _ in strategy.full_state(parts, trained=True))


def test_recomputation_has_three_names(twin):
    with pytest.raises(UserError, match="none, selective, full, not 'all'"):
        prepared(twin, recompute_blocks="all")
