"""Holding rows out so that no later row moves an earlier one: pure functions over columns, for any number of rows.

Each row draws a number from its own words. Evaluation takes the lowest draws, test the highest, so that neither's size
moves a row of the other. The seed has no say: runs of different seeds are compared on the same held-out rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from launcher.data.store import Set
from launcher.errors import DataError
from launcher.plan.plan import HeldOutPlan

Digests = NDArray[np.uint64]
"""[rows, 2] first and last 8 bytes of each row's digest, big-endian."""


def as_digests(digests: Sequence[bytes]) -> Digests:
    """[rows, 2] from 16 bytes a row."""
    return np.frombuffer(b"".join(digests), dtype=">u8").reshape(-1, 2).astype(np.uint64)


def group_digests(groups: Sequence[str | None], digests: Digests) -> Digests:
    """[rows, 2] of each row's group: of its name, or of the row's own words where it has none."""
    of_name = {name: bytes(16) if name is None else _digest(name) for name in set(groups)}
    found = as_digests([of_name[name] for name in groups])
    nameless = np.array([name is None for name in groups], dtype=bool)
    found[nameless] = digests[nameless]
    return found


def draws(digests: Digests) -> NDArray[np.uint64]:
    """[rows] a number for each row, even from 0 to 2^64 - 1, that equal words have in common."""
    return digests[:, 0]


def below(draws: NDArray[np.uint64], share: float) -> NDArray[np.bool_]:
    """[rows] which draws lie in the lowest `share` (0 to 1) of their range."""
    limit = int(share * 2.0**64)
    return np.ones(len(draws), dtype=bool) if limit >= 1 << 64 else draws < np.uint64(limit)


def split(
    digests: Digests,
    eval: HeldOutPlan,
    test: HeldOutPlan,
    *,
    groups: Digests | None = None,
    labels: NDArray[np.int32] | None = None,
    stratify: bool = False,
) -> NDArray[np.int8]:
    """[rows] the `Set` of each: trained on, held out for evaluation, or for test.

    Rows with the same words, and rows of one group, are on one side; where the same words stand in two groups, both
    groups are. `labels` holds a class number a row, -1 for none.

    `split: s`    every row (or group) whose draw is below s. Adding rows moves none.
    `rows: n`     the n lowest draws, of equal ones all or none: whole groups in the order of their draws until n rows
                  are reached. Added rows may take the places of others.
    `stratify`    likewise in each class by itself, where `split: s` means round(s * rows of the class), and `rows: n`
                  is shared out by the sizes of the classes. A group counts as its most frequent class.

    Raises DataError where no row is left to train on, or more rows should be held out than there are.
    """
    if stratify and labels is None:
        hint = "name the column with data.label, or leave data.stratify out"
        raise DataError("data.stratify needs the class of each row, and there is none", hint)
    units, unit_draws = _units(digests, groups)
    sizes = np.bincount(units, minlength=len(unit_draws))
    classes = _classes(units, labels, len(unit_draws)) if stratify and labels is not None else None
    # Units are in the order of their draws, so that test is evaluation seen from the other end.
    backwards = None if classes is None else classes[::-1]
    for_test = _lowest(test, ~unit_draws[::-1], sizes[::-1], backwards)[::-1]
    for_eval = _lowest(eval, unit_draws, sizes, classes)
    sides = np.select([for_eval, for_test], [np.int8(Set.EVAL), np.int8(Set.TEST)], np.int8(Set.TRAIN))[units]
    _check(sides, eval, test, groups is not None)
    return sides


def _units(digests: Digests, groups: Digests | None) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """([rows] number of what stays together, in the order of draws; [units] draw of each)."""
    words, unit_draws = _numbered(digests)
    if groups is None:
        return words, unit_draws
    units, unit_draws = _numbered(groups)
    while True:  # groups that share words become one, which has the lowest draw of theirs
        of_words = np.full(words.max(initial=0) + 1, len(unit_draws))
        np.minimum.at(of_words, words, units)
        joined = np.arange(len(unit_draws))
        np.minimum.at(joined, units, of_words[words])
        if np.array_equal(joined[units], units):
            return units, unit_draws
        units = joined[units]


def _numbered(digests: Digests) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """([rows] rank of each digest, equal ones alike; [ranks] draw of each)."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    is_new = np.ones(len(order), dtype=bool)
    is_new[1:] = (np.diff(digests[order], axis=0) != 0).any(axis=1)
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = np.cumsum(is_new) - 1
    return ranks, draws(digests)[order[is_new]]


def _classes(units: NDArray[np.int64], labels: NDArray[np.int32], num_units: int) -> NDArray[np.int64]:
    """[units] class of most of a unit's rows, counted from 0; of several, the lowest."""
    codes = labels.astype(np.int64) + 1
    num_classes = int(codes.max(initial=0)) + 1
    pairs, counts = np.unique(units * num_classes + codes, return_counts=True)
    best_last = pairs[np.lexsort((-pairs, counts))]
    classes = np.zeros(num_units, dtype=np.int64)
    classes[best_last // num_classes] = best_last % num_classes
    return classes


def _lowest(
    plan: HeldOutPlan,
    draws: NDArray[np.uint64],
    sizes: NDArray[np.int64],
    classes: NDArray[np.int64] | None,
) -> NDArray[np.bool_]:
    """[units] which are held out: in ascending order of draws, the first ones."""
    if plan.split is None and plan.rows is None:
        return np.zeros(len(draws), dtype=bool)
    if plan.split is not None and classes is None:
        return below(draws, plan.split)
    if classes is None:
        classes = np.zeros(len(draws), dtype=np.int64)
    totals = np.bincount(classes, weights=sizes).astype(np.int64)
    wanted = np.floor(totals * plan.split + 0.5) if plan.split is not None else _shared_out(plan.rows or 0, totals)
    by_class = np.argsort(classes, kind="stable")
    before = np.cumsum(sizes[by_class]) - sizes[by_class]
    before -= (np.cumsum(totals) - totals)[classes[by_class]]
    held_out = np.empty(len(draws), dtype=bool)
    held_out[by_class] = before < wanted[classes[by_class]]
    return held_out


def _shared_out(rows: int, totals: NDArray[np.int64]) -> NDArray[np.int64]:
    """[classes] `rows` in proportion to `totals`: rounded down, and one more where most was lost by that."""
    exact = rows * totals / max(totals.sum(), 1)
    shares = np.floor(exact).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: rows - shares.sum()]] += 1
    return shares


def _check(sides: NDArray[np.int8], eval: HeldOutPlan, test: HeldOutPlan, grouped: bool) -> None:
    num_rows = len(sides)
    for plan, key in ((eval, "data.eval"), (test, "data.test")):
        if plan.rows is not None and plan.rows > num_rows:
            message = f"{key}.rows is {plan.rows}, and there are {num_rows} training rows"
            raise DataError(message, "hold out fewer rows")
    if (eval.split or eval.rows or test.split or test.rows) and not (sides == Set.TRAIN).any():
        counts = (
            f"{np.count_nonzero(sides == Set.EVAL)} for evaluation and {np.count_nonzero(sides == Set.TEST)} for test"
        )
        hint = "hold out less" + ("; a group of data.group is held out as a whole" if grouped else "")
        raise DataError(f"no training row is left: of {num_rows} rows {counts} are held out", hint)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]
