"""bitsandbytes' double-quantized 4-bit weights back to bf16, at the widest layers of Llama 3 8B and 70B."""

from __future__ import annotations

from typing import Any

import floors
import torch
from contest import OURS, Contest, Draw, Part, Target
from torch import Tensor

from launcher_kernels import reference

BLOCK, ABSMAX_BLOCK = 64, 256
CODE = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
"""NF4 (Dettmers et al., 2023, appendix E), which bitsandbytes' GPU code takes whatever table it is handed."""


def contests(dry: bool) -> list[Contest]:
    return [_contest(*shape) for shape in (((16, 64),) if dry else ((4096, 14336), (8192, 28672)))]


def packed(draw: Draw, rows: int, columns: int) -> dict[str, Tensor]:
    """A random weight as bitsandbytes keeps it."""
    blocks = rows * columns // BLOCK
    wide = Draw(draw.device, torch.float32, seed=1)
    return {
        "packed": draw.integers(256, rows * columns // 2, 1, dtype=torch.uint8),
        "code": torch.tensor(CODE, device=draw.device),
        "absmax": draw.integers(256, blocks, dtype=torch.uint8),
        "absmax_code": wide.normal(256, scale=0.1).sort().values,
        "absmax_scale": wide.normal(-(-blocks // ABSMAX_BLOCK), scale=0.01).abs(),
        "absmax_offset": wide.normal(scale=0.01).abs(),
    }


def quant_state(inputs: Any, rows: int, columns: int) -> Any:
    """bitsandbytes' own object of such a weight."""
    from bitsandbytes.functional import QuantState

    inner = QuantState(inputs["absmax_scale"], code=inputs["absmax_code"], blocksize=ABSMAX_BLOCK, dtype=torch.float32)
    return QuantState(
        inputs["absmax"],
        shape=torch.Size((rows, columns)),
        code=inputs["code"],
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=torch.bfloat16,
        offset=inputs["absmax_offset"],
        state2=inner,
    )


def _contest(rows: int, columns: int) -> Contest:
    shape = (rows, columns)

    def eager(packed: Tensor, code: Tensor, absmax: Tensor, **absmax_parts: Tensor) -> Tensor:
        dtype = torch.float64 if code.dtype == torch.float64 else torch.bfloat16
        return reference.dequantize_nf4(packed, code, absmax, shape, dtype, **absmax_parts)

    def ours(inputs: Any) -> Any:
        from launcher_kernels.nf4 import dequantize_nf4

        return lambda packed, code, absmax, **parts: dequantize_nf4(
            packed, code, absmax, shape, torch.bfloat16, **parts
        )

    def bitsandbytes(inputs: Any) -> Any:
        from bitsandbytes.functional import dequantize_4bit

        state = quant_state(inputs, rows, columns)
        return lambda packed, **_: dequantize_4bit(packed, state)

    return Contest(
        op="nf4",
        name=f"dequantize {rows} x {columns}",
        inputs=lambda draw: packed(draw, rows, columns),
        eager=eager,
        differentiable=(),
        contenders={OURS: ours, "bitsandbytes": bitsandbytes},
        parts={"forward": Part(floors.nf4(rows, columns), {OURS: Target(0.85)})},
    )
