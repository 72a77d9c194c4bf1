"""Rotary embedding of queries and keys, alone and with their norm, at the head counts of Llama 3 8B and 70B.

Heads lie in memory as projections write them, token by token: [T, H, d] seen as [1, H, T, d]. Results and gradients
are looked at token by token, too, as attention over packed documents does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import floors
import torch
from contest import OURS, Contest, Draw, Part, Target
from torch import Tensor

from launcher_kernels import reference

EPS, THETA = 1e-6, 500_000.0
TARGETS = {OURS: Target(0.85)}


def contests(dry: bool) -> list[Contest]:
    tokens, head_size, shapes = (7, 16, ((4, 2),)) if dry else (8192, 128, ((32, 8), (64, 8)))
    return [_rope(tokens, *heads, head_size, norm) for norm in (False, True) for heads in shapes]


def _inputs(draw: Draw, tokens: int, queries: int, keys: int, head_size: int, norm: bool) -> dict[str, Tensor]:
    position = draw.integers(8192, tokens).float()
    frequency = THETA ** -(torch.arange(0, head_size, 2, device=draw.device) / head_size)
    angle = (position[:, None] * frequency)[None]
    found = {
        "query": draw.normal(1, tokens, queries, head_size).transpose(1, 2),
        "key": draw.normal(1, tokens, keys, head_size).transpose(1, 2),
        "cos": angle.cos().to(draw.dtype),
        "sin": angle.sin().to(draw.dtype),
    }
    weights = {"query_weight": draw.normal(head_size), "key_weight": draw.normal(head_size)}
    return found | (weights if norm else {})


def _rope(tokens: int, queries: int, keys: int, head_size: int, norm: bool) -> Contest:
    if norm:
        forward, backward = floors.qk_norm_rope(tokens, queries + keys, head_size)
    else:
        forward = backward = floors.rope(tokens, queries + keys, head_size)
    weights = ("query_weight", "key_weight") if norm else ()
    return Contest(
        op="rope",
        name=f"{'QK norm + ' if norm else ''}rope, {tokens} tokens, {queries} and {keys} heads of {head_size}",
        inputs=lambda draw: _inputs(draw, tokens, queries, keys, head_size, norm),
        eager=_by_token(_eager_normed if norm else reference.rope),
        differentiable=("query", "key", *weights),
        contenders={OURS: _ours_normed} if norm else {"slipway": _ours, "liger": _liger},
        parts={"forward": Part(forward, TARGETS), "backward": Part(backward, TARGETS)},
    )


def _by_token(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    def turned(**inputs: Tensor) -> tuple[Tensor, Tensor]:
        query, key = function(**inputs)
        return query.transpose(1, 2), key.transpose(1, 2)

    return turned


def _eager_normed(**inputs: Tensor) -> tuple[Tensor, Tensor]:
    return reference.qk_norm_rope(**inputs, eps=EPS)


def _ours(inputs: Any) -> Any:
    from launcher_kernels import rope

    return _by_token(rope.rope)


def _ours_normed(inputs: Any) -> Any:
    from launcher_kernels import rope

    return _by_token(lambda **given: rope.qk_norm_rope(**given, eps=EPS))


def _liger(inputs: Any) -> Any:
    from liger_kernel.ops import LigerRopeFunction

    cos, sin = (torch.cat([inputs[name]] * 2, -1) for name in ("cos", "sin"))

    def function(query: Tensor, key: Tensor, **_: Tensor) -> Any:
        return LigerRopeFunction.apply(query, key, cos, sin)

    return _by_token(function)
