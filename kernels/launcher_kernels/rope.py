"""Rotary position embedding of queries and keys in one launch, alone or after a norm of each head.

    a' = a cos - b sin,  b' = b cos + a sin              for each pair (a, b) of a head's first R numbers
    halves:      pair i is (x[i], x[i + R / 2])          (Llama's layout)
    interleaved: pair i is (x[2 i], x[2 i + 1])          (GPT-J's layout)

The numbers from R on are copied: they are pairs too, whose angle is zero. The backward pass turns by the negative
angle; the angles themselves get no gradient. `qk_norm_rope` first makes each head y = x r (offset + w) as in `norm.py`;
its backward computes r again from x, which it must read anyway.

Su et al., 2021. B rows of T tokens, Hq query and Hk key heads of d numbers; bytes in a 16-bit dtype: rope
4BT(Hq + Hk)d forward and backward, qk_norm_rope 4 and 6. Queries and keys are read where they lie, by their strides;
what comes out lies in memory as [B, T, N, d]. Weight gradients are added up in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from launcher_kernels import reference
from launcher_kernels.dispatch import launch, multiprocessors, runs_triton, token_major
from launcher_kernels.norm import Casting

MAX_HEAD = 1024
"""Numbers a head; longer ones go through PyTorch."""
_PAIRS = 2048
"""A program's, of all its tokens and heads: 32 numbers for each of 128 threads."""


