"""Which machine each worker runs on: as few machines as will do, free ones before those that others use, in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from launcher.plan.facts import ClusterFacts, NodeFacts


def choose(nodes: Sequence[NodeFacts], workers: int, cpus: int, gpu: bool) -> list[NodeFacts]:
    """The machine of each rank, for workers of `cpus` CPUs, and of one GPU each where `gpu`.

    Shorter than `workers` where there is no room for all. The ranks of a machine are neighbours; machines come in the
    order of `nodes`, those that others use last.
    """
    left = [(_shared(node, gpu), node.room(cpus, gpu), place) for place, node in enumerate(nodes)]
    taken: list[tuple[bool, int, int]] = []
    missing = workers
    while missing and (left := [candidate for candidate in left if candidate[1]]):
        # One machine for all that are missing, the smallest that will do; else the largest, for as few as possible.
        enough = [candidate for candidate in left if candidate[1] >= missing]
        best = min(enough) if enough else min(left, key=lambda one: (one[0], -one[1], one[2]))
        left.remove(best)
        shared, room, place = best
        number = min(missing, room)
        taken.append((shared, place, number))
        missing -= number
    return [nodes[place] for _, place, number in sorted(taken) for _ in range(number)]


def _shared(node: NodeFacts, gpu: bool) -> bool:
    """Whether others use it: its GPUs, where those are wanted."""
    return bool(node.used_gpus if gpu else node.used_cpus)


def freed(cluster: ClusterFacts, held: Iterable[str], cpus: int, gpu: bool) -> ClusterFacts:
    """The cluster as it would be without our own workers; `held` has the Ray node of each of them."""
    workers = Counter(held)

    def without(node: NodeFacts) -> NodeFacts:
        ours = workers[node.id]
        return replace(
            node,
            cpus=node.cpus + ours * cpus,
            used_cpus=max(0, node.used_cpus - ours * cpus),
            gpus=node.gpus + ours * gpu,
            used_gpus=max(0, node.used_gpus - ours * gpu),
        )

    return ClusterFacts(tuple(without(node) for node in cluster.nodes))
