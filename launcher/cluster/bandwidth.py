"""How fast two nodes reach each other: all-reduce between every pair, and between all at once.

Pairs are measured in the rounds of a tournament, so that no node is in two at a time: n - 1 rounds for n nodes, each of
them n / 2 pairs at once. The slow end of a pair is the node whose every pair is slow.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.plan.facts import ClusterFacts, NodeFacts

SIZES = (2**20, 2**26)
"""Bytes of one all-reduce: one that waits for the network, one that fills it. The larger is left out where the smaller
says that it would take longer than PATIENCE_S."""
PATIENCE_S = 3.0
MEASURE_S = 0.5
"""Each size is repeated for about so long."""
MEET_TIMEOUT_S = 10
"""For two nodes to find each other, and for each all-reduce."""
START_TIMEOUT_S = 60
"""For a process on every node that has imported torch."""
MAX_ROUNDS = 31
"""Of large clusters not every pair is measured, but each node with 31 others: a minute or two."""
SLOW = 0.5
"""A pair below this share of what nodes reach at their best is slow."""

Pair = tuple[str, str]


@dataclass(frozen=True)
class Bandwidth:
    """Bus bandwidth in GB/s, 10^9 bytes; None where two nodes did not reach each other."""

    device: str
    """cpu: over gloo; cuda: over NCCL, one GPU a node."""
    pairs: dict[Pair, float | None]
    everyone: float | None
    silent: tuple[str, ...] = ()
    """Nodes on which no process could be started within START_TIMEOUT_S."""
    slow: tuple[Pair, ...] = field(init=False)
    """Those below SLOW, and those that did not reach each other, slowest first."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "slow", slow_pairs(self.pairs))


def bus_bandwidth(size: int, seconds: float, ranks: int) -> float:
    """GB/s that the network must carry for an all-reduce of `size` bytes: 2 (n - 1) / n size / seconds, which is
    independent of the number of ranks. Source: nccl-tests, doc/PERFORMANCE.md, "Bus bandwidth"."""
    return 2 * (ranks - 1) / ranks * size / seconds / 1e9


def rounds(names: Sequence[str]) -> list[list[Pair]]:
    """Every pair once, in rounds in which each name comes at most once (the circle method of tournaments)."""
    ring: list[str | None] = [*names, *([None] if len(names) % 2 else [])]
    found = []
    for _ in range(len(ring) - 1):
        half = len(ring) // 2
        facing = zip(ring[:half], reversed(ring[half:]), strict=True)
        found.append([(a, b) for a, b in facing if a is not None and b is not None])
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return found


def slow_pairs(pairs: dict[Pair, float | None]) -> tuple[Pair, ...]:
    """Below SLOW of the median of every node's best pair, slowest first.

    Not of the median pair: with one bad link among three nodes, two of three pairs are bad.
    """
    names = {name for pair in pairs for name in pair}
    best = [max(speed or 0.0 for pair, speed in pairs.items() if name in pair) for name in names]
    limit = SLOW * statistics.median(best) if best else 0.0
    return tuple(sorted((pair for pair, speed in pairs.items() if (speed or 0.0) < limit or speed is None),
                        key=lambda pair: pairs[pair] or 0.0))  # fmt: skip


def culprits(found: Bandwidth) -> list[str]:
    """Nodes whose every pair is slow, where the others do well among themselves."""
    names = sorted({name for pair in found.pairs for name in pair})
    if len(names) < 3:
        return []
    slow = set(found.slow)
    bad = [name for name in names if all(pair in slow for pair in found.pairs if name in pair)]
    rest = [pair for pair in found.pairs if not set(pair) & set(bad)]
    return bad if len(bad) < len(names) - 1 and not slow & set(rest) else []


def verdicts(found: Bandwidth) -> list[str]:
    """What is to be said of it, a sentence each: the slow node, or the slow pairs where no node is to blame for all."""
    said = [f"{name}: no process could be started there" for name in found.silent]
    bad = culprits(found)
    alone = []
    for name in bad:
        speeds = [speed for pair, speed in found.pairs.items() if name in pair]
        reached = [speed for speed in speeds if speed is not None]
        if reached:
            how = f"at most {max(reached):.3g} GB/s, others {_best(found):.3g}"
            said.append(f"{name} is slow with every other node: {how}")
        else:
            alone.append(name)
            said.append(f"{name} reaches no other node")
    for pair in found.slow:
        speed = found.pairs[pair]
        if speed is None and not set(pair) & set(alone):
            said.append(f"{pair[0]} and {pair[1]}: do not reach each other")
        elif speed is not None and not set(pair) & set(bad):
            said.append(f"{pair[0]} and {pair[1]}: only {speed:.3g} GB/s, others {_best(found):.3g}")
    return said


def _best(found: Bandwidth) -> float:
    return max((speed for speed in found.pairs.values() if speed is not None), default=0.0)


