"""A linear layer with a low-rank adapter over a frozen weight (LoRA and QLoRA).

    y  = x W^T + bias + s (x' A^T) B^T                      x [M, K], W [N, K], A [r, K], B [N, r]
    dx = dy W,  dx' = s u A  with u = dy B [M, r]           (one tensor, u's part added in place, where x' is x)
    dA = s u^T x',  dB = s dy^T (x' A^T)

x' is x, or x after dropout. Hu et al., 2021; Dettmers et al., 2023, with W from four bits. W is asked for once in each
pass and not kept, so a quantized weight is dequantized twice a step, and one that ZeRO-3 frees after the forward pass
and gathers elsewhere is read where it then is. The adapter's product is added into that of W (`addmm_`): one more read
and write of y and no tensor of its size besides.

u and dB from one read of dy: a program keeps B and dB of 256 columns of N in registers and goes through a share of the
rows; of u each block of columns gives a part in fp32, of dB each share of the rows, and both are added up in a fixed
order: the same bits in every run. Bytes in a 16-bit dtype: 2MN + 8 r MN / 256 + 8 r MN / (rows of a share). At M=8192,
N=4096, r=16 that is 2.75 MN of which 0.75, 25 MB, stay in an H200's second-level cache; two matrix products read
4 MN. Beyond r=32 the parts are as large as the second read, and it is two products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from launcher_kernels import reference
from launcher_kernels.dispatch import capability, launch, multiprocessors, rows, runs_triton

Weight = Tensor | Callable[[torch.dtype], Tensor]
"""[N, K], or what gives it in the dtype asked for; called in the forward and again in the backward pass."""

MAX_RANK = 32
"""Up to here one read of dy and partial sums are fewer bytes than two reads."""


@triton.jit
def lora_backward(
    dy_ptr, xa_ptr, b_ptr, u_ptr, db_ptr, dy_stride, M, N, r, share,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A part of u [N blocks, M, R] and of dB [shares, N, R] from BLOCK_N columns and `share` rows of dy."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rank = tl.arange(0, R)[None, :]
    b = tl.load(b_ptr + column[:, None].to(tl.int64) * r + rank, mask=(column[:, None] < N) & (rank < r), other=0.0)
    db = tl.zeros((BLOCK_N, R), tl.float32)
    u_ptr += tl.program_id(0).to(tl.int64) * M * R
    first = tl.program_id(1) * share
    for start in range(first, tl.minimum(first + share, M), BLOCK_M):
        row = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_M)[:, None]
        dy = tl.load(dy_ptr + row * dy_stride + column[None, :], mask=(row < M) & (column[None, :] < N), other=0.0)
        xa = tl.load(xa_ptr + row * r + rank, mask=(row < M) & (rank < r), other=0.0)
        u = tl.dot(dy, b, input_precision="ieee")
        tl.store(u_ptr + row * R + rank, u, mask=row < M)
        db = tl.dot(tl.trans(dy), xa, db, input_precision="ieee")
    place = (tl.program_id(1).to(tl.int64) * N + column[:, None]) * R + rank
    tl.store(db_ptr + place, db, mask=column[:, None] < N)


@triton.jit
def lora_add_up(parts_ptr, sum_ptr, num_parts, length, r, scaling, R: tl.constexpr, BLOCK: tl.constexpr):
    """[length, r] from [num_parts, length, R], times `scaling`."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    rank = tl.arange(0, R)[None, :]
    total = tl.zeros((BLOCK, R), tl.float32)
    for part in range(num_parts):
        total += tl.load(parts_ptr + (tl.cast(part, tl.int64) * length + row) * R + rank, mask=row < length, other=0.0)
    total *= tl.cast(scaling, tl.float32)
    tl.store(sum_ptr + row * r + rank, total.to(sum_ptr.dtype.element_ty), mask=(row < length) & (rank < r))


