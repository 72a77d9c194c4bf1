"""Cross entropy of next-token prediction as a sum, with what accuracy needs beside it.

Shapes: S supervised tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy_sum(
    logits_SV: Tensor, targets_S: Tensor, weights_S: Tensor | None = None, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Sum of -log softmax(logits)[target] in fp32, and how many targets were the most likely token.

    With smoothing e of labels: (1 - e) of that, and e of the mean of -log softmax(logits) over all V (Szegedy et al.,
    2016).

    A sum, not a mean: a mean over one micro batch, averaged over micro batches and ranks, weighs tokens by the
    company they keep. The caller divides by the supervised tokens of the whole global batch.

    Args:
        logits_SV: [S, V], any floating dtype; S may be 0
        targets_S: [S] int64
        weights_S: [S] fp32, what each target counts in the sum; None: 1 each
        label_smoothing: e

    Returns:
        loss sum, [] fp32, differentiable; correct tokens, [] fp32
    """
    if weights_S is None:
        loss = F.cross_entropy(logits_SV.float(), targets_S, reduction="sum", label_smoothing=label_smoothing)
    else:
        losses_S = F.cross_entropy(logits_SV.float(), targets_S, reduction="none", label_smoothing=label_smoothing)
        loss = (losses_S * weights_S).sum()
    with torch.no_grad():
        # max, not argmax: the same index, and four times as fast on a CPU in bf16.
        correct = (logits_SV.max(-1).indices == targets_S).sum().float()
    return loss, correct
