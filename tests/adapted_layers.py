"""Single layers with adapters, in 4 and more bits, and one training pass of them: as it is, and in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from launcher.model.nf4 import dequantized, train_through_zero

K, N, RANK, SCALING = 96, 64, 4, 3.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")
"""Of an adapter; the last with DoRA."""


def adapted(kind: str, dtype: torch.dtype, bias: bool = True, **settings: Any) -> Any:
    """A peft model around one layer named `proj`, of kind linear, conv1d or packed, its adapter not zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    network = nn.Module()
    if kind == "packed":
        network.proj = packed_layer(bias, dtype)
        network.is_loaded_in_4bit = True
        train_through_zero(network)
    else:
        network.proj = (Conv1D(N, K) if kind == "conv1d" else nn.Linear(K, N, bias=bias)).to(dtype)
    network.forward = lambda x: network.proj(x)
    network.requires_grad_(False)
    settings = {"r": RANK, "lora_alpha": RANK * SCALING, "target_modules": ["proj"]} | settings
    model = get_peft_model(
        network, LoraConfig(**settings, fan_in_fan_out=kind == "conv1d"), autocast_adapter_dtype=False
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.to(dtype) if kind != "packed" else model


def packed_layer(bias: bool, dtype: torch.dtype) -> Any:
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(K, N, bias=bias, compute_dtype=dtype, quant_type="nf4", quant_storage=dtype)
    return layer.to(dtype).to("cpu")


def layer_of(model: Any) -> Any:
    return model.base_model.model.proj


def weight_of(model: Any) -> Tensor:
    base: Any = layer_of(model).get_base_layer()
    if hasattr(base, "quant_state"):
        return dequantized(base.weight, base.quant_state, base.compute_dtype)
    return base.weight.t() if isinstance(base, Conv1D) else base.weight


def parts_of(model: Any) -> list[Tensor]:
    """A and B, and with DoRA the lengths."""
    adapters = [getattr(layer_of(model), part) for part in PARTS]
    return [adapter.default.weight for adapter in adapters if "default" in adapter]


def draw(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def passed(model: Any, x: Tensor) -> list[Tensor]:
    """Output and gradients of x and of each part, of one training pass with random numbers of its own."""
    torch.manual_seed(5)
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.backward(draw(*y.shape, dtype=y.dtype, seed=2))
    assert all(p.grad is None for p in layer_of(model).base_layer.parameters())
    return [y.detach(), *(of.grad for of in (x, *parts_of(model)))]  # type: ignore[list-item]


def truth(model: Any, x: Tensor, dropout: float) -> list[Tensor]:
    """The same in float64."""
    torch.manual_seed(5)
    mask = F.dropout(torch.ones_like(x), dropout).double()
    a, b, *lengths = parts = [part.detach().double().requires_grad_() for part in parts_of(model)]
    weight, bias, wide = weight_of(model).detach().double(), layer_of(model).base_layer.bias, x.double()
    wide.requires_grad_()
    seen, change = wide * mask, SCALING * b @ a
    y = F.linear(wide, weight, None if bias is None else bias.double())
    if lengths:
        scale = lengths[0] / (weight + change).norm(dim=1).detach()
        y = y + (scale - 1) * F.linear(seen, weight) + scale * F.linear(seen, change)
    else:
        y = y + F.linear(seen, change)
    y.backward(draw(*y.shape, dtype=x.dtype, seed=2).double())
    return [y.detach(), *(of.grad for of in (wide, *parts))]  # type: ignore[list-item]
