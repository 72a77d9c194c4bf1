"""Kill a run again and again, half of the time inside a save: nothing committed is lost, and it goes on as if never
killed.

    pytest -m long tests/distributed/test_crash_fuzz.py                        200 kills
    SLIPWAY_KILLS=1000 SLIPWAY_SEED=7 pytest -m long tests/distributed/test_crash_fuzz.py -s
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint.layout import Checkpoint, committed, newest_committed, steps
from launcher.checkpoint.lease import current
from launcher.checkpoint.manifest import verify
from launcher.plan.plan import Plan
from launcher.store.folder import FolderStore
from launcher.train.verdict import Verdict
from tests.distributed.lives import Forked, Torchrun, losses, starts
from tests.distributed.runs import open_alone, tiny_run, variant

pytestmark = pytest.mark.distributed

STEPS, EVERY = 60, 3
LAYOUTS = [(2, 3), (2, 1), (2, 2), (1, 3), (2, 0)]
"""Ranks and ZeRO stage, drawn for each life."""
TOLERANCE = 1e-5


class Fuzz:
    """Lives of one run after another, each killed at a random moment, and what is found after each."""

    def __init__(self, plan: Plan, root: Path) -> None:
        self.plan, self.root = plan, root
        self.draw = random.Random(int(os.environ.get("SLIPWAY_SEED", "1")))
        self.runs = 0
        self.lives = 0
        self.counts: Counter[str] = Counter()
        self.worst = 0.0
        self.expected: list[float] = []
        self.new_run()

    def reference(self) -> list[float]:
        """The losses of the uninterrupted run, one rank at ZeRO 0."""
        plan = variant(self.plan, "uninterrupted")
        open_alone(plan)
        life = self.start(plan, (1, 0))
        assert life.end(kill=False) == [0], life.log.read_text()[-3000:]
        return losses(plan)

    def new_run(self) -> None:
        self.run = variant(self.plan, f"run-{self.runs}")
        self.runs += 1
        open_alone(self.run)

    def start(self, plan: Plan, layout: tuple[int, int], torchrun: bool = False, **lease: Any) -> Any:
        self.lives += 1
        scratch = self.root / f"life-{self.lives}"
        scratch.mkdir()
        world_size, zero = layout
        changes = {"layout": plan.layout.model_copy(update={"zero": zero, "workers": world_size})}
        plan = plan.model_copy(update=changes)
        if torchrun:
            plan.save(Path(plan.run_dir) / "plan.json")
            return Torchrun(plan, world_size, scratch)
        return Forked(plan, world_size, scratch, **lease)

    def kill_once(self, torchrun: bool = False) -> None:
        """One life: from the newest checkpoint, to a SIGKILL or to the run's end; then everything is looked at."""
        run_dir = Path(self.run.run_dir)
        store, lived = FolderStore(run_dir), len(starts(run_dir))
        before = newest_committed(store)
        life = self.start(self.run, self.draw.choice(LAYOUTS), torchrun)
        killed = self.kill(life, store)
        promised = newest_committed(store)
        codes = life.end(kill=killed)
        log = life.log.read_text()
        if not killed:
            assert set(codes) == {0}, log[-3000:]
        begun = starts(run_dir)[lived:]
        assert begun in ([], [before.step if before else 0]), "not gone on from the newest checkpoint"
        self.look(store, promised)
        if Verdict.load(run_dir) is not None:
            self.counts["finished runs"] += 1
            assert len(losses(self.run)) == STEPS
            self.new_run()

    def kill(self, life: Any, store: FolderStore) -> bool:
        """SIGKILL one rank or all, inside a save or at any moment; False where the run ended before that."""
        inside = self.draw.random() < 0.5
        deadline = time.monotonic() + self.draw.uniform(1.0, 6.0)
        while life.running() and time.monotonic() < deadline:
            time.sleep(0.001)
        if inside:
            known = len(committed(store))
            while life.running() and not self.saving(store) and len(committed(store)) <= known + 3:
                time.sleep(0.0002)
            until = time.monotonic() + self.draw.uniform(0.0, 0.02)
            while time.monotonic() < until:
                pass
        if not life.running():
            return False
        pids = life.pids
        victims = pids if self.draw.random() < 0.5 else self.draw.sample(pids, min(1, len(pids)))
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.counts["kills"] += bool(victims)
        self.counts["inside a save"] += self.saving(store)
        self.counts["of all ranks"] += len(victims) == len(pids)
        return True

    @staticmethod
    def saving(store: FolderStore) -> bool:
        """Whether the life that began last has staged a step and not committed it; what an earlier one left does not
        count."""
        attempt = current(store)
        return any(attempt in checkpoint.attempts() and not checkpoint.is_committed() for checkpoint in steps(store))

    def look(self, store: FolderStore, promised: Checkpoint | None) -> None:
        """Everything committed is whole, nothing that was is gone, and the losses are the uninterrupted run's."""
        there = committed(store)
        for checkpoint in there:
            verify(checkpoint)
        if promised is not None:
            assert there[-1].step >= promised.step, "a committed step is lost"
        found = losses(self.run)
        errors = [abs(a - b) / b for a, b in zip(found, self.expected, strict=False)]
        self.worst = max([self.worst, *errors])
        assert self.worst <= TOLERANCE, (errors, found)


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzz]:
    root = tmp_path_factory.mktemp("fuzz")
    changes = {"max_steps": STEPS, "total_steps": STEPS, "checkpoint_every_steps": EVERY, "eval_every_steps": 25}
    fuzz = Fuzz(variant(tiny_run(root), "none", **changes, keep_last=3), root)
    fuzz.expected = fuzz.reference()
    yield fuzz
    print(dict(fuzz.counts), f"worst error of a loss {fuzz.worst:.1e}")


