"""Which failures count against a run: in a row, without a checkpoint between; a lost machine's do not."""

from __future__ import annotations

import pytest

from launcher.driver.elastic import NOTICE_S, Policy, Terms, _Failure


@pytest.mark.parametrize(
    ("progressed", "number"),
    [
        ([True], 1),
        ([True, False, False], 3),
        ([True, True, True], 1),
        ([True, False, True, False], 2),
    ],
)
def test_a_checkpoint_between_two_failures_starts_the_count_anew(progressed: list[bool], number: int) -> None:
    policy = made()
    policy.failures = [_Failure(10.0 * i, 10.0 * i - 5, frozenset({"a"}), each) for i, each in enumerate(progressed)]
    assert policy._num_failures() == number


def test_a_lost_machine_does_not_count_unless_nothing_was_saved_since_the_failure_before() -> None:
    policy = made()
    policy.failures = [
        _Failure(100.0, 50.0, frozenset({"a", "b"}), True),
        _Failure(300.0, 250.0, frozenset({"b"}), False),
    ]
    assert policy._num_failures() == 2
    policy.gone = {"a": 100.0 + NOTICE_S}  # found dead a while after its neighbours had failed
    assert policy._num_failures() == 1
    policy.gone["b"] = 300.0
    assert policy._num_failures() == 1, "the second loss followed no checkpoint"


def made() -> Policy:
    return Policy(Terms("/nowhere", 2, 2, 1, False, 60.0, 3, "/nowhere/events"))
