"""Which machine each worker runs on, and what is said where there is no room."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.driver.placement import choose, freed
from launcher.plan.facts import ClusterFacts, NodeFacts, shortage


def gpus(*machines: tuple[int, int]) -> tuple[NodeFacts, ...]:
    """host1, host2, ...: (GPUs free, GPUs in use), with CPUs enough."""
    return tuple(
        NodeFacts(f"host{number}", cpus=64, gpus=free, used_gpus=used, id=f"id{number}")
        for number, (free, used) in enumerate(machines, start=1)
    )


def hosts(nodes: list[NodeFacts]) -> list[int]:
    return [int(node.host.removeprefix("host")) for node in nodes]


@pytest.mark.parametrize(
    ("machines", "workers", "ranks"),
    [
        ([(4, 0), (4, 0)], 8, [1, 1, 1, 1, 2, 2, 2, 2]),
        ([(4, 0), (4, 0), (4, 0)], 6, [1, 1, 1, 1, 2, 2]),
        ([(0, 0), (4, 0), (4, 0)], 5, [2, 2, 2, 2, 3]),  # the head has none
        ([(2, 2), (4, 0)], 4, [2, 2, 2, 2]),  # others use the first
        ([(2, 2), (4, 0)], 6, [2, 2, 2, 2, 1, 1]),
        ([(2, 0), (8, 0)], 8, [2] * 8),  # no node is split that need not be
        ([(2, 0), (8, 0)], 2, [1, 1]),
        ([(8, 0), (2, 0), (4, 0)], 10, [1] * 8 + [2] * 2),
        ([(1, 3), (4, 0), (0, 4)], 8, [2, 2, 2, 2, 1]),  # no room for all
        ([], 2, []),
    ],
)
def test_free_machines_are_filled_whole_and_in_order(
    machines: list[tuple[int, int]], workers: int, ranks: list[int]
) -> None:
    assert hosts(choose(gpus(*machines), workers, cpus=1, gpu=True)) == ranks


def test_a_machine_without_cpus_for_its_gpus_takes_fewer() -> None:
    nodes = (NodeFacts("host1", cpus=5, gpus=4), NodeFacts("host2", cpus=8, gpus=4))
    assert hosts(choose(nodes, 8, cpus=2, gpu=True)) == [1, 1, 2, 2, 2, 2]
    assert hosts(choose(nodes, 8, cpus=2, gpu=False)) == [1, 1, 2, 2, 2, 2]


machines = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=8)


@given(machines, st.integers(1, 40))
def test_nobody_gets_more_than_is_free_and_ranks_are_neighbours(free: list[tuple[int, int]], workers: int) -> None:
    nodes = gpus(*free)
    chosen = choose(nodes, workers, cpus=1, gpu=True)
    assert len(chosen) == min(workers, sum(node.gpus for node in nodes))
    count = Counter(node.host for node in chosen)
    assert all(count[node.host] <= node.gpus for node in nodes)
    assert [node.host for node in chosen] == [host for host, number in count.items() for _ in range(number)]
    if any(node.gpus >= workers for node in nodes):
        assert len(count) == 1
    # At most one machine is left with some that are free, of those that others do not use.
    assert sum(0 < count[node.host] < node.gpus for node in nodes) <= 1


def test_our_own_workers_are_room_for_us() -> None:
    cluster = ClusterFacts(gpus((0, 4), (1, 3)))
    without = freed(cluster, ["id1", "id1", "id1", "id1", "id2", "lost"], cpus=2, gpu=True)
    assert [(node.gpus, node.used_gpus, node.cpus) for node in without.nodes] == [(4, 0, 72), (2, 2, 66)]


def test_what_is_missing_is_said_machine_by_machine() -> None:
    cluster = ClusterFacts(gpus((4, 0), (1, 3)))
    assert shortage(cluster, 8, 1, gpu=True) == "8 GPUs; free are 5: host1 4 of 4, host2 1 of 4 (3 in use)"
    assert shortage(cluster, 8, 32, gpu=True) == (
        "8 GPUs with 32 CPUs each; there is room for 3: GPUs free are host1 4 of 4, host2 1 of 4 (3 in use), "
        "CPUs free are host1 64 of 64, host2 64 of 64"
    )
    cpus = ClusterFacts((NodeFacts("host1", 2, 0, used_cpus=6),))
    assert shortage(cpus, 3, 1, gpu=False) == (
        "3 workers of 1 CPU; there is room for 2: CPUs free are host1 2 of 8 (6 in use)"
    )
    many = ClusterFacts(gpus(*[(0, 8)] * 100))
    assert shortage(many, 8, 1, gpu=True).endswith("host12 0 of 8 (8 in use), and 88 more machines")
