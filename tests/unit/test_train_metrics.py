"""metrics.jsonl outlives kills, bad disks and orphans: a torn line costs itself only, a repeated step counts once."""

from __future__ import annotations

import json
import logging
import math
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.train import metrics
from launcher.train.metrics import FILE, MetricsLog, last_of_each_step, read
from tests.disks import fill, mounted


def write_steps(run_dir: Path, steps: range, attempt: str) -> None:
    log = MetricsLog(run_dir, attempt, writes=True)
    for step in steps:
        log.write("step", step=step, loss=step / 3)
    log.close()


def steps_of(run_dir: Path) -> list[int]:
    return [record["step"] for record in read(run_dir) if record["kind"] == "step"]


def test_floats_come_back_to_the_last_bit(tmp_path: Path) -> None:
    values = [1 / 3, 1e-300, 0.1 + 0.2, 5.725943268033704]
    log = MetricsLog(tmp_path, "1.1", writes=True)
    log.write("step", step=1, values=values)
    log.write("step", step=2, values=[math.nan])
    log.close()
    first, second = read(tmp_path)
    assert first["values"] == values
    assert first["kind"] == "step"
    assert math.isnan(second["values"][0])


def test_a_line_names_its_attempt_right_after_kind_and_time(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, "3.2", writes=True)
    log.write("start", step=7)
    log.close()
    [record] = read(tmp_path)
    assert list(record) == ["kind", "time", "attempt", "step"]
    assert record["attempt"] == "3.2"


def test_every_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, "1.1", writes=True)
    log.write("step", step=1)
    assert steps_of(tmp_path) == [1]
    log.close()


def test_a_torn_last_line_costs_itself_only(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4), "1.1")
    whole = (tmp_path / FILE).read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for cut in range(1, len(last)):
        (tmp_path / FILE).write_bytes(whole[:-cut])
        assert steps_of(tmp_path) == ([1, 2, 3] if cut == 1 else [1, 2])
        write_steps(tmp_path, range(3, 5), "1.2")
        found = last_of_each_step(tmp_path)
        assert sorted(found) == [1, 2, 3, 4]
        assert [found[step]["attempt"] for step in sorted(found)] == ["1.1", "1.1", "1.2", "1.2"]


def test_after_a_restart_the_last_line_of_a_step_counts(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 6), "1.1")
    write_steps(tmp_path, range(3, 8), "1.2")
    log = MetricsLog(tmp_path, "1.2", writes=True)
    log.write("eval", step=7, loss=9.0)
    log.close()
    found = last_of_each_step(tmp_path)
    by_attempt = {step: record["attempt"] for step, record in found.items()}
    assert by_attempt == dict.fromkeys((1, 2), "1.1") | dict.fromkeys((3, 4, 5, 6, 7), "1.2")
    assert {step: record["loss"] for step, record in last_of_each_step(tmp_path, "eval").items()} == {7: 9.0}


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, "1.1", writes=False)
    log.write("step", step=1)
    log.close()
    assert not list(tmp_path.iterdir())
    assert list(read(tmp_path)) == []


@pytest.mark.parametrize(("orphan", "successor"), [("9.4", "10.1"), ("3.9", "3.10"), ("2.10", "3.1")])
def test_what_an_orphan_writes_after_its_successor_began_does_not_count(
    tmp_path: Path, orphan: str, successor: str
) -> None:
    """As two real writers with the file open at once; attempts are compared as numbers, not as text."""
    old, new = MetricsLog(tmp_path, orphan, writes=True), MetricsLog(tmp_path, successor, writes=True)
    old.write("start", step=0)
    old.write("step", step=1, loss=1.0)
    new.write("damaged_checkpoint", message="m")
    old.write("step", step=2, loss=2.0)
    new.write("start", step=1)
    old.write("step", step=3, loss=-1.0)
    old.write("start", step=0)
    new.write("step", step=2, loss=2.5)
    old.write("step", step=2, loss=-1.0)
    new.write("step", step=3, loss=3.0)
    old.close()
    new.close()
    assert [record["loss"] for record in read(tmp_path) if record["kind"] == "step"] == [1.0, 2.0, 2.5, 3.0]
    assert [record["attempt"] for record in read(tmp_path) if record["kind"] == "start"] == [orphan, successor]


