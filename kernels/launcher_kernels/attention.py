"""Causal attention over documents laid end to end: each token sees its own document, up to itself.

Shapes: T tokens of all documents, D documents, H query heads, K key-value heads (H a multiple of K), d head size.
Work is proportional to the sum of squared document lengths, not to T squared.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Document-aware causal attention with PyTorch's own kernels, on any device.

    Args:
        query: [H, T, d]
        key, value: [K, T, d], of the query's dtype
        cu_seqlens: [D + 1] int32; document i is tokens cu_seqlens[i] to cu_seqlens[i + 1]
        scale: factor on the scores; 1 / sqrt(d) where None
        sliding_window: a token sees so many tokens up to itself
        softcap: scores become softcap * tanh(scores / softcap)
        dropout: probability of dropping an attention weight

    Returns:
        [H, T, d]

    On an accelerator reading `cu_seqlens` waits for the device once a call; the varlen kernels do not.
    """
    dtype = query.dtype
    if query.device.type == "cpu" and dtype == torch.bfloat16:
        # The backward of the CPU's flash kernel is 1.5 times as fast in fp32 as in bf16, and closer.
        query, key, value = query.float(), key.float(), value.float()
    num_groups = query.shape[0] // key.shape[0]
    if num_groups > 1:
        key, value = (x.repeat_interleave(num_groups, dim=0) for x in (key, value))
    bounds = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in pairwise(bounds)]
    # One split each, not a slice a document: the backward of a slice writes a whole [H, T, d] of zeros.
    documents = zip(*(x.split(lengths, dim=1) for x in (query, key, value)), strict=True)
    attended = [_one_document(q, k, v, scale, sliding_window, softcap, dropout) for q, k, v in documents]
    return torch.cat(attended, dim=1).to(dtype)


def _one_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    sliding_window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    length = query.shape[1]
    windowed = sliding_window is not None and sliding_window < length
    mask = causal_mask(length, sliding_window, query.device) if windowed or softcap is not None else None
    if softcap is not None:
        assert mask is not None
        scores = (query @ key.transpose(-1, -2)) * (scale if scale is not None else query.shape[-1] ** -0.5)
        scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32).to(value.dtype)
        return F.dropout(weights, dropout) @ value
    # The CPU's flash kernel wants four dimensions; with three it takes the one that builds the whole score matrix.
    attended = F.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale
    )
    return attended.squeeze(0)


def causal_mask(length: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """[length, length] bool, True where row i may see column j: i - sliding_window < j <= i."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    mask = distance >= 0
    return mask if sliding_window is None else mask & (distance < sliding_window)
