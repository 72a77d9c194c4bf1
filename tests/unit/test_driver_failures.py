"""The first of many failures is the one that the user is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError, RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from launcher.driver.failures import Failure, collect, death, describe, root_cause

GLOO = "RuntimeError: Read error [10.0.0.2]:32384: Connection reset by peer"


def failure(rank: int, message: str, time: float | None = None, died: bool = False) -> Failure:
    return Failure(rank, "host", message, time, died)


def test_a_process_that_died_comes_before_what_its_neighbours_say() -> None:
    echoes = [failure(0, "ValueError: earlier", 1.0), failure(2, GLOO, 2.0)]
    assert root_cause([*echoes, failure(1, "the process died", died=True)]).rank == 1


def test_an_error_comes_before_its_echoes_even_if_those_were_quicker() -> None:
    assert root_cause([failure(0, GLOO, 1.0), failure(3, "ValueError: boom", 2.0), failure(2, GLOO, 0.5)]).rank == 3


def test_of_several_errors_the_first_in_time() -> None:
    assert root_cause([failure(0, "KeyError: a", 2.0), failure(1, "KeyError: b", 1.0)]).rank == 1


def test_of_echoes_alone_the_first() -> None:
    assert root_cause([failure(0, GLOO, 2.0), failure(1, GLOO, 1.0)]).rank == 1


def test_ray_says_who_died_and_the_ranks_themselves_say_why_they_failed() -> None:
    dead = WorkerHealthCheckFailedError("A worker health check failed", failure=RayActorError())
    recorded = [{"rank": 0, "host": "a", "time": 5.0, "type": "RuntimeError", "message": "Connection reset by peer"}]
    found = {f.rank: f for f in collect({0: RuntimeError("long text"), 1: dead}, recorded, ["a", "b"])}
    assert found[1] == Failure(1, "b", "its process died", None, True)
    assert found[0] == Failure(0, "a", "RuntimeError: Connection reset by peer", 5.0, False)
    assert found[0].collateral


KILLED = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was "
    "killed by the OOM killer due to high memory usage, (2) ray stop --force was called"
)
LOST = (
    "The actor died because its node has died. Node Id: 59c0\n\tthe actor's node was terminated unexpectedly: health "
    "check failed due to missing too many heartbeats"
)


@pytest.mark.parametrize(
    ("said", "meaning"),
    [
        (
            RayActorError(error_msg=KILLED),
            "its process was killed, as the kernel does when memory runs out, or it crashed",
        ),
        (RayActorError(error_msg=LOST), "its machine was lost: it is off, cut off, or Ray on it ended"),
        (ActorDiedError(), "its process died"),
        (ActorUnavailableError("End of file", None), "the connection to its process was lost"),
        (OutOfMemoryError("killed"), "Ray killed its process, as the machine was running out of memory"),
        (RuntimeError("its node has died"), None),
    ],
)
def test_what_ray_knows_of_a_death(said: Exception, meaning: str | None) -> None:
    assert death(said) == meaning


def test_the_cause_comes_first_and_then_the_ranks_last_lines(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "worker-1.log").write_text("".join(f"line {i}\n" for i in range(40)))
    lines = describe(failure(1, "ValueError: boom", 1.0), tmp_path, 2).splitlines()
    assert lines[0] == "rank 1 on host failed: ValueError: boom"
    assert lines[1] == "the run was restarted 2 times from its last checkpoint before giving up"
    assert lines[-1] == "  line 39"
    assert len(lines) == 3 + 12
