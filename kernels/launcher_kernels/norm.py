"""RMS norm and layer norm over the last dimension, alone or after a residual addition.

    h = x + residual                                     (add_* only; rounded to the dtype, as eager does)
    rms_norm:   y = h r * (offset + w)                   r = 1 / sqrt(mean(h^2) + eps)
    layer_norm: y = (h - mean(h)) r * w + b              r = 1 / sqrt(mean((h - mean(h))^2) + eps)

    with n = h r (or (h - mean) r) and g = dy (offset + w):
    dh = r (g - n mean(n g)) [- r mean(g) in layer_norm] + the gradient that h has besides
    dw = sum over rows of dy n,  db = sum over rows of dy

RMS norm: Zhang and Sennrich, 2019; layer norm: Ba et al., 2016. T rows of H numbers; bytes in a 16-bit dtype: forward
4TH, backward 6TH; with the residual 8TH each. Weight gradients are added up in a fixed order, so they are the same bits
in every run: each program keeps its rows' sum in fp32, a second sum adds the programs' up.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from launcher_kernels import reference
from launcher_kernels.dispatch import launch, multiprocessors, rows, runs_triton

Casting = Literal["llama", "gemma"]
"""`llama`: the normalized row is rounded to the dtype, then multiplied; `gemma`: multiplied in fp32, then rounded."""

MAX_HIDDEN = 32768
"""A row is held in registers; longer ones go through PyTorch."""
_ONE_PASS = 8192
"""Up to here the backward pass has room for a row's weight gradient beside the row; beyond it takes two kernels."""


