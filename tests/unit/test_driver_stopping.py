"""What Ctrl-C means while the workers train, and while the run waits for room."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.driver.trainer import Stopping
from launcher.errors import Interrupted
from launcher.train.verdict import STOP_FILE

WAITING = {"kind": "waiting", "message": "2 workers are needed", "wait_s": 600.0}


def training(run_dir: Path, location: str | None = None) -> tuple[Stopping, list[dict[str, Any]]]:
    """Of launch 1, whose workers have saved step 5, and what its listener is told from now on."""
    told: list[dict[str, Any]] = []
    plan = SimpleNamespace(
        run_dir=str(run_dir), location=location or str(run_dir), lifecycle=SimpleNamespace(grace_s=25.0)
    )
    stopping = Stopping(plan, 1, told.append)  # type: ignore[arg-type]
    stopping.heard({"kind": "start", "attempt": "1.1", "step": 0})
    stopping.heard({"kind": "checkpoint", "attempt": "1.1", "step": 5})
    told.clear()
    return stopping, told


def ends(stopping: Stopping, number: int) -> Interrupted:
    with pytest.raises(Interrupted) as caught:
        stopping.act()
    assert caught.value.exit_code == 128 + number
    return caught.value


def test_a_run_that_waits_for_room_ends_at_once(tmp_path: Path) -> None:
    stopping, _ = training(tmp_path)
    stopping.told(WAITING)
    stopping.act()
    stopping.on_signal(signal.SIGTERM, None)
    said = ends(stopping, signal.SIGTERM).message
    assert said == "stopped while waiting for room; steps since the checkpoint of step 5 are lost"


def test_so_does_one_whose_workers_are_lost_before_they_have_saved(tmp_path: Path) -> None:
    stopping, told = training(tmp_path)
    stopping.on_signal(signal.SIGINT, None)
    stopping.act()
    assert [event["kind"] for event in told] == ["stopping"]
    stopping.told(WAITING)
    assert ends(stopping, signal.SIGINT).message.startswith("stopped while waiting for room; ")


@pytest.mark.parametrize(("location", "over"), [(None, "start"), ("memory://bucket/run", "placed")])
def test_the_waiting_is_over_when_the_workers_are_there(tmp_path: Path, location: str | None, over: str) -> None:
    stopping, told = training(tmp_path, location)
    stopping.told(WAITING)
    if over == "placed":  # what they write comes with their first checkpoint
        stopping.told({"kind": "placed"})
    else:
        stopping.heard({"kind": "start", "attempt": "1.2", "step": 5})
    stopping.on_signal(signal.SIGINT, None)
    stopping.act()
    assert told[-1]["kind"] == "stopping"
    assert (tmp_path / STOP_FILE).read_text() == "SIGINT\n"
