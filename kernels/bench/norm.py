"""The norms at the hidden sizes of 1B to 70B models."""

from __future__ import annotations

import torch
from offline import Case

from launcher_kernels import norm

HIDDEN = {"1B": 2048, "8B": 4096, "70B": 8192}
ROWS = 64


def _call(hidden: int, dtype: torch.dtype, layer: bool, add: bool) -> None:
    x, residual = (torch.empty(ROWS, hidden, dtype=dtype, requires_grad=True) for _ in range(2))
    weight, bias = (torch.empty(hidden, dtype=dtype, requires_grad=True) for _ in range(2))
    if layer:
        y = norm.add_layer_norm(x, residual, weight, bias, 1e-5) if add else norm.layer_norm(x, weight, bias, 1e-5)
    else:
        y = norm.add_rms_norm(x, residual, weight, 1e-5) if add else norm.rms_norm(x, weight, 1e-5)
    outputs = y if isinstance(y, tuple) else (y,)
    torch.autograd.backward(outputs, [torch.empty_like(each) for each in outputs])


def cases() -> list[Case]:
    """RMS and layer norm, alone and with the residual, in bf16, and one size in fp32 and fp16."""
    wide = {"norm_forward": ["LDG.128", "STG.128"], "norm_backward": ["LDG.128", "STG.128"]}
    found = []
    for size, hidden in HIDDEN.items():
        for layer in (False, True):
            for add in (False, True):
                for dtype in (torch.bfloat16, torch.float16, torch.float32) if size == "8B" else (torch.bfloat16,):
                    name = f"{'add_' if add else ''}{'layer' if layer else 'rms'}_norm"
                    title = f"{name} {str(dtype)[6:]} H={hidden} ({size})"
                    found.append(Case(title, lambda h=hidden, d=dtype, la=layer, a=add: _call(h, d, la, a), wide))
    return found
