"""Causal attention over documents laid end to end: each token sees its own document, up to itself.

    s_ij = scale q_i . k_j                                [softcap tanh(s_ij / softcap)]
    p_ij = exp(s_ij) / (sum over j of exp(s_ij) [+ exp(sink)])
    o_i  = sum over j of p_ij v_j                         j in i's document, i - window < j <= i

Shapes: T tokens of all documents, D documents, H query heads, K key-value heads (H a multiple of K), d head size. A
sink is one more logit a head that takes weight and gives nothing (gpt_oss). Work is proportional to the sum of squared
document lengths L, not to T squared: 2 d H sum(L^2) FLOP forward, 7 d H sum(L^2) backward (5 where scores are not
computed twice). Bytes in a 16-bit dtype: 4 T d (H + K) forward at least.

Tiles and online softmax: FlashAttention-2 (Dao, 2023), in attention_forward.py and attention_backward.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from launcher_kernels import reference
from launcher_kernels.attention_backward import backward
from launcher_kernels.attention_forward import forward
from launcher_kernels.dispatch import runs_triton, token_major

MAX_HEAD_SIZE = 256
"""Larger heads go through PyTorch: their tiles do not fit in registers."""


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    max_seqlen: int | None = None,
) -> Tensor:
    """Document-aware causal attention, differentiable in query, key, value and sinks.

    Args:
        query: [H, T, d]
        key, value: [K, T, d], of the query's dtype; value's d may be smaller
        cu_seqlens: [D + 1] int32, from 0; document i is tokens cu_seqlens[i] to cu_seqlens[i + 1]
        scale: factor on the scores, above zero; 1 / sqrt(d) where None
        sliding_window: a token sees so many tokens up to itself
        softcap: scores become softcap * tanh(scores / softcap)
        sinks: [H], the logit of each head's sink
        dropout: probability of dropping an attention weight; above zero PyTorch computes it, document by document
        max_seqlen: at least the longest document's length, where known: a window beyond it costs nothing

    Returns:
        [H, T, d], laid out in memory as [T, H, d]; tokens behind the last document are zero

    The device is never waited for, except by PyTorch's path on an accelerator.
    """
    if dropout or not _fits(query, key, value, sinks):
        return reference.packed_attention(
            query, key, value, cu_seqlens, scale=scale, sliding_window=sliding_window, softcap=softcap, sinks=sinks,
            dropout=dropout,
        )  # fmt: skip
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    assert scale > 0
    longest = query.shape[1] if max_seqlen is None else max_seqlen
    window = sliding_window if sliding_window is not None and sliding_window < longest else None
    short = query.shape[-1] - value.shape[-1]
    if short:  # latent attention: keys carry positions that values have not
        value = F.pad(value, (0, short))
    output: Tensor = _attention(query, key, value, cu_seqlens.to(torch.int32), sinks, scale, window, softcap)[0]
    return output[..., : output.shape[-1] - short] if short else output


def _fits(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> bool:
    """Whether the kernels know these shapes; PyTorch's path says what is wrong with impossible ones."""
    heads, num_tokens, size = query.shape
    return (
        runs_triton(query)
        and query.dtype == key.dtype == value.dtype
        and key.shape == (key.shape[0], num_tokens, size)
        and value.shape[:2] == key.shape[:2]
        and value.shape[2] <= size <= MAX_HEAD_SIZE
        and heads % max(key.shape[0], 1) == 0
        and (sinks is None or sinks.shape == (heads,))
    )


@torch.library.custom_op("launcher_kernels::attention", mutates_args=())
def _attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, sinks: Tensor | None, scale: float,
    window: int | None, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [H, T, d] and lse [H, T]."""
    query, key, value = _dense(query), _dense(key), _dense(value)
    sinks = sinks if sinks is None else sinks.contiguous()
    return forward(query, key, value, cu_seqlens.contiguous(), sinks, scale, window, softcap)


@_attention.register_fake
def _(query, key, value, cu_seqlens, sinks, scale, window, softcap):
    return token_major(query), query.new_empty(query.shape[:2], dtype=torch.float32)


@torch.library.custom_op("launcher_kernels::attention_backward", mutates_args=())
def _attention_backward(
    slope: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, cu_seqlens: Tensor,
    sinks: Tensor | None, scale: float, window: int | None, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dquery, dkey, dvalue; dsinks [H], empty without sinks."""
    slope, query, key, value = _dense(slope), _dense(query), _dense(key), _dense(value)
    cu_seqlens = cu_seqlens.contiguous()
    return backward(slope, query, key, value, output, lse, cu_seqlens, sinks, scale, window, softcap)


@_attention_backward.register_fake
def _(slope, query, key, value, output, lse, cu_seqlens, sinks, scale, window, softcap):
    dsinks = query.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return token_major(query), token_major(key), token_major(value), dsinks


def _dense(x: Tensor) -> Tensor:
    """Each head's row of d numbers in one piece."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, cu_seqlens, sinks, *form = inputs
    ctx.save_for_backward(query, key, value, *output, cu_seqlens, sinks)
    ctx.form = form
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, slope: Tensor | None, _: Any) -> tuple[Any, ...]:
    if slope is None:
        return (None,) * 8
    query, key, value, output, lse, cu_seqlens, sinks = ctx.saved_tensors
    found = _attention_backward(slope, query, key, value, output, lse, cu_seqlens, sinks, *ctx.form)
    dquery, dkey, dvalue, dsinks = (x if need else None for x, need in zip(found, _needs(ctx), strict=True))
    return dquery, dkey, dvalue, None, dsinks, None, None, None


def _needs(ctx: Any) -> tuple[bool, ...]:
    query, key, value, _, sinks, *_ = ctx.needs_input_grad
    return query, key, value, sinks


_attention.register_autograd(_differentiate, setup_context=_keep)
