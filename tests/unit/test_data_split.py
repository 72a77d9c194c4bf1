"""Held-out rows: which they are, and that nothing moves them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.conversation import Conversation, Message
from launcher.data.prepare.split import as_digests, below, draws, group_digests, split
from launcher.data.store import Set
from launcher.errors import DataError
from tests.plans import held_out

NOTHING = held_out()
FIXED = settings(derandomize=True, max_examples=100, deadline=None, database=None)


def digests_of(*texts: str) -> np.ndarray:
    rows = [Conversation((Message("user", text), Message("assistant", "Yes."))) for text in texts]
    return as_digests([row.digest() for row in rows])


def many(number: int, first: int = 0) -> np.ndarray:
    return digests_of(*(f"question {i}" for i in range(first, first + number)))


def counts(sides: np.ndarray) -> list[int]:
    return np.bincount(sides, minlength=3).tolist()


# Shares


def test_a_share_is_about_that_many_and_depends_on_each_row_alone() -> None:
    digests = many(20_000)
    sides = split(digests, held_out(0.1), held_out(0.25))
    train, evaluation, test = counts(sides)
    # Four standard deviations of a draw for each row.
    assert abs(evaluation - 2000) < 4 * (20_000 * 0.1 * 0.9) ** 0.5
    assert abs(test - 5000) < 4 * (20_000 * 0.25 * 0.75) ** 0.5
    assert train == 20_000 - evaluation - test
    # Adding, removing and reordering rows moves none.
    order = np.random.default_rng(0).permutation(20_000)[:5000]
    np.testing.assert_array_equal(split(digests[order], held_out(0.1), held_out(0.25)), sides[order])


def test_the_shares_are_nested_and_do_not_move_each_other() -> None:
    digests = many(2000)
    one = split(digests, held_out(0.1), held_out(0.2))
    other = split(digests, held_out(0.3), held_out(0.2))
    np.testing.assert_array_equal(one == Set.TEST, other == Set.TEST)
    assert (other[one == Set.EVAL] == Set.EVAL).all()
    larger = split(digests, held_out(0.1), held_out(0.4))
    np.testing.assert_array_equal(one == Set.EVAL, larger == Set.EVAL)
    assert (larger[one == Set.TEST] == Set.TEST).all()


def test_a_draw_is_the_beginning_of_the_digest_so_that_it_is_the_same_for_ever() -> None:
    digest = bytes.fromhex("80000000000000000123456789abcdef")
    assert draws(as_digests([digest])).tolist() == [1 << 63]
    halves = np.array([(1 << 63) - 1, 1 << 63, (1 << 64) - 1], dtype=np.uint64)
    assert below(halves, 0.5).tolist() == [True, False, False]
    assert below(halves, 1.0).tolist() == [True] * 3
    assert below(halves, 0.0).tolist() == [False] * 3
    # The other end: as near to it as evaluation's is to the beginning.
    ends = as_digests([bytes([first]) + b"\0" * 15 for first in (0x00, 0x40, 0xBF)] + [b"\xff" * 16])
    assert split(ends, held_out(0.25), NOTHING).tolist() == [Set.EVAL, Set.TRAIN, Set.TRAIN, Set.TRAIN]
    assert split(ends, NOTHING, held_out(0.25)).tolist() == [Set.TRAIN, Set.TRAIN, Set.TRAIN, Set.TEST]


def test_nothing_is_held_out_where_nothing_is_asked_for() -> None:
    assert counts(split(many(10), NOTHING, NOTHING)) == [10, 0, 0]
    assert split(many(0), NOTHING, NOTHING).tolist() == []


# Numbers of rows


def test_a_number_of_rows_is_exactly_that_and_the_lowest_draws() -> None:
    digests = many(500)
    sides = split(digests, held_out(rows=20), held_out(rows=30))
    assert counts(sides) == [450, 20, 30]
    drawn = draws(digests)
    assert drawn[sides == Set.EVAL].max() < drawn[sides == Set.TRAIN].min()
    assert drawn[sides == Set.TRAIN].max() < drawn[sides == Set.TEST].min()
    assert (split(digests, held_out(rows=40), held_out(rows=30))[sides != Set.TRAIN] == sides[sides != Set.TRAIN]).all()


def test_rows_with_the_same_words_are_on_one_side() -> None:
    digests = np.repeat(many(100), 3, axis=0)[np.random.default_rng(0).permutation(300)]
    for plan in (held_out(0.2), held_out(rows=20)):
        sides = split(digests, plan, NOTHING)
        assert len({(draw, side) for draw, side in zip(draws(digests).tolist(), sides.tolist(), strict=True)}) == 100
    assert counts(split(digests, held_out(rows=20), NOTHING))[Set.EVAL] == 21


def test_equal_draws_are_told_apart_by_the_rest_of_the_digest() -> None:
    digests = as_digests([bytes(8) + bytes([i]) * 8 for i in (3, 1, 2)])
    assert split(digests, held_out(rows=1), held_out(rows=1)).tolist() == [Set.TEST, Set.EVAL, Set.TRAIN]


# Groups


def test_a_group_is_held_out_as_a_whole_or_not_at_all() -> None:
    digests = many(3000)
    names = [f"patient {i % 700}" for i in range(2800)] + [None] * 200
    groups = group_digests(names, digests)
    np.testing.assert_array_equal(groups[2800:], digests[2800:])
    for plans in ((held_out(0.2), held_out(0.1)), (held_out(rows=300), held_out(rows=100))):
        sides = split(digests, *plans, groups=groups)
        assert len({(name, side) for name, side in zip(names[:2800], sides.tolist(), strict=False)}) == 700
        assert 200 < counts(sides)[Set.EVAL] < 900
    # Whole groups until there are enough.
    assert 300 <= counts(sides)[Set.EVAL] <= 303
    assert 100 <= counts(sides)[Set.TEST] <= 103


def test_adding_rows_moves_no_group() -> None:
    digests = many(1000)
    groups = group_digests([f"g{i % 90}" for i in range(1000)], digests)
    sides = split(digests, held_out(0.3), held_out(0.3), groups=groups)
    np.testing.assert_array_equal(split(digests[:400], held_out(0.3), held_out(0.3), groups=groups[:400]), sides[:400])


@FIXED
@given(
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from("ABCDEF")), min_size=3, max_size=30),
    st.sampled_from([held_out(0.4), held_out(rows=3)]),
)
def test_no_words_and_no_group_are_on_two_sides(rows: list[tuple[str, str]], plan: object) -> None:
    digests = digests_of(*(text for text, _ in rows))
    groups = group_digests([group for _, group in rows], digests)
    try:
        sides = split(digests, plan, NOTHING, groups=groups)
    except DataError:
        return
    for column in (0, 1):
        assert len({(row[column], side) for row, side in zip(rows, sides.tolist(), strict=True)}) == len(
            {row[column] for row in rows}
        )


def test_groups_that_share_words_through_others_stay_together() -> None:
    # a1 a2 share x with b, b shares y with c, c shares z with d, and so on: a chain of 50 groups.
    digests = digests_of(*(f"{i + half}" for i in range(50) for half in (0, 1)))
    groups = group_digests([f"g{i}" for i in range(50) for _ in "12"], digests)
    alone = many(50, first=1000)
    sides = split(np.concatenate([digests, alone]), held_out(0.3), NOTHING, groups=np.concatenate([groups, alone]))
    assert len(set(sides[:100].tolist())) == 1


# Classes


def test_stratified_each_class_gives_the_same_share() -> None:
    digests = many(1000)
    labels = np.repeat([0, 1, 2, -1], [600, 300, 95, 5]).astype(np.int32)
    sides = split(digests, held_out(0.1), held_out(0.2), labels=labels, stratify=True)
    for label, evaluation, test in ((0, 60, 120), (1, 30, 60), (2, 10, 19), (-1, 1, 1)):
        assert counts(sides[labels == label])[1:] == [evaluation, test]
        drawn = draws(digests)[labels == label]
        assert drawn[sides[labels == label] == Set.EVAL].max() < drawn[sides[labels == label] != Set.EVAL].min()
    order = np.random.default_rng(0).permutation(1000)
    again = split(digests[order], held_out(0.1), held_out(0.2), labels=labels[order], stratify=True)
    np.testing.assert_array_equal(again, sides[order])


def test_a_number_of_rows_is_shared_out_over_the_classes() -> None:
    labels = np.repeat([0, 1, 2], [600, 300, 100]).astype(np.int32)
    sides = split(many(1000), held_out(rows=25), held_out(rows=10), labels=labels, stratify=True)
    assert [counts(sides[labels == label])[1:] for label in range(3)] == [[15, 6], [8, 3], [2, 1]]
    rows = [
        counts(split(many(1000), held_out(rows=n), NOTHING, labels=labels, stratify=True))[Set.EVAL] for n in (1, 7, 99)
    ]
    assert rows == [1, 7, 99]


def test_a_group_counts_as_its_most_frequent_class() -> None:
    digests = many(400)
    groups = group_digests([f"g{i // 4}" for i in range(400)], digests)
    labels = np.array([0, 0, 0, 1] * 50 + [1, 1, 0, 1] * 50, dtype=np.int32)
    sides = split(digests, held_out(0.25), NOTHING, groups=groups, labels=labels, stratify=True)
    # 50 groups of 4 rows each; a quarter of 200 rows is 12 groups and a half.
    assert counts(sides[:200])[Set.EVAL] == counts(sides[200:])[Set.EVAL] == 52


# Errors


@pytest.mark.parametrize(
    ("number", "eval", "test", "message", "hint"),
    [
        (10, held_out(rows=11), NOTHING, "data.eval.rows is 11, and there are 10 training rows", "fewer"),
        (
            *(10, held_out(rows=4), held_out(rows=6)),
            "no training row is left: of 10 rows 4 for evaluation and 6 for test are held out",
            "hold out less",
        ),
        (
            *(10, held_out(rows=8), held_out(rows=6)),
            "no training row is left: of 10 rows 8 for evaluation and 2 for test are held out",
            "hold out less",
        ),
    ],
)
def test_no_side_is_empty(number: int, eval: object, test: object, message: str, hint: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        split(many(number), eval, test)
    assert hint in raised.value.hint


def test_one_group_cannot_be_halved() -> None:
    digests = many(20)
    groups = group_digests(["all of them"] * 20, digests)
    with pytest.raises(DataError, match="no training row is left: of 20 rows 20 for evaluation") as raised:
        split(digests, held_out(rows=3), NOTHING, groups=groups)
    assert "a group of data.group is held out as a whole" in raised.value.hint


def test_classes_that_are_missing() -> None:
    with pytest.raises(DataError, match="data.stratify needs the class of each row"):
        split(many(20), held_out(0.5), NOTHING, stratify=True)
