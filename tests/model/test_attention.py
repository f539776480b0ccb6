"""Attention within packed documents against each document alone, gradients too."""

import pytest
import torch

from puna.kernels import cpu_bf16
from puna.model.attention import causal, document_attention, masked_attention, packed_attention

LENGTHS = [[7, 1, 12], [20], [3, 3, 14], [19, 1]]


@pytest.fixture
def inputs():
    """q, k, v of packed rows, in float64, and their documents."""
    documents = torch.tensor([[n for n, length in enumerate(row) for _ in range(length)] for row in LENGTHS])
    shapes = (4, 20, 6, 8), (4, 20, 2, 8), (4, 20, 2, 8)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes], documents


def results(attend, tensors):
    """The result and the gradients of q, k and v."""
    out = attend(0, *tensors)
    gradients = torch.autograd.grad((out * torch.arange(8.0)).square().sum(), tensors)
    return out.detach(), *gradients


def alone(layer, q, k, v):
    rows = []
    for row, lengths in enumerate(LENGTHS):
        ends = torch.tensor(lengths).cumsum(0).tolist()
        parts = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        rows.append(torch.cat([causal(layer, *(x[row : row + 1, part] for x in (q, k, v))) for part in parts], 1))
    return torch.cat(rows)


def test_packed_documents_see_themselves_alone(inputs):
    tensors, documents = inputs
    for found, expected in zip(results(packed_attention(documents), tensors), results(alone, tensors), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_slow_twin_sees_the_same(inputs):
    tensors, documents = inputs
    place = torch.arange(20)
    visible = (documents.unsqueeze(2) == documents.unsqueeze(1)) & (place.unsqueeze(1) >= place)
    for attend in (masked_attention(visible), document_attention(documents, documents, place, place)):
        for found, expected in zip(
            results(attend, tensors), results(packed_attention(documents), tensors), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_rows_of_one_document_are_not_cut():
    assert packed_attention(torch.zeros(2, 5)) is causal
    assert packed_attention(torch.tensor([[3, 3], [4, 4]]), cpu_bf16.causal) is cpu_bf16.causal


def test_queries_out_of_order_see_what_comes_no_later(inputs):
    tensors, documents = inputs
    order = torch.randperm(20)
    attend = document_attention(documents[:, order], documents, order, torch.arange(20))
    q, k, v = tensors
    torch.testing.assert_close(
        attend(0, q[:, order], k, v), packed_attention(documents)(0, q, k, v)[:, order], rtol=0, atol=1e-12
    )