def measure(cluster: ClusterFacts, report: Callable[[str], None] = lambda _: None) -> Bandwidth:
    """Measure the connected cluster's living nodes: over NCCL if each has a free GPU, else over gloo.

    A node that answers nobody costs MEET_TIMEOUT_S a round, and ends nothing.
    """
    device = "cuda" if cluster.nodes and all(node.gpus for node in cluster.nodes) else "cpu"
    report(f"starting a process on {len(cluster.nodes)} nodes")
    team = _Team(cluster.nodes, device)
    try:
        pairs: dict[Pair, float | None] = {}
        plan = rounds(team.names)[:MAX_ROUNDS]
        for number, meetings in enumerate(plan, 1):
            report(f"all-reduce between pairs, round {number} of {len(plan)}")
            pairs |= dict(zip(meetings, team.meet(meetings), strict=True))
        everyone = None
        if len(team.names) > 1 and None not in pairs.values():
            report("all-reduce between all")
            (everyone,) = team.meet([tuple(team.names)])
        return Bandwidth(device, pairs, everyone, tuple(team.silent))
    finally:
        team.close()


class _Team:
    """One process a node."""

    def __init__(self, nodes: Sequence[NodeFacts], device: str) -> None:
        import ray

        self.device = device
        hosts = [node.host for node in nodes]  # a test may have several nodes on one
        self.nodes = {
            node.host if hosts.count(node.host) == 1 else f"{node.host} {node.id[:6]}": node for node in nodes
        }
        self.actors = {name: self._start(node) for name, node in self.nodes.items()}
        there = {actor.ready.remote(): name for name, actor in self.actors.items()}
        ready, _ = ray.wait(list(there), num_returns=len(there), timeout=START_TIMEOUT_S)
        self.names = [name for answer, name in there.items() if answer in ready and _answer(answer) is True]
        self.silent = [name for name in self.nodes if name not in self.names]

    def _start(self, node: NodeFacts) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        where = NodeAffinitySchedulingStrategy(node.id, soft=False)
        gpus = 1 if self.device == "cuda" else 0
        return ray.remote(num_cpus=0, num_gpus=gpus)(_Node).options(scheduling_strategy=where).remote()

    def meet(self, meetings: Sequence[Sequence[str]]) -> list[float | None]:
        """The bus bandwidth of each meeting, all of them at once; None of one whose nodes do not reach each other."""
        import ray

        calls: list[list[Any]] = []
        for meeting in meetings:
            first = self.actors[meeting[0]]
            place = first.place.remote()  # a port that is free there; the others are told by Ray
            size = len(meeting)
            calls.append(
                [self.actors[name].meet.remote(place, rank, size, self.device) for rank, name in enumerate(meeting)]
            )
        everything = list(itertools.chain.from_iterable(calls))
        limit_s = 3 * MEET_TIMEOUT_S + len(SIZES) * (PATIENCE_S + MEASURE_S)
        _, stuck = ray.wait(everything, num_returns=len(everything), timeout=limit_s)
        speeds: list[float | None] = []
        for meeting, answers in zip(meetings, calls, strict=True):
            found: list[float | None] = [None if answer in stuck else _answer(answer) for answer in answers]
            reached = [speed for speed in found if speed is not None]
            speeds.append(min(reached) if len(reached) == len(found) else None)
            for name, speed in zip(meeting, found, strict=True):
                if speed is None:  # what it waits for may go on for long
                    ray.kill(self.actors[name])
                    self.actors[name] = self._start(self.nodes[name])
        return speeds

    def close(self) -> None:
        import ray

        for actor in self.actors.values():
            ray.kill(actor)


def _answer(reference: Any) -> Any:
    """What a call returned; None if it failed."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayError:
        return None


class _Node:
    """The process on one node; its process group lasts for one meeting."""

    def __init__(self) -> None:
        from launcher.driver.interface import use_ray_interface

        use_ray_interface()
        import torch.distributed  # noqa: F401

    def ready(self) -> bool:
        return True

    def place(self) -> str:
        """Where the others find this node: a URL with a port that is free."""
        import socket

        import ray

        address = ray.util.get_node_ip_address()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
            port = probe.getsockname()[1]
        return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"

    def meet(self, place: str, rank: int, ranks: int, device: str) -> float:
        """Bus bandwidth in GB/s at the largest size measured. Raises what torch raises where the others are not met."""
        from datetime import timedelta

        import torch.distributed as dist

        timeout = timedelta(seconds=MEET_TIMEOUT_S)
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=place, rank=rank, world_size=ranks, timeout=timeout)
        try:
            speed = 0.0
            for size in SIZES:
                if speed and bus_bandwidth(size, PATIENCE_S, ranks) > speed:
                    break
                speed = bus_bandwidth(size, _seconds(size, device), ranks)
            return speed
        finally:
            dist.destroy_process_group()


def _seconds(size: int, device: str) -> float:
    """Of one all-reduce of `size` bytes, the slowest rank's mean. Collective."""
    import time

    import torch
    import torch.distributed as dist

    tensor = torch.zeros(size // 4, device=device)

    def timed(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            dist.all_reduce(tensor)
        if device == "cuda":
            torch.cuda.synchronize()
        slowest = torch.tensor((time.perf_counter() - began) / times, device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return float(slowest)

    once = timed(1)  # connects
    if once < PATIENCE_S:
        once = timed(1)
    return timed(min(100, int(MEASURE_S / once))) if once < MEASURE_S else once
