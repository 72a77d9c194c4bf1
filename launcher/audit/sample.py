"""Which of a run's own training documents an audit looks at. The same on all ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from launcher.data.loader import MicroBatch
from launcher.data.store import Documents, read_lists

MAX_TOKENS = 512
"""Of the two documents that go through the model: a fraction of any micro batch worth its GPU."""


def sampled(folder: Path, count: int) -> list[int]:
    """Numbers of at most `count` training documents, spread evenly over the rows."""
    rows = read_lists(folder / "packs.arrow")
    places = np.linspace(0, max(0, len(rows) - 1), min(count, len(rows)))
    chosen = np.unique(places.round().astype(int)).tolist()
    return list(dict.fromkeys(int(rows[row][place % len(rows[row])]) for place, row in enumerate(chosen)))


def two_documents(folder: Path, numbers: list[int], max_tokens: int) -> MicroBatch:
    """The two longest of the documents `numbers` in one flat row, cut to `max_tokens` in all, each around its first
    target; one document twice where there is no other. Where the cut leaves no target, all tokens are.

    The border is at five twelfths at most: no multiple of what a kernel takes at once (213 of 512), since documents
    that end where a block ends would be kept apart by a kernel that knows of no documents.
    """
    documents = Documents(folder)
    longest = sorted(numbers, key=lambda number: -int(documents.lengths[number]))[:2]
    longest = longest if len(longest) == 2 else longest * 2
    room = max_tokens
    ids, supervised = [], []
    for number, share in zip(longest, (5 / 12, 1), strict=True):
        mask = documents.supervised(number).copy()
        mask[:1] = 0  # nothing predicts a first token
        length = min(len(mask), max(2, int(max_tokens * share)), room)
        start = min(max(0, int(mask.argmax()) - length // 2), len(mask) - length)
        mask[: start + 1] = 0
        ids.append(documents.input_ids(number)[start : start + length].astype(np.int64))
        supervised.append(mask[start : start + length])
        room -= length
    lengths = [len(document) for document in ids]
    flat, predicted = np.concatenate(ids), np.flatnonzero(np.concatenate(supervised))
    if not len(predicted):
        predicted = np.setdiff1d(np.arange(len(flat)), [0, lengths[0]])
    return MicroBatch(
        input_ids=torch.from_numpy(flat)[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
        cu_seqlens=torch.tensor([0, lengths[0], len(flat)], dtype=torch.int32),
        max_seqlen=max(lengths),
        supervised_index=torch.from_numpy(predicted - 1),
        targets=torch.from_numpy(flat[predicted]),
        weights=None,
        where=tuple(documents.where(number) for number in longest),
        num_tokens=len(flat),
    )
