"""One launcher a run: who may hold the folder, and when a holder counts as gone."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint import lease
from launcher.errors import RunFolderError

SPAWN = multiprocessing.get_context("spawn")


def race(run_dir: Path, start: Any, say: Connection) -> None:
    start.wait()
    try:
        held = lease.acquire(run_dir)
    except RunFolderError as error:
        say.send(("refused", str(error)))
    else:
        say.send(("held", held.attempt))
        say.close()
        time.sleep(60)


def racers(run_dir: Path, count: int) -> tuple[list[Any], list[tuple[str, Any]]]:
    """`count` processes that call acquire at the same instant; the processes and what each said."""
    start, processes, ears = SPAWN.Event(), [], []
    for _ in range(count):
        ear, mouth = SPAWN.Pipe(duplex=False)
        process = SPAWN.Process(target=race, args=(run_dir, start, mouth), daemon=True)
        process.start()
        processes.append(process)
        ears.append(ear)
    start.set()
    return processes, [ear.recv() for ear in ears]


def rewrite(run_dir: Path, **changed: Any) -> None:
    path = run_dir / "lease.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def test_a_second_launcher_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    with lease.acquire(tmp_path) as held:
        assert held.attempt == 1
        with pytest.raises(RunFolderError) as caught:
            lease.acquire(tmp_path)
    assert socket.gethostname() in str(caught.value)
    assert f"pid {os.getpid()}" in str(caught.value)
    assert "since 20" in str(caught.value)
    assert caught.value.hint


def test_every_acquisition_has_a_number_of_its_own(tmp_path: Path) -> None:
    assert lease.current_attempt(tmp_path) is None
    for attempt in (1, 2, 3):
        held = lease.acquire(tmp_path)
        assert held.attempt == attempt == lease.current_attempt(tmp_path)
        held.release()
        held.release()


def test_of_racing_launchers_one_wins_and_a_killed_holder_is_taken_over_at_once(tmp_path: Path) -> None:
    processes, said = racers(tmp_path, 3)
    try:
        assert sorted(kind for kind, _ in said) == ["held", "refused", "refused"]
        winner = next(process for process, (kind, _) in zip(processes, said, strict=True) if kind == "held")
        assert all(f"pid {winner.pid}" in what for kind, what in said if kind == "refused")
        os.kill(winner.pid, signal.SIGKILL)
        # Not collected yet: a zombie still has its pid and is dead all the same.
        deadline = time.monotonic() + 5
        while Path(f"/proc/{winner.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with lease.acquire(tmp_path) as held:
            assert held.attempt == 2
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_a_pid_that_belongs_to_another_process_by_now_is_no_holder(tmp_path: Path) -> None:
    first = lease.acquire(tmp_path)
    rewrite(tmp_path, process_start="1")
    with lease.acquire(tmp_path) as held:
        assert held.attempt == 2
        first.release()  # late: it must not give away what another holds
        with pytest.raises(RunFolderError):
            lease.acquire(tmp_path)


@pytest.mark.parametrize(("silent_s", "is_taken_over"), [(5.0, False), (50.0, False), (70.0, True)])
def test_a_holder_on_another_machine_is_judged_by_its_heartbeat(
    tmp_path: Path, silent_s: float, is_taken_over: bool
) -> None:
    lease.acquire(tmp_path).release()
    rewrite(tmp_path, released=False, host="elsewhere", machine="another boot", pid=os.getpid())
    then = time.time() - silent_s
    os.utime(tmp_path / ".lease-heartbeat", (then, then))
    if is_taken_over:
        with lease.acquire(tmp_path) as held:
            assert held.attempt == 2
    else:
        with pytest.raises(RunFolderError, match="elsewhere"):
            lease.acquire(tmp_path)


def test_the_heartbeat_beats_until_the_lease_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.02)
    heartbeat = tmp_path / ".lease-heartbeat"

    def beats_again() -> bool:
        os.utime(heartbeat, (1, 1))
        time.sleep(0.5)
        return heartbeat.stat().st_mtime > 1

    with lease.acquire(tmp_path):
        assert beats_again()
        rewrite(tmp_path, attempt=9)
        time.sleep(0.2)
        assert not beats_again()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: folder.rmdir(),
        lambda folder: (folder / "lease.json").write_text("{"),
        lambda folder: (folder / "lease.json").write_text('{"attempt": 1}'),
        lambda folder: (folder / ".lease-lock").mkdir(),
    ],
)
def test_a_folder_that_cannot_be_held_is_a_users_error(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    spoil(folder)
    with pytest.raises(RunFolderError) as caught:
        lease.acquire(folder)
    assert caught.value.hint
