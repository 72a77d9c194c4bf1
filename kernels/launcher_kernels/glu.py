"""Gated linear units: an activation of the gate times the other half, in one pass.

    h = f(gate) up,   dup = dh f(gate),   dgate = dh up f'(gate)
    silu:       f(x) = x s(x)                            s(x) = 1 / (1 + exp(-x))
    gelu_tanh:  f(x) = x s(2 u) = x (1 + tanh u) / 2     u = sqrt(2 / pi) (x + 0.044715 x^3)
    gelu:       f(x) = x (1 + erf(x / sqrt(2))) / 2

Shazeer, 2020; Hendrycks and Gimpel, 2016. The backward pass keeps the inputs alone and computes f again. T rows of I
numbers; bytes in a 16-bit dtype: forward 6TI, backward 10TI.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from launcher_kernels import reference
from launcher_kernels.dispatch import launch, rows, runs_triton

Activation = Literal["silu", "gelu_tanh", "gelu"]
_ACTIVATIONS = get_args(Activation)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """f(x) and f'(x) in fp32; what the caller does not use is never computed."""
    if ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        if ACTIVATION == "silu":
            inner, steepness = x, 1.0
        else:  # 2 u: half of 1 + tanh u is its sigmoid, which does not cancel below zero
            inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)
            steepness = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        small = tl.exp(-tl.abs(inner))  # of the absolute value: it never overflows, and s (1 - s) never cancels
        large = 1.0 / (1.0 + small)
        small *= large
        share = tl.where(inner < 0, small, large)
        slope = share + x * small * large * steepness
    return x * share, slope


@triton.jit
def glu_forward(
    gate_ptr, up_ptr, h_ptr, gate_stride, up_stride, num_rows, columns, column_blocks,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of ROWS rows a program; h is contiguous."""
    row = (tl.program_id(0) // column_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % column_blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < num_rows) & (column < columns)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    active, _ = activate(gate, ACTIVATION)
    dtype = h_ptr.dtype.element_ty
    tl.store(h_ptr + row * columns + column, (active.to(dtype).to(tl.float32) * up).to(dtype), mask=inside)


@triton.jit
def glu_backward(
    dh_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, dh_stride, gate_stride, up_stride, out_stride,
    num_rows, columns, column_blocks,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dgate and dup have rows of the same stride: they are two tensors, or the halves of one."""
    row = (tl.program_id(0) // column_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % column_blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < num_rows) & (column < columns)
    dh = tl.load(dh_ptr + row * dh_stride + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    active, slope = activate(gate, ACTIVATION)
    dtype = dgate_ptr.dtype.element_ty
    tl.store(dgate_ptr + row * out_stride + column, (dh * up * slope).to(dtype), mask=inside)
    tl.store(dup_ptr + row * out_stride + column, (dh * active.to(dtype).to(tl.float32)).to(dtype), mask=inside)


def glu(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    """[..., I]: `activation` of `gate`, rounded to the dtype, times `up` of the same shape and dtype.

    Differentiable in both.
    """
    assert activation in _ACTIVATIONS
    if not (runs_triton(gate) and gate.dtype == up.dtype and gate.shape == up.shape):
        return reference.glu(gate, up, activation)
    h: Tensor = _glu(gate, up, activation)
    return h


def glu_packed(gate_up: Tensor, activation: Activation = "silu") -> Tensor:
    """[..., I] of [..., 2I], whose first half is the gate (as in transformers' Phi-3); its gradient is one tensor."""
    assert activation in _ACTIVATIONS
    if not (runs_triton(gate_up) and gate_up.shape[-1] % 2 == 0):
        return reference.glu_packed(gate_up, activation)
    h: Tensor = _glu_packed(gate_up, activation)
    return h


def _shape(num_rows: int, columns: int) -> tuple[int, int, tuple[int]]:
    """(rows, columns) of a program, and the grid: 16 numbers of each tensor for each of 128 threads. All I that models
    have are multiples of 1024 or nearly so."""
    block = min(triton.next_power_of_2(columns), 1024)
    together = 2048 // block
    return together, block, (triton.cdiv(num_rows, together) * triton.cdiv(columns, block),)


def _forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate, up = rows(gate), rows(up)
    num_rows, columns = gate.shape
    together, block, grid = _shape(num_rows, columns)
    launch(
        glu_forward, grid,
        gate, up, h, gate.stride(0), up.stride(0), num_rows, columns, triton.cdiv(columns, block),
        ACTIVATION=activation, ROWS=together, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return h


def _backward(dh: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, activation: str) -> None:
    """All of two dimensions; writes dgate and dup."""
    num_rows, columns = gate.shape
    together, block, grid = _shape(num_rows, columns)
    launch(
        glu_backward, grid,
        dh, gate, up, dgate, dup, dh.stride(0), gate.stride(0), up.stride(0), dgate.stride(0),
        num_rows, columns, triton.cdiv(columns, block),
        ACTIVATION=activation, ROWS=together, BLOCK=block, num_warps=4,
    )  # fmt: skip


@torch.library.custom_op("launcher_kernels::glu", mutates_args=())
def _glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return _forward(gate, up, activation)


@_glu.register_fake
def _(gate, up, activation):
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@torch.library.custom_op("launcher_kernels::glu_backward", mutates_args=())
def _glu_backward(dh: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty_like(dgate)
    size = (-1, gate.shape[-1])
    _backward(rows(dh), rows(gate), rows(up), dgate.view(size), dup.view(size), activation)
    return dgate, dup


@_glu_backward.register_fake
def _(dh, gate, up, activation):
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    return dgate, torch.empty_like(dgate)


@torch.library.custom_op("launcher_kernels::glu_packed", mutates_args=())
def _glu_packed(gate_up: Tensor, activation: str) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return _forward(gate, up, activation)


@_glu_packed.register_fake
def _(gate_up, activation):
    shape = (*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    return torch.empty(shape, dtype=gate_up.dtype, device=gate_up.device)


@torch.library.custom_op("launcher_kernels::glu_packed_backward", mutates_args=())
def _glu_packed_backward(dh: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    dgate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    gate, up = gate_up.chunk(2, -1)
    dgate, dup = dgate_up.view(-1, gate_up.shape[-1]).chunk(2, -1)
    _backward(rows(dh), rows(gate), rows(up), dgate, dup, activation)
    return dgate_up


@_glu_packed_backward.register_fake
def _(dh, gate_up, activation):
    return torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dh: Tensor) -> tuple[Any, ...]:
    dgate, dup = _glu_backward(dh, *ctx.saved_tensors, ctx.activation)
    return dgate, dup, None


def _differentiate_packed(ctx: Any, dh: Tensor) -> tuple[Any, ...]:
    return _glu_packed_backward(dh, *ctx.saved_tensors, ctx.activation), None


_glu.register_autograd(_differentiate, setup_context=_keep)
_glu_packed.register_autograd(_differentiate_packed, setup_context=_keep)
