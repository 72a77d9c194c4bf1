"""What the planner is told about the machines: plain numbers, from Ray or from this machine."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

NAMED = 12
"""Machines that a message names one by one."""


@dataclass(frozen=True)
class NodeFacts:
    """One machine as Ray counts it: what no other job has taken, and what they have."""

    host: str
    cpus: int
    gpus: int
    used_cpus: int = 0
    used_gpus: int = 0
    id: str = ""
    """Of the Ray node; empty where no Ray has been asked."""
    address: str = ""

    def room(self, cpus: int, gpu: bool) -> int:
        """How many workers of `cpus` CPUs, and of one GPU each where `gpu`, it has room for."""
        return min(self.gpus, self.cpus // cpus) if gpu else self.cpus // cpus


@dataclass(frozen=True)
class ClusterFacts:
    """All machines of the cluster that are alive, with what nobody else is using."""

    nodes: tuple[NodeFacts, ...]

    @property
    def has_gpus(self) -> bool:
        """Whether there are any, free or in use."""
        return any(node.gpus + node.used_gpus for node in self.nodes)

    def room(self, cpus: int, gpu: bool) -> int:
        """How many workers of `cpus` CPUs, and of one GPU each where `gpu`, it has room for."""
        return sum(node.room(cpus, gpu) for node in self.nodes)

    @property
    def cpus(self) -> int:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> int:
        return sum(node.gpus for node in self.nodes)

    def __str__(self) -> str:
        """What is free, machine by machine: GPUs where there are any, and else CPUs."""
        kind = "gpus" if self.has_gpus else "cpus"
        parts = [_free(node.host, getattr(node, kind), getattr(node, f"used_{kind}")) for node in self.nodes]
        more = [f"and {len(parts) - NAMED} more machines"] if len(parts) > NAMED else []
        return ", ".join(parts[:NAMED] + more)


def _free(host: str, free: int, used: int) -> str:
    return f"{host} {free} of {free + used}" + (f" ({used} in use)" if used else "")


def shortage(cluster: ClusterFacts, workers: int, cpus: int, gpu: bool) -> str:
    """What `workers` of `cpus` CPUs each, and of one GPU each where `gpu`, would take, and what there is."""
    room, one = cluster.room(cpus, gpu), f"{cpus} CPU{'s' * (cpus > 1)}"
    if not gpu:
        return f"{workers} worker{'s' * (workers > 1)} of {one}; there is room for {room}: CPUs free are {cluster}"
    if room == cluster.gpus:
        return f"{workers} GPU{'s' * (workers > 1)}; free are {room}: {cluster}"
    return (
        f"{workers} GPU{'s' * (workers > 1)} with {one} each; there is room for {room}: GPUs free are {cluster}, "
        f"CPUs free are {', '.join(_free(node.host, node.cpus, node.used_cpus) for node in cluster.nodes[:NAMED])}"
    )


def this_machine() -> ClusterFacts:
    """This machine alone, without starting Ray: the CPUs this process may use, and NVIDIA's GPUs as the driver lists
    them."""
    driver = Path("/proc/driver/nvidia/gpus")
    gpus = len(list(driver.iterdir())) if driver.is_dir() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = min(gpus, len([device for device in visible.split(",") if device.strip() not in ("", "-1")]))
    return ClusterFacts((NodeFacts(socket.gethostname(), len(os.sched_getaffinity(0)), gpus),))