def test_a_few_kills(fuzz: Fuzz) -> None:
    while fuzz.counts["kills"] < 5:
        fuzz.kill_once()


def test_a_healed_partition_damages_nothing(fuzz: Fuzz) -> None:
    """A launcher is cut off inside a save, another takes the run over, then the first wakes up and goes on."""
    plan = variant(fuzz.plan, "partition")
    open_alone(plan)
    store = FolderStore(Path(plan.run_dir))
    orphan = fuzz.start(plan, (2, 3), elsewhere=True)
    while len(committed(store)) < 2 or not fuzz.saving(store):
        assert orphan.running()
    for pid in orphan.pids:
        os.kill(pid, signal.SIGSTOP)
    refused = fuzz.start(plan, (1, 0), dead_after_s=60.0)
    assert refused.end(kill=False) == [2]
    assert "in use by a launcher on" in refused.log.read_text()
    heartbeat = Path(plan.run_dir) / "lease" / "00000001.beat"
    while time.time() - heartbeat.stat().st_mtime < 1.5:
        time.sleep(0.05)
    successor = fuzz.start(plan, (2, 1))
    while len(starts(Path(plan.run_dir))) < 2 or newest_committed(store) == committed(store)[0]:
        assert successor.running(), successor.log.read_text()[-3000:]
        time.sleep(0.01)
    for pid in orphan.pids:
        os.kill(pid, signal.SIGCONT)
    assert set(orphan.end(kill=False)) == {1}
    assert "has taken" in orphan.log.read_text()
    assert successor.end(kill=False) == [0, 0]
    for checkpoint in committed(store):
        verify(checkpoint)
    assert not fuzz.saving(store)
    found = losses(plan)
    assert len(found) == STEPS
    assert max(abs(a - b) / b for a, b in zip(found, fuzz.expected, strict=True)) <= TOLERANCE
    verdict = Verdict.load(Path(plan.run_dir))
    assert verdict is not None
    assert (verdict.kind, verdict.launch) == ("finished", 2)


@pytest.mark.long
def test_many_kills(fuzz: Fuzz) -> None:
    wanted = fuzz.counts["kills"] + int(os.environ.get("SLIPWAY_KILLS", "200"))
    while fuzz.counts["kills"] < wanted:
        fuzz.kill_once()


@pytest.mark.long
def test_kills_under_torchrun(fuzz: Fuzz) -> None:
    for _ in range(10):
        fuzz.kill_once(torchrun=True)
