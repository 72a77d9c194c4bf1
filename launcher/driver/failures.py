"""Which failure came first. When one rank dies the others fail with it; the user needs the one that died."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLLATERAL = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "socket timeout",
    "timed out",
    "nccl error",
    "remote process exited",
    "application timeout",
    "gloo",
)
"""What collectives say in a rank whose neighbour is gone."""
DEATHS = {
    # Whether the machine itself or only its raylet is gone looks the same from the head.
    "its node has died": "its machine was lost: it is off, cut off, or Ray on it ended",
    "running low on memory": "Ray killed its process, as the machine was running out of memory",
    # SIGKILL and a crash look the same to Ray; a crash leaves its trace in the log whose last lines follow.
    "connection error code 2": "its process was killed, as the kernel does when memory runs out, or it crashed",
    "ray.kill": "its process was killed through Ray",
}
"""What Ray 2.60 says of a dead actor, the telling words first, and what that means to a person."""
LAST_LINES = 12


@dataclass(frozen=True)
class Failure:
    """One rank's end. `died`: the process was gone without an exception, and `message` says what Ray knows of it."""

    rank: int
    host: str | None
    message: str
    time: float | None
    died: bool

    @property
    def collateral(self) -> bool:
        return not self.died and any(sign in self.message.lower() for sign in COLLATERAL)


def root_cause(failures: Sequence[Failure]) -> Failure:
    """A process that died, else the first error that is not an echo of another rank's end, else the first of all."""

    def order(failure: Failure) -> tuple[bool, bool, float, int]:
        when = failure.time if failure.time is not None else float("inf")
        return (not failure.died, failure.collateral, when, failure.rank)

    return min(failures, key=order)


def collect(
    worker_failures: Mapping[int, BaseException], recorded: Sequence[Mapping[str, Any]], hosts: Sequence[str] = ()
) -> list[Failure]:
    """Ray's failure of each rank, joined with the latest record that the rank itself left, if it could.

    `hosts` are the ranks' machines, as the run wrote them down when it started.
    """
    latest = {int(record["rank"]): record for record in recorded}
    found = []
    for rank, error in worker_failures.items():
        # Ray Train wraps the death of a worker in its own failed health check.
        fate = death(getattr(error, "health_check_failure", error))
        record = latest.get(rank) if fate is None else None
        message = f"{record['type']}: {record['message']}" if record else fate or _last_line(error)
        host = record["host"] if record else hosts[rank] if rank < len(hosts) else None
        found.append(Failure(rank, host, message, record["time"] if record else None, fate is not None))
    return found


def death(error: BaseException | None) -> str | None:
    """What became of an actor's process, by what Ray says of it; None where it raised an error of its own."""
    from ray.exceptions import ActorUnavailableError, NodeDiedError, OutOfMemoryError, RayActorError

    if isinstance(error, OutOfMemoryError):
        return "Ray killed its process, as the machine was running out of memory"
    if isinstance(error, ActorUnavailableError):
        return "the connection to its process was lost"
    if not isinstance(error, (RayActorError, NodeDiedError)):
        return None
    said = str(error)
    for words, meaning in DEATHS.items():
        if words in said:
            return meaning
    return "its process died"


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def recorded_failures(file: Path) -> list[dict[str, Any]]:
    """What the workers wrote down, oldest first."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def restarted(attempts: int) -> str:
    """A further line of such a message; empty where the first failure was the last."""
    times = "once" if attempts == 1 else f"{attempts} times"
    return f"\nthe run was restarted {times} from its last checkpoint before giving up" if attempts else ""


def describe(cause: Failure, run_dir: Path, attempts: int) -> str:
    """The message of a failed run: root cause first, then the last lines that rank printed."""
    where = f" on {cause.host}" if cause.host else ""
    text = f"rank {cause.rank}{where} failed: {cause.message}"
    text += restarted(attempts)
    log = run_dir / "logs" / f"worker-{cause.rank}.log"
    if log.exists():
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        text += f"\nlast lines of {log}:\n" + "\n".join(f"  {line}" for line in last)
    return text
