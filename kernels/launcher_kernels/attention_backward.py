"""The backward pass of packed attention in Triton (FlashAttention-2: Dao, 2023).

With weights p = exp(s - lse), recomputed from the scores s, and the output's gradient do:
    delta = sum(do output)  a row                 ds = p (do v^T - delta) [(1 - tanh(s)^2) under a soft cap]
    dv = p^T do      dk = scale ds^T q      dq = scale ds k      dsink = -sum over rows of exp(sink - lse) delta

One kernel has a tile of keys and goes over the queries that see them, of all heads that share them; another has a tile
of queries and goes over its keys. So nothing is added from two programs, and gradients are the same bits in every run;
the scores are computed twice for it (7 products of a tile where one kernel with atomics takes 5).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from launcher_kernels.attention_forward import (
    LOG2E,
    Blocks,
    amd,
    base_two,
    capped,
    desktop,
    find_tile,
    first_key,
    hidden,
    hopper,
    load_tile,
    num_tiles,
    on_edge,
    single_precision,
    store_tile,
)
from launcher_kernels.dispatch import launch, token_major


@triton.jit
def attention_delta(
    output_ptr, slope_ptr, delta_ptr, output_head, output_token, slope_head, slope_token, T, blocks,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """delta [H, T] in fp32: BLOCK rows of a head a program."""
    head = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK
    row = first + tl.arange(0, BLOCK)
    output = load_tile(output_ptr + head * output_head, first, T, output_token, True, SIZE, BLOCK, BLOCK_D)
    slope = load_tile(slope_ptr + head * slope_head, first, T, slope_token, True, SIZE, BLOCK, BLOCK_D)
    tl.store(delta_ptr + head * T + row, tl.sum(output.to(tl.float32) * slope.to(tl.float32), axis=1), mask=row < T)


@triton.jit
def attention_backward_query(
    query_ptr, key_ptr, value_ptr, slope_ptr, borders_ptr, lse_ptr, delta_ptr, dquery_ptr,
    query_head, query_token, key_head, key_token, value_head, value_token, slope_head, slope_token,
    T, D, tiles, heads, group, window, scale,
    WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of one query head: dquery [T, H, d] is contiguous."""
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    token, start, stop, real = find_tile(borders_ptr, tiles - 1 - program // heads, T, D, BLOCK_M)
    if token >= stop:
        return
    row = token + tl.arange(0, BLOCK_M)
    query = load_tile(query_ptr + head * query_head, token, stop, query_token, True, SIZE, BLOCK_M, BLOCK_D)
    slope = load_tile(slope_ptr + head * slope_head, token, stop, slope_token, True, SIZE, BLOCK_M, BLOCK_D)
    lse = tl.load(lse_ptr + head * T + row, mask=row < stop, other=float("inf"))
    delta = tl.load(delta_ptr + head * T + row, mask=row < stop, other=0.0)
    key_ptr += head // group * key_head
    value_ptr += head // group * value_head
    scale = tl.cast(scale, tl.float32)
    steepness = base_two(scale, SOFTCAP)
    dquery = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    last = tl.where(real, tl.minimum(token + BLOCK_M, stop), start)
    for begin in range(first_key(token, start, window, WINDOWED, BLOCK_N), last, BLOCK_N):
        key = load_tile(key_ptr, begin, stop, key_token, True, SIZE, BLOCK_N, BLOCK_D)
        value = load_tile(value_ptr, begin, stop, value_token, True, SIZE, BLOCK_N, BLOCK_D)
        scores = capped(tl.dot(query, tl.trans(key), input_precision="ieee"), scale, SOFTCAP)
        masked = scores
        if on_edge(token, begin, window, WINDOWED, BLOCK_M, BLOCK_N):
            column = begin + tl.arange(0, BLOCK_N)
            masked = hidden(scores, row[:, None], column[None, :], stop, window, WINDOWED)
        weights = tl.exp2(masked * steepness - lse[:, None])
        if SOFTCAP > 0.0:
            weights *= 1.0 - scores * scores
        dscores = weights * (tl.dot(slope, tl.trans(value), input_precision="ieee") - delta[:, None])
        dquery = tl.dot(dscores.to(key.dtype), key, dquery, input_precision="ieee")
    store_tile(dquery_ptr + head * SIZE, token, stop, heads * SIZE, dquery * scale, SIZE, BLOCK_M, BLOCK_D)


@triton.jit
def attention_backward_key(
    query_ptr, key_ptr, value_ptr, slope_ptr, borders_ptr, lse_ptr, delta_ptr, dkey_ptr, dvalue_ptr,
    query_head, query_token, key_head, key_token, value_head, value_token, slope_head, slope_token,
    T, D, tiles, heads, group, window, scale,
    WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradients of one tile of one key-value head: dkey and dvalue [T, K, d] are contiguous; `heads` is K."""
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    # The first tiles of a document are seen by most queries.
    token, _, stop, real = find_tile(borders_ptr, program // heads, T, D, BLOCK_N)
    if token >= stop:
        return
    column = token + tl.arange(0, BLOCK_N)
    key = load_tile(key_ptr + head * key_head, token, stop, key_token, True, SIZE, BLOCK_N, BLOCK_D)
    value = load_tile(value_ptr + head * value_head, token, stop, value_token, True, SIZE, BLOCK_N, BLOCK_D)
    scale = tl.cast(scale, tl.float32)
    steepness = base_two(scale, SOFTCAP)
    last = tl.where(real, stop, token)
    if WINDOWED:
        last = tl.minimum(last, token + BLOCK_N - 1 + window)
    steps = tl.cdiv(last - token, BLOCK_M)
    dkey = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dvalue = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    # One loop over the heads and their queries: loads of the next head start before the last one is done.
    for step in range(group * steps):
        queried = head * group + step // steps
        begin = token + step % steps * BLOCK_M
        row = begin + tl.arange(0, BLOCK_M)
        query = load_tile(query_ptr + queried * query_head, begin, stop, query_token, True, SIZE, BLOCK_M, BLOCK_D)
        slope = load_tile(slope_ptr + queried * slope_head, begin, stop, slope_token, True, SIZE, BLOCK_M, BLOCK_D)
        # Rows behind the document's end get weights of zero: exp(0 - inf).
        lse = tl.load(lse_ptr + queried * T + row, mask=row < stop, other=float("inf"))
        delta = tl.load(delta_ptr + queried * T + row, mask=row < stop, other=0.0)
        scores = capped(tl.dot(key, tl.trans(query), input_precision="ieee"), scale, SOFTCAP)
        masked = scores
        if on_edge(begin, token, window, WINDOWED, BLOCK_M, BLOCK_N):
            masked = hidden(scores, row[None, :], column[:, None], stop, window, WINDOWED)
        weights = tl.exp2(masked * steepness - lse[None, :])
        steep = weights
        if SOFTCAP > 0.0:
            steep *= 1.0 - scores * scores
        # Both in the inputs' dtype while the next product runs: in fp32 they would not fit beside it.
        weights, steep = weights.to(slope.dtype), steep.to(slope.dtype)
        dvalue = tl.dot(weights, slope, dvalue, input_precision="ieee")
        dweights = tl.dot(value, tl.trans(slope), input_precision="ieee")
        dscores = steep.to(tl.float32) * (dweights - delta[None, :])
        dkey = tl.dot(dscores.to(query.dtype), query, dkey, input_precision="ieee")
    store_tile(dkey_ptr + head * SIZE, token, stop, heads * SIZE, dkey * scale, SIZE, BLOCK_N, BLOCK_D)
    store_tile(dvalue_ptr + head * SIZE, token, stop, heads * SIZE, dvalue, SIZE, BLOCK_N, BLOCK_D)


def backward(
    slope: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, cu_seqlens: Tensor,
    sinks: Tensor | None, scale: float, window: int | None, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dquery [H, T, d], dkey and dvalue [K, T, d], laid out as [T, ., d]; dsinks [H], empty without sinks."""
    heads, num_tokens, size = query.shape
    kv_heads, device = key.shape[0], query.device
    width = max(triton.next_power_of_2(size), 16)
    dquery, dkey, dvalue = token_major(query), token_major(key), token_major(value)
    delta = torch.empty(heads, num_tokens, dtype=torch.float32, device=device)
    rows = max(4096 // width, 16)
    blocks = triton.cdiv(num_tokens, rows)
    launch(
        attention_delta, (blocks * heads,),
        output, slope, delta, output.stride(0), output.stride(1), slope.stride(0), slope.stride(1), num_tokens, blocks,
        SIZE=size, BLOCK_D=width, BLOCK=rows, num_warps=4,
    )  # fmt: skip
    strides = [x.stride(i) for x in (query, key, value, slope) for i in (0, 1)]
    form = {"WINDOWED": window is not None, "SOFTCAP": softcap or 0.0, "SIZE": size, "BLOCK_D": width}
    cut = _key_blocks(width, query)
    tiles = num_tiles(cu_seqlens, num_tokens, cut.keys)
    launch(
        attention_backward_key, (tiles * kv_heads if num_tokens else 0,),
        query, key, value, slope, cu_seqlens, lse, delta, dkey, dvalue, *strides,
        num_tokens, len(cu_seqlens) - 1, tiles, kv_heads, heads // kv_heads, window or 0, scale,
        **form, BLOCK_M=cut.queries, BLOCK_N=cut.keys, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    cut = _query_blocks(width, query)
    tiles = num_tiles(cu_seqlens, num_tokens, cut.queries)
    launch(
        attention_backward_query, (tiles * heads if num_tokens else 0,),
        query, key, value, slope, cu_seqlens, lse, delta, dquery, *strides,
        num_tokens, len(cu_seqlens) - 1, tiles, heads, heads // kv_heads, window or 0, scale,
        **form, BLOCK_M=cut.queries, BLOCK_N=cut.keys, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    dsinks = query.new_empty(0)
    if sinks is not None:
        dsinks = -(torch.exp2(sinks.float()[:, None] * LOG2E - lse) * delta).sum(1).to(sinks.dtype)
    return dquery, dkey, dvalue, dsinks


def _key_blocks(width: int, x: Tensor) -> Blocks:
    """Of the kernel that has a tile of keys: two accumulators beside each other leave little room."""
    if x.dtype == torch.float32:
        return single_precision(width)
    if amd(x):
        return Blocks(64, 64, 4, 1) if width <= 64 else Blocks(32, 64, 4, 1) if width <= 128 else Blocks(16, 32, 4, 1)
    if width > 128:
        return Blocks(32, 32, 8, 2)
    if hopper(x):
        return Blocks(64 if width <= 64 else 32, 128, 8, 2)
    return Blocks(32, 128, 8, 2) if width <= 64 else Blocks(64, 64, 8, 2)


def _query_blocks(width: int, x: Tensor) -> Blocks:
    """Of the kernel that has a tile of queries."""
    if x.dtype == torch.float32:
        return single_precision(width)
    if amd(x):
        return Blocks(128 if width <= 64 else 64, 64 if width <= 64 else 32, 4, 1)
    if width > 128:
        return Blocks(128 if hopper(x) else 64, 32, 8, 1 if desktop(x) else 2)
    if hopper(x):
        return Blocks(64, 64, 4, 2) if width <= 64 else Blocks(128, 64, 8, 2)
    return Blocks(64, 64, 8 if width <= 64 else 4, 2)
