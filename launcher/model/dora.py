"""DoRA: the length of each row of a weight is learned apart from its direction (Liu et al., 2024).

    y = m / n * (x W^T + s (x A^T) B^T) + bias        n = the length of each row of W + s B A, without a gradient

with W [N, K], A [r, K], B [N, r], m and n [N], s the adapters' scale. With dropout the adapter sees x after it, and so
does the change of the base's own part:

    y = x W^T + bias + (m / n - 1) x' W^T + m / n s (x' A^T) B^T

peft does this only for a process that owns its weights: reading a 4-bit one it puts a copy of the parameter in its
place, which ZeRO-3 does not know. And it multiplies a whole identity [K, K] to have B A, 800 MB for a row of 14,336 in
fp32. So the layers' forward is replaced here, by the same arithmetic on a weight that is gathered, or dequantized from
the bytes as they are at that moment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from launcher.errors import ModelError
from launcher.model.lora_layers import gather_here, other_kind, reader
from launcher.model.token_rows import whole


def compute_lengths(model: nn.Module) -> None:
    """Replace the forward of every adapter layer of `model`, which peft has made with DoRA.

    Raises:
        ModelError: an adapter is on another layer than a linear one, or a row of its weight has no length.
    """
    from peft.tuners.lora import LoraLayer

    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if (reason := other_kind(layer)) is not None:
            raise ModelError(
                f"method.dora: {name} has {reason}, and lengths are learned of linear layers only",
                hint="leave that layer out of method.targets, or set method.dora to false",
            )
        if hasattr(layer.base_layer, "quant_state"):
            # Again, from what this forward will dequantize: bitsandbytes' own code gets some widths wrong, see
            # `model.nf4`, and a layer's first length must be the one that it is divided by.
            with torch.no_grad():
                _magnitude(layer).copy_(lengths(layer, _magnitude(layer).dtype))
        if not (_magnitude(layer).is_meta or _magnitude(layer).all()):  # 0 / 0 in the first step
            raise ModelError(
                f"method.dora: rows of {name}'s weight are zero, and have no length to be learned",
                hint="leave that layer out of method.targets, or set method.dora to false",
            )
        layer.forward = MethodType(_forward, layer)


@contextlib.contextmanager
def peft_gathers() -> Iterator[None]:
    """Have peft gather, one after another, the weights that it measures and ZeRO-3 has partitioned.

    It would where transformers says that ZeRO-3 is on, but then it looks for a GPU too, to read rows of added tokens.
    """
    from peft.tuners.lora import dora

    own = dora.gather_params_ctx
    dora.gather_params_ctx = lambda weights: whole(list(weights))
    try:
        yield
    finally:
        dora.gather_params_ctx = own


def lengths(layer: Any, dtype: torch.dtype) -> Tensor:
    """[N] length of each row of W + s B A, in `dtype`. Both must be gathered."""
    [adapter] = layer.active_adapters
    weight_NK = reader(layer.base_layer)(dtype).to(dtype)
    change_NK = (layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight).to(dtype)
    return torch.linalg.vector_norm(weight_NK + layer.scaling[adapter] * change_NK, dim=1)


def _magnitude(layer: Any) -> Any:
    [adapter] = layer.active_adapters
    return layer.lora_magnitude_vector[adapter].weight


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or self.disable_adapters or self.merged:
        result: Tensor = type(self).forward(self, x, *args, **kwargs)
        return result
    [adapter] = self.active_adapters
    base, a, b, magnitude = self.base_layer, self.lora_A[adapter], self.lora_B[adapter], _magnitude(self)
    x = self._cast_input_dtype(x, a.weight.dtype)
    gather_here(self, base.weight, base.bias, a.weight, b.weight, magnitude)
    with torch.no_grad():
        length_N = lengths(self, x.dtype)
    scale_N = magnitude / length_N
    seen = self.lora_dropout[adapter](x) if self.training else x
    plain = base(x)
    again = plain if seen is x else base(seen)
    if base.bias is not None:
        again = again - base.bias
    return plain + (scale_N - 1) * again + scale_N * b(a(seen)) * self.scaling[adapter]
