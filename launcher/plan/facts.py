"""What the planner is told about the machines: plain numbers, from Ray or from this machine."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class NodeFacts:
    """One machine as Ray counts it: what no other job has taken."""

    host: str
    cpus: int
    gpus: int


@dataclass(frozen=True)
class ClusterFacts:
    """All machines of the cluster that are alive, with what nobody else is using."""

    nodes: tuple[NodeFacts, ...]

    @property
    def cpus(self) -> int:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> int:
        return sum(node.gpus for node in self.nodes)

    def __str__(self) -> str:
        parts = [f"{node.host}: {node.cpus} CPUs, {node.gpus} GPUs" for node in self.nodes]
        return "; ".join(parts)


def this_machine() -> ClusterFacts:
    """This machine alone, without starting Ray: the CPUs this process may use, and NVIDIA's GPUs as the driver lists
    them."""
    driver = Path("/proc/driver/nvidia/gpus")
    gpus = len(list(driver.iterdir())) if driver.is_dir() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = min(gpus, len([device for device in visible.split(",") if device.strip() not in ("", "-1")]))
    return ClusterFacts((NodeFacts(socket.gethostname(), len(os.sched_getaffinity(0)), gpus),))
