"""4-bit linear layers that train right under every ZeRO stage, on CPU and GPU.

Two things in bitsandbytes 0.50 are made for one process that owns its weights, and one is wrong:

- Its matmul keeps a view of the packed bytes for the backward pass. ZeRO-3 frees those bytes after the forward and
  gathers them again before the backward, elsewhere: the view reads what the buffer holds by then. Losses stay
  plausible, gradients are wrong.
- On CPUs with AVX512-BF16, a layer in evaluation mode repacks its bytes in place and then computes without a gradient,
  also when it is trained again.
- On CPUs with AVX512, rows whose length is a multiple of 16 but not of the block size are multiplied by the absmax of
  other rows (seen with 0.50.2: a weight of 48 columns is off by 100%, of 1,008 by 38%).

So the layer's forward is replaced: weights are dequantized from the parameter as it is at that moment, forward and
backward.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from launcher_kernels.dispatch import runs_triton
from launcher_kernels.nf4 import dequantize_nf4


class _DequantizedLinear(torch.autograd.Function):
    """y = x W^T with W dequantized from the parameter, which is read again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, quant_state: Any) -> Tensor:
        ctx.weight, ctx.quant_state = weight, quant_state
        return F.linear(x, dequantized(weight, quant_state, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ dequantized(ctx.weight, ctx.quant_state, grad.dtype), None, None


def dequantized(weight: nn.Parameter, quant_state: Any, dtype: torch.dtype) -> Tensor:
    """The [out, in] weight of packed 4-bit bytes, in `dtype`: on a GPU in one launch, and the same bits."""
    if runs_triton(weight) or quant_state.shape[-1] % quant_state.blocksize:
        whole = dequantize_nf4(weight.data, dtype=quant_state.dtype, **arguments_of(quant_state))
    else:
        from bitsandbytes.functional import dequantize_4bit

        whole = dequantize_4bit(weight.data.view(-1, 1), quant_state)
    return whole.to(dtype)


def arguments_of(quant_state: Any) -> dict[str, Any]:
    """Arguments of `dequantize_nf4` from a `bitsandbytes.functional.QuantState`, all but the bytes and the dtype."""
    single = {
        "code": quant_state.code,
        "absmax": quant_state.absmax,
        "shape": tuple(quant_state.shape),
        "block_size": quant_state.blocksize,
    }
    if not quant_state.nested:
        return single
    second = quant_state.state2
    return single | {
        "absmax_code": second.code,
        "absmax_scale": second.absmax,
        "absmax_offset": quant_state.offset,
        "absmax_block_size": second.blocksize,
    }


def _forward(self: Any, x: Tensor) -> Tensor:
    product: Tensor = _DequantizedLinear.apply(x, self.weight, self.quant_state)
    return product if self.bias is None else product + self.bias.to(product.dtype)


def train_through_zero(model: nn.Module) -> int:
    """Replace the forward of every 4-bit layer in `model`; returns how many there were.

    The quantization state moves from the parameter, which ZeRO-3 replaces, to the layer.
    """
    from bitsandbytes.nn import Linear4bit

    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    for layer in layers:
        layer.quant_state = layer.weight.quant_state
        layer.forward = MethodType(_forward, layer)
    return len(layers)
