"""Keeps Ray running on this host: `ray start --block`, started again whenever it ends, until it is told to stop.

A raylet that is killed, a link that was cut until the head gave this node up, a head that began anew: in each of them
`ray start --block` ends, and this is all it takes for the node to come back.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import psutil

from launcher.cluster.auth_token import write_private
from launcher.cluster.probe import boot, started_at, state_folder
from launcher.driver.connect import QUIET

PORT, DASHBOARD_PORT = 6379, 8265
"""Of the head, where nobody asks for others: Ray's own defaults."""
LOG = "node.log"
LOG_BYTES = 2**20
"""Of the log, and of the one before it that is kept."""
MAX_DELAY_S = 15
STEADY_S = 60
"""A Ray that ran so long ended for a reason of its own: it is started again at once."""
GRACE_S = 6
"""For Ray's own orderly end, before what is left is killed."""
OPEN_FILES = 65536
PATIENCE = {
    # A node is asked every second, an answer awaited 10 s, and given up after the fifth that fails: a silent one after
    # 55 s, one whose raylet was killed after 5 s (Ray's own 3 s make it 65 and 15).
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "10000",
    "RAY_health_check_failure_threshold": "5",
    # A node that does not hear the head for a minute ends, and this keeper starts it again.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "60",
    # Ray closes a connection that says nothing for 20 s: the very length of a cut that should be a pause.
    "RAY_grpc_keepalive_timeout_ms": "60000",
    # Ray drains a node for up to 30 s at its end, which is for Ray Serve.
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
}
NOT_FOR_RAY = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "SSH_AUTH_SOCK", "SSH_CONNECTION", "SSH_CLIENT")
"""Ray reads the token from its file, so that no environment shows it; the rest is another cluster's, or ssh's."""
_PR_SET_CHILD_SUBREAPER = 36
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Node:
    """What this host is in the cluster. `head` is the head's address and port."""

    role: str
    name: str
    address: str
    head: str
    gpus: int
    dashboard_host: str
    dashboard_port: int

    def command(self) -> list[str]:
        """The command line that runs Ray here."""
        # The module and not the script `ray`, which may be another environment's on PATH. -P: not what lies in HOME.
        command = [sys.executable, "-Pum", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        command += ["--log-style=pretty", "--log-color=false"]
        command += [f"--node-ip-address={self.address}", f"--node-name={self.name}", f"--num-gpus={self.gpus}"]
        if self.role != "head":
            return [*command, f"--address={self.head}"]
        dashboard = ["--include-dashboard=true", f"--dashboard-host={self.dashboard_host}"]
        port = self.head.rpartition(":")[2]
        return [*command, "--head", f"--port={port}", *dashboard, f"--dashboard-port={self.dashboard_port}"]


def environment() -> dict[str, str]:
    """The environment of everything of Ray's on this host."""
    env = {**QUIET, **PATIENCE, **os.environ, "RAY_AUTH_MODE": "token"}
    for name in NOT_FOR_RAY:
        env.pop(name, None)
    env["PATH"] = f"{Path(sys.executable).parent}:{env.get('PATH', os.defpath)}"
    return env


class Keeper:
    """The process that runs Ray on this host. Everything Ray starts descends from it and ends with it."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.told_to_stop = threading.Event()
        self.ray: subprocess.Popen[str] | None = None

    def run(self) -> None:
        """Until SIGTERM."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.told_to_stop.set())
        # What a dying raylet leaves behind becomes a child of this process instead of the host's first one.
        with contextlib.suppress(OSError):
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        _raise_open_files()
        pid = os.getpid()
        state = {**asdict(self.node), "pid": pid, "started": started_at(pid), "boot": boot()}
        write_private(Path(state_folder()) / "node.json", json.dumps(state))
        _log.info("keeper %d: %s %s of %s", pid, self.node.role, self.node.address, self.node.head)
        try:
            self._keep()
        finally:
            self.end_ray()
            _log.info("keeper %d: told to stop", pid)

    def _keep(self) -> None:
        delay_s = 1.0
        while not self.told_to_stop.is_set():
            self._wait_for_head()
            if self.told_to_stop.is_set():
                return
            began = time.monotonic()
            code = self._run_ray()
            if self.told_to_stop.is_set():
                return
            self.end_ray()
            delay_s = 1.0 if time.monotonic() - began > STEADY_S else min(2 * delay_s, MAX_DELAY_S)
            _log.info("Ray ended with %s after %.0f s; again in %.0f s", code, time.monotonic() - began, delay_s)
            self.told_to_stop.wait(delay_s)

    def _wait_for_head(self) -> None:
        """A worker's Ray that finds no head takes a minute to say so; a connection tells at once."""
        if self.node.role == "head":
            return
        host, _, port = self.node.head.rpartition(":")
        said = False
        while not self.told_to_stop.is_set():
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
                return
            except OSError as error:
                if not said:
                    _log.info("waiting for the head at %s: %s", self.node.head, error)
                said = True
            self.told_to_stop.wait(0.3)

    def _run_ray(self) -> int:
        """Ray until it ends, or until this process is told to."""
        self.ray = subprocess.Popen(
            self.node.command(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        reader = threading.Thread(target=_copy_to_log, args=(self.ray.stdout,), daemon=True)
        reader.start()
        while self.ray.poll() is None and not self.told_to_stop.wait(0.5):
            self._family()
        reader.join(1)
        return self.ray.returncode or 0

    def end_ray(self) -> None:
        """End Ray and whatever it left, in order if it does so in time."""
        if self.ray is not None and self.ray.poll() is None:
            self.ray.terminate()
        began = time.monotonic()
        while (family := self._family()) and time.monotonic() - began < GRACE_S + 10:
            is_late = time.monotonic() - began > GRACE_S
            has_ended = self.ray is None or self.ray.poll() is not None
            for process in family if is_late or has_ended else []:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            time.sleep(0.05)
        for process in family:
            _log.warning("process %d is left", process.pid)

    def _family(self) -> list[psutil.Process]:
        """Living descendants; dead ones that were left to this process are taken off the process table."""
        living = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error, ChildProcessError):
                if process.status() != psutil.STATUS_ZOMBIE:
                    living.append(process)
                elif process.ppid() == os.getpid() and (self.ray is None or process.pid != self.ray.pid):
                    os.waitpid(process.pid, os.WNOHANG)
        return living


def _copy_to_log(lines: Any) -> None:
    for line in lines:
        if line.strip() and "[state-dump]" not in line:  # of a dead raylet, hundreds of lines
            _log.info("ray: %s", line.rstrip())


def _raise_open_files() -> None:
    """A raylet keeps several files open for each worker; many systems give 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def keep(node: Node) -> None:
    """Be the keeper of this host, with its log."""
    handler = RotatingFileHandler(Path(state_folder()) / LOG, maxBytes=LOG_BYTES, backupCount=1)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    try:
        Keeper(node).run()
    except Exception:
        _log.exception("the keeper ends")
        raise
