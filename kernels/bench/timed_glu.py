"""SwiGLU at the intermediate sizes of 8B and 70B models."""

from __future__ import annotations

from typing import Any

import floors
from contest import OURS, Contest, Part, Target

from launcher_kernels import reference


def contests(dry: bool) -> list[Contest]:
    return [_glu(*sizes) for sizes in (((5, 72),) if dry else ((8192, 14336), (8192, 28672)))]


def _glu(tokens: int, intermediate: int) -> Contest:
    forward, backward = floors.glu(tokens, intermediate)
    return Contest(
        op="glu",
        name=f"SwiGLU, {tokens} x {intermediate}",
        inputs=lambda draw: {name: draw.normal(tokens, intermediate) for name in ("gate", "up")},
        eager=reference.glu,
        differentiable=("gate", "up"),
        contenders={OURS: _ours, "liger": _liger},
        parts={"forward": Part(forward, {OURS: Target(0.90)}), "backward": Part(backward, {OURS: Target(0.85)})},
    )


def _ours(inputs: Any) -> Any:
    from launcher_kernels import glu

    return lambda gate, up: glu.glu(gate, up, "silu")


def _liger(inputs: Any) -> Any:
    from liger_kernel.ops import LigerSiLUMulFunction

    return lambda gate, up: LigerSiLUMulFunction.apply(gate, up)
