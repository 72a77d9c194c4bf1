"""Classes and sources of different sizes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from launcher.data.conversation import Conversation, Message
from launcher.data.prepare.balance import balance, independent_draws, source_copies
from launcher.data.prepare.split import as_digests, split
from launcher.errors import DataError
from tests.plans import held_out


def many(number: int) -> np.ndarray:
    rows = [Conversation((Message("user", f"question {i}"), Message("assistant", "Yes."))) for i in range(number)]
    return as_digests([row.digest() for row in rows])


DIGESTS = many(1000)
LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 3], [700, 260, 40])).astype(np.int32)
ONCE = np.ones(1000, dtype=np.int32)


def of(label: int) -> np.ndarray:
    return np.equal(LABELS, label)


def sizes(amounts: np.ndarray) -> list[float]:
    return np.bincount(LABELS, weights=amounts).tolist()


def test_none_changes_nothing() -> None:
    copies, weights = balance("none", np.full(1000, -1, dtype=np.int32), ONCE * 3, DIGESTS)
    assert (copies == 3).all()
    assert (weights == 1).all()
    assert (copies.dtype, weights.dtype) == (np.int32, np.float32)


def test_weights_make_every_class_weigh_the_same() -> None:
    copies, weights = balance("weights", LABELS, ONCE, DIGESTS)
    assert (copies == 1).all()
    np.testing.assert_allclose(sizes(copies * weights), [1000 / 3, 1000 / 3, 0, 1000 / 3], rtol=1e-5)
    np.testing.assert_allclose(weights.mean(), 1, rtol=1e-6)
    np.testing.assert_allclose(np.unique(weights), [1000 / 2100, 1000 / 780, 1000 / 120], rtol=1e-6)


def test_weights_count_copies_and_not_what_is_left_out() -> None:
    before = np.where(of(3), 5, 1).astype(np.int32)
    before[::2] = 0
    copies, weights = balance("weights", LABELS, before, DIGESTS)
    np.testing.assert_array_equal(copies, before)
    by_class = np.array(sizes(copies * weights))
    np.testing.assert_allclose(by_class[[0, 1, 3]], before.sum() / 3, rtol=1e-5)
    np.testing.assert_allclose((copies * weights).sum(), copies.sum(), rtol=1e-6)


def test_oversampled_every_class_is_as_large_as_the_largest() -> None:
    copies, weights = balance("oversample", LABELS, ONCE, DIGESTS)
    assert sizes(copies) == [700, 700, 0, 700]
    assert (weights == 1).all()
    for label, often in ((0, {1}), (1, {2, 3}), (3, {17, 18})):
        assert set(copies[of(label)].tolist()) == often
    # Those that come once more have the lowest draws.
    drawn = independent_draws(DIGESTS)
    assert drawn[of(1) & (copies == 3)].max() < drawn[of(1) & (copies == 2)].min()


def test_undersampled_every_class_is_as_small_as_the_smallest() -> None:
    copies, _ = balance("undersample", LABELS, ONCE, DIGESTS)
    assert sizes(copies) == [40, 40, 0, 40]
    assert set(copies.tolist()) == {0, 1}
    drawn = independent_draws(DIGESTS)
    for label in (0, 1):
        same = of(label)
        assert drawn[same & (copies == 1)].max() < drawn[same & (copies == 0)].min()


@pytest.mark.parametrize("how", ["oversample", "undersample"])
def test_rows_of_several_copies_and_of_none(how: str) -> None:
    before = np.random.default_rng(1).integers(0, 4, 1000).astype(np.int32)
    copies, _ = balance(how, LABELS, before, DIGESTS)
    assert (copies[before == 0] == 0).all()
    expected = {"oversample": max, "undersample": min}[how](size for size in sizes(before) if size)
    assert [size for size in sizes(copies) if size] == [expected] * 3
    if how == "oversample":
        assert (copies >= before).all()
    else:
        assert (copies <= before).all()


@pytest.mark.parametrize("how", ["oversample", "undersample"])
def test_what_is_chosen_depends_on_the_rows_and_not_on_their_order(how: str) -> None:
    copies, _ = balance(how, LABELS, ONCE, DIGESTS)
    order = np.random.default_rng(2).permutation(1000)
    again, _ = balance(how, LABELS[order], ONCE, DIGESTS[order])
    np.testing.assert_array_equal(again, copies[order])


def test_a_smaller_goal_keeps_part_of_what_a_larger_one_kept() -> None:
    """Leaving rows of the smallest class out takes rows of the others away, and adds none."""
    copies, _ = balance("undersample", LABELS, ONCE, DIGESTS)
    fewer = ONCE.copy()
    fewer[np.flatnonzero(of(3))[:10]] = 0
    others = ~of(3)
    again, _ = balance("undersample", LABELS, fewer, DIGESTS)
    assert sizes(again) == [30, 30, 0, 30]
    assert (again[others] <= copies[others]).all()


def test_rows_without_a_class() -> None:
    labels = LABELS.copy()
    labels[:7] = -1
    message = "data.balance: weights needs the class of each row, and 7 of 1000 rows have none"
    with pytest.raises(DataError, match=message) as raised:
        balance("weights", labels, ONCE, DIGESTS)
    assert "data.label" in raised.value.hint
    left_out = ONCE.copy()
    left_out[:7] = 0
    copies, _ = balance("undersample", labels, left_out, DIGESTS)
    assert (copies[:7] == 0).all()
    assert balance("oversample", labels, ONCE * 0, DIGESTS)[0].sum() == 0


def test_a_sources_weight() -> None:
    weights = np.array([1.0, 2.0, 0.5, 2.25])
    copies = source_copies(np.repeat(weights, 250), DIGESTS).reshape(4, 250)
    assert (copies[0] == 1).all()
    assert (copies[1] == 2).all()
    assert set(copies[2].tolist()) == {0, 1}
    assert set(copies[3].tolist()) == {2, 3}
    # Four standard deviations.
    assert abs(copies[2].sum() - 125) < 4 * (250 * 0.25) ** 0.5
    assert abs(copies[3].sum() - 562.5) < 4 * (250 * 0.1875) ** 0.5


def test_a_greater_weight_keeps_what_a_smaller_one_kept() -> None:
    found = [source_copies(np.full(1000, weight), DIGESTS) for weight in np.arange(0.05, 3, 0.05)]
    for smaller, greater in itertools.pairwise(found):
        assert (smaller <= greater).all()


def test_half_of_what_is_not_held_out_is_half_of_it() -> None:
    digests = many(20_000)
    trained = split(digests, held_out(0.2), held_out(0.2)) == 0
    copies = source_copies(np.full(20_000, 0.5), digests)[trained]
    assert abs(copies.mean() - 0.5) < 4 * (0.25 / len(copies)) ** 0.5
