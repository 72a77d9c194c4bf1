"""Who may train and save: one launcher a run, and of its worker groups the one that started last.

    lease/00000003.json      who made launch 3
    lease/00000003.beat      rewritten every few seconds while it lives
    lease/00000003.released  it has ended
    lease/00000003.0002      the second start of its worker group: attempt 3.2

Each number is a file that can be made only once, so no lock is needed, which network disks and object stores lack. A
holder that is gone is taken over: on its own machine as soon as its process is gone (or its pid belongs to another
process by now), from another machine once its heartbeat is a minute old. That may hit one that only slept; therefore
whoever saves asks `fence` first. Every acquisition raises the launch, also after a clean release, so that no two
launchers of a run ever share a number. Launch 0 is a worker group that no launcher started (plain torchrun).
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import secrets
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from launcher.errors import RunFolderError, Superseded
from launcher.store.store import Store

log = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
DEAD_AFTER_S = 60.0
_PATIENCE_S = 10.0
"""How long a release waits for a heartbeat under way."""
_FILE = re.compile(r"([0-9]{8,})\.(json|beat|released|[0-9]{4,})")
_CLOCK = "lease/clock"
"""Written to learn the store's time; its content is of no use."""


@dataclass(frozen=True, order=True)
class Attempt:
    """One start of a run's workers. A later one is greater."""

    launch: int
    start: int
    """1 for the first worker group of the launch; 0 where it has started none yet."""

    def __str__(self) -> str:
        return f"{self.launch}.{self.start}"

    @classmethod
    def parse(cls, text: str) -> Attempt:
        """What `str` made. Raises ValueError for anything else."""
        match = re.fullmatch(r"([0-9]+)\.([0-9]+)", text)
        if match is None:
            raise ValueError(f"{text!r} is not an attempt, such as 3.2")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class _Holder:
    """A process that made a launch or a start."""

    host: str
    machine: str
    """Boot id and pid namespace: only within the same one does a pid mean the same process."""
    pid: int
    process_start: str
    """When the kernel started `pid`: tells a process from a later one under the same number."""
    since: str
    token: str
    """Random: no two holders are equal, even where one process makes both in the same second."""

    def content(self) -> bytes:
        return json.dumps(asdict(self), indent=2).encode() + b"\n"


class Lease:
    """A held run. Leave the `with` block or call `release` to give it back."""

    def __init__(self, store: Store, launch: int) -> None:
        self.launch = launch
        """1 for the first launcher of a run, one more for each that follows."""
        self._store = store
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._live, name="lease-heartbeat", daemon=True)
        self._thread.start()

    def held(self) -> bool:
        """Whether no later launch has taken the run over. One listing. Raises OSError also where the lease vanished."""
        return max(_present(self._store, self.launch)) == self.launch

    def beat(self) -> None:
        """Say that this launcher lives; its thread does so every HEARTBEAT_S. Raises OSError."""
        self._store.write(_name(self.launch, "beat"), _now().encode())

    def release(self) -> None:
        """Give the run back; a second call does nothing. What the store refuses is only logged."""
        if self._stop.is_set():
            return
        self._stop.set()
        # A disk that hangs must not keep the launcher from ending, nor one that has vanished or filled up hide the
        # error that brought us here; the next launcher sees that this process is gone.
        self._thread.join(_PATIENCE_S)
        try:
            if self._thread.is_alive():
                log.warning("%s does not answer: its lease is left as it is", self._store)
            elif self.held():
                self._store.write(_name(self.launch, "released"), _now().encode())
        except OSError as error:
            log.warning("the lease of %s could not be given back: %s", self._store, error)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def _live(self) -> None:
        fails = False
        while not self._stop.wait(HEARTBEAT_S):
            try:
                if not self.held():
                    log.warning("%s was taken over by another launcher", self._store)
                    return
                self.beat()
            except OSError as error:
                if not fails:  # an outage of an hour is said once
                    log.warning("the heartbeat of %s failed: %s", self._store, error)
                fails = True
            else:
                if fails:
                    log.warning("the heartbeat of %s is back", self._store)
                fails = False