def test_lines_without_an_attempt_and_what_is_no_line_of_ours(tmp_path: Path) -> None:
    lines = [
        '{"kind": "start", "attempt": "2.1"}',
        '{"kind": "step", "step": 1}',
        "17",
        '{"step": 2}',
        '{"kind": "step", "step": 3, "attempt": "gone"}',
        '\0\0\0{"kind": "step", "step": 4}',
    ]
    (tmp_path / FILE).write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n")
    assert steps_of(tmp_path) == [1, 3]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB with a run's folder in it."""
    with mounted(tmp_path / "small", "1m") as disk:
        (disk / "run").mkdir()
        yield disk


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_full_disk_loses_no_line_and_is_said_once(small: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Twice over; the space runs out inside a line, so that its torn half lies in the file."""
    run_dir, step = small / "run", 0
    log = MetricsLog(run_dir, "1.1", writes=True)
    for outage in (1, 2):
        filler = fill(small)
        before = step
        while len(warnings(caplog)) < outage:
            step += 1
            log.write("step", step=step, text="x" * 700)
        assert step - before <= 6, "a page of 4096 bytes holds five such lines"
        assert not (run_dir / FILE).read_bytes().endswith(b"\n"), "half a line"
        for _ in range(50):
            step += 1
            log.write("step", step=step)
        filler.unlink()
        step += 1
        log.write("step", step=step)
        assert steps_of(run_dir) == list(range(1, step + 1))
    log.close()
    assert len(warnings(caplog)) == 2
    assert "No space left on device" in warnings(caplog)[0]
    whole = [line for line in (run_dir / FILE).read_text().splitlines() if line.endswith("}")]
    assert len(whole) == len([json.loads(line) for line in whole]) == step, "no line twice"


def test_the_oldest_lines_go_first_and_are_counted(
    small: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics, "MOST_KEPT", 100)
    log = MetricsLog(small / "run", "1.1", writes=True)
    log.write("step", step=0)
    filler = fill(small)
    log.write("step", step=0, text="x" * 5000)
    for step in range(1, 251):
        log.write("step", step=step)
    filler.unlink()
    log.write("step", step=251)
    log.write("step", step=252)
    log.close()
    # 100 of 251 that failed (the long one too), and what was written after.
    assert [record.get("lines", record.get("step")) for record in read(small / "run")] == [0, 151, *range(151, 253)]
    assert [record["kind"] for record in read(small / "run")].count("metrics_lost") == 1
    assert len(warnings(caplog)) == 1


def test_a_disk_that_is_read_only_for_a_while(small: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = MetricsLog(small / "run", "1.1", writes=True)
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    for step in range(3):
        log.write("step", step=step)
    assert "Read-only file system" in warnings(caplog)[0]
    subprocess.run(["mount", "-o", "remount,rw", str(small)], check=True)
    log.write("step", step=3)
    log.close()
    assert steps_of(small / "run") == [0, 1, 2, 3]
    assert len(warnings(caplog)) == 1


def test_what_a_disk_never_takes_is_said_at_the_end(small: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = MetricsLog(small / "run", "1.1", writes=True)
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    for step in range(3):
        log.write("step", step=step)
    log.close()
    assert len(warnings(caplog)) == 2
    assert warnings(caplog)[1].startswith("3 lines of ")


def test_a_vanished_mount_leaves_nothing_on_the_disk_below_it(small: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The run's folder is the mount point itself, which stays where the mount goes; then it comes back."""
    store = small.parent / "store"
    store.mkdir()
    subprocess.run(["mount", "--bind", str(store), str(small)], check=True)
    log = MetricsLog(small, "1.1", writes=True)
    log.write("step", step=1)
    (store / FILE).rename(store / "elsewhere")  # so that the descriptor still open does not hide the loss
    (store / "elsewhere").unlink()
    subprocess.run(["umount", "--lazy", str(small)], check=True)
    log.write("step", step=2)
    log.write("step", step=3)
    assert not (small / FILE).exists()
    subprocess.run(["mount", "--bind", str(store), str(small)], check=True)
    try:
        log.write("step", step=4)
        log.close()
        assert steps_of(store) == [2, 3, 4]
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)
    assert len(warnings(caplog)) == 1


def test_a_removed_folder_is_not_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    log = MetricsLog(run_dir, "1.1", writes=True)
    log.write("step", step=1)
    shutil.rmtree(run_dir)
    for step in range(2, 5):
        log.write("step", step=step)
    log.close()
    assert not run_dir.exists()
    assert "the file was deleted" in warnings(caplog)[0]
    assert warnings(caplog)[1] == f"3 lines of {run_dir / FILE} are lost"
    assert len(warnings(caplog)) == 2


def test_a_deleted_file_is_begun_anew(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, "1.1", writes=True)
    log.write("step", step=1)
    (tmp_path / FILE).unlink()
    log.write("step", step=2)
    log.write("step", step=3)
    log.close()
    assert steps_of(tmp_path) == [2, 3]
