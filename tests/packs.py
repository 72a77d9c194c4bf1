"""Micro batches of made-up documents."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from launcher.data.loader import MicroBatch


def pack(lengths: Sequence[int], seed: int = 0, *, vocabulary: int, weighted: bool = False) -> MicroBatch:
    """Documents of random tokens end to end; every second token but the first of a document is a target."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (sum(lengths),), generator=generator)
    starts = [0, *itertools.accumulate(lengths)]
    predicted = torch.cat([torch.arange(start + 1, stop, 2) for start, stop in itertools.pairwise(starts)])
    return MicroBatch(
        input_ids=ids[None],
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        max_seqlen=max(lengths),
        supervised_index=predicted - 1,
        targets=ids[predicted],
        weights=torch.linspace(0.5, 1.5, len(predicted)) if weighted else None,
        where=tuple(f"made up:{i}" for i in range(len(lengths))),
        num_tokens=len(ids),
    )