def acquire(store: Store) -> Lease:
    """Hold the run in `store` for this process.

    Raises:
        RunFolderError: another live launcher holds it (named: host, pid, since when); the folder is missing or cannot
            be written; the last holder's file is damaged.
    """
    with _refusals(store):
        files = _files(store)
        newest = max(files, default=0)
        if holder := _living(store, files):
            raise _in_use(store, holder)
        launch, this = newest + 1, _this_process()
        # A network disk may say "it is there" of the very file it has just made, when its first answer got lost.
        if not store.create(_name(launch, "json"), this.content()) and _named(store, launch) != this:
            raise _in_use(store, _named(store, launch))
        lease = Lease(store, launch)
        try:
            # Between the listing and the creation others may have come, gone, and swept up the number we then made.
            later = max(_present(store, launch))
            if later > launch:
                raise _in_use(store, _named(store, later))
            lease.beat()
        except BaseException:
            lease.release()
            raise
    _sweep(store, launch)
    return lease


def begin(store: Store, launch: int) -> Attempt:
    """A worker group starts under `launch`, 0 where no launcher is: the attempt it is, later than any before.

    Raises:
        Superseded: a later launch has taken the run over.
        RunFolderError: the launch is not there, or the folder cannot be written.
    """
    with _refusals(store):
        before = current(store) or Attempt(0, 0)
        if before.launch > launch:
            raise _taken_over(store, launch, before.launch)
        if before.launch < launch:
            raise RunFolderError(
                f"the lease of launch {launch} is gone from {store}",
                hint="`slipway resume` takes a new one; nobody may delete the folder lease/ while a launcher works",
            )
        attempt, content = Attempt(launch, before.start + 1), _this_process().content()
        while not store.create(_name(launch, f"{attempt.start:04d}"), content):
            attempt = Attempt(launch, attempt.start + 1)
        # A launch that came between the listing and the creation may have swept earlier starts away: the number may
        # have been given before.
        after = max(_present(store, launch))
        if after > launch:
            raise _taken_over(store, launch, after)
    return attempt


def current(store: Store) -> Attempt | None:
    """The latest launch with its latest start; None where nobody ever started. Raises OSError."""
    files = _files(store)
    if not files:
        return None
    launch = max(files)
    return Attempt(launch, max((int(ending) for ending in files[launch] if ending.isdigit()), default=0))


def held_by(store: Store) -> str | None:
    """Which living launcher holds the run, in words; None where none does.

    Raises OSError, and RunFolderError where its file is damaged.
    """
    holder = _living(store, _files(store))
    return None if holder is None else f"a launcher on {holder.host}, pid {holder.pid}, since {holder.since}"


def fence(store: Store, attempt: Attempt) -> None:
    """Let only the current attempt pass.

    Raises:
        Superseded: a later one has begun, or a later launcher has taken the run over.
        OSError: nobody can say, as the lease has vanished or cannot be read.
    """
    latest = current(store)
    if latest is None or latest < attempt:
        raise _vanished(store)
    if latest.launch > attempt.launch:
        raise _taken_over(store, attempt.launch, latest.launch)
    if latest > attempt:
        raise Superseded(
            f"attempt {attempt} may no longer train or save: attempt {latest} of {store} has begun",
            hint="stop these workers, the later ones go on",
        )


def _name(launch: int, ending: str) -> str:
    return f"lease/{launch:08d}.{ending}"


def _files(store: Store) -> dict[int, set[str]]:
    """{launch: the endings of its files}. A launch whose .json was deleted by hand counts: its number was given."""
    found: dict[int, set[str]] = {}
    for name in store.names("lease"):
        if match := _FILE.fullmatch(name):
            found.setdefault(int(match[1]), set()).add(match[2])
    return found


def _present(store: Store, launch: int) -> dict[int, set[str]]:
    """`_files` where `launch` or a later one is among them. Raises FileNotFoundError where they have vanished."""
    files = _files(store)
    if max(files, default=-1) < launch:
        raise _vanished(store)
    return files


def _vanished(store: Store) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "the lease has vanished", f"{store}/lease")


