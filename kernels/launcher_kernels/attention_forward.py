"""The forward pass of packed attention in Triton, and what both passes share: tiles, their loads, scores.

A tile is BLOCK tokens in a row of one document. Document i owns the tiles from cu_seqlens[i] // BLOCK + i up to the
next document's first: at least as many as it needs and never more than one too many, so T // BLOCK + D + 1 programs a
head cover any pack. Each program finds its document by counting the documents that begin no later than its tile;
nothing is prepared on the device before, and the host never has to know a length. What lies behind the last document is
tiled as one more, whose tokens see nothing.

With a tile's rows in one document, its keys are in it too: from the first that the window lets its first row see, to
its last row. Only the blocks on the two edges of that range need a mask.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from launcher_kernels.dispatch import capability, launch, token_major

LOG2E = 1.4426950408889634
_LOG2E = tl.constexpr(LOG2E)


@triton.jit
def find_tile(borders_ptr, tile, T, D, BLOCK: tl.constexpr):
    """(first token, the document's first, its end, whether it is a document) of a tile; it may begin behind the end."""
    document = -1
    for first in range(0, D + 1, 128):
        index = first + tl.arange(0, 128)
        border = tl.load(borders_ptr + index, mask=index <= D, other=0)
        document += tl.sum(((index <= D) & (border // BLOCK + index <= tile)).to(tl.int32), axis=0)
    start = tl.load(borders_ptr + document)
    stop = tl.load(borders_ptr + document + 1, mask=document < D, other=T)
    return start + (tile - start // BLOCK - document) * BLOCK, start, stop, document < D


@triton.jit
def load_tile(
    ptr, token, stop, token_stride,
    CHECK: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[BLOCK, BLOCK_D] of one head from `token` on; zeros from `stop` on, where it is to be checked, and beyond SIZE
    numbers."""
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_D)[None, :]
    # 64 bits for the tile, 32 inside it: a thread keeps its offsets over a loop in half the registers.
    place = ptr + tl.cast(token, tl.int64) * token_stride + (row * token_stride + column)
    if CHECK:
        inside = row < stop - token
        if SIZE < BLOCK_D:
            inside = inside & (column < SIZE)
        return tl.load(place, mask=inside, other=0.0)
    elif SIZE < BLOCK_D:
        return tl.load(place, mask=column < SIZE, other=0.0)
    else:
        return tl.load(place)


@triton.jit
def store_tile(ptr, token, stop, token_stride, x, SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """The counterpart of `load_tile`, with a cast."""
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_D)[None, :]
    place = ptr + tl.cast(token, tl.int64) * token_stride + (row * token_stride + column)
    tl.store(place, x.to(ptr.dtype.element_ty), mask=(row < stop - token) & (column < SIZE))


@triton.jit
def tanh(x):
    """To 3 ulp: Lambert's continued fraction up to one, where 1 - 2 / (exp(2x) + 1) would lose digits."""
    square = x * x
    above = x * (135135.0 + square * (17325.0 + square * (378.0 + square)))
    below = 135135.0 + square * (62370.0 + square * (3150.0 + square * 28.0))
    return tl.where(square < 1.0, above / below, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def capped(products, scale, SOFTCAP: tl.constexpr):
    """Products of queries and keys as scores still to be multiplied by `base_two`."""
    if SOFTCAP > 0.0:
        return tanh(products * (scale / SOFTCAP))
    else:
        return products


@triton.jit
def base_two(scale, SOFTCAP: tl.constexpr):
    """From `capped` scores to powers of two."""
    if SOFTCAP > 0.0:
        return SOFTCAP * _LOG2E
    else:
        return scale * _LOG2E


@triton.jit
def hidden(scores, row, column, stop, window, WINDOWED: tl.constexpr):
    """Scores of what a row does not see become -inf; `row` and `column` broadcast to their shape."""
    visible = (column <= row) & (column < stop)
    if WINDOWED:
        visible = visible & (row - column < window)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def first_key(token, start, window, WINDOWED: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first key that the tile at `token` sees, rounded down to whole blocks from `start`."""
    if WINDOWED:
        return start + tl.maximum(token - window + 1 - start, 0) // BLOCK_N * BLOCK_N
    else:
        return start


@triton.jit
def on_edge(token, begin, window, WINDOWED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether some query of the tile at `token` does not see some key of the block at `begin`."""
    edge = begin + BLOCK_N - 1 > token
    if WINDOWED:
        edge = edge | (token + BLOCK_M - begin > window)
    return edge


@triton.jit
def attention_forward(
    query_ptr, key_ptr, value_ptr, sinks_ptr, borders_ptr, output_ptr, lse_ptr,
    query_head, query_token, key_head, key_token, value_head, value_token, T, D, tiles, heads, group, window, scale,
    SINKS: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of one query head. Output [T, H, d] and lse [H, T] (base 2) are contiguous."""
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    # The last tiles of a document see most keys: they start first, so that the light ones fill the gaps at the end.
    token, start, stop, real = find_tile(borders_ptr, tiles - 1 - program // heads, T, D, BLOCK_M)
    if token >= stop:
        return
    row = token + tl.arange(0, BLOCK_M)
    query = load_tile(query_ptr + head * query_head, token, stop, query_token, True, SIZE, BLOCK_M, BLOCK_D)
    key_ptr += head // group * key_head
    value_ptr += head // group * value_head
    scale = tl.cast(scale, tl.float32)
    steepness = base_two(scale, SOFTCAP)
    output = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if SINKS:
        peak = tl.zeros((BLOCK_M,), tl.float32) + tl.load(sinks_ptr + head).to(tl.float32) * _LOG2E
        total += 1.0
    last = tl.where(real, tl.minimum(token + BLOCK_M, stop), start)
    for begin in range(first_key(token, start, window, WINDOWED, BLOCK_N), last, BLOCK_N):
        key = load_tile(key_ptr, begin, stop, key_token, True, SIZE, BLOCK_N, BLOCK_D)
        value = load_tile(value_ptr, begin, stop, value_token, True, SIZE, BLOCK_N, BLOCK_D)
        scores = capped(tl.dot(query, tl.trans(key), input_precision="ieee"), scale, SOFTCAP)
        if on_edge(token, begin, window, WINDOWED, BLOCK_M, BLOCK_N):
            column = begin + tl.arange(0, BLOCK_N)
            scores = hidden(scores, row[:, None], column[None, :], stop, window, WINDOWED)
        higher = tl.maximum(peak, tl.max(scores, axis=1) * steepness)
        # A row may see nothing of a block at its window's edge, and have seen nothing before.
        shift = tl.where(higher == float("-inf"), 0.0, higher) if WINDOWED else higher
        weights = tl.exp2(scores * steepness - shift[:, None])
        kept = tl.exp2(peak - shift)
        total = total * kept + tl.sum(weights, axis=1)
        output = tl.dot(weights.to(value.dtype), value, output * kept[:, None], input_precision="ieee")
        peak = higher
    total = tl.where(total > 0.0, total, 1.0)  # outside of all documents nothing is seen
    store_tile(output_ptr + head * SIZE, token, stop, heads * SIZE, output / total[:, None], SIZE, BLOCK_M, BLOCK_D)
    tl.store(lse_ptr + head * T + row, peak + tl.log2(total), mask=row < stop)


class Blocks(NamedTuple):
    """How a kernel is cut up."""

    queries: int
    keys: int
    warps: int
    stages: int


def forward(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, sinks: Tensor | None, scale: float,
    window: int | None, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [H, T, d], laid out as [T, H, d], and the base-2 logarithm of the weights' sum [H, T] in fp32."""
    heads, num_tokens, size = query.shape
    width = max(triton.next_power_of_2(size), 16)
    output = token_major(query)
    lse = torch.empty(heads, num_tokens, dtype=torch.float32, device=query.device)
    blocks = _blocks(width, softcap is not None, query)
    tiles = num_tiles(cu_seqlens, num_tokens, blocks.queries)
    launch(
        attention_forward, (tiles * heads if num_tokens else 0,),
        query, key, value, lse if sinks is None else sinks, cu_seqlens, output, lse,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        num_tokens, len(cu_seqlens) - 1, tiles, heads, heads // key.shape[0], window or 0, scale,
        SINKS=sinks is not None, WINDOWED=window is not None, SOFTCAP=softcap or 0.0, SIZE=size,
        BLOCK_D=width, BLOCK_M=blocks.queries, BLOCK_N=blocks.keys,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return output, lse


def num_tiles(cu_seqlens: Tensor, num_tokens: int, block: int) -> int:
    """How many tiles of `block` tokens cover any pack of so many documents."""
    return num_tokens // block + len(cu_seqlens)


def _blocks(width: int, capped: bool, x: Tensor) -> Blocks:
    """Of the forward kernel, for heads of at most `width` numbers: as large as registers allow without spilling."""
    if x.dtype == torch.float32:
        return single_precision(width)
    if amd(x):
        return Blocks(64 if width > 128 else 128, 32 if width > 128 else 64, 8 if 64 < width <= 128 else 4, 1)
    if width > 128:
        return Blocks(128 if hopper(x) else 64, 32, 8, 2)
    if width <= 64:  # two programs on a multiprocessor: one multiplies while the other takes exponentials
        return Blocks(128, 64, 4, 2)
    return Blocks(128, 128 if capability(x)[0] == 9 and not capped else 64, 8, 2)


def single_precision(width: int) -> Blocks:
    """Of all kernels in fp32: no matrix units, the products' factors wait in registers."""
    if width <= 32:
        return Blocks(32, 32, 4, 1)
    return Blocks(16, 32, 4, 1) if width <= 128 else Blocks(16, 16, 8, 1)


def hopper(x: Tensor) -> bool:
    """Whether products read shared memory themselves, of which there are 227 KiB: NVIDIA's H100 to B300."""
    return capability(x)[0] in (9, 10) and not amd(x)


def desktop(x: Tensor) -> bool:
    """Whether shared memory ends at 99 KiB: 8.6, 8.9 and 12.x."""
    return capability(x)[0] in (8, 12) and capability(x) != (8, 0)


def amd(x: Tensor) -> bool:
    """Whether shared memory ends at 64 KiB."""
    return torch.version.hip is not None or capability(x) == (9, 4)
