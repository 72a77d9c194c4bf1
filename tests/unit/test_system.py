"""What the machine does, sampled while something runs: against what this machine really does."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest

from launcher.train import system
from launcher.train.metrics import MetricsLog, read
from launcher.train.system import Machine, sampled


def burn(seconds: float) -> None:
    """Keep every core busy that this process may use."""
    ends = time.monotonic() + seconds
    data = bytes(1 << 20)

    def work() -> None:
        from zlib import crc32

        while time.monotonic() < ends:
            crc32(data)  # lets go of the interpreter's lock

    threads = [threading.Thread(target=work) for _ in range(psutil.cpu_count() or 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_busy_machine_is_seen_as_busy_as_the_kernel_counts() -> None:
    machine, before = Machine(), psutil.cpu_times()
    burn(0.4)
    busy, after = machine.look(), psutil.cpu_times()
    machine.close()
    idle = after.idle + after.iowait - before.idle - before.iowait
    kernel = 100 * (1 - idle / (sum(after[:8]) - sum(before[:8])))
    assert busy["host"] == socket.gethostname()
    assert busy["cpu_percent"] == pytest.approx(kernel, abs=10)
    assert busy["cpu_percent"] > 100 / (psutil.cpu_count() or 1) / 2, "of a core at least half was ours"
    memory = psutil.virtual_memory()
    assert busy["memory_total_bytes"] == memory.total
    assert abs(busy["memory_bytes"] - (memory.total - memory.available)) < 0.05 * memory.total
    if not Path("/proc/driver/nvidia").exists():
        assert "gpus" not in busy, "without a driver nothing is said of GPUs, whatever packages are there"


def test_the_first_rank_writes_beside_the_loop_and_each_line_is_whole(tmp_path: Path) -> None:
    loop = MetricsLog(tmp_path, "1.1", writes=True)
    with sampled(tmp_path, "1.1", rank=0, every_s=0.02):
        ends = time.monotonic() + 0.5
        written = 0
        while time.monotonic() < ends:
            loop.write("step", step=written, padding="x" * 500)
            written += 1
    loop.close()
    # Whoever opens the file amid a line of the other begins a new one to be safe, which leaves an empty one.
    lines = list(filter(None, (tmp_path / "metrics.jsonl").read_text().splitlines()))
    assert len(lines) == len(list(map(json.loads, lines))), "no line is torn by another"
    kinds = [record["kind"] for record in read(tmp_path)]
    assert kinds.count("step") == written
    assert kinds.count("system") >= 3
    assert not [thread for thread in threading.enumerate() if thread.name == "system"], "it ends with the block"


def test_every_other_host_has_a_file_of_its_own_and_other_ranks_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "logs").mkdir()
    with sampled(tmp_path, "1.1", rank=8, every_s=60):
        pass  # a block that is shorter than the interval is looked at once, at its end
    (record,) = map(json.loads, (tmp_path / "logs" / f"system-{socket.gethostname()}.jsonl").read_text().splitlines())
    assert (record["kind"], record["attempt"]) == ("system", "1.1")
    assert not (tmp_path / "metrics.jsonl").exists()
    monkeypatch.setenv("LOCAL_RANK", "1")
    (tmp_path / "other").mkdir()
    with sampled(tmp_path / "other", "1.1", rank=1, every_s=0.01):
        time.sleep(0.05)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with sampled(tmp_path / "other", "1.1", rank=0, every_s=None):
        time.sleep(0.05)
    assert list((tmp_path / "other").iterdir()) == []


def test_nothing_that_goes_wrong_in_it_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(system.Machine, "look", lambda self: 1 / 0)
    with sampled(tmp_path, "1.1", rank=0, every_s=0.01):
        time.sleep(0.1)
    assert [record.getMessage() for record in caplog.records] == [
        "what the machine does is not measured any more: division by zero"
    ]
    monkeypatch.undo()
    with sampled(tmp_path / "vanished", "1.1", rank=0, every_s=0.01):
        time.sleep(0.05)
    assert not (tmp_path / "vanished").exists()


def test_the_cpus_energy_goes_on_where_its_counter_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files such as the kernel has; containers seldom have them."""
    for name, kind, joules in (("0", "package-0", 90), ("0:0", "dram", 5), ("1", "psys", 7)):
        zone = tmp_path / f"intel-rapl:{name}"
        zone.mkdir()
        (zone / "name").write_text(kind + "\n")
        (zone / "energy_uj").write_text(f"{joules * 10**6}\n")
        (zone / "max_energy_range_uj").write_text(f"{100 * 10**6}\n")
    monkeypatch.setattr(system, "POWERCAP", tmp_path)
    machine = Machine()
    counter = tmp_path / "intel-rapl:0" / "energy_uj"
    found = [machine.look()["energy_j"]]
    for joules in (98, 3, 50):
        counter.write_text(f"{joules * 10**6}\n")
        found.append(machine.look()["energy_j"])
    assert found == [0, 8, 13, 60]
    counter.unlink()
    assert "energy_j" not in machine.look(), "what cannot be read is left out"


def test_a_look_costs_next_to_nothing() -> None:
    machine = Machine()
    start = time.process_time()
    for _ in range(100):
        machine.look()
    assert (time.process_time() - start) / 100 < 0.005, "0.06 ms on an idle core, every 10 s"