@contextlib.contextmanager
def _refusals(store: Store) -> Iterator[None]:
    """Say as a user's error what the store refuses."""
    try:
        if not store.is_there():
            raise RunFolderError(f"no run folder {store}", hint="`slipway runs` lists the runs")
        yield
    except OSError as error:
        raise RunFolderError(
            f"cannot write in {store}: {error.strerror or error}", hint="check its permissions and the space left"
        ) from error


def _sweep(store: Store, launch: int) -> None:
    """Delete what launches before `launch` have left, as far as the store lets us."""
    try:
        for earlier, endings in _files(store).items():
            for ending in endings if earlier < launch else ():
                store.remove(_name(earlier, ending))
    except OSError as error:
        log.info("files of earlier launches stay in %s: %s", store, error)


def _this_process() -> _Holder:
    return _Holder(
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        process_start=_process_start(os.getpid()) or "",
        since=_now(),
        token=secrets.token_hex(8),
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _holder(store: Store, launch: int) -> _Holder | None:
    """Who made a launch; None where its file is not there. Raises RunFolderError where it is damaged, and OSError."""
    name = _name(launch, "json")
    try:
        said = json.loads(store.read(name))
        holder = _Holder(**{field.name: said[field.name] for field in fields(_Holder)})
        if not isinstance(holder.pid, int):
            raise TypeError(f"pid {holder.pid!r}")
        return holder
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise RunFolderError(
            f"{store}/{name} is damaged", hint="delete this file once no launcher works on this run"
        ) from error


def _living(store: Store, files: dict[int, set[str]]) -> _Holder | None:
    """Who holds the run that `files` are of; None where it was given back, or its holder is gone."""
    newest = max(files, default=0)
    if not newest or "released" in files[newest]:
        return None
    holder = _holder(store, newest)
    return holder if holder is not None and _alive(store, newest, holder, "beat" in files[newest]) else None


def _named(store: Store, launch: int) -> _Holder | None:
    """Who made a launch, for a message or a comparison: None wherever that cannot be told."""
    with contextlib.suppress(OSError, RunFolderError):
        return _holder(store, launch)
    return None


def _in_use(store: Store, holder: _Holder | None) -> RunFolderError:
    if holder is None:  # its file is being written this moment, or it has ended already
        return RunFolderError(f"another launcher has just taken {store}", hint="try again to learn which")
    return RunFolderError(
        f"{store} is in use by a launcher on {holder.host}, pid {holder.pid}, since {holder.since}",
        hint="wait for it, stop it, or start a run in another folder with --run-dir",
    )


def _taken_over(store: Store, launch: int, later: int) -> Superseded:
    holder = _named(store, later)
    where = "" if holder is None else f" on {holder.host}, pid {holder.pid},"
    return Superseded(
        f"launch {launch} may no longer train or save: launch {later}{where} has taken {store} over",
        hint="stop this launcher, the other one goes on",
    )


def _alive(store: Store, launch: int, holder: _Holder, beats: bool) -> bool:
    """Whether the holder of `launch` still lives; `beats` where its heartbeat has begun."""
    if holder.machine == _machine():
        with contextlib.suppress(PermissionError):  # then its heartbeat must tell
            return _process_start(holder.pid) == holder.process_start
    # The two machines' clocks may differ, so both times are the store's: what is written now has its time of now.
    store.write(_CLOCK, _now().encode())
    try:
        silent_s = store.modified(_CLOCK) - store.modified(_name(launch, "beat" if beats else "json"))
    except FileNotFoundError:  # swept up: there is a later launch by now, and creating ours will meet it
        return False
    return silent_s < DEAD_AFTER_S


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return socket.gethostname()


def _process_start(pid: int) -> str | None:
    """When process `pid` started, in the kernel's own words; None where there is no such process.

    Raises PermissionError for another user's process on a machine that hides those.
    """
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            # The name in brackets may hold spaces and brackets; after it come state (3rd field) .. starttime (22nd).
            words = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            with contextlib.suppress(ProcessLookupError, OverflowError):
                os.kill(pid, 0)  # PermissionError: it is there, /proc only does not show it (hidepid=2)
            return None
        return None if words[0] in "ZX" else words[19]  # a zombie is dead; nobody has collected it yet
    shown = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return shown.stdout.strip() or None
