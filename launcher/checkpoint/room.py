"""Is there room in the host's memory for a copy of what its ranks save?"""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import psutil
import torch.distributed as dist

from launcher.units import format_bytes

_CGROUP = Path("/sys/fs/cgroup")
SHARE = {"cpu": 0.5, "cuda": 0.8}
"""Of the free memory that the copies may take. On a CPU the first steps still have to allocate their activations."""


def missing_room(num_bytes: int, device: str, group: dist.ProcessGroup | None) -> str | None:
    """Why this run's hosts cannot hold `num_bytes` more for each rank; None where all can. Collective, the same answer
    on all ranks."""
    here = socket.gethostname()
    everyone: list[tuple[str, int, int]] = [(here, num_bytes, available_bytes())] * dist.get_world_size(group)
    dist.all_gather_object(everyone, everyone[0], group=group)
    for host in sorted({host for host, _, _ in everyone}):
        needed = sum(count for other, count, _ in everyone if other == host)
        free = min(count for other, _, count in everyone if other == host)
        if needed > SHARE[device] * free:
            copies = f"copies of its ranks' state take {format_bytes(needed)}"
            return f"{host} has {format_bytes(free)} of memory free, and {copies}"
    return None


def available_bytes() -> int:
    """Memory that this process may still take: the machine's, or its container's where that is less."""
    free = int(psutil.virtual_memory().available)
    # No file: no container's limit, or an older kind of cgroup. "max": none set.
    with contextlib.suppress(OSError, ValueError):
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(statistics.get("inactive_file", 0)))
    return free
