"""A linear layer with a LoRA adapter over a frozen weight, in bf16 and in 4 bits, at Llama 3 8B's and 70B's widest."""

from __future__ import annotations

from typing import Any

import floors
import torch
from contest import OURS, Build, Contest, Draw, Part, Target
from timed_nf4 import packed, quant_state
from torch import Tensor, nn

from launcher_kernels import reference

SCALING = 2.0


def contests(dry: bool) -> list[Contest]:
    tokens, shapes = (6, ((16, 64, 4),)) if dry else (8192, ((14336, 4096, 16), (14336, 4096, 64), (28672, 8192, 16)))
    return [_contest(tokens, *shape, quantized) for quantized in (False, True) for shape in shapes]


def _contest(tokens: int, rows: int, columns: int, rank: int, quantized: bool) -> Contest:
    def inputs(draw: Draw) -> dict[str, Tensor]:
        weight = {"weight": draw.normal(rows, columns, scale=columns**-0.5)}
        return {
            "x": draw.normal(tokens, columns),
            "lora_a": draw.normal(rank, columns, scale=columns**-0.5),
            "lora_b": draw.normal(rows, rank, scale=rank**-0.5),
        } | (packed(draw, rows, columns) if quantized else weight)

    def eager(x: Tensor, lora_a: Tensor, lora_b: Tensor, weight: Tensor | None = None, **parts: Tensor) -> Tensor:
        if weight is None:
            weight = reference.dequantize_nf4(**parts, shape=(rows, columns), dtype=x.dtype)
        return reference.lora_linear(x, weight, None, lora_a, lora_b, SCALING)

    def ours(inputs: Any) -> Any:
        from launcher_kernels.lora import lora_linear

        return lambda x, lora_a, lora_b, weight: lora_linear(x, weight, None, lora_a, lora_b, SCALING)

    def ours_quantized(inputs: Any) -> Any:
        from launcher.model.lora_layers import fuse_adapters
        from launcher.model.nf4 import train_through_zero

        layer = _peft_layer(_base_4bit(inputs, rows, columns), rank)
        train_through_zero(layer)
        if not fuse_adapters(layer)[0]:
            raise ImportError("fuse_adapters replaces nothing in a layer of peft over 4 bits")
        return _called(layer)

    def peft(inputs: Any) -> Any:
        base = _base_4bit(inputs, rows, columns) if quantized else _base(inputs, rows, columns)
        return _called(_peft_layer(base, rank))

    forward, backward = floors.lora_linear(tokens, rows, columns, rank)
    base = floors.nf4(rows, columns) if quantized else floors.Work()
    peer = "peft + bitsandbytes" if quantized else "peft"
    targets = {OURS: Target(over={peer: 1.15})} if quantized else {}
    others: dict[str, Build] = {OURS: ours_quantized if quantized else ours, peer: peft}
    return Contest(
        op="lora",
        name=f"{'QLoRA' if quantized else 'LoRA'} r={rank}, {tokens} tokens by {rows} x {columns}",
        inputs=inputs,
        eager=eager,
        differentiable=("x", "lora_a", "lora_b"),
        contenders=others,
        parts={
            "forward": Part(forward + base),
            "backward": Part(backward + base),
            "both": Part(forward + backward + base + base, targets),
        },
    )


def _base(inputs: Any, rows: int, columns: int) -> nn.Module:
    layer = nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = nn.Parameter(inputs["weight"], requires_grad=False)
    return layer


def _base_4bit(inputs: Any, rows: int, columns: int) -> nn.Module:
    """As transformers loads it for QLoRA."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(
        columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", quant_storage=torch.bfloat16,
        device="meta",
    )  # fmt: skip
    layer.weight = Params4bit(
        inputs["packed"].reshape(-1).view(torch.bfloat16)[:, None],
        requires_grad=False,
        quant_state=quant_state(inputs, rows, columns),
        quant_type="nf4",
        quant_storage=torch.bfloat16,
        module=layer,
        bnb_quantized=True,
    )
    return layer


def _peft_layer(base: nn.Module, rank: int) -> nn.Module:
    """peft's LoRA layer over `base`, in bf16."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=round(SCALING * rank), target_modules=["base"], lora_dropout=0.0)
    holder = nn.Sequential()
    holder.add_module("base", base)
    layer: Any = inject_adapter_in_model(config, holder).get_submodule("base")
    device = next(base.parameters()).device
    for part in (layer.lora_A, layer.lora_B):
        part.to(device=device, dtype=torch.bfloat16)
    made: nn.Module = layer
    return made


def _called(layer: nn.Module) -> Any:
    """The layer as a function of its input and its adapter."""

    def function(x: Tensor, lora_a: Tensor, lora_b: Tensor, **_: Tensor) -> Any:
        adapter = {"lora_A.default.weight": lora_a, "lora_B.default.weight": lora_b}
        return torch.func.functional_call(layer, adapter, (x,))

    return function