@triton.jit
def pair_columns(D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Where the first and second numbers of D / 2 pairs are in the layout of halves; the first HALF pairs turn."""
    pair = tl.arange(0, BLOCK)[None, None, :]
    if 2 * HALF == D:
        return pair, pair + HALF
    return tl.where(pair < HALF, pair, pair + HALF), tl.where(pair < HALF, pair + HALF, pair + D // 2)


@triton.jit
def load_pairs(at, stride, inside, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    """Heads that begin at the pointers `at` [tokens, heads, 1], as two fp32 blocks [tokens, heads, BLOCK]."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK)[None, None, :]
        both = tl.load(at + column.to(tl.int64) * stride, mask=inside & (column < D), other=0.0).to(tl.float32)
        return tl.split(tl.reshape(both, (both.shape[0], both.shape[1], BLOCK, 2)))
    one, two = pair_columns(D, HALF, BLOCK)
    inside &= tl.arange(0, BLOCK)[None, None, :] < D // 2
    first = tl.load(at + one.to(tl.int64) * stride, mask=inside, other=0.0).to(tl.float32)
    return first, tl.load(at + two.to(tl.int64) * stride, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_pairs(
    at, first, second, inside, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """What `load_pairs` reads, for contiguous heads."""
    dtype = at.dtype.element_ty
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK)[None, None, :]
        both = tl.reshape(tl.join(first, second), (first.shape[0], first.shape[1], 2 * BLOCK))
        tl.store(at + column, both.to(dtype), mask=inside & (column < D))
    else:
        one, two = pair_columns(D, HALF, BLOCK)
        inside &= tl.arange(0, BLOCK)[None, None, :] < D // 2
        tl.store(at + one, first.to(dtype), mask=inside)
        tl.store(at + two, second.to(dtype), mask=inside)


@triton.jit
def load_angles(
    angles, x_ptr, batch, position, inside, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Cosine and sine of each head's pairs; those that do not turn have 1 and 0.

    Each thread loads those of its own pairs, for each head again (`inside` is [tokens, heads, 1]; most come from the L1
    cache): a single row would be dealt out through shared memory, and the heads with it, behind six barriers. So the
    interleaved layout takes as many at once as there are pairs in 16 bytes of x.
    """
    cos_ptr, sin_ptr, by_batch, by_token = angles
    pair = tl.arange(0, BLOCK)[None, None, :]
    at = batch * by_batch + position * by_token + pair
    if INTERLEAVED:
        at = tl.max_contiguous(at, [1, 1, 64 // x_ptr.dtype.element_ty.primitive_bitwidth])
    cos = tl.load(cos_ptr + at, mask=inside & (pair < HALF), other=1.0).to(tl.float32)
    return cos, tl.load(sin_ptr + at, mask=inside & (pair < HALF), other=0.0).to(tl.float32)


@triton.jit
def turn_heads(
    x_ptr, weight_ptr, y_ptr, strides, angles, token, inside, head, num_heads, T, eps,
    NORM: tl.constexpr, ROUND: tl.constexpr, OFFSET: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The heads `head` [1, heads, 1] of the tokens `token` [tokens, 1, 1]."""
    # Divided as int32, since a 64-bit division is a hundred instructions; offsets are int64.
    batch, position = (token // T).to(tl.int64), (token % T).to(tl.int64)
    by_batch, by_head, by_token, by_column = strides
    at = x_ptr + batch * by_batch + head * by_head + position * by_token
    inside &= head < num_heads
    first, second = load_pairs(at, by_column, inside, D, HALF, INTERLEAVED, BLOCK)
    cos, sin = load_angles(angles, x_ptr, batch, position, inside, HALF, INTERLEAVED, BLOCK)
    sin = -sin if BACKWARD else sin
    if NORM:
        dtype = y_ptr.dtype.element_ty
        everywhere = tl.zeros(inside.shape, tl.int32)
        w_first, w_second = load_pairs(weight_ptr + everywhere, 1, everywhere == 0, D, HALF, INTERLEAVED, BLOCK)
        mean = tl.sum(first * first + second * second, axis=2)[:, :, None] / D
        rstd = 1.0 / tl.sqrt(mean + tl.cast(eps, tl.float32))
        first, second = first * rstd, second * rstd
        if ROUND:
            first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
        first = (first * (w_first + OFFSET)).to(dtype).to(tl.float32)
        second = (second * (w_second + OFFSET)).to(dtype).to(tl.float32)
    at = y_ptr + (token.to(tl.int64) * num_heads + head) * D
    store_pairs(at, first * cos - second * sin, second * cos + first * sin, inside, D, HALF, INTERLEAVED, BLOCK)


@triton.jit
def rope_turn(
    query_ptr, key_ptr, query_weight_ptr, key_weight_ptr, cos_ptr, sin_ptr, query_out_ptr, key_out_ptr,
    query_batch, query_head, query_token, query_column, key_batch, key_head, key_token, key_column,
    angle_batch, angle_token, query_heads, key_heads, T, num_tokens, eps,
    NORM: tl.constexpr, ROUND: tl.constexpr, OFFSET: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """HEADS query or key heads of TOKENS tokens a program; a token's programs follow each other, for its angles."""
    query_blocks = tl.cdiv(query_heads, HEADS)
    blocks = query_blocks + tl.cdiv(key_heads, HEADS)
    block = tl.program_id(0) % blocks
    token = (tl.program_id(0) // blocks) * TOKENS + tl.arange(0, TOKENS)[:, None, None]
    head = tl.arange(0, HEADS)[None, :, None].to(tl.int64)
    angles = (cos_ptr, sin_ptr, angle_batch, angle_token)
    if block < query_blocks:
        turn_heads(
            query_ptr, query_weight_ptr, query_out_ptr, (query_batch, query_head, query_token, query_column), angles,
            token, token < num_tokens, block * HEADS + head, query_heads, T, eps,
            NORM, ROUND, OFFSET, D, HALF, INTERLEAVED, BACKWARD, BLOCK,
        )  # fmt: skip
    else:
        turn_heads(
            key_ptr, key_weight_ptr, key_out_ptr, (key_batch, key_head, key_token, key_column), angles,
            token, token < num_tokens, (block - query_blocks) * HEADS + head, key_heads, T, eps,
            NORM, ROUND, OFFSET, D, HALF, INTERLEAVED, BACKWARD, BLOCK,
        )  # fmt: skip


@triton.jit
def norm_heads_backward(
    dy_ptr, x_ptr, weight_ptr, dx_ptr, dweight_ptr, dy_strides, x_strides, angles, head, num_heads, T, num_tokens, eps,
    WEIGHT: tl.constexpr, ROUND: tl.constexpr, OFFSET: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The heads `head` of every n-th group of TOKENS tokens, and their weight gradient."""
    dy_batch, dy_head, dy_token, dy_column = dy_strides
    x_batch, x_head, x_token, x_column = x_strides
    everywhere = tl.zeros((TOKENS, HEADS, 1), tl.int32)
    w_first, w_second = load_pairs(weight_ptr + everywhere, 1, everywhere == 0, D, HALF, INTERLEAVED, BLOCK)
    dw_first, dw_second = tl.zeros((TOKENS, HEADS, BLOCK), tl.float32), tl.zeros((TOKENS, HEADS, BLOCK), tl.float32)
    for start in range(tl.program_id(0) * TOKENS, num_tokens, tl.num_programs(0) * TOKENS):
        token = start + tl.arange(0, TOKENS)[:, None, None]
        inside = (token < num_tokens) & (head < num_heads)
        batch, position = (token // T).to(tl.int64), (token % T).to(tl.int64)
        at = x_ptr + batch * x_batch + head * x_head + position * x_token
        first, second = load_pairs(at, x_column, inside, D, HALF, INTERLEAVED, BLOCK)
        at = dy_ptr + batch * dy_batch + head * dy_head + position * dy_token
        dy_first, dy_second = load_pairs(at, dy_column, inside, D, HALF, INTERLEAVED, BLOCK)
        cos, sin = load_angles(angles, x_ptr, batch, position, inside, HALF, INTERLEAVED, BLOCK)
        dy_first, dy_second = dy_first * cos + dy_second * sin, dy_second * cos - dy_first * sin
        mean = tl.sum(first * first + second * second, axis=2)[:, :, None] / D
        rstd = 1.0 / tl.sqrt(mean + tl.cast(eps, tl.float32))
        first, second = first * rstd, second * rstd
        slope_first, slope_second = dy_first * (w_first + OFFSET), dy_second * (w_second + OFFSET)
        common = tl.sum(first * slope_first + second * slope_second, axis=2)[:, :, None] / D
        at = dx_ptr + (token.to(tl.int64) * num_heads + head) * D
        slope_first, slope_second = rstd * (slope_first - first * common), rstd * (slope_second - second * common)
        store_pairs(at, slope_first, slope_second, inside, D, HALF, INTERLEAVED, BLOCK)
        if WEIGHT:
            if ROUND:  # the factor of w as it was multiplied
                first = first.to(x_ptr.dtype.element_ty).to(tl.float32)
                second = second.to(x_ptr.dtype.element_ty).to(tl.float32)
            dw_first += dy_first * first
            dw_second += dy_second * second
    if WEIGHT:
        dw_first = tl.sum(tl.reshape(dw_first, (TOKENS * HEADS, BLOCK)), axis=0)[None, None, :]
        dw_second = tl.sum(tl.reshape(dw_second, (TOKENS * HEADS, BLOCK)), axis=0)[None, None, :]
        once = tl.zeros((1, 1, 1), tl.int32)
        store_pairs(dweight_ptr + once, dw_first, dw_second, once == 0, D, HALF, INTERLEAVED, BLOCK)


@triton.jit
def qk_norm_rope_backward(
    dquery_ptr, dkey_ptr, query_ptr, key_ptr, query_weight_ptr, key_weight_ptr, cos_ptr, sin_ptr,
    query_out_ptr, key_out_ptr, dweight_ptr,
    dquery_batch, dquery_head, dquery_token, dquery_column, dkey_batch, dkey_head, dkey_token, dkey_column,
    query_batch, query_head, query_token, query_column, key_batch, key_head, key_token, key_column,
    angle_batch, angle_token, query_heads, key_heads, T, num_tokens, eps,
    WEIGHT: tl.constexpr, ROUND: tl.constexpr, OFFSET: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """HEADS query or key heads a program, by program_id(1); dweight is [blocks of heads, programs, D]."""
    query_blocks = tl.cdiv(query_heads, HEADS)
    block = tl.program_id(1)
    head = tl.arange(0, HEADS)[None, :, None].to(tl.int64)
    dweight_ptr += (block * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * D
    angles = (cos_ptr, sin_ptr, angle_batch, angle_token)
    if block < query_blocks:
        norm_heads_backward(
            dquery_ptr, query_ptr, query_weight_ptr, query_out_ptr, dweight_ptr,
            (dquery_batch, dquery_head, dquery_token, dquery_column),
            (query_batch, query_head, query_token, query_column),
            angles, block * HEADS + head, query_heads, T, num_tokens, eps,
            WEIGHT, ROUND, OFFSET, D, HALF, INTERLEAVED, TOKENS, HEADS, BLOCK,
        )  # fmt: skip
    else:
        norm_heads_backward(
            dkey_ptr, key_ptr, key_weight_ptr, key_out_ptr, dweight_ptr,
            (dkey_batch, dkey_head, dkey_token, dkey_column), (key_batch, key_head, key_token, key_column),
            angles, (block - query_blocks) * HEADS + head, key_heads, T, num_tokens, eps,
            WEIGHT, ROUND, OFFSET, D, HALF, INTERLEAVED, TOKENS, HEADS, BLOCK,
        )  # fmt: skip


def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """`query` [B, Hq, T, d] and `key` [B, Hk, T, d], turned by angles of which `cos` and `sin` are [B or 1, T, R / 2].

    The first R numbers of each head turn. Angles in fp32 or the heads' dtype, and one a token, so that each document of
    a packed row has positions of its own. Differentiable in `query` and `key`.
    """
    if not _fits(query, key, cos, sin):
        return reference.rope(query, key, cos, sin, interleaved=interleaved)
    heads: tuple[Tensor, Tensor] = _rope(query, key, cos, sin, interleaved, False)
    return heads


def qk_norm_rope(
    query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, *,
    interleaved: bool = False, offset: float = 0.0, casting: Casting = "llama",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`rope` of heads that are each divided by their root mean square and multiplied by `offset` + weight [d].

    See `norm.rms_norm` for `offset` and `casting`. Differentiable in `query`, `key` and the weights.
    """
    fits = _fits(query, key, cos, sin) and query_weight.dtype == key_weight.dtype == query.dtype
    if not (fits and query_weight.shape == key_weight.shape == query.shape[-1:]):
        return reference.qk_norm_rope(
            query, key, query_weight, key_weight, cos, sin, eps, interleaved=interleaved, offset=offset, casting=casting
        )
    weights = query_weight.contiguous(), key_weight.contiguous()
    heads: tuple[Tensor, Tensor]
    heads = _qk_norm_rope(query, key, *weights, cos, sin, eps, interleaved, casting == "llama", offset)
    return heads


def _fits(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Anything else is PyTorch's to broadcast, or to complain about: a kernel would read past the end."""
    batch, _, length, head = query.shape
    return (
        runs_triton(query)
        and (key.dtype, key.shape[0], key.shape[2], key.shape[3]) == (query.dtype, batch, length, head)
        and cos.shape == sin.shape == (cos.shape[0], length, cos.shape[-1])
        and cos.shape[0] in (1, batch)
        and 2 * cos.shape[-1] <= head <= MAX_HEAD
        and head % 2 == 0
        and not (cos.requires_grad or sin.requires_grad)
    )


def _angles(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Both with pairs that follow each other, as `load_angles` says; strides of batch (0 if there is one) and token."""
    if cos.stride() != sin.stride() or cos.stride(2) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, (cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1))


def _shape(query: Tensor, key: Tensor, pairs: int) -> tuple[int, int, int, int]:
    """(tokens, heads, pairs of a head) of a program, and how many blocks of heads there are."""
    block = triton.next_power_of_2(max(query.shape[3] // 2, 1))
    heads = min(triton.next_power_of_2(max(query.shape[1], key.shape[1])), 8, max(pairs // block, 1))
    blocks = triton.cdiv(query.shape[1], heads) + triton.cdiv(key.shape[1], heads)
    return max(pairs // (heads * block), 1), heads, block, blocks


def _turn(
    query: Tensor, key: Tensor, weights: tuple[Tensor, Tensor] | None, cos: Tensor, sin: Tensor, eps: float,
    interleaved: bool, backward: bool, round_first: bool, offset: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    turned_query, turned_key = token_major(query), token_major(key)
    cos, sin, angle_strides = _angles(cos, sin)
    tokens, heads, block, blocks = _shape(query, key, _PAIRS)
    num_tokens = query.shape[0] * query.shape[2]
    launch(
        rope_turn, (triton.cdiv(num_tokens, tokens) * blocks,),
        query, key, *(weights or (query, key)), cos, sin, turned_query, turned_key,
        *query.stride(), *key.stride(), *angle_strides, query.shape[1], key.shape[1], query.shape[2], num_tokens, eps,
        NORM=weights is not None, ROUND=round_first, OFFSET=offset, D=query.shape[3], HALF=cos.shape[2],
        INTERLEAVED=interleaved, BACKWARD=backward, TOKENS=tokens, HEADS=heads, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return turned_query, turned_key


@torch.library.custom_op("launcher_kernels::rope", mutates_args=())
def _rope(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backward: bool
) -> tuple[Tensor, Tensor]:
    """`backward`: by the negative angle."""
    return _turn(query, key, None, cos, sin, 0.0, interleaved, backward, False, 0.0)


@_rope.register_fake
def _(query, key, cos, sin, interleaved, backward):
    return token_major(query), token_major(key)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, cos, sin, ctx.interleaved, ctx.backward = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx: Any, dquery: Tensor, dkey: Tensor) -> tuple[Any, ...]:
    dquery, dkey = _rope(dquery, dkey, *ctx.saved_tensors, ctx.interleaved, not ctx.backward)
    return dquery, dkey, None, None, None, None


_rope.register_autograd(_differentiate, setup_context=_keep)


@torch.library.custom_op("launcher_kernels::qk_norm_rope", mutates_args=())
def _qk_norm_rope(
    query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    interleaved: bool, round_first: bool, offset: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _turn(query, key, (query_weight, key_weight), cos, sin, eps, interleaved, False, round_first, offset)


@_qk_norm_rope.register_fake
def _(query, key, query_weight, key_weight, cos, sin, eps, interleaved, round_first, offset):
    return token_major(query), token_major(key)


@torch.library.custom_op("launcher_kernels::qk_norm_rope_backward", mutates_args=())
def _qk_norm_rope_backward(
    dquery: Tensor, dkey: Tensor, query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor,
    cos: Tensor, sin: Tensor, eps: float, interleaved: bool, round_first: bool, offset: float, need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query and key, and of their weights [d], which are empty where not needed."""
    query_out, key_out = token_major(query), token_major(key)
    cos, sin, angle_strides = _angles(cos, sin)
    tokens, heads, block, blocks = _shape(query, key, _PAIRS // 2)
    num_tokens = query.shape[0] * query.shape[2]
    groups = triton.cdiv(num_tokens, tokens)
    # With a weight gradient to keep, as many programs as run side by side: four have room on a multiprocessor.
    programs = min(groups, triton.cdiv(4 * multiprocessors(query), blocks)) if need_weights else groups
    dweight = torch.empty(
        blocks if need_weights else 0, programs, query.shape[3], dtype=torch.float32, device=query.device
    )
    launch(
        qk_norm_rope_backward, (programs, blocks),
        dquery, dkey, query, key, query_weight, key_weight, cos, sin, query_out, key_out, dweight,
        *dquery.stride(), *dkey.stride(), *query.stride(), *key.stride(), *angle_strides,
        query.shape[1], key.shape[1], query.shape[2], num_tokens, eps,
        WEIGHT=need_weights, ROUND=round_first, OFFSET=offset, D=query.shape[3], HALF=cos.shape[2],
        INTERLEAVED=interleaved, TOKENS=tokens, HEADS=heads, BLOCK=block, num_warps=4,
    )  # fmt: skip
    if not need_weights:
        return query_out, key_out, query_weight.new_empty(0), key_weight.new_empty(0)
    of_query, of_key = dweight.tensor_split([triton.cdiv(query.shape[1], heads)])
    return query_out, key_out, of_query.sum((0, 1)).to(query.dtype), of_key.sum((0, 1)).to(query.dtype)


@_qk_norm_rope_backward.register_fake
def _(dquery, dkey, query, key, query_weight, key_weight, *form):
    size = query.shape[3] if form[-1] else 0
    return token_major(query), token_major(key), query_weight.new_empty(size), key_weight.new_empty(size)


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, eps, interleaved, round_first, offset = inputs
    ctx.save_for_backward(*tensors)
    ctx.form = eps, interleaved, round_first, offset


def _differentiate_norm(ctx: Any, dquery: Tensor, dkey: Tensor) -> tuple[Any, ...]:
    _, _, *weights = ctx.needs_input_grad[:4]
    dquery, dkey, *sums = _qk_norm_rope_backward(dquery, dkey, *ctx.saved_tensors, *ctx.form, any(weights))
    needed = [dweight if needs else None for dweight, needs in zip(sums, weights, strict=True)]
    return dquery, dkey, *needed, None, None, None, None, None, None


_qk_norm_rope.register_autograd(_differentiate_norm, setup_context=_keep_norm)
