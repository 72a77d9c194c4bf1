"""peft's LoRA layers, over a frozen weight in 16, 32 or 4 bits, computed by `launcher_kernels.lora`.

peft calls three layers and adds up what they give. Here the layer itself reads their parameters: one operation whose
backward pass reads the output's gradient once for both adapter matrices, and dequantizes a 4-bit weight once. Modules,
parameters and their names stay as they are, and with them what is saved. In whatever the fused form does not cover
while it runs (adapters switched off, merged or several, autocast, another dtype) peft's own forward answers.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from launcher.model.nf4 import dequantized
from launcher_kernels.lora import lora_linear


def fuse_adapters(model: nn.Module) -> tuple[dict[str, int], dict[str, str], list[Callable[[], None]]]:
    """Compute each LoRA layer of `model` in one operation.

    Returns how many were replaced ({"lora_linear" or "qlora_linear": count}), which were left ({name: why}), and what
    to call for peft's own forward to return. Before or after `deepspeed.initialize`.
    """
    counts: Counter[str] = Counter()
    left: dict[str, str] = {}
    undo: list[Callable[[], None]] = []
    if "peft" not in sys.modules:  # it takes six seconds to import, and no layer can be its
        return {}, left, undo
    from peft.tuners.lora import LoraLayer

    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        reason = why_not(layer)
        if reason is not None:
            left[name] = reason
            continue
        undo.append(fuse_lora_linear(layer))
        counts["qlora_linear" if _is_packed(layer.get_base_layer()) else "lora_linear"] += 1
    return dict(counts), left, undo


def fuse_lora_linear(layer: Any) -> Callable[[], None]:
    """Replace the forward of one peft layer for which `why_not` is None; returns what undoes it."""
    layer.forward = MethodType(_forward, layer)
    return partial(layer.__dict__.pop, "forward", None)


def why_not(layer: Any) -> str | None:
    """What keeps a peft LoRA layer from being computed in one operation; None where nothing does."""
    if (reason := other_kind(layer)) is not None:
        return reason
    base = layer.base_layer
    packed = _is_packed(base)
    if len(layer.active_adapters) != 1 or layer.active_adapters[0] not in layer.lora_A:
        return f"{len(layer.active_adapters)} active adapters"
    [adapter] = layer.active_adapters
    if adapter in layer.lora_variant or layer.use_dora.get(adapter):
        return "a variant of LoRA"
    if "forward" in layer.__dict__:
        return "its forward has been replaced already"
    if layer.merged:
        return "its adapter is merged"
    a, b = layer.lora_A[adapter], layer.lora_B[adapter]
    if not (type(a) is type(b) is nn.Linear) or b.bias is not None:
        return "an adapter with a bias" if type(b) is nn.Linear else "an adapter of other layers"
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return "its own weight is trained"
    if len({a.weight.dtype, b.weight.dtype} | (set() if packed else {base.weight.dtype})) > 1:
        return f"an adapter in {a.weight.dtype} over a weight in {base.weight.dtype}"
    hooked = [part for part in (base, a, b) if part._forward_hooks or part._forward_pre_hooks]
    if hooked and not hasattr(base.weight, "ds_id"):  # ZeRO-3's hooks gather what is read here anyway
        return "hooks on its parts, which would not be called"
    return None


def other_kind(layer: Any) -> str | None:
    """What kind of adapter a peft LoRA layer is, unless it is one on a linear layer; in words that follow "has"."""
    from peft.tuners.lora import Linear

    base = layer.base_layer
    packed = _is_packed(base)
    if not (type(layer) is Linear or (packed and type(layer).__name__ == "Linear4bit")):
        return f"an adapter of kind {type(layer).__name__}"
    if not (packed or type(base) is nn.Linear or _is_transposed(base)):
        return f"an adapter over {type(base).__name__}"
    return None


def _is_packed(base: nn.Module) -> bool:
    return "bitsandbytes" in sys.modules and isinstance(base, sys.modules["bitsandbytes"].nn.Linear4bit)


def _is_transposed(base: nn.Module) -> bool:
    """GPT-2's Conv1D, whose weight is [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return type(base) is Conv1D


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """peft's forward where the layer is still what it was when it was replaced, in one operation."""
    adapters = self.active_adapters
    if args or kwargs or self.disable_adapters or self.merged or len(adapters) != 1 or adapters[0] not in self.lora_A:
        return _peft_forward(self, x, *args, **kwargs)
    [adapter] = adapters
    base, a, b = self.base_layer, self.lora_A[adapter].weight, self.lora_B[adapter].weight
    computed = getattr(base, "compute_dtype", None) or x.dtype
    if not x.dtype == a.dtype == b.dtype == computed or adapter in self.lora_variant or _autocast(x):
        return _peft_forward(self, x)
    gather_here(self, base.weight, base.bias, a, b)
    bias = None if base.bias is None else base.bias.to(x.dtype)
    seen = self.lora_dropout[adapter](x)  # draws what peft's own forward would draw
    return lora_linear(x, reader(base), bias, a, b, self.scaling[adapter], adapter_x=None if seen is x else seen)


def _peft_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    result: Tensor = type(layer).forward(layer, x, *args, **kwargs)
    return result


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def reader(base: Any) -> Callable[[torch.dtype], Tensor]:
    """What gives the weight [N, K] from the parameter that `base` has at that moment."""
    if _is_packed(base):
        return lambda dtype: dequantized(base.weight, base.quant_state, dtype)
    if _is_transposed(base):
        return lambda dtype: base.weight.detach().t()
    return lambda dtype: base.weight.detach()


def gather_here(layer: nn.Module, *parameters: Tensor | None) -> None:
    """Tell ZeRO-3, which gathers a parameter for the module that owns it, that `layer` reads these in both passes."""
    for parameter in parameters:
        if hasattr(parameter, "ds_id"):
            import deepspeed

            deepspeed.zero.register_external_parameter(layer, parameter)
