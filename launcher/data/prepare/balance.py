"""Classes and sources of different sizes: how often each row comes, and what it counts. Pure functions over columns.

Which rows come once more, or not at all, is drawn from their own words, as the held-out rows are; a row that comes n
times comes at least n times under a greater weight. The seed has no say.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from launcher.data.prepare.split import Digests, below
from launcher.errors import DataError

Balance = Literal["none", "weights", "oversample", "undersample"]


def independent_draws(digests: Digests) -> NDArray[np.uint64]:
    """[rows] draws that tell nothing of those by which rows are held out, so that half of what is left is half of it.

    The second half of each digest, which those use only to break ties.
    """
    return digests[:, 1]


def source_copies(weights: NDArray[np.float64], digests: Digests) -> NDArray[np.int32]:
    """[rows] how often each comes in an epoch under its source's weight: 2 is twice, 0.5 is half of the rows once."""
    whole = np.floor(weights)
    copies = whole.astype(np.int32)
    drawn = independent_draws(digests)
    for weight in np.unique(weights):
        same = weights == weight
        copies[same] += below(drawn[same], float(weight - np.floor(weight)))
    return copies


def balance(
    how: Balance, labels: NDArray[np.int32], copies: NDArray[np.int32], digests: Digests
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """([rows] copies, [rows] weight of each copy in the loss), from each row's class number and its copies so far.

    none         as before, with weight 1.
    weights      as before; a row of a class of n copies weighs N / (K n), for N copies of K classes: every class weighs
                 the same, and a row 1 on average.
    oversample   every class comes as often as the largest, its rows as evenly as that allows.
    undersample  every class comes as often as the smallest.

    A row of 0 copies is left out: it counts for no class and stays so. Raises DataError where any other has none (-1).
    """
    weights = np.ones(len(labels), dtype=np.float32)
    if how == "none" or not copies.any():
        return copies.copy(), weights
    without = int(np.count_nonzero((labels < 0) & (copies > 0)))
    if without:
        message = f"data.balance: {how} needs the class of each row, and {without} of {len(labels)} rows have none"
        raise DataError(message, "name the column with data.label, fill it in, or leave data.balance out")
    sizes = np.bincount(labels[copies > 0], weights=copies[copies > 0]).astype(np.int64)
    present = sizes > 0
    if how == "weights":
        of_class = sizes.sum() / (np.count_nonzero(present) * np.maximum(sizes, 1))
        weights[copies > 0] = of_class[labels[copies > 0]]
        return copies.copy(), weights
    target = sizes.max() if how == "oversample" else sizes[present].min()
    return _resized(labels, copies, digests, sizes, int(target)), weights


def _resized(
    labels: NDArray[np.int32], copies: NDArray[np.int32], digests: Digests, sizes: NDArray[np.int64], target: int
) -> NDArray[np.int32]:
    """[rows] copies such that each class has `target` of them."""
    rows = np.repeat(np.arange(len(copies)), copies)
    number = np.arange(len(rows)) - np.repeat(np.cumsum(copies) - copies, copies)  # first copy, second, ...
    order = np.lexsort((rows, digests[rows, 0], digests[rows, 1], number, labels[rows]))
    of_class = labels[rows[order]]
    rank = np.arange(len(rows)) - (np.cumsum(sizes) - sizes)[of_class]
    times = target // sizes[of_class] + (rank < target % sizes[of_class])
    return np.bincount(rows[order], weights=times, minlength=len(copies)).astype(np.int32)
