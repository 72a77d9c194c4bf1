"""Gated linear units at the intermediate sizes of 1B to 70B models."""

from __future__ import annotations

import torch
from offline import Case

from launcher_kernels import glu

MODELS = {
    "Llama 8B": (14336, "silu", False),
    "Llama 1B": (8192, "silu", False),
    "Llama 70B": (28672, "silu", False),
    "Qwen3 8B": (12288, "silu", False),
    "Phi-3 mini": (8192, "silu", True),
    "Gemma-2 9B": (14336, "gelu_tanh", False),
    "GeGLU of T5's kind": (10240, "gelu", False),
}
"""{model: intermediate size, activation, whether gate and up are one projection}"""
ROWS = 64


def _call(columns: int, activation: glu.Activation, packed: bool, dtype: torch.dtype) -> None:
    if packed:
        h = glu.glu_packed(torch.empty(ROWS, 2 * columns, dtype=dtype, requires_grad=True), activation)
    else:
        h = glu.glu(*(torch.empty(ROWS, columns, dtype=dtype, requires_grad=True) for _ in range(2)), activation)
    h.backward(torch.empty_like(h))


def cases() -> list[Case]:
    """Each model in bf16, and one in fp32 and fp16."""
    wide = {"glu_forward": ["LDG.128", "STG.128"], "glu_backward": ["LDG.128", "STG.128"]}
    every = (torch.bfloat16, torch.float16, torch.float32)
    found = []
    for model, (columns, activation, packed) in MODELS.items():
        for dtype in every if model == "Llama 8B" else every[:1]:
            title = f"glu{'_packed' if packed else ''} {activation} {str(dtype)[6:]} I={columns} ({model})"
            found.append(
                Case(title, lambda c=columns, a=activation, p=packed, d=dtype: _call(c, a, p, d), wide)
            )  # fmt: skip
    return found