@triton.jit
def norm_forward(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr, x_stride, residual_stride, T, H, eps,
    LAYER: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, ROUND: tl.constexpr, OFFSET: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program; y and h are contiguous."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < T) & (column < H)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        residual = tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        rounded = (x + residual).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + row * H + column, rounded, mask=inside)
        x = rounded.to(tl.float32)
    if LAYER:
        mean = tl.sum(x, axis=1) / H
        x = tl.where(inside, x - mean[:, None], 0.0)
        tl.store(mean_ptr + row, mean[:, None], mask=row < T)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / H + tl.cast(eps, tl.float32))
    tl.store(rstd_ptr + row, rstd[:, None], mask=row < T)
    normed = x * rstd[:, None]
    if ROUND:
        normed = normed.to(y_ptr.dtype.element_ty).to(tl.float32)
    y = normed * (tl.load(weight_ptr + column, mask=column < H, other=0.0).to(tl.float32) + OFFSET)
    if BIAS:
        y += tl.load(bias_ptr + column, mask=column < H, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * H + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    dy_stride, dh_stride, h_stride, T, H,
    LAYER: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, ROUND: tl.constexpr, OFFSET: tl.constexpr,
    WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program takes every n-th group of ROWS rows and keeps their weight gradient: dweight is [programs, H]."""
    column = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < H, other=0.0).to(tl.float32) + OFFSET
    dweight = tl.zeros((1, BLOCK), tl.float32)
    dbias = tl.zeros((1, BLOCK), tl.float32)
    for start in range(tl.program_id(0) * ROWS, T, tl.num_programs(0) * ROWS):
        row = tl.cast(start, tl.int64) + tl.arange(0, ROWS)[:, None]
        inside = (row < T) & (column < H)
        dy = tl.load(dy_ptr + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
        normed = tl.load(h_ptr + row * h_stride + column, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < T, other=0.0)
        if LAYER:
            mean = tl.load(mean_ptr + row, mask=row < T, other=0.0)
            normed = tl.where(inside, normed - mean, 0.0)
        normed *= rstd
        slope = dy * weight
        dx = slope - normed * (tl.sum(normed * slope, axis=1) / H)[:, None]
        if LAYER:
            dx -= (tl.sum(slope, axis=1) / H)[:, None]
        dx *= rstd
        if ADD:
            dx += tl.load(dh_ptr + row * dh_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * H + column, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if WEIGHT:
            if ROUND:  # the factor of w as it was multiplied
                normed = normed.to(dx_ptr.dtype.element_ty).to(tl.float32)
            dweight += tl.sum(dy * normed, axis=0)[None, :]
            if BIAS:
                dbias += tl.sum(dy, axis=0)[None, :]
    if WEIGHT:
        place = tl.program_id(0).to(tl.int64) * H + column
        tl.store(dweight_ptr + place, dweight, mask=column < H)
        if BIAS:
            tl.store(dbias_ptr + place, dbias, mask=column < H)


@triton.jit
def norm_backward_weight(
    dy_ptr, h_ptr, mean_ptr, rstd_ptr, dweight_ptr, dbias_ptr, dy_stride, h_stride, T, H,
    LAYER: tl.constexpr, BIAS: tl.constexpr, ROUND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The weight gradient alone, of BLOCK columns over every n-th group of ROWS rows, for rows too long to keep."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    dweight = tl.zeros((1, BLOCK), tl.float32)
    dbias = tl.zeros((1, BLOCK), tl.float32)
    for start in range(tl.program_id(1) * ROWS, T, tl.num_programs(1) * ROWS):
        row = tl.cast(start, tl.int64) + tl.arange(0, ROWS)[:, None]
        inside = (row < T) & (column < H)
        dy = tl.load(dy_ptr + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
        normed = tl.load(h_ptr + row * h_stride + column, mask=inside, other=0.0).to(tl.float32)
        if LAYER:
            normed -= tl.load(mean_ptr + row, mask=row < T, other=0.0)
        normed *= tl.load(rstd_ptr + row, mask=row < T, other=0.0)
        if ROUND:
            normed = normed.to(h_ptr.dtype.element_ty).to(tl.float32)
        dweight += tl.sum(dy * normed, axis=0)[None, :]
        if BIAS:
            dbias += tl.sum(dy, axis=0)[None, :]
    place = tl.program_id(1).to(tl.int64) * H + column
    tl.store(dweight_ptr + place, dweight, mask=column < H)
    if BIAS:
        tl.store(dbias_ptr + place, dbias, mask=column < H)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, casting: Casting = "llama") -> Tensor:
    """[..., H] normalized by its root mean square, times `offset` + `weight` [H] of the same dtype.

    Gemma multiplies by 1 + w: offset 1.0, casting `gemma`. Differentiable in `x` and `weight`.
    """
    if not _fits(x, weight):
        return reference.rms_norm(x, weight, eps, offset=offset, casting=casting)
    y: Tensor = _norm(x, None, weight, None, eps, False, casting == "llama", offset)[0]
    return y


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, casting: Casting = "llama"
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of x + residual, and x + residual itself, all [..., H]."""
    if not _fits(x, weight, residual=residual):
        return reference.add_rms_norm(x, residual, weight, eps, offset=offset, casting=casting)
    y, h, *_ = _norm(x, residual, weight, None, eps, False, casting == "llama", offset)
    return y, h


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """[..., H] less its mean, over its standard deviation, times `weight` [H] plus `bias` [H]."""
    if not _fits(x, weight, bias):
        return reference.layer_norm(x, weight, bias, eps)
    y: Tensor = _norm(x, None, weight, bias, eps, True, False, 0.0)[0]
    return y


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`layer_norm` of x + residual, and x + residual itself, all [..., H]."""
    if not _fits(x, weight, bias, residual):
        return reference.add_layer_norm(x, residual, weight, bias, eps)
    y, h, *_ = _norm(x, residual, weight, bias, eps, True, False, 0.0)
    return y, h


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> bool:
    """Anything else is PyTorch's to promote, to broadcast or to complain about: a kernel would read past the end."""
    wanted = [(weight, x.shape[-1:]), (bias, x.shape[-1:]), (residual, x.shape)]
    alike = all(y.dtype == x.dtype and y.shape == shape for y, shape in wanted if y is not None)
    return runs_triton(x) and alike and x.shape[-1] <= MAX_HIDDEN


def _shape(hidden: int) -> tuple[int, int, int]:
    """(columns, rows, warps) of a program: 16 numbers a thread, and short rows together."""
    block = triton.next_power_of_2(hidden)
    num_rows = max(1, 1024 // block)
    return block, num_rows, min(max(block * num_rows // 512, 1), 16)


@torch.library.custom_op("launcher_kernels::norm", mutates_args=())
def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, layer: bool, round_first: bool,
    offset: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, h (empty without a residual), and per row mean (empty for RMS) and rstd in fp32."""
    flat, weight, bias = rows(x), weight.contiguous(), bias if bias is None else bias.contiguous()
    num_rows, hidden = flat.shape
    added = rows(residual) if residual is not None else flat
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = torch.empty_like(y) if residual is not None else x.new_empty(0)
    mean = torch.empty(num_rows if layer else 0, dtype=torch.float32, device=x.device)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    block, together, warps = _shape(hidden)
    launch(
        norm_forward, (triton.cdiv(num_rows, together),),
        flat, added, weight, weight if bias is None else bias, y, h, mean, rstd, flat.stride(0), added.stride(0),
        num_rows, hidden, eps,
        LAYER=layer, ADD=residual is not None, BIAS=bias is not None, ROUND=round_first, OFFSET=offset,
        ROWS=together, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return y, h, mean, rstd


@_norm.register_fake
def _(x, residual, weight, bias, eps, layer, round_first, offset):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_rows = x.numel() // x.shape[-1]
    h = torch.empty_like(y) if residual is not None else x.new_empty(0)
    mean = x.new_empty(num_rows if layer else 0, dtype=torch.float32)
    return y, h, mean, x.new_empty(num_rows, dtype=torch.float32)


@torch.library.custom_op("launcher_kernels::norm_backward", mutates_args=())
def _norm_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, layer: bool,
    round_first: bool, offset: float, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx of h's shape; dweight and dbias [H], empty where not needed."""
    flat, slope, weight = rows(h), rows(dy), weight.contiguous()
    besides = rows(dh) if dh is not None else slope
    num_rows, hidden = flat.shape
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    one_pass = hidden <= _ONE_PASS
    block, together, warps = _shape(hidden)
    programs = min(triton.cdiv(num_rows, together), multiprocessors(h) * (4 if warps <= 8 else 1))
    sums = need_weight or need_bias
    dweight = torch.empty(programs if sums and one_pass else 0, hidden, dtype=torch.float32, device=h.device)
    dbias = torch.empty(programs if need_bias and one_pass else 0, hidden, dtype=torch.float32, device=h.device)
    launch(
        norm_backward, (programs if one_pass else num_rows,),
        slope, besides, flat, weight, mean, rstd, dx, dweight, dbias,
        slope.stride(0), besides.stride(0), flat.stride(0), num_rows, hidden,
        LAYER=layer, ADD=dh is not None, BIAS=need_bias, ROUND=round_first, OFFSET=offset, WEIGHT=sums and one_pass,
        ROWS=together, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    if sums and not one_pass:
        columns, groups = triton.cdiv(hidden, 128), min(triton.cdiv(num_rows, 32), 32)
        dweight = torch.empty(groups, hidden, dtype=torch.float32, device=h.device)
        dbias = torch.empty(groups if need_bias else 0, hidden, dtype=torch.float32, device=h.device)
        launch(
            norm_backward_weight, (columns, groups),
            slope, flat, mean, rstd, dweight, dbias, slope.stride(0), flat.stride(0), num_rows, hidden,
            LAYER=layer, BIAS=need_bias, ROUND=round_first, ROWS=32, BLOCK=128, num_warps=4,
        )  # fmt: skip
    nothing = weight.new_empty(0)
    return (
        dx,
        dweight.sum(0).to(weight.dtype) if need_weight else nothing,
        dbias.sum(0).to(weight.dtype) if need_bias else nothing.clone(),
    )


@_norm_backward.register_fake
def _(dy, dh, h, weight, mean, rstd, layer, round_first, offset, need_weight, need_bias):
    sizes = [weight.shape[0] if needed else 0 for needed in (need_weight, need_bias)]
    return torch.empty(h.shape, dtype=h.dtype, device=h.device), weight.new_empty(sizes[0]), weight.new_empty(sizes[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, _, layer, round_first, offset = inputs
    _, h, mean, rstd = output
    ctx.save_for_backward(x if residual is None else h, weight, mean, rstd)
    ctx.form = layer, round_first, offset
    ctx.has_residual, ctx.has_bias = residual is not None, bias is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)


def _differentiate(ctx: Any, dy: Tensor | None, dh: Tensor | None, *_: Any) -> tuple[Any, ...]:
    h, weight, mean, rstd = ctx.saved_tensors
    if dy is None:  # only the sum went on
        return dh, dh, None, None, None, None, None, None
    if not ctx.has_residual:
        dh = None
    _, _, need_weight, need_bias, *_ = ctx.needs_input_grad
    dx, dweight, dbias = _norm_backward(dy, dh, h, weight, mean, rstd, *ctx.form, need_weight, need_bias)
    return (
        dx, dx if ctx.has_residual else None, dweight if need_weight else None, dbias if need_bias else None,
        None, None, None, None,
    )  # fmt: skip


_norm.register_autograd(_differentiate, setup_context=_keep)
