"""The least time that an operation can take on a machine: the bytes and FLOPs it cannot do without, over what that very
machine was seen to move and multiply.

Bytes count each input read once and each output written once; FLOPs count matrix products alone. T tokens, H hidden, I
intermediate, V vocabulary, S supervised tokens, d head size, Q query and K key-value heads, N x K weights, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from timing import Timer

SIZE = 2
"""Bytes of a number in bf16 and fp16."""


@dataclass(frozen=True)
class Work:
    """What an operation cannot do without."""

    bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Rates:
    """What a machine was seen to do."""

    copy: float
    """Bytes/s of a large device-to-device copy, read plus written."""
    matmul: float
    """FLOP/s of the fastest of the large bf16 products."""

    def floor_s(self, work: Work) -> float:
        """Seconds: moving and multiplying at best overlap."""
        return max(work.bytes / self.copy, work.flops / self.matmul)


def norm(tokens: int, hidden: int, add: bool) -> tuple[Work, Work]:
    """Forward: x (and the residual) in, y (and the sum) out. Backward: dy and x (and the sum's gradient) in, dx out."""
    row = tokens * hidden * SIZE
    return Work((4 if add else 2) * row), Work((4 if add else 3) * row)


def rope(tokens: int, heads: int, head_size: int) -> Work:
    """All query and key heads in and out, forward and backward alike; the angles are small beside them."""
    return Work(2 * tokens * heads * head_size * SIZE)


def qk_norm_rope(tokens: int, heads: int, head_size: int) -> tuple[Work, Work]:
    """Backward reads the heads as they were, too."""
    each = tokens * heads * head_size * SIZE
    return Work(2 * each), Work(3 * each)


def glu(tokens: int, intermediate: int) -> tuple[Work, Work]:
    """Forward: gate and up in, one out. Backward: three in, two out."""
    each = tokens * intermediate * SIZE
    return Work(3 * each), Work(5 * each)


def linear_cross_entropy(supervised: int, hidden: int, vocabulary: int, trained: bool) -> Work:
    """Forward and backward: the logits, the gradient of the hidden states, and that of a trained head."""
    products = 3 if trained else 2
    weights = (2 if trained else 1) * vocabulary * hidden * SIZE
    return Work(weights + 2 * supervised * hidden * SIZE, products * 2 * supervised * hidden * vocabulary)


def attention(lengths: Sequence[int], queries: int, keys: int, head_size: int) -> tuple[Work, Work]:
    """Causal, document by document: two products forward; five backward, of which one makes the scores again."""
    squares, tokens = sum(length**2 for length in lengths), sum(lengths)
    each = tokens * head_size * SIZE
    moved = 2 * (queries + keys) * each
    # A product over half of the L x L pairs is d L^2 FLOPs.
    return (
        Work(moved, 2 * head_size * queries * squares),
        Work(2 * moved, 5 * head_size * queries * squares),
    )


def nf4(rows: int, columns: int, block_size: int = 64, absmax_block_size: int = 256) -> Work:
    """Half a byte a number, a byte a block, four bytes a block of blocks; out in 16 bits: 2.516 bytes a number."""
    return Work(rows * columns * (0.5 + 1 / block_size + 4 / (block_size * absmax_block_size) + SIZE))


def lora_linear(tokens: int, rows: int, columns: int, rank: int) -> tuple[Work, Work]:
    """[T, K] by a frozen [N, K] with an adapter of rank r; backward: the input's gradient and the adapter's."""
    base, adapter = 2 * tokens * rows * columns, 2 * tokens * rank * (rows + columns)
    moved = SIZE * (tokens * (rows + columns) + rows * columns)
    return Work(moved, base + adapter), Work(moved + SIZE * tokens * columns, base + 2 * adapter)


def measure(device: torch.device, dry: bool) -> Rates:
    """Copy bandwidth and matrix rate of this device, on random numbers; a dry run's mean nothing."""
    timer, times = Timer(device), 3 if dry else 15
    size = 2**16 if dry else 2**32
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = [timer(lambda: target.copy_(source))[0] for _ in range(times)][times // 3 :]
    copy = 2 * size / median(seconds)
    rates = []
    for rows, inner, columns in ((32, 32, 32),) if dry else ((8192, 8192, 8192), (8192, 4096, 128256)):
        a = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
        b = torch.randn(columns, inner, device=device, dtype=torch.bfloat16)
        seconds = [timer(lambda a=a, b=b: a @ b.T)[0] for _ in range(times)][times // 3 :]
        rates.append(2 * rows * inner * columns / median(seconds))
    return Rates(copy, max(rates))
