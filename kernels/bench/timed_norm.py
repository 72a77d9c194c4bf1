"""RMS and layer norm, alone and after the residual addition."""

from __future__ import annotations

from functools import partial
from typing import Any

import floors
from contest import OURS, Build, Contest, Draw, Part, Target
from torch import Tensor
from torch.nn import functional as F

from launcher_kernels import reference

EPS = 1e-5


def contests(dry: bool) -> list[Contest]:
    sizes = ((6, 96),) if dry else ((8192, 4096), (8192, 8192))
    found = [_rms(tokens, hidden, add) for tokens, hidden in sizes for add in (False, True)]
    return [*found, *(_layer(*sizes[0], add) for add in (False, True))]


def _parts(tokens: int, hidden: int, add: bool) -> dict[str, Part]:
    forward, backward = floors.norm(tokens, hidden, add)
    return {"forward": Part(forward, {OURS: Target(0.90)}), "backward": Part(backward, {OURS: Target(0.85)})}


def _inputs(draw: Draw, tokens: int, hidden: int, add: bool, bias: bool) -> dict[str, Tensor]:
    found = {"x": draw.normal(tokens, hidden)}
    if add:
        found["residual"] = draw.normal(tokens, hidden)
    found["weight"] = draw.normal(hidden)
    return found | ({"bias": draw.normal(hidden)} if bias else {})


def _rms(tokens: int, hidden: int, add: bool) -> Contest:
    eager = partial(reference.add_rms_norm if add else reference.rms_norm, eps=EPS)
    others: dict[str, Build] = {OURS: partial(_ours, f"{'add_' if add else ''}rms_norm"), "liger": _liger(add)}
    if not add:
        others["F.rms_norm"] = lambda _: lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS)
    return Contest(
        op="norm",
        name=f"{'add + ' if add else ''}RMS, {tokens} x {hidden}",
        inputs=lambda draw: _inputs(draw, tokens, hidden, add, bias=False),
        eager=eager,
        differentiable=("x", "residual", "weight") if add else ("x", "weight"),
        contenders=others,
        parts=_parts(tokens, hidden, add),
    )


def _layer(tokens: int, hidden: int, add: bool) -> Contest:
    others: dict[str, Build] = {OURS: partial(_ours, f"{'add_' if add else ''}layer_norm")}
    if not add:
        others["liger"] = _liger_layer
    return Contest(
        op="norm",
        name=f"{'add + ' if add else ''}layer, {tokens} x {hidden}",
        inputs=lambda draw: _inputs(draw, tokens, hidden, add, bias=True),
        eager=partial(reference.add_layer_norm if add else reference.layer_norm, eps=EPS),
        differentiable=("x", "residual", "weight", "bias") if add else ("x", "weight", "bias"),
        contenders=others,
        parts=_parts(tokens, hidden, add),
    )


def _ours(name: str, inputs: Any) -> Any:
    from launcher_kernels import norm

    return partial(getattr(norm, name), eps=EPS)


def _liger(add: bool) -> Build:
    def build(inputs: Any) -> Any:
        from liger_kernel.ops import LigerFusedAddRMSNormFunction, LigerRMSNormFunction

        if add:
            return lambda x, residual, weight: LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS)
        return lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPS)

    return build


def _liger_layer(inputs: Any) -> Any:
    from liger_kernel.ops import LigerLayerNormFunction

    return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, EPS)
