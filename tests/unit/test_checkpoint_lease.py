"""Who may train and save: one launcher a run, when a holder counts as gone, and what those before may no longer do."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint import lease
from launcher.checkpoint.lease import Attempt
from launcher.errors import CheckpointError, RunFolderError, Superseded
from launcher.store.folder import FolderStore
from launcher.store.location import open_store
from launcher.store.store import Store
from tests.unit.s3_server import BUCKET, environment, s3_server

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty one, which processes that a test starts can open too."""
    if request.param == "folder":
        return FolderStore(tmp_path)
    for name, value in environment(request.getfixturevalue("s3")).items():
        monkeypatch.setenv(name, value)
    return open_store(f"s3://{BUCKET}/{tmp_path.name}")


def race(location: str, launch: int | None, start: Any, say: Connection) -> None:
    """Acquire, or begin under `launch`; then live until killed."""
    store = open_store(location)
    say.send("ready")
    start.wait()
    try:
        said = lease.acquire(store).launch if launch is None else lease.begin(store, launch)
    except RunFolderError as error:
        say.send(("refused", str(error)))
    else:
        say.send(("done", said))
    threading.Event().wait()


class Racers:
    """`count` processes that call acquire (or begin) at the same instant; fewer by default where each needs s3fs."""

    def __init__(self, store: Store, count: int | None = None, launch: int | None = None) -> None:
        start, ears = SPAWN.Event(), []
        count = count or (8 if isinstance(store, FolderStore) else 4)
        self.processes = []
        for _ in range(count):
            ear, mouth = SPAWN.Pipe(duplex=False)
            process = SPAWN.Process(target=race, args=(str(store), launch, start, mouth), daemon=True)
            process.start()
            self.processes.append(process)
            ears.append(ear)
        assert [ear.recv() for ear in ears] == ["ready"] * count
        start.set()
        self.said: list[tuple[str, Any]] = [ear.recv() for ear in ears]

    def __enter__(self) -> Racers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def of(self, kind: str) -> list[Any]:
        return [what for said, what in self.said if said == kind]

    def winner(self) -> int:
        """The pid of the one that holds the lease."""
        [process] = [p for p, (kind, _) in zip(self.processes, self.said, strict=True) if kind == "done"]
        assert process.pid is not None
        return process.pid


def rewrite(store: Store, launch: int = 1, **changed: Any) -> None:
    """Change what the holder of a launch said of itself."""
    name = f"lease/{launch:08d}.json"
    store.write(name, json.dumps(json.loads(store.read(name)) | changed).encode())


def elsewhere(store: Store) -> None:
    """Launch 1 is held by a process of another machine, as far as anyone can tell, and its pid says nothing here."""
    lease.acquire(store).release()
    store.remove("lease/00000001.released")
    rewrite(store, host="elsewhere", machine="another boot", pid=os.getpid())


class Interleaved(FolderStore):
    """A store whose first listing is followed by what others do meanwhile."""

    def __init__(self, root: Path, meanwhile: Callable[[], object]) -> None:
        super().__init__(root)
        self.meanwhile: list[Callable[[], object]] = [meanwhile]

    def names(self, folder: str = "") -> list[str]:
        found = super().names(folder)
        while self.meanwhile:
            self.meanwhile.pop()()
        return found


class Heard(FolderStore):
    """A store that lets a test wait for heartbeats."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.beats = threading.Semaphore(0)

    def write(self, name: str, content: bytes) -> None:
        super().write(name, content)
        if name.endswith(".beat"):
            self.beats.release()

    def hear(self, count: int) -> bool:
        return all(self.beats.acquire(timeout=10) for _ in range(count))


class Full(FolderStore):
    """A disk on which small files can still be made, but nothing replaced."""

    def write(self, name: str, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.root / name))


class Warnings(logging.Handler):
    """Lets a test wait for a warning of the lease."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []
        self.more = threading.Semaphore(0)

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())
        self.more.release()

    def next(self) -> str:
        assert self.more.acquire(timeout=10)
        return self.said[-1]


@pytest.fixture
def warnings() -> Iterator[Warnings]:
    handler = Warnings()
    lease.log.addHandler(handler)
    yield handler
    lease.log.removeHandler(handler)


def test_a_second_launcher_is_refused_and_told_who_holds_it(store: Store) -> None:
    with lease.acquire(store) as held:
        assert held.launch == 1
        with pytest.raises(RunFolderError) as caught:
            lease.acquire(store)
        assert held.held()
    assert str(store) in str(caught.value)
    assert socket.gethostname() in str(caught.value)
    assert f"pid {os.getpid()}" in str(caught.value)
    assert "since 20" in str(caught.value)
    assert caught.value.hint


