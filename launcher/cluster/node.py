"""What `up` and `down` call on a host over ssh: `python -m launcher.cluster.node token | prepare | start | stop | log`.

Each prints one line of JSON. `start` takes what the host shall be as JSON, nothing secret; `prepare` takes the token
on stdin, so that it is in no process list. `keep` is the keeper itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from launcher.cluster import auth_token
from launcher.cluster.keeper import GRACE_S, LOG, Node, environment, keep
from launcher.cluster.probe import keeper, session_of_dead_keeper, started_at, state_folder

START_TIMEOUT_S = 15
NUM_LINES = 12
PYTHON = "python"
"""The file that names this Python to `down`, which may be asked from another machine than `up` was."""


def token() -> dict[str, Any]:
    """This host's token, a new one if it has none: the same one for two `up` at once. Raises OSError."""
    with _alone():
        known = auth_token.read() or auth_token.new_token()
        prepare(known)
    return {"token": known}


def prepare(token: str) -> dict[str, Any]:
    """Put the token here, and what `down` needs to find its way back. Raises OSError."""
    folder = Path(state_folder())
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    auth_token.write_private(folder / PYTHON, sys.executable)
    auth_token.put(token)
    return {}


def start(node: Node) -> dict[str, Any]:
    """Start the keeper, detached from the connection that asked, unless it runs. Raises RuntimeError."""
    with _alone():
        return _start(node)


def _start(node: Node) -> dict[str, Any]:
    running = keeper()
    if running is not None:
        return {"pid": running["pid"], "started": False}
    folder = Path(state_folder())
    _end(_left_by_a_dead_keeper())
    command = [sys.executable, "-P", "-m", "launcher.cluster.node", "keep", json.dumps(vars(node))]
    with (folder / "start.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=Path.home(),
            env=environment(),
            start_new_session=True,
        )
    for _ in range(START_TIMEOUT_S * 20):
        running = keeper()
        if running is not None and running["pid"] == process.pid:
            return {"pid": process.pid, "started": True}
        if process.poll() is not None:
            break
        time.sleep(0.05)
    process.kill()
    raise RuntimeError((folder / "start.log").read_text(errors="replace").strip() or "the keeper did not start")


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One at a time on this host: two keepers would know nothing of each other, and `down` only of the later."""
    folder = Path(state_folder())
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        with contextlib.suppress(OSError):  # a network disk without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def stop() -> dict[str, Any]:
    """Stop the keeper and all that it started, and remove what `up` put here; says what is left."""
    running = keeper()
    family = _left_by_a_dead_keeper()
    something = running is not None or bool(family)
    if running is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(running["pid"])
            family += [process, *process.children(recursive=True)]
            process.terminate()
        deadline = time.monotonic() + GRACE_S + 12
        while started_at(running["pid"]) == running["started"] and time.monotonic() < deadline:
            time.sleep(0.05)
    left = _end(family)
    if running is not None:
        _forget_address(running["head"])
    auth_token.restore()
    folder = Path(state_folder())
    shutil.rmtree(folder, ignore_errors=True)
    for parent in folder.parents[:2]:
        with contextlib.suppress(OSError):  # other hosts' state is in it, or what --install made
            parent.rmdir()
    return {"running": something, "left": left}


def _forget_address(head: str) -> None:
    """Remove the file by which Ray's drivers find a cluster on this host; `ray stop` does the same."""
    file = Path(os.environ.get("RAY_TMPDIR") or "/tmp") / "ray" / "ray_current_cluster"
    with contextlib.suppress(OSError):
        if file.read_text().strip() == head:
            file.unlink()


def log() -> dict[str, Any]:
    """The last lines of the keeper's log."""
    try:
        with (Path(state_folder()) / LOG).open(errors="replace") as file:
            return {"lines": [line.rstrip() for line in deque(file, NUM_LINES)]}
    except FileNotFoundError:
        return {"lines": []}


def _left_by_a_dead_keeper() -> list[psutil.Process]:
    """What a keeper that was killed has left: processes of its session, which no other has."""
    session = session_of_dead_keeper()
    found: list[psutil.Process] = []
    if session is None:
        return found
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == session:
                found.append(process)
    return found


def _end(processes: list[psutil.Process]) -> list[str]:
    """Kill those that still live; the command lines of those that do not end."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    _, alive = psutil.wait_procs(processes, timeout=5)
    left = []
    for process in alive:
        with contextlib.suppress(psutil.Error):
            left.append(f"{process.pid} {' '.join(process.cmdline())[:80]}")
    return left


def main(argv: list[str]) -> None:
    """One of them, by name."""
    what = argv[0]
    if what == "keep":
        keep(Node(**json.loads(argv[1])))
        return
    if what == "start":
        answer = start(Node(**json.loads(argv[1])))
    elif what == "prepare":
        answer = prepare(sys.stdin.read().strip())
    else:
        answer = {"token": token, "stop": stop, "log": log}[what]()
    print(json.dumps(answer))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OSError as error:
        sys.exit(f"{error.filename2 or error.filename}: {error.strerror}")
    except RuntimeError as error:
        sys.exit(str(error))
