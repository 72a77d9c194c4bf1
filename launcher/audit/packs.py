"""E8: documents that lie in one flat row do not see each other, through the run's own model and attention kernel.

The second half of each of two documents is written over with other tokens, and the logits of all else are compared with
those from before, bit for bit. Over the first document: what moves in the second has crossed the border between them,
which a causal attention that knows of no borders lets pass. Over the second: what moves in the first, or in its own
first half, has seen tokens that come later. And what was written over has to move, or nothing is proven.

Three forward passes without gradients, of at most 512 tokens each and 64 rows of logits: less than a micro batch takes,
whose tokens the two documents do not exceed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from launcher.audit.finding import Checked, Finding
from launcher.data.loader import MicroBatch

WATCHED = 16
"""Positions of each half whose logits are compared, its first and last among them."""
OF_MOVED = 0.05
"""Of what other tokens move themselves, how much a mixture of experts may move what is not theirs."""


def check_packs(
    logits_of: Callable[[MicroBatch], Tensor], batch: MicroBatch, vocabulary: int, experts: bool, hint: str
) -> Checked:
    """Whether the two documents of `batch` are isolated. Collective under ZeRO-3.

    Args:
        logits_of: [S, V] logits at the batch's `supervised_index`, without dropout or gradients
        batch: two documents
        vocabulary: tokens with a row of their own
        experts: a mixture of experts: how many tokens an expert gets decides how its products are rounded, so that
            others' tokens do move a logit, a little
        hint: what to do where they are not isolated
    """
    border, end = batch.cu_seqlens.tolist()[1:]
    edges = [0, border // 2, border, border + (end - border) // 2, end]
    halves = [slice(start, stop) for start, stop in itertools.pairwise(edges)]
    watched = [np.unique(np.linspace(h.start, h.stop - 1, WATCHED).round().astype(int)) for h in halves]
    index = torch.from_numpy(np.concatenate(watched))
    batch = replace(batch, supervised_index=index, targets=torch.zeros_like(index))
    before, where = logits_of(batch), " and ".join(batch.where)
    if before.isnan().any():  # of all ranks alike
        what, detail = "the model computes what is no number", f"there are NaNs among its logits of {where}"
        return Checked("packs isolated", (Finding(what, detail, "check the model's weights"),))

    def moved(half: slice) -> list[float]:
        """The largest difference of a logit in each half, with other tokens in one of them."""
        tokens = batch.input_ids.clone()
        tokens[0, half] = (tokens[0, half] + 1) % vocabulary
        after = logits_of(replace(batch, input_ids=tokens))
        # Models may give tokens that pad the vocabulary a logit of minus infinity.
        differences = (after.float() - before.float()).masked_fill(after == before, 0.0).abs().amax(-1)
        return [part.max().item() for part in differences.split([len(positions) for positions in watched])]

    by_first, by_second = moved(halves[1]), moved(halves[3])
    protected = {
        "from the first document to the second": max(by_first[2:]),
        "from the second document to the first": max(by_second[:2]),
        "from a later token to an earlier one": max(by_first[0], by_second[2]),
    }
    own = min(by_first[1], by_second[3])
    allowed = OF_MOVED * own if experts else 0.0
    findings = [
        Finding("packed documents see each other", f"{way} ({where}) logits move by {size:.3g}, not by 0", hint)
        for way, size in protected.items()
        if not size <= allowed  # NaN is no isolation either
    ]
    if not own > 0:
        detail = f"other tokens in {where} change no logit"
        findings.append(Finding("the model does not look at its input", detail, "check the model's weights"))
    return Checked("packs isolated" if not experts else "packs isolated up to rounding", tuple(findings))
