"""A disk that fills up, turns read-only or vanishes under a run: it says so, trains on, and loses nothing committed."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint.layout import committed
from launcher.checkpoint.manifest import verify
from launcher.plan.plan import Plan
from launcher.store.folder import FolderStore
from launcher.train.metrics import read
from launcher.train.verdict import Verdict
from tests.disks import fill, mounted
from tests.distributed.lives import Forked, losses
from tests.distributed.runs import open_alone, tiny_run, variant

pytestmark = pytest.mark.distributed

STEPS, EVERY = 400, 20
DISK_BYTES = 16 * 2**20


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    root = tmp_path_factory.mktemp("disks")
    changes = {"max_steps": STEPS, "total_steps": STEPS, "checkpoint_every_steps": EVERY, "eval_every_steps": STEPS}
    return variant(tiny_run(root), "none", **changes)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    with mounted(tmp_path / "disk", f"{DISK_BYTES}") as where:
        yield where


@contextlib.contextmanager
def running(plan: Plan, disk: Path, tmp_path: Path) -> Iterator[tuple[Plan, Forked]]:
    """The run on the disk, two ranks at ZeRO 3, past its first checkpoints."""
    run_dir = disk / "runs" / "first"
    run_dir.parent.mkdir()
    plan = plan.model_copy(update={"run_dir": str(run_dir), "location": str(run_dir)})
    open_alone(plan)
    life = Forked(plan, 2, tmp_path)
    try:
        wait_until(life, lambda: len(committed(FolderStore(run_dir))) >= 2)
        yield plan, life
    finally:
        life.end(kill=True)


def wait_until(life: Forked, condition: Callable[[], bool]) -> None:
    while not condition():
        assert life.running(), life.log.read_text()[-3000:]


def said(plan: Plan, kind: str) -> list[dict[str, Any]]:
    return [record for record in read(Path(plan.run_dir)) if record["kind"] == kind]


def check_end(plan: Plan, life: Forked) -> None:
    """It trained every step, said which saves failed, and its checkpoints are whole."""
    assert life.end(kill=False) == [0, 0], life.log.read_text()[-3000:]
    verdict = Verdict.load(Path(plan.run_dir))
    assert verdict is not None
    assert verdict.kind == "finished"
    there = committed(FolderStore(Path(plan.run_dir)))
    assert there[-1].step == STEPS
    for checkpoint in there:
        verify(checkpoint)
    assert len(losses(plan)) == STEPS


def test_full(plan: Plan, disk: Path, tmp_path: Path) -> None:
    with running(plan, disk, tmp_path) as (plan, life):
        filler = fill(disk)
        wait_until(life, lambda: "is not saved" in life.log.read_text())
        before = committed(FolderStore(Path(plan.run_dir)))
        assert before
        filler.unlink()
        check_end(plan, life)
        (failed, *_) = said(plan, "checkpoint_failed")
        assert "No space left on device" in failed["message"]
        assert failed["newest"] == before[-1].step


@contextlib.contextmanager
def taken_away(disk: Path, aside: Path) -> Iterator[None]:
    """Within the block nothing is mounted where the disk was, or what the block mounts; then it is back."""
    aside.mkdir()
    mount("--bind", aside.with_name("disk"), aside)
    subprocess.run(["umount", "-l", disk], check=True)
    try:
        yield
        subprocess.run(["umount", "-l", disk], capture_output=True, check=False)
        mount("--bind", aside, disk)
    finally:
        subprocess.run(["umount", "-l", aside], check=True)


def mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


def test_read_only(plan: Plan, disk: Path, tmp_path: Path) -> None:
    with running(plan, disk, tmp_path) as (plan, life):
        # A mount with a file open for writing cannot be made read-only: the disk comes back as another one.
        with taken_away(disk, tmp_path / "aside"):
            mount("--bind", tmp_path / "aside", disk)
            mount("-o", "remount,bind,ro", disk)
            wait_until(life, lambda: "Read-only file system" in life.log.read_text())
            wait_until(life, lambda: "is not saved" in life.log.read_text())
        check_end(plan, life)
        assert any("Read-only file system" in failed["message"] for failed in said(plan, "checkpoint_failed"))


def test_vanished(plan: Plan, disk: Path, tmp_path: Path) -> None:
    with running(plan, disk, tmp_path) as (plan, life):
        with taken_away(disk, tmp_path / "aside"):
            wait_until(life, lambda: "is not saved" in life.log.read_text())
            assert list(disk.iterdir()) == [], "nothing is written where the disk was"
        check_end(plan, life)
        assert "vanished" in said(plan, "checkpoint_failed")[0]["message"]
