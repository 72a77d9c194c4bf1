"""4-bit weights at the shapes of the layers of 8B and 70B models."""

from __future__ import annotations

import torch
from offline import Case

from launcher_kernels import nf4

SHAPES = {"8B": (14336, 4096), "70B": (28672, 8192)}


def _call(shape: tuple[int, int], dtype: torch.dtype, double: bool) -> None:
    count = shape[0] * shape[1]
    packed, code = torch.empty(count // 2, 1, dtype=torch.uint8), torch.empty(16)
    if not double:
        nf4.dequantize_nf4(packed, code, torch.empty(count // 64), shape, dtype)
        return
    nf4.dequantize_nf4(
        packed, code, torch.empty(count // 64, dtype=torch.uint8), shape, dtype,
        absmax_code=torch.empty(256), absmax_scale=torch.empty(count // 64 // 256), absmax_offset=torch.empty(()),
    )  # fmt: skip


def cases() -> list[Case]:
    """Double quantization in each dtype, and fp32 absmax."""
    wide = {"nf4_dequantize": ["STG.128"]}
    forms = [("8B", dtype, True) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    forms += [("8B", torch.bfloat16, False), ("70B", torch.bfloat16, True)]
    found = []
    for size, dtype, double in forms:
        title = f"nf4 {str(dtype)[6:]} {' x '.join(map(str, SHAPES[size]))} ({size}{', double' if double else ''})"
        found.append(Case(title, lambda s=SHAPES[size], d=dtype, f=double: _call(s, d, f), wide))
    return found
