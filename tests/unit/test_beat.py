"""What a rank tells of itself, on real process groups."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import timeit
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launcher.checkpoint.layout import GROUP
from launcher.train import beat
from launcher.train.beat import Doing, Pulse, born, collectives, mark, used


@pytest.fixture(autouse=True)
def doing(monkeypatch: pytest.MonkeyPatch) -> Doing:
    fresh = Doing()
    monkeypatch.setattr(beat, "doing", fresh)
    return fresh


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one rank."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_marks_tell_the_part_the_step_and_that_something_moves(doing: Doing) -> None:
    pulse = Pulse(3, "node")
    first = pulse.beat()
    assert (first.rank, first.node, first.part, first.patient) == (3, "node", "starting", True)
    doing.warm = True
    mark("data", 12)
    mark("forward")
    second = pulse.beat()
    assert (second.part, second.step, second.patient) == ("forward", 12, False)
    assert second.counts > first.counts
    mark("checkpoint")
    assert pulse.beat().patient, "writing is progress"


def test_the_first_step_may_compile(doing: Doing) -> None:
    mark("forward", 1)
    assert Pulse(0).beat().patient


def test_a_mark_costs_less_than_a_microsecond() -> None:
    assert min(timeit.repeat(lambda: mark("forward"), number=10_000, repeat=5)) / 10_000 < 1e-6


def test_torch_counts_the_collectives_of_training_apart_from_those_of_checkpoints(alone: None) -> None:
    saves = dist.new_group(group_desc=GROUP)
    before = collectives()
    for _ in range(5):
        dist.all_reduce(torch.ones(2))
    dist.barrier(saves)
    after = collectives()
    assert (after[0] - before[0], after[1] - before[1]) == (5, 1)


def test_without_a_process_group_there_are_none() -> None:
    assert collectives() == (0, 0)
    assert beat.waits_in("forward") is None


def test_the_collective_that_does_not_end_is_named(tmp_path: Path) -> None:
    """Rank 0 enters an all-reduce that rank 1 never joins."""
    code = (
        "import sys, threading, torch, torch.distributed as dist\n"
        "from launcher.train.beat import Pulse, mark\n"
        "rank = int(sys.argv[1])\n"
        "dist.init_process_group('gloo', init_method='file://' + sys.argv[2], rank=rank, world_size=2)\n"
        "dist.barrier()\n"
        "if rank == 0:\n"
        "    threading.Thread(target=dist.all_reduce, args=(torch.ones(2),), daemon=True).start()\n"
        "    pulse = Pulse(0)\n"
        "    while pulse.beat().entered < 2: pass\n"
        "    beats = [pulse.beat().waits_in for _ in range(5)]\n"
        "    print(beats, flush=True)\n"
        "sys.stdin.read()\n"
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path / "store")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        assert ranks[0].stdout is not None
        said = ranks[0].stdout.readline()
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    assert said.strip() == "[None, None, 'all_reduce 2', 'all_reduce 2', 'all_reduce 2']"


def test_what_a_process_uses_rises_with_what_it_does(tmp_path: Path) -> None:
    before, began = used(os.getpid()), time.process_time()
    while time.process_time() < began + 0.1:
        (tmp_path / "file").write_bytes(bytes(10_000))
    cpu_s, io_bytes = (after - earlier for after, earlier in zip(used(os.getpid()), before, strict=True))
    assert cpu_s >= 0.05
    assert io_bytes > 10_000


def test_a_process_that_is_gone_was_never_born() -> None:
    assert born(2**22 + 1) is None
