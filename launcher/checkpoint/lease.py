"""One launcher a run: who holds the folder, and the attempt number that fences off everyone before.

`lease.json` names the holder; `.lease-heartbeat` is touched every few seconds while it lives. A holder that is gone is
taken over: on its own machine as soon as its process is gone (or its pid belongs to another process by now), from
another machine once its heartbeat is a minute old. Every acquisition raises the attempt by one, also after a clean
release, so that no two launchers of a run ever share a number.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from launcher.checkpoint.durable import replace_synced
from launcher.errors import RunFolderError

log = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
DEAD_AFTER_S = 60.0
_LEASE, _HEARTBEAT, _LOCK = "lease.json", ".lease-heartbeat", ".lease-lock"


@dataclass(frozen=True)
class _Holder:
    """What lease.json says."""

    attempt: int
    host: str
    machine: str
    """Boot id and pid namespace: only within the same one does a pid mean the same process."""
    pid: int
    process_start: str
    """When the kernel started `pid`: tells a process from a later one under the same number."""
    since: str
    released: bool


class Lease:
    """A held run folder. Leave the `with` block or call `release` to give it back."""

    def __init__(self, run_dir: Path, holder: _Holder) -> None:
        self.attempt = holder.attempt
        """1 for the first launcher of a run, one more for each that follows."""
        self._run_dir = run_dir
        self._holder = holder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the folder back; a second call does nothing."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        # A folder that has vanished or filled up must not hide the error that brought us here; the next launcher
        # sees that this process is gone.
        with contextlib.suppress(OSError), _deciding(self._run_dir):
            if _read(self._run_dir) == self._holder:
                _write(self._run_dir, _Holder(**{**asdict(self._holder), "released": True}))

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            try:
                if _read(self._run_dir) != self._holder:
                    log.warning("%s was taken over by another launcher", self._run_dir)
                    return
                (self._run_dir / _HEARTBEAT).touch()
            except (OSError, RunFolderError) as error:
                log.warning("the heartbeat of %s failed: %s", self._run_dir, error)


def acquire(run_dir: Path) -> Lease:
    """Hold `run_dir` for this process.

    Raises RunFolderError where another live launcher holds it (named: host, pid, since when), where the folder is
    missing or cannot be written, and where lease.json is damaged.
    """
    if not run_dir.is_dir():
        raise RunFolderError(f"no run folder {run_dir}", hint="`slipway runs` lists the runs")
    try:
        with _deciding(run_dir):
            before = _read(run_dir)
            if before is not None and _alive(before, run_dir):
                raise RunFolderError(
                    f"{run_dir} is in use by a launcher on {before.host}, pid {before.pid}, since {before.since}",
                    hint="wait for it, stop it, or start a run in another folder with --run-dir",
                )
            holder = _Holder(
                attempt=1 if before is None else before.attempt + 1,
                host=socket.gethostname(),
                machine=_machine(),
                pid=os.getpid(),
                process_start=_process_start(os.getpid()) or "",
                since=datetime.now(UTC).isoformat(timespec="seconds"),
                released=False,
            )
            _write(run_dir, holder)
            (run_dir / _HEARTBEAT).touch()
    except OSError as error:
        raise RunFolderError(
            f"cannot write in {run_dir}: {error.strerror}", hint="check its permissions and the space left"
        ) from error
    return Lease(run_dir, holder)


def current_attempt(run_dir: Path) -> int | None:
    """The attempt of the last launcher that took the folder; None where none ever did.

    Raises RunFolderError where lease.json is damaged.
    """
    holder = _read(run_dir)
    return None if holder is None else holder.attempt


@contextlib.contextmanager
def _deciding(run_dir: Path) -> Iterator[None]:
    """Only one process reads, judges and rewrites lease.json at a time."""
    with open(run_dir / _LOCK, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems have no locks; all but two simultaneous starts still work
            log.warning(
                "%s cannot be locked (%s): two launchers started at the same instant would not notice", lock.name, error
            )
        yield


def _read(run_dir: Path) -> _Holder | None:
    path = run_dir / _LEASE
    try:
        return _Holder(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise RunFolderError(f"{path} is damaged", hint="delete it once no launcher works on this run") from error


def _write(run_dir: Path, holder: _Holder) -> None:
    replace_synced(run_dir / _LEASE, json.dumps(asdict(holder), indent=2).encode() + b"\n")


def _alive(holder: _Holder, run_dir: Path) -> bool:
    if holder.released:
        return False
    if holder.machine == _machine():
        return _process_start(holder.pid) == holder.process_start
    # The two machines' clocks may differ, so both times come from the file system: its clock stamps the lock now.
    lock = run_dir / _LOCK
    os.utime(lock)
    try:
        silent_s = lock.stat().st_mtime - (run_dir / _HEARTBEAT).stat().st_mtime
    except FileNotFoundError:
        return False
    return silent_s < DEAD_AFTER_S


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return socket.gethostname()


def _process_start(pid: int) -> str | None:
    """When process `pid` started, in the kernel's own words; None where there is no such process."""
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            # The name in brackets may hold spaces and brackets; after it come state (3rd field) .. starttime (22nd).
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] in "ZX" else fields[19]  # a zombie is dead; nobody has collected it yet
    shown = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return shown.stdout.strip() or None
