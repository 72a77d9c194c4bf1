"""Which nodes are measured together, and what is made of the numbers."""

from __future__ import annotations

from itertools import combinations

import pytest

from launcher.cluster.bandwidth import Bandwidth, bus_bandwidth, culprits, rounds, verdicts


@pytest.mark.parametrize("count", range(2, 12))
def test_every_pair_meets_once_and_nobody_twice_in_a_round(count: int) -> None:
    names = [f"host{number}" for number in range(count)]
    found = rounds(names)
    assert len(found) == count - 1 + count % 2
    for meetings in found:
        there = [name for pair in meetings for name in pair]
        assert len(there) == len(set(there)) == count - count % 2
    everyone = [frozenset(pair) for meetings in found for pair in meetings]
    assert sorted(map(sorted, everyone)) == sorted(map(sorted, combinations(names, 2)))


def test_one_host_has_nobody_to_meet() -> None:
    assert [pair for meetings in rounds(["host0"]) for pair in meetings] == []


def test_bus_bandwidth_is_the_links_whatever_the_number_of_ranks() -> None:
    assert bus_bandwidth(10**9, 1.0, 2) == pytest.approx(1.0)
    assert bus_bandwidth(10**9, 1.0, 4) == pytest.approx(1.5)


def found(**pairs: float | None) -> Bandwidth:
    """`found(ab=1.0)`: a and b reach each other with 1.0 GB/s."""
    return Bandwidth("cpu", {(name[0], name[1]): speed for name, speed in pairs.items()}, None)


def test_of_three_hosts_the_one_with_the_slow_link_is_named() -> None:
    slow = found(ab=1.2, ac=0.02, bc=0.03)
    assert slow.slow == (("a", "c"), ("b", "c"))
    assert culprits(slow) == ["c"]
    assert verdicts(slow) == ["c is slow with every other node: at most 0.03 GB/s, others 1.2"]


def test_a_slow_pair_of_hosts_that_are_fast_with_others_is_named_as_a_pair() -> None:
    slow = found(ab=1.2, ac=1.1, ad=1.3, bc=0.2, bd=1.2, cd=1.2)
    assert culprits(slow) == []
    assert verdicts(slow) == ["b and c: only 0.2 GB/s, others 1.3"]


def test_hosts_that_do_not_reach_each_other_are_named() -> None:
    cut = found(ab=1.0, ac=1.0, bc=None)
    assert verdicts(cut) == ["b and c: do not reach each other"]
    alone = found(ab=1.0, ac=None, bc=None)
    assert verdicts(alone) == ["c reaches no other node"]
    both = found(ab=1.0, ac=0.01, bc=None)
    assert verdicts(both) == [
        "c is slow with every other node: at most 0.01 GB/s, others 1",
        "b and c: do not reach each other",
    ]
    assert verdicts(found(ab=None)) == ["a and b: do not reach each other"]


def test_equal_links_are_all_right() -> None:
    assert verdicts(found(ab=1.0, ac=0.8, bc=0.7)) == []
    assert verdicts(found(ab=0.001)) == [], "there is nothing to compare it with"


def test_a_host_without_a_process_is_named() -> None:
    quiet = Bandwidth("cpu", {("a", "b"): 1.0}, 1.0, silent=("c",))
    assert verdicts(quiet) == ["c: no process could be started there"]
