"""What this rank is doing, for another thread to tell a watch while the loop itself stands still.

The loop says where it is by `mark`: a few assignments, no lock. Collectives are not wrapped: every process group of
torch counts those that were entered, on gloo and NCCL, whoever of us, DeepSpeed or the model's own code calls them.
Torch's flight recorder names the one that has not ended; it is asked only where nothing has moved for a while.

Under plain torchrun the marks are made and nobody reads them: there is no watch, and a hang ends with the process
group's timeout.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.checkpoint.layout import GROUP

STARTING = "starting"
ENDED = "ended"
OPENING = "opening the process group"
LOADING = "loading the model"
AUDITING = "auditing"
BUILDING = "building the engine"
SUMS = "all-reduce of the step's sums"
GENERATE = "generate"
RESUMING = "reading the checkpoint"
CONCLUDING = "ending the run"
IN_A_STEP = ("data", "forward", SUMS, "backward", "step", "evaluate")
"""Parts whose marks follow each other quickly. In all others a process that computes or reads is taken at its word, and
so it is in its first step, where kernels are compiled."""


@dataclass
class Doing:
    """Of this process, which is one rank. Written by its loop alone."""

    part: str = STARTING
    """One of `throughput.PARTS` or of those above."""
    step: int = 0
    """The one that is being computed, from 1; after it, the last."""
    marks: int = 0
    attempt: str = ""
    """As `str(Attempt)` gives it, once there is one."""
    warm: bool = False
    """Whether a step has been done."""


doing = Doing()


def mark(part: str, step: int | None = None) -> None:
    """This rank begins with `part`."""
    doing.part = part
    if step is not None:
        doing.step = step
    doing.marks += 1


@dataclass(frozen=True)
class Beat:
    """One rank at one moment."""

    rank: int
    host: str
    node: str
    """Ray's id of the node."""
    pid: int
    born: int
    """When the process was started, in clock ticks since its host was: with `pid` it names the process for good."""
    attempt: str = ""
    part: str = STARTING
    step: int = 0
    marks: int = 0
    patient: bool = True
    """Whether computing and reading count as progress."""
    entered: int = 0
    """Collectives so far, all groups together but that of the checkpoints."""
    entered_saves: int = 0
    """Those of the checkpoints."""
    waits_in: str | None = None
    """The collective that was entered and has not ended, such as "all_reduce 345"; told only where nothing moves."""
    clock_s: float = 0.0
    """Of this process, monotonic."""
    cpu_s: float = 0.0
    """CPU seconds of the process and those it has started."""
    io_bytes: int = 0
    """Read and written."""

    @property
    def counts(self) -> tuple[int, int, int]:
        """They rise where there is progress."""
        return self.marks, self.entered, self.entered_saves


class Pulse:
    """Takes this process's beats."""

    def __init__(self, rank: int, node: str = "") -> None:
        self.rank, self.node = rank, node
        self.host, self.pid = socket.gethostname(), os.getpid()
        self.born = born(self.pid) or 0
        self._counts = (0, 0, 0)
        self._still = 0
        """Beats since they changed."""

    def beat(self) -> Beat:
        """What this rank does now. Costs some 10 µs, and a few ms in parts where computing counts as progress."""
        now = doing
        part, patient = now.part, not now.warm or now.part not in IN_A_STEP
        entered, saves = collectives()
        counts = (now.marks, entered, saves)
        self._still = self._still + 1 if counts == self._counts else 0
        self._counts = counts
        cpu_s, io_bytes = used(self.pid) if patient else (0.0, 0)
        return Beat(
            *(self.rank, self.host, self.node, self.pid, self.born, now.attempt, part, now.step, now.marks, patient),
            *(entered, saves, waits_in(part) if self._still > 2 else None, time.monotonic(), cpu_s, io_bytes),
        )


def collectives() -> tuple[int, int]:
    """How many this process has entered: on all groups but the checkpoints', and on that."""
    entered = saves = 0
    torch = sys.modules.get("torch")
    # Torch may be half imported, a group half made: the next beat knows.
    with contextlib.suppress(AttributeError, RuntimeError):
        for group in list(torch.distributed.distributed_c10d._world.pg_names):  # type: ignore[union-attr]
            number = group._get_sequence_number_for_group()
            if group.group_desc == GROUP:
                saves += number
            else:
                entered += number
    return entered, saves


def waits_in(part: str) -> str | None:
    """Name and number of the latest collective that has not ended; one of the checkpoints only for whoever waits for
    a checkpoint."""
    with contextlib.suppress(AttributeError, RuntimeError, ValueError, KeyError):
        for entry in reversed(_recorded()):
            ours = entry["process_group"][1] != GROUP or part == "checkpoint"
            if not entry["retired"] and ours:
                return f"{entry['profiling_name'].rpartition(':')[2]} {entry['collective_seq_id']}"
    return None


def _recorded() -> list[dict[str, Any]]:
    """What torch's flight recorder has on this process's collectives, the oldest first."""
    torch: Any = sys.modules["torch"]
    c10d = torch._C._distributed_c10d
    nccl = torch.distributed.get_backend() == "nccl"
    dump = c10d._dump_nccl_trace_json if nccl else c10d._dump_fr_trace_json
    entries: list[dict[str, Any]] = json.loads(dump(True, True)).get("entries", [])
    return entries


def _children(pid: int) -> list[int]:
    """Those that a process has started, also compilers; none where the kernel does not list them."""
    children = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children += [int(word) for word in file.read_text().split()]
    return children


def born(pid: int) -> int | None:
    """When a process was started, in clock ticks since its host was; None where there is none."""
    with contextlib.suppress(OSError):
        return int(_stat(pid)[19])
    return None


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on. Raises OSError."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def used(pid: int) -> tuple[float, int]:
    """CPU seconds of a process and of what it has started, and bytes that it has read and written; what it does not
    tell counts nothing."""
    ticks = moved = 0
    family = [pid]
    for each in family:  # which grows
        family += _children(each)
        with contextlib.suppress(OSError, ValueError):
            ticks += sum(int(field) for field in _stat(each)[11:15])
        with contextlib.suppress(OSError, ValueError):
            lines = Path(f"/proc/{each}/io").read_text().splitlines()
            moved += sum(int(line.split()[1]) for line in lines if not line.startswith(("sysc", "cancel")))
    return ticks / os.sysconf("SC_CLK_TCK"), moved
