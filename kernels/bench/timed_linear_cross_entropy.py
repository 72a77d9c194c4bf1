"""LM head and cross entropy at the heads of Llama 3 8B and 70B, all tokens supervised or 40% of them.

Forward and backward are timed together: who makes the gradients in the forward pass has little left to do after it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import floors
import torch
from contest import OURS, Build, Contest, Draw, Part, Target
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from launcher_kernels import reference

_ROWS = 1024
"""Of the float64 truth at once: 1 GB of logits."""


def contests(dry: bool) -> list[Contest]:
    tokens, vocabulary, hidden = (10, 50, (24,)) if dry else (8192, 128256, (4096, 8192))
    return [
        _contest(tokens, size, vocabulary, share, trained)
        for size in hidden
        for share in (1.0, 0.4)
        for trained in (False, True)
    ]


def _contest(tokens: int, hidden: int, vocabulary: int, share: float, trained: bool) -> Contest:
    supervised = round(share * tokens)
    whole = supervised == tokens

    def inputs(draw: Draw) -> dict[str, Tensor]:
        return {
            "hidden": draw.normal(tokens, hidden),
            "weight": draw.normal(vocabulary, hidden, scale=hidden**-0.5),
            "targets": draw.integers(vocabulary, supervised),
            "index": draw.some(supervised, tokens),
        }

    target = Target(0.90) if whole else Target(0.90, {"liger": 5.0})
    others: dict[str, Build] = {OURS: _ours, "liger": partial(_liger, None)}
    if trained:
        others["liger, fp32 sums"] = partial(_liger, torch.float32)
    others["F.linear_cross_entropy"] = _torch
    return Contest(
        op="linear_cross_entropy",
        name=f"{supervised} of {tokens} tokens, {vocabulary} x {hidden} {'trained' if trained else 'frozen'}",
        inputs=inputs,
        eager=_eager,
        differentiable=("hidden", "weight") if trained else ("hidden",),
        contenders=others,
        parts={"both": Part(floors.linear_cross_entropy(supervised, hidden, vocabulary, trained), {OURS: target})},
        exact=_exact,
    )


def _eager(hidden: Tensor, weight: Tensor, targets: Tensor, index: Tensor) -> Tensor:
    """As models do it: logits of all tokens, in fp32 for the loss."""
    labels = torch.full((len(hidden),), -100, device=hidden.device).index_copy(0, index, targets)
    logits = F.linear(hidden, weight)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, labels, reduction="sum", ignore_index=-100)


def _exact(hidden: Tensor, weight: Tensor, targets: Tensor, index: Tensor) -> Tensor:
    def some(rows: Tensor, wanted: Tensor) -> Tensor:
        return reference.linear_cross_entropy(rows, weight, wanted)[0]

    pieces = zip(hidden[index].split(_ROWS), targets.split(_ROWS), strict=True)
    losses = [checkpoint(some, rows, wanted, use_reentrant=False) for rows, wanted in pieces]
    total: Tensor = torch.stack(losses).sum()  # type: ignore[arg-type]
    return total


def _ours(inputs: Any) -> Any:
    from launcher_kernels.linear_cross_entropy import linear_cross_entropy

    def function(hidden: Tensor, weight: Tensor, targets: Tensor, index: Tensor) -> Any:
        chosen = None if len(index) == len(hidden) else index
        return linear_cross_entropy(hidden, weight, targets, index=chosen)[0]

    return function


def _labels(inputs: Any) -> Tensor:
    """[T], -100 where nothing is learned: what the others take instead of an index."""
    labels = torch.full((len(inputs["hidden"]),), -100, device=inputs["hidden"].device)
    labels[inputs["index"]] = inputs["targets"]
    return labels


def _liger(accumulate: torch.dtype | None, inputs: Any) -> Any:
    """It adds the head's gradient up chunk by chunk, in the weight's own dtype where `accumulate` is None."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    labels = _labels(inputs)

    def function(hidden: Tensor, weight: Tensor, **_: Tensor) -> Any:
        return liger_fused_linear_cross_entropy(hidden, weight, labels, reduction="sum", accum_dtype=accumulate)

    return function


def _torch(inputs: Any) -> Any:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    from torch.nn import LinearCrossEntropyOptions

    labels, chunked = _labels(inputs), LinearCrossEntropyOptions()

    def function(hidden: Tensor, weight: Tensor, **_: Tensor) -> Any:
        return F.linear_cross_entropy(hidden, weight, labels, reduction="sum", ignore_index=-100, options=chunked)

    return function
