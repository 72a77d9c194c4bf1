"""Why a run has changed its size, in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.train.metrics import MetricsLog, latest_start
from launcher.train.resize import resized


def ranks(*hosts: str) -> list[dict[str, str]]:
    return [{"host": host} for host in hosts]


@pytest.mark.parametrize(
    ("before", "now", "why"),
    [
        (("a", "b", "c"), ("a", "b"), "c is gone"),
        (("a", "b"), ("a", "b", "c"), "c joined"),
        (("a", "a", "b"), ("a", "c"), "b is gone, c joined, a has room for 1 instead of 2"),
        (("a",), ("a", "a"), "a has room for 2 instead of 1"),
    ],
)
def test_the_machines_say_why(before: tuple[str, ...], now: tuple[str, ...], why: str) -> None:
    start = {"attempt": "3.1", "world_size": len(before), "workers": ranks(*before)}
    assert resized(start, "3.2", ranks(*now)) == {"from": len(before), "to": len(now), "why": why}
    assert resized(start, "4.1", ranks(*now))["why"] == "it was resumed so"


def test_another_machine_is_no_other_size() -> None:
    assert resized({"attempt": "1.1", "world_size": 1, "workers": ranks("a")}, "1.2", ranks("b")) == {}
    assert resized(None, "1.1", ranks("b")) == {}


def test_the_latest_start_is_found(tmp_path: Path) -> None:
    assert latest_start(tmp_path) is None
    metrics = MetricsLog(tmp_path, "1.1", writes=True)
    for size in (3, 2):
        metrics.write("start", step=0, world_size=size)
        metrics.write("step", step=1)
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "start", "world_si')  # torn
    found = latest_start(tmp_path)
    assert found is not None
    assert found["world_size"] == 2