def lora_linear(
    x: Tensor, weight: Weight, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float, *,
    adapter_x: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[..., N] of x [..., K], all of one dtype. Differentiable in `x`, `lora_a`, `lora_b` and `adapter_x`; `weight` and
    `bias` are frozen.

    `adapter_x`: what the adapter sees instead of `x`, as after dropout. `lora_a` [r, K] and `lora_b` [N, r] are read
    again in the backward pass.
    """
    if isinstance(weight, Tensor) and not runs_triton(x):
        return reference.lora_linear(x, weight, bias, lora_a, lora_b, scaling, adapter_x=adapter_x)
    y: Tensor = _LoraLinear.apply(x, adapter_x, lora_a, lora_b, weight, bias, scaling)
    return y


def lora_gradients(dy: Tensor, xa: Tensor, lora_b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """s dy B [M, r] and s dy^T xa [N, r] of dy [M, N], xa = x' A^T [M, r] and B [N, r], in their one dtype."""
    if not runs_triton(dy) or lora_b.shape[1] > MAX_RANK or not dy.dtype == xa.dtype == lora_b.dtype:
        return (dy @ lora_b).mul_(scaling), (dy.t() @ xa).mul_(scaling)
    u, db = _gradients(dy, xa, lora_b, scaling)
    return u, db


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, adapter_x: Tensor | None, lora_a: Tensor, lora_b: Tensor, weight: Weight,
        bias: Tensor | None, scaling: float,
    ) -> Tensor:  # fmt: skip
        flat = x.reshape(-1, x.shape[-1])
        seen = flat if adapter_x is None else adapter_x.reshape(flat.shape)
        y = F.linear(flat, _read(weight, x.dtype), bias)
        xa = seen @ lora_a.t()
        y.addmm_(xa, lora_b.t(), alpha=scaling)
        ctx.save_for_backward(x if adapter_x is None else adapter_x, xa)
        # Not among the saved tensors: under ZeRO-3 only the parameter itself knows where its numbers are by then.
        ctx.weight, ctx.lora_a, ctx.lora_b = weight, lora_a, lora_b
        ctx.scaling, ctx.apart = scaling, adapter_x is not None
        # Not a view to autograd, which would forbid to change it in place: Olmo clamps what its projections give.
        whole: Tensor = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        seen, xa = ctx.saved_tensors
        need_x, need_seen, need_a, *_ = ctx.needs_input_grad
        dy = rows(grad)
        u, db = lora_gradients(dy, xa, ctx.lora_b.detach(), ctx.scaling)
        da = u.t() @ seen.reshape(-1, seen.shape[-1]) if need_a else None
        dx = dy @ _read(ctx.weight, dy.dtype) if need_x else None
        dseen = None
        if ctx.apart:
            dseen = (u @ ctx.lora_a.detach()).view(seen.shape) if need_seen else None
        elif dx is not None:
            dx.addmm_(u, ctx.lora_a.detach())
        return dx if dx is None else dx.view(seen.shape), dseen, da, db, None, None, None


def _read(weight: Weight, dtype: torch.dtype) -> Tensor:
    return weight.detach() if isinstance(weight, Tensor) else weight(dtype)


def _shape(rank: int, dtype: torch.dtype, target: tuple[int, int]) -> tuple[int, int, int, int, int]:
    """(padded rank, rows and columns of a tile, warps, stages) of `lora_backward`."""
    padded = max(16, triton.next_power_of_2(rank))  # tl.dot's least
    if dtype == torch.float32:  # no tensor cores: the tile is multiplied from registers
        return padded, 32, 64, 4, 2
    if target == (9, 4):  # 64 KiB of LDS
        return padded, 32, 256, 4, 2
    return padded, 64, 256, 4, 2  # 80 to 96 KiB of shared memory: a third stage would leave room for one program only


@torch.library.custom_op("launcher_kernels::lora_gradients", mutates_args=())
def _gradients(dy: Tensor, xa: Tensor, lora_b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    dy, xa, lora_b = rows(dy), xa.contiguous(), lora_b.contiguous()
    num_rows, columns = dy.shape
    rank = lora_b.shape[1]
    padded, block_m, block_n, warps, stages = _shape(rank, dy.dtype, capability(dy))
    blocks = triton.cdiv(columns, block_n)
    # Two programs are on a multiprocessor at a time.
    shares = max(1, min(2 * multiprocessors(dy) // blocks, triton.cdiv(num_rows, block_m)))
    share = triton.cdiv(triton.cdiv(num_rows, shares), block_m) * block_m
    shares = triton.cdiv(num_rows, share) if num_rows else 0
    u_parts = torch.empty(blocks, num_rows, padded, dtype=torch.float32, device=dy.device)
    db_parts = torch.empty(shares, columns, padded, dtype=torch.float32, device=dy.device)
    launch(
        lora_backward, (blocks, shares),
        dy, xa, lora_b, u_parts, db_parts, dy.stride(0), num_rows, columns, rank, share,
        R=padded, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    u, db = torch.empty_like(xa), torch.empty_like(lora_b)
    for parts, total in ((u_parts, u), (db_parts, db)):
        length = total.shape[0]
        launch(
            lora_add_up, (triton.cdiv(length, 1024 // padded),),
            parts, total, parts.shape[0], length, rank, scaling, R=padded, BLOCK=1024 // padded, num_warps=4,
        )  # fmt: skip
    return u, db


@_gradients.register_fake
def _(dy, xa, lora_b, scaling):
    return xa.new_empty(xa.shape), lora_b.new_empty(lora_b.shape)
