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
LAST_LINES = 12


@dataclass(frozen=True)
class Failure:
    """One rank's end. `died`: the process was gone without an exception (killed, out of memory, lost node)."""

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
    from ray.exceptions import RayActorError

    latest = {int(record["rank"]): record for record in recorded}
    found = []
    for rank, error in worker_failures.items():
        # Ray Train wraps the death of a worker in its own failed health check.
        died = isinstance(getattr(error, "health_check_failure", error), RayActorError)
        record = latest.get(rank) if not died else None
        message = f"{record['type']}: {record['message']}" if record else _first_line(error, died)
        host = record["host"] if record else hosts[rank] if rank < len(hosts) else None
        found.append(Failure(rank, host, message, record["time"] if record else None, died))
    return found


def _first_line(error: BaseException, died: bool) -> str:
    if died:
        return "the process died (killed, out of memory, or its node was lost)"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def recorded_failures(file: Path) -> list[dict[str, Any]]:
    """What the workers wrote down, oldest first."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def describe(cause: Failure, run_dir: Path, attempts: int) -> str:
    """The message of a failed run: root cause first, then the last lines that rank printed."""
    where = f" on {cause.host}" if cause.host else ""
    text = f"rank {cause.rank}{where} failed: {cause.message}"
    if attempts:
        times = "once" if attempts == 1 else f"{attempts} times"
        text += f"\nthe run was restarted {times} from its last checkpoint before giving up"
    log = run_dir / "logs" / f"worker-{cause.rank}.log"
    if log.exists():
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        text += f"\nlast lines of {log}:\n" + "\n".join(f"  {line}" for line in last)
    return text
