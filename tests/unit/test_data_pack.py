"""Packing: every document once, none split, little padding, the same every time."""

from __future__ import annotations

import time

import numpy as np
import pytest

from launcher.data.pack import best_fit


def brute_force(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best fit, decreasing, by looking at every row: what `best_fit` must agree with in rows and room left."""
    rows: list[list[int]] = []
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [row for row in rows if sum(lengths[i] for i in row) + lengths[document] <= capacity]
        if fitting:
            max(fitting, key=lambda row: sum(lengths[i] for i in row)).append(document)
        else:
            rows.append([document])
    return rows


@pytest.mark.parametrize("capacity", [7, 64, 100])
def test_agrees_with_brute_force(capacity: int) -> None:
    random = np.random.default_rng(capacity)
    for _ in range(20):
        lengths = random.integers(1, capacity + 1, size=random.integers(1, 80))
        packs = best_fit(lengths, capacity)
        assert np.array_equal(np.sort(np.concatenate(packs)), np.arange(len(lengths)))
        assert max(int(lengths[pack].sum()) for pack in packs) <= capacity
        filled = sorted(int(lengths[pack].sum()) for pack in packs)
        expected = brute_force(lengths.tolist(), capacity)
        assert filled == sorted(sum(int(lengths[i]) for i in row) for row in expected)


def test_order_is_fixed() -> None:
    lengths = np.array([5, 3, 5, 2, 8, 3])
    packs = [pack.tolist() for pack in best_fit(lengths, 8)]
    assert packs == [[0, 5], [1, 2], [3], [4]]
    assert packs == [pack.tolist() for pack in best_fit(lengths, 8)]
    assert best_fit(lengths, 8)[0].dtype == np.int32


def test_edges() -> None:
    assert best_fit(np.array([], dtype=np.int64), 8) == []
    with pytest.raises(ValueError, match="lengths must be 1 to 8, got 3 to 9"):
        best_fit(np.array([3, 9]), 8)
    with pytest.raises(ValueError, match="got 0 to 3"):
        best_fit(np.array([3, 0]), 8)


def test_a_hundred_thousand_documents_take_a_second() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.0, 0.7, 100_000).astype(np.int64), 1, 8192)
    start = time.perf_counter()
    packs = best_fit(lengths, 8192)
    assert time.perf_counter() - start < 5.0  # 0.3 s on an idle core
    assert 1 - lengths.sum() / (len(packs) * 8192) < 0.001
