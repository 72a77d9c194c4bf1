"""Rows of what a model learned earlier, among those it learns from: how many, and which. Pure functions.

Which ones is drawn from their own words, and independently of what is held out: of the same files the run before may
have held rows out. The seed has no say. What is counted are documents: those of an epoch, once `data.clean` and
`data.max_length` have been applied to all.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from launcher.data.store import Documents

SPARE = 100
"""Rows that are tokenized beyond twice as many as are wanted, should some be too long."""


def wanted(num_training: int, share: float) -> int:
    """How many beside `num_training` are `share` (0 to 1) of all, to the nearest; at least one."""
    return max(1, round(num_training * share / (1 - share)))


def candidates(draws: NDArray[np.uint64], num_training: int, share: float) -> NDArray[np.bool_]:
    """[rows] which are worth tokenizing: those of the lowest draws, more than enough of them."""
    ranks = _ranks(draws)
    return ranks < 2 * wanted(num_training, share) + SPARE


def replayed(documents: Documents, numbers: NDArray[np.int32], num_training: int, share: float) -> NDArray[np.int32]:
    """The documents of an epoch, of those with these `numbers`: the lowest draws, all equally often where there are too
    few. None where there are none."""
    if not len(numbers):
        return numbers
    tokens = (documents.input_ids(int(number)).tobytes() for number in numbers)
    digests = b"".join(hashlib.sha256(each).digest()[:8] for each in tokens)
    count = wanted(num_training, share)
    times = count // len(numbers) + (_ranks(np.frombuffer(digests, dtype=">u8")) < count % len(numbers))
    return np.repeat(numbers, times)


def _ranks(draws: NDArray[np.unsignedinteger]) -> NDArray[np.int64]:
    """[rows] place of each in the order of its draw, of equal ones in their own."""
    ranks = np.empty(len(draws), dtype=np.int64)
    ranks[np.argsort(draws, kind="stable")] = np.arange(len(draws))
    return ranks
