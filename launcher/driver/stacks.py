"""What a process that stands still is doing: its state, its Python stack, whether it computes. Runs on its own host.

`py-spy`, which Ray brings, reads another process's memory without its help, also of a stopped one, where the kernel
lets it: the same user, and a ptrace_scope of 0 or root. Where it may not, the process is asked to write its stack into
its own log (`answer_signals`), which a stopped one cannot.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from launcher.train.beat import born, used

STACK_SIGNAL = signal.SIGUSR2
LOOK_S = 1.0
"""How long a process is watched for whether it computes."""
SPY_S = 30.0
ANSWER_S = 3.0
ENDS_S = 5.0
"""How long a killed process may take to be gone; one that waits for a disk does not go."""
OF_A_LIBRARY = re.compile(r"[(/](torch|deepspeed|ray)/|\(threading\.py")
"""A frame of py-spy's that tells less than the one that called it."""


@dataclass(frozen=True)
class Process:
    """A rank's, on this host."""

    rank: int
    pid: int
    born: int
    log: str
    """File that its output goes to."""


@dataclass(frozen=True)
class Seen:
    """What was found of it."""

    rank: int
    state: str
    """The kernel's letter: R runs, S sleeps, D waits for a disk, T stopped, t held by a debugger; empty where it is
    gone."""
    traced: bool
    """A debugger is attached: somebody is looking."""
    kernel: str
    """The kernel function that it sleeps in."""
    cpu_s: float
    io_bytes: int
    """What it used in `seconds`."""
    seconds: float
    stack: str
    frame: str | None
    """Where its training thread is, as "function (file:line)"."""

    @property
    def busy(self) -> bool:
        """Whether it computes."""
        return self.state == "R" or self.cpu_s > 0.1 * self.seconds


def answer_signals() -> None:
    """Have this process write its stacks to its standard error when it gets STACK_SIGNAL."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        faulthandler.register(STACK_SIGNAL, file=2, all_threads=True)


def examine(processes: Sequence[Process]) -> list[Seen]:
    """All of them at once; takes about a second and a half, or as long as py-spy is given."""
    with ThreadPoolExecutor(max(1, len(processes))) as pool:
        return list(pool.map(_examine, processes))


def _examine(process: Process) -> Seen:
    if born(process.pid) != process.born:
        return Seen(process.rank, "", False, "", 0.0, 0, 0.0, "the process is gone", None)
    began, before = time.monotonic(), used(process.pid)
    status = _status(process.pid)
    stack = _spied(process.pid)
    if stack is None:
        stack = _asked(process, status)
    time.sleep(max(0.0, LOOK_S - (time.monotonic() - began)))
    after, seconds = used(process.pid), time.monotonic() - began
    kernel = ""
    with contextlib.suppress(OSError):
        kernel = Path(f"/proc/{process.pid}/wchan").read_text().strip("0 \n")
    return Seen(
        process.rank,
        status.get("State", "")[:1],
        status.get("TracerPid", "0") != "0",
        kernel,
        after[0] - before[0],
        after[1] - before[1],
        seconds,
        stack,
        training_frame(stack),
    )


def _status(pid: int) -> dict[str, str]:
    """/proc/PID/status, empty where there is none."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {}


def _spied(pid: int) -> str | None:
    """The stacks as py-spy reads them; None where it is not there or may not."""
    program = shutil.which("py-spy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        return None
    # Not blocking: it would stop the process with signals, and fail at one that is stopped already.
    command = [program, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SPY_S, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _asked(process: Process, status: dict[str, str]) -> str:
    """The stacks as the process itself writes them into its log."""
    log, signalled = Path(process.log), 1 << (STACK_SIGNAL - 1)
    # One that does not catch it would die of it.
    if status.get("State", "T")[:1] in "TtDZ" or not int(status.get("SigCgt", "0"), 16) & signalled:
        return "no stack: py-spy may not read the process, and it cannot be asked"
    try:
        size = log.stat().st_size
        os.kill(process.pid, STACK_SIGNAL)
        deadline, length = time.monotonic() + ANSWER_S, -1
        while time.monotonic() < deadline and (length < size + 1 or length != log.stat().st_size):
            length = log.stat().st_size
            time.sleep(0.2)
        with log.open("rb") as file:
            file.seek(size)
            written = file.read().decode(errors="replace")
    except OSError as error:
        return f"no stack: {error}"
    return written or f"no stack: py-spy may not read the process, and it wrote none to {log}"


def training_frame(stack: str) -> str | None:
    """The innermost frame of the thread that trains which is not a library's, from what py-spy printed."""
    for thread in re.split(r"^Thread ", stack, flags=re.MULTILINE)[1:]:
        frames = [line.strip() for line in thread.splitlines()[1:] if line.strip()]
        if any("train_worker (" in frame for frame in frames):
            # None where we too are installed below a folder of such a name, as /home/ray/ of Ray's own images.
            return next((frame for frame in frames if not OF_A_LIBRARY.search(frame)), None)
    return None


def end(processes: Sequence[Process]) -> list[int]:
    """SIGKILL; the ranks whose processes are gone then. Never another process that has got the number since."""
    for process in processes:
        if born(process.pid) == process.born:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + ENDS_S
    while time.monotonic() < deadline and not all(map(_gone, processes)):
        time.sleep(0.05)
    return [process.rank for process in processes if _gone(process)]


def _gone(process: Process) -> bool:
    """Also where only its entry is left, until its parent asks for it."""
    return born(process.pid) != process.born or _status(process.pid).get("State", "Z")[:1] in "ZX"