def test_whoever_asks_is_told_who_holds_a_run(store: Store) -> None:
    assert lease.held_by(store) is None
    with lease.acquire(store):
        assert (held := lease.held_by(store)) is not None
        assert held.startswith(f"a launcher on {socket.gethostname()}, pid {os.getpid()}, since 20")
    assert lease.held_by(store) is None


def test_every_acquisition_has_a_number_of_its_own(store: Store) -> None:
    assert lease.current(store) is None
    for launch in (1, 2, 3):
        held = lease.acquire(store)
        assert held.launch == launch
        assert lease.current(store) == Attempt(launch, 0)
        held.release()
        held.release()


def test_of_racing_launchers_one_wins_and_a_killed_holder_is_taken_over_at_once(store: Store) -> None:
    with Racers(store) as racers:
        assert racers.of("done") == [1]
        winner, refused = racers.winner(), racers.of("refused")
        assert len(refused) == len(racers.said) - 1
        assert all(f"pid {winner}," in message for message in refused)
        os.kill(winner, signal.SIGKILL)
        # Dead and not collected yet: a zombie still has its pid and is dead all the same.
        os.waitid(os.P_PID, winner, os.WEXITED | os.WNOWAIT)
        with lease.acquire(store) as held:
            assert held.launch == 2


def test_a_holder_that_was_killed_and_collected_is_taken_over_at_once(store: Store) -> None:
    with Racers(store, 1) as racers:
        assert racers.of("done") == [1]
    with lease.acquire(store) as held:
        assert held.launch == 2


def test_a_pid_that_belongs_to_another_process_by_now_is_no_holder(store: Store) -> None:
    first = lease.acquire(store)
    rewrite(store, process_start="1")
    with lease.acquire(store) as held:
        assert held.launch == 2
        assert held.held()
        assert not first.held()
        first.release()  # late: it must not give away what another holds
        with pytest.raises(RunFolderError):
            lease.acquire(store)


@pytest.mark.parametrize("dead_after_s", [60.0, 0.0])
def test_a_holder_on_another_machine_is_judged_by_the_stores_clock(
    store: Store, monkeypatch: pytest.MonkeyPatch, dead_after_s: float
) -> None:
    elsewhere(store)
    monkeypatch.setattr(lease, "DEAD_AFTER_S", dead_after_s)
    if dead_after_s:
        with pytest.raises(RunFolderError, match="elsewhere"):
            lease.acquire(store)
    else:
        with lease.acquire(store) as held:
            assert held.launch == 2


@pytest.mark.parametrize("stamped", ["beat", "json"])
@pytest.mark.parametrize(("silent_s", "is_taken_over"), [(5.0, False), (50.0, False), (70.0, True)])
def test_a_holder_on_another_machine_is_dead_after_a_minute(
    tmp_path: Path, stamped: str, silent_s: float, is_taken_over: bool
) -> None:
    """Its heartbeat tells; where it has none yet, the moment at which it came."""
    store = FolderStore(tmp_path)
    elsewhere(store)
    if stamped == "json":
        store.remove("lease/00000001.beat")
    then = time.time() - silent_s
    os.utime(tmp_path / "lease" / f"00000001.{stamped}", (then, then))
    if is_taken_over:
        with lease.acquire(store) as held:
            assert held.launch == 2
    else:
        with pytest.raises(RunFolderError, match="elsewhere"):
            lease.acquire(store)


def test_the_heartbeat_beats_until_the_lease_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: Warnings
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.02)
    store = Heard(tmp_path)
    with lease.acquire(store) as held:
        assert store.hear(4)  # the first is acquire's own
        store.create("lease/00000009.json", b"")
        assert warnings.next() == f"{store} was taken over by another launcher"
        assert not held.held()
    assert not [thread for thread in threading.enumerate() if thread.name == "lease-heartbeat"]
    assert store.read("lease/00000009.json") == b""
    assert "00000001.released" not in store.names("lease")


