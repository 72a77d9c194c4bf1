"""Packed attention against its definition in float64, output and gradients.

T tokens, H query heads, K key-value heads, d head size.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from launcher_kernels.attention import causal_mask, packed_attention

HEADS, HEAD_SIZE = 4, 16
LENGTHS = {"one token": [1], "one document": [33], "many": [1, 7, 30, 2, 16, 1]}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.7},
    "window": {"sliding_window": 5},
    "window of one": {"sliding_window": 1},
    "window beyond the longest": {"sliding_window": 99},
    "soft cap": {"softcap": 0.5},
    "soft cap, window, scale": {"softcap": 0.5, "sliding_window": 3, "scale": 0.4},
}


def oracle(query: Tensor, key: Tensor, value: Tensor, borders: list[int], **settings: Any) -> Tensor:
    """[H, T, d] in float64, token by token and head by head."""
    scale = settings.get("scale") or query.shape[-1] ** -0.5
    window, cap = settings.get("sliding_window") or query.shape[1], settings.get("softcap")
    group = query.shape[0] // key.shape[0]
    heads = []
    for head in range(query.shape[0]):
        rows = []
        for start, stop in pairwise(borders):
            for i in range(start, stop):
                seen = slice(max(start, i - window + 1), i + 1)
                scores = key[head // group, seen] @ query[head, i] * scale
                if cap is not None:
                    scores = cap * torch.tanh(scores / cap)
                weights = scores.exp() / scores.exp().sum()
                rows.append(weights @ value[head // group, seen])
        heads.append(torch.stack(rows))
    return torch.stack(heads)


def inputs(dtype: torch.dtype, num_tokens: int, kv_heads: int) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (HEADS, num_tokens), (kv_heads, num_tokens), (kv_heads, num_tokens)
    return [torch.randn(*shape, HEAD_SIZE).to(dtype).requires_grad_() for shape in shapes]


def compare(dtype: torch.dtype, bound: float, lengths: list[int], kv_heads: int, settings: dict[str, Any]) -> None:
    """Errors as shares of the largest number of the output and of each gradient."""
    borders = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    found_in = inputs(dtype, borders[-1], kv_heads)
    exact_in = [x.detach().double().requires_grad_() for x in found_in]
    found = packed_attention(*found_in, torch.tensor(borders, dtype=torch.int32), **settings)  # type: ignore[call-arg]
    exact = oracle(*exact_in, borders, **settings)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found.backward(weight)
    exact.backward(weight.double())
    assert found.dtype == dtype
    pairs = [(found, exact), *((x.grad, y.grad) for x, y in zip(found_in, exact_in, strict=True))]
    for what, (mine, theirs) in zip(("output", "query", "key", "value"), pairs, strict=True):
        assert mine is not None
        assert theirs is not None
        # Where a token sees one token only, query and key have no gradient: what cancels there is of size one.
        scale = max(theirs.abs().max().item(), 1.0)
        assert (mine.double() - theirs).abs().max().item() <= bound * scale, what


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_output_and_gradients(lengths: list[int], settings: dict[str, Any]) -> None:
    compare(torch.float32, 5e-6, lengths, 2, settings)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_grouped_heads(kv_heads: int) -> None:
    compare(torch.float32, 5e-6, LENGTHS["many"], kv_heads, {})


@pytest.mark.parametrize("settings", ["plain", "window", "soft cap"])
def test_bf16(settings: str) -> None:
    compare(torch.bfloat16, 4 * 2**-8, LENGTHS["many"], 2, SETTINGS[settings])


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_documents_output_does_not_depend_on_the_others(settings: dict[str, Any]) -> None:
    lengths = LENGTHS["many"]
    borders = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    tensors = inputs(torch.float32, borders[-1], 2)
    with torch.no_grad():
        packed = packed_attention(*tensors, torch.tensor(borders, dtype=torch.int32), **settings)  # type: ignore[call-arg]
        for start, stop in pairwise(borders):
            parts = [x[:, start:stop] for x in tensors]
            alone = packed_attention(*parts, torch.tensor([0, stop - start]), **settings)  # type: ignore[call-arg]
            torch.testing.assert_close(packed[:, start:stop], alone, rtol=0, atol=1e-6)


def test_dropout_keeps_the_mean_and_only_drops_when_asked() -> None:
    draws = 2000
    query, key, value = (x.detach().repeat(draws, 1, 1) for x in inputs(torch.float32, 8, HEADS))  # a draw in each head
    borders = torch.tensor([0, 8], dtype=torch.int32)
    torch.manual_seed(0)
    for settings in ({}, {"softcap": 50.0}):
        kept = packed_attention(query[:HEADS], key[:HEADS], value[:HEADS], borders, **settings)
        drawn = packed_attention(query, key, value, borders, dropout=0.3, **settings).unflatten(0, (draws, HEADS))
        assert not torch.equal(drawn[0], drawn[1])
        # Weights kept with 0.7 and divided by it: a standard error of about 1.5 percent of a value of size one.
        assert (drawn.mean(0) - kept).abs().max() < 0.1


def test_causal_mask_by_hand() -> None:
    full = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
    two = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1]]).bool()
    assert torch.equal(causal_mask(3, None, torch.device("cpu")), full)
    assert torch.equal(causal_mask(3, 2, torch.device("cpu")), two)
