"""Rows that nearly repeat an earlier one: Jaccard similarity of their word 5-grams, estimated by MinHash.

Broder 1997; candidates by locality-sensitive hashing in bands (Leskovec et al., Mining of Massive Datasets, 3.4).
A signature has 128 values of 32 bits, so 512 bytes a row; of two texts of similarity s, each value is equal with
probability s, so the estimate has a standard deviation of sqrt(s (1 - s) / 128), at most 0.044.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.data.clean.extra import require
from launcher.data.clean.words import ngrams, words

NUM_WORDS = 5
NUM_VALUES = 128
SEED = 1
"""Of the hash functions: a constant, not the run's seed, so that every run leaves out the same rows."""
MOST_IN_A_BUCKET = 128
"""Kept rows of a bucket that a later row is compared with. Only in rows from one template do more share a bucket."""
_NO_WORDS = np.uint32(0xFFFFFFFF)
_MIX = np.uint64(0xD6E8FEB86659FD93)


def signatures(texts: Iterable[str]) -> NDArray[np.uint32]:
    """[rows, 128] MinHash of each text's runs of 5 words, or of all its words where it has fewer.

    By datasketch's scheme `affine32`, which its versions keep, over our own hashes of words: the same on every machine.
    Raises DataError where datasketch is not installed.
    """
    rows = [_signature(ngrams(words(text), NUM_WORDS)) for text in texts]
    return np.stack(rows) if rows else np.empty((0, NUM_VALUES), dtype=np.uint32)


def _signature(runs: NDArray[np.uint64]) -> NDArray[np.uint32]:
    minhash = _empty().copy()
    minhash.update_batch((runs >> np.uint64(32)).tolist())
    values: NDArray[np.uint32] = minhash.hashvalues
    return values


@cache
def _empty() -> Any:
    require("datasketch", "data.clean.near_duplicates")
    from datasketch import MinHash

    return MinHash(num_perm=NUM_VALUES, seed=SEED, scheme="affine32", hashfunc=_as_it_is)


def _as_it_is(value: int) -> int:
    return value


def first_wins(
    signatures: NDArray[np.uint32],
    threshold: float,
    alive: NDArray[np.bool_] | None = None,
    held_out: NDArray[np.bool_] | None = None,
) -> NDArray[np.int64]:
    """[rows] the earlier row that each one nearly repeats, or -1.

    Rows are taken in order. One is left out where its estimated similarity to a **kept** earlier one is at least
    `threshold`; named is the earliest of those. A row that resembles only rows that are left out is kept, so that a
    chain of small changes is not cut down to its first link. Rows not `alive` take no part, rows `held_out` come before
    all others and are always kept, and a row without words resembles none.

    Compared are rows that agree in one band at least (see `bands`), each with the first 128 kept rows of every bucket.
    The result depends on nothing but the arguments. Memory: 4 bytes a row and band, 4 bands to 128.
    """
    earlier = np.full(len(signatures), -1, dtype=np.int64)
    usable = signatures.min(axis=1, initial=_NO_WORDS) != _NO_WORDS
    if alive is not None:
        usable &= alive
    never_dropped = np.zeros(len(signatures), dtype=bool) if held_out is None else held_out
    order = np.concatenate([np.flatnonzero(usable & never_dropped), np.flatnonzero(usable & ~never_dropped)])
    buckets, num_buckets = _buckets(signatures, order, *bands(threshold))
    kept_in: list[list[int]] = [[] for _ in range(num_buckets)]
    for place in np.flatnonzero((buckets >= 0).any(axis=1)).tolist():
        row = order[place]
        own = [kept_in[bucket] for bucket in buckets[place].tolist() if bucket >= 0]
        if not never_dropped[row] and (places := sorted({other for bucket in own for other in bucket})):
            candidates = order[places]
            equal = np.count_nonzero(signatures[candidates] == signatures[row], axis=1)
            alike = equal >= threshold * NUM_VALUES
            if alike.any():
                earlier[row] = candidates[alike.argmax()]
                continue
        for bucket in own:
            if len(bucket) < MOST_IN_A_BUCKET:
                bucket.append(place)
    return earlier


def bands(threshold: float) -> tuple[int, int]:
    """(bands, values of each): the longest bands by which two texts 0.05 above `threshold` meet in 99 of 100 cases.

    Long bands make few candidates: at 0.8 it is 16 bands of 8 values, by which texts of similarity 0.5 meet in 6 of
    100 cases.
    """
    similarity = min(threshold + 0.05, 0.99)
    for length in range(NUM_VALUES, 1, -1):
        count = NUM_VALUES // length
        if 1 - (1 - similarity**length) ** count >= 0.99:
            return count, length
    return NUM_VALUES, 1


def _buckets(
    signatures: NDArray[np.uint32], order: NDArray[np.int64], num_bands: int, length: int
) -> tuple[NDArray[np.int32], int]:
    """([rows in order, bands] bucket that a row shares with others in a band, or -1; how many buckets there are)."""
    buckets = np.full((len(order), num_bands), -1, dtype=np.int32)
    count = 0
    powers = _MIX ** np.arange(length, dtype=np.uint64)
    for band in range(num_bands):
        values = signatures[order, band * length : (band + 1) * length]
        keys = values.astype(np.uint64) @ powers
        by_key = np.argsort(keys, kind="stable")
        same = np.diff(keys[by_key]) == 0
        starts = np.concatenate([[True], ~same])[: len(keys)]
        alone = starts & np.concatenate([~same, [True]])[: len(keys)]
        starts &= ~alone
        numbers = np.cumsum(starts) - 1 + count
        buckets[by_key[~alone], band] = numbers[~alone]
        count += int(np.count_nonzero(starts))
    return buckets, count