def test_a_disk_that_vanishes_for_a_while_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: Warnings
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.02)
    folder, gone = tmp_path / "run", tmp_path / "gone"
    folder.mkdir()
    store = Heard(folder)
    held = lease.acquire(store)
    assert store.hear(2)
    folder.rename(gone)
    assert "the heartbeat of" in warnings.next()
    assert "failed" in warnings.said[0]
    with pytest.raises(OSError, match="vanished"):
        held.held()
    gone.rename(folder)
    assert "is back" in warnings.next()
    assert store.hear(2)
    folder.rename(gone)
    assert "failed" in warnings.next()
    held.release()  # raises nothing
    assert len(warnings.said) == 4  # an outage is said once, however many beats it lasts; then the release
    gone.rename(folder)
    with pytest.raises(RunFolderError):  # it was not given back, and its process lives
        lease.acquire(store)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: folder.rmdir(),
        lambda folder: (folder / "lease").write_text("a file"),
        lambda folder: lay(folder, "lease/00000003.json", "{"),
        lambda folder: lay(folder, "lease/00000003.json", '{"host": "here"}'),
        lambda folder: lay(folder, "lease/00000003.json", "[1]"),
        lambda folder: lay(folder, "lease/00000003.json", ""),
    ],
)
def test_a_folder_that_cannot_be_held_is_a_users_error(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    spoil(folder)
    with pytest.raises(RunFolderError) as caught:
        lease.acquire(FolderStore(folder))
    assert str(folder) in str(caught.value)
    assert caught.value.hint
    if (folder / "lease" / "00000003.json").exists():
        assert str(caught.value) == f"{folder}/lease/00000003.json is damaged"


def lay(folder: Path, name: str, text: str) -> None:
    FolderStore(folder).write(name, text.encode())


def test_after_a_damaged_file_is_deleted_its_number_is_not_given_again(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    lease.acquire(store).release()
    lease.begin(store, 1)
    store.remove("lease/00000001.json")
    with lease.acquire(store) as held:
        assert held.launch == 2


@pytest.mark.skipif(not os.path.isdir("/sys/kernel"), reason="no folder here that refuses even root")
def test_a_folder_that_cannot_be_written_is_a_users_error() -> None:
    store = FolderStore(Path("/sys/kernel"))
    for attempt in (lambda: lease.acquire(store), lambda: lease.begin(store, 0)):
        with pytest.raises(RunFolderError, match="cannot write in /sys/kernel: (Operation not|Permission|Read-only)"):
            attempt()


def test_a_disk_that_fills_up_while_the_run_is_taken_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="No space left") as caught:
        lease.acquire(Full(tmp_path))
    assert caught.value.hint
    assert not [thread for thread in threading.enumerate() if thread.name == "lease-heartbeat"]


def test_what_earlier_launches_left_is_swept(store: Store) -> None:
    lease.begin(store, 0)
    for launch in (1, 2):
        with lease.acquire(store):
            lease.begin(store, launch)
            lease.begin(store, launch)
        assert [name for name in store.names("lease") if name != "clock"] == [
            f"0000000{launch}.{ending}" for ending in ("0001", "0002", "beat", "json", "released")
        ]


def test_a_launcher_that_is_late_gets_no_number_that_was_swept_up(tmp_path: Path) -> None:
    """It lists, sleeps while two others come and go, and then makes a number that the second has deleted."""
    store = FolderStore(tmp_path)
    lease.acquire(store).release()
    held = []

    def meanwhile() -> None:
        lease.acquire(store).release()
        held.append(lease.acquire(store))
        assert store.names("lease") == ["00000003.beat", "00000003.json"]

    with pytest.raises(RunFolderError, match=f"in use by a launcher on .* pid {os.getpid()}"):
        lease.acquire(Interleaved(tmp_path, meanwhile))
    assert lease.current(store) == Attempt(3, 0)
    assert held[0].held()
    held[0].release()


def test_of_worker_groups_that_start_at_once_each_has_its_own_number(store: Store) -> None:
    with lease.acquire(store) as held, Racers(store, launch=held.launch) as racers:
        count = len(racers.said)
        assert sorted(racers.of("done")) == [Attempt(1, start) for start in range(1, count + 1)]
        assert lease.current(store) == Attempt(1, count)


def test_only_the_last_start_of_the_last_launch_may_save(store: Store) -> None:
    with lease.acquire(store):
        first = lease.begin(store, 1)
        lease.fence(store, first)
        second = lease.begin(store, 1)
        assert [str(first), str(second)] == ["1.1", "1.2"]
        lease.fence(store, second)
        with pytest.raises(
            Superseded, match=f"attempt 1.1 may no longer .* attempt 1.2 of {store} has begun"
        ) as caught:
            lease.fence(store, first)
        assert caught.value.hint
    lease.fence(store, second)  # released, and nobody has come since
    with lease.acquire(store):
        for forbidden in (lambda: lease.fence(store, second), lambda: lease.begin(store, 1)):
            with pytest.raises(Superseded) as caught:
                forbidden()
            assert str(caught.value) == (
                f"launch 1 may no longer train or save: launch 2 on {socket.gethostname()}, pid {os.getpid()}, "
                f"has taken {store} over"
            )
            assert caught.value.hint == "stop this launcher, the other one goes on"
            assert isinstance(caught.value, CheckpointError)
            assert caught.value.exit_code == 1
        assert lease.current(store) == Attempt(2, 0)
        third = lease.begin(store, 2)
        assert str(third) == "2.1"
        lease.fence(store, third)


def test_a_worker_group_that_is_late_is_superseded_though_it_made_its_file(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    lease.acquire(store).release()
    with pytest.raises(Superseded, match="launch 1 may no longer train or save: launch 2 on"):
        lease.begin(Interleaved(tmp_path, lambda: lease.acquire(store).release()), 1)
    assert lease.current(store) == Attempt(2, 0)
    lease.acquire(store).release()
    assert not [name for name in store.names("lease") if name.startswith(("00000001", "00000002"))]


def test_without_a_launcher_the_launch_is_0_until_one_comes(store: Store) -> None:
    assert lease.begin(store, 0) == Attempt(0, 1)
    second = lease.begin(store, 0)
    assert second == lease.current(store) == Attempt(0, 2)
    lease.fence(store, second)
    with pytest.raises(Superseded, match="attempt 0.2"):
        lease.fence(store, Attempt(0, 1))
    with lease.acquire(store) as held:
        assert held.launch == 1
        with pytest.raises(Superseded, match="launch 0 may no longer train or save: launch 1"):
            lease.fence(store, second)
        with pytest.raises(Superseded, match="launch 0 may no longer train or save: launch 1"):
            lease.begin(store, 0)


def test_a_launch_that_nobody_took_begins_nothing(store: Store) -> None:
    with pytest.raises(RunFolderError, match="launch 2 is gone"):
        lease.begin(store, 2)
    assert store.names("lease") == []


def test_where_the_lease_has_vanished_the_fence_cannot_say(store: Store) -> None:
    with lease.acquire(store) as held:
        attempt = lease.begin(store, 1)
        store.remove("lease")
        with pytest.raises(FileNotFoundError):
            lease.fence(store, attempt)
        with pytest.raises(FileNotFoundError):
            held.held()
    assert store.names("lease") == []  # what has vanished is not made again by its release


def test_attempts_are_in_the_order_of_their_starts(store: Store) -> None:
    texts = ["0.1", "0.2", "1.0", "1.9", "1.10", "2.0", "10.1", "10.10000", "100000000.0"]
    attempts = [Attempt.parse(text) for text in texts]
    assert all(earlier < later for earlier, later in pairwise(attempts))
    assert [str(attempt) for attempt in attempts] == texts
    for text in ("3", "3.", ".2", "3.2.1", "-3.2", " 3.2", "3.2\n", "", "a.b"):
        with pytest.raises(ValueError, match="is not an attempt"):
            Attempt.parse(text)


def test_numbers_that_outgrow_their_names_go_on(store: Store) -> None:
    lease.acquire(store).release()
    store.create("lease/00000001.9999", b"")
    assert [lease.begin(store, 1).start for _ in range(3)] == [10000, 10001, 10002]
    assert lease.current(store) == Attempt(1, 10002)
    store.create("lease/99999999.json", b"{}")
    store.create("lease/99999999.released", b"")
    with lease.acquire(store) as held:
        assert held.launch == 100_000_000
        assert lease.current(store) == Attempt(100_000_000, 0)
        assert str(lease.begin(store, held.launch)) == "100000000.1"


def test_a_create_whose_answer_got_lost_is_still_ours(tmp_path: Path) -> None:
    """A network disk repeats a request it had no answer to, and is then told that the file is there."""

    class Forgetful(FolderStore):
        def create(self, name: str, content: bytes) -> bool:
            super().create(name, content)
            return False

    with lease.acquire(Forgetful(tmp_path)) as held:
        assert held.launch == 1
        with pytest.raises(RunFolderError):
            lease.acquire(Forgetful(tmp_path))


def test_threads_of_one_process_get_one_lease_too(store: Store) -> None:
    def attempt(_: int) -> lease.Lease | None:
        try:
            return lease.acquire(store)
        except RunFolderError:
            return None

    with ThreadPoolExecutor(8) as pool:
        held = [found for found in pool.map(attempt, range(8)) if found is not None]
    assert [found.launch for found in held] == [1]
    held[0].release()
