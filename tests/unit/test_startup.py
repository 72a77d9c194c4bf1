"""Where the time before the first step goes: parts of the launcher and the worker, joined."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from launcher.bench.startup import PARTS, by_owner, page
from launcher.train import startup


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    startup.forget()
    yield
    startup.forget()


def test_where_nothing_has_begun_nothing_is_kept() -> None:
    startup.ended("data")
    assert startup.so_far() == []
    assert startup.conclude() is None


def test_this_process_began_before_now_and_after_its_parent() -> None:
    began = startup.process_start()
    assert time.time() - 86_400 < began < time.time()
    child = os.fork()
    if child == 0:
        os._exit(0 if abs(time.time() - startup.process_start()) < 0.5 else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_workers_parts_follow_the_launchers_and_a_part_that_comes_twice_is_summed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(startup, "process_start", lambda: 104.0)
    startup.begin()
    startup.ended("worker group", 107.0)
    startup.go_on([(startup.BEGIN, 100.0), ("command", 100.5), ("ray.init", 103.0)])
    for part, at in (("audit", 107.25), ("engine", 108.0), ("audit", 108.25)):
        startup.ended(part, at)
    told = startup.conclude()
    assert told == {
        "seconds": 8.25,
        "parts": {
            **{"command": 0.5, "ray.init": 2.5, "worker process": 1.0, "worker group": 3.0},
            **{"audit": 0.5, "engine": 0.75},
        },
    }
    assert startup.conclude() is None, "told once"


def test_a_process_that_was_there_before_and_a_clock_that_is_behind_take_no_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(startup, "process_start", lambda: 90.0)
    startup.begin()
    startup.ended("worker group", 107.0)
    startup.go_on([(startup.BEGIN, 100.0), ("command", 104.0)])
    told = startup.conclude()
    assert told is not None
    assert told["parts"] == {"command": 4.0, "worker process": 0.0, "worker group": 3.0}
    assert told["seconds"] == 7.0


def test_every_part_belongs_to_somebody_and_the_sums_are_the_whole() -> None:
    parts = dict.fromkeys(PARTS, 0.5)
    sums = by_owner(parts)
    assert sum(sums.values()) == pytest.approx(0.5 * len(PARTS))
    found = {"workers": 1, "joined": False, "machine": {"cpus": 2}, "runs": [{"seconds": 11.0, "parts": parts}]}
    text = page(found)
    assert "| **ours** | | **5.00 (5.00 to 5.00)** | |" in text
    assert "| **all** | | **11.00 (11.00 to 11.00)** | |" in text
