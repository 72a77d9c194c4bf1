"""Adapter gradients at the shapes of the layers of 1B, 8B and 70B models."""

from __future__ import annotations

import torch
from offline import Case

from launcher_kernels import lora

SIZES = {"1B": 2048, "8B": 4096, "8B mlp": 14336, "70B": 8192}
ROWS = 8192


def _call(columns: int, rank: int, dtype: torch.dtype) -> None:
    dy, xa, b = (torch.empty(shape, dtype=dtype) for shape in ((ROWS, columns), (ROWS, rank), (columns, rank)))
    lora.lora_gradients(dy, xa, b, 2.0)


def cases() -> list[Case]:
    """Ranks 8, 16 and 32 in bf16, and one in fp16 and fp32."""
    narrow = {"lora_backward": ["HGMMA", "LDGSTS"], "lora_add_up": ["LDG.128"]}
    forms = [("8B", 16, torch.bfloat16), ("8B", 8, torch.bfloat16), ("8B", 32, torch.bfloat16)]
    forms += [("8B", 16, torch.float16), ("8B", 16, torch.float32)]
    forms += [(size, 16, torch.bfloat16) for size in SIZES if size != "8B"]
    found = []
    for size, rank, dtype in forms:
        title = f"lora gradients {str(dtype)[6:]} N={SIZES[size]} r={rank} ({size})"
        expects = {"lora_add_up": ["LDG.128"]} if dtype == torch.float32 else narrow
        found.append(Case(title, lambda n=SIZES[size], r=rank, d=dtype: _call(n, r, d), expects))
    return found
