"""metrics.jsonl outlives kills: a torn line costs itself only, and a repeated step counts once."""

from __future__ import annotations

import math
from pathlib import Path

from launcher.train.metrics import FILE, MetricsLog, last_of_each_step, read


def write_steps(run_dir: Path, steps: range, attempt: int) -> None:
    log = MetricsLog(run_dir, writes=True)
    for step in steps:
        log.write("step", step=step, loss=step / 3, attempt=attempt)
    log.close()


def test_floats_come_back_to_the_last_bit(tmp_path: Path) -> None:
    values = [1 / 3, 1e-300, 0.1 + 0.2, 5.725943268033704]
    log = MetricsLog(tmp_path, writes=True)
    log.write("step", step=1, values=values)
    log.write("step", step=2, values=[math.nan])
    log.close()
    first, second = read(tmp_path)
    assert first["values"] == values
    assert first["kind"] == "step"
    assert math.isnan(second["values"][0])


def test_every_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, writes=True)
    log.write("step", step=1)
    assert [record["step"] for record in read(tmp_path)] == [1]
    log.close()


def test_a_torn_last_line_costs_itself_only(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4), attempt=1)
    whole = (tmp_path / FILE).read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for cut in range(1, len(last)):
        (tmp_path / FILE).write_bytes(whole[:-cut])
        assert [record["step"] for record in read(tmp_path)] == ([1, 2, 3] if cut == 1 else [1, 2])
        write_steps(tmp_path, range(3, 5), attempt=2)
        found = last_of_each_step(tmp_path)
        assert sorted(found) == [1, 2, 3, 4]
        assert [found[step]["attempt"] for step in sorted(found)] == [1, 1, 2, 2]


def test_after_a_restart_the_last_line_of_a_step_counts(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 6), attempt=1)
    write_steps(tmp_path, range(3, 8), attempt=2)
    log = MetricsLog(tmp_path, writes=True)
    log.write("eval", step=7, loss=9.0)
    log.close()
    found = last_of_each_step(tmp_path)
    assert {step: record["attempt"] for step, record in found.items()} == {1: 1, 2: 1, 3: 2, 4: 2, 5: 2, 6: 2, 7: 2}
    assert {step: record["loss"] for step, record in last_of_each_step(tmp_path, "eval").items()} == {7: 9.0}


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, writes=False)
    log.write("step", step=1)
    log.close()
    assert not list(tmp_path.iterdir())
    assert list(read(tmp_path)) == []
