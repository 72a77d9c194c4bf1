"""The dashboard of a head's Ray at a port of this machine, through the user's own ssh.

The head keeps it on its loopback interface: who may log in there may use it, and nobody else.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import tempfile
import time
from typing import IO

from launcher.cluster.hostfile import Host
from launcher.cluster.keeper import DASHBOARD_PORT
from launcher.cluster.ssh import Ssh
from launcher.errors import ClusterError

OPEN_TIMEOUT_S = 20.0
_END_S = 5.0
_READY = b"slipway-tunnel\n"


class Tunnel:
    """Open for the length of a `with` block; `url` is where the dashboard then answers, if there is one."""

    def __init__(self, ssh: Ssh, host: Host, port: int = DASHBOARD_PORT) -> None:
        self.ssh, self.host, self.port = ssh, host, port
        self.local_port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._err: IO[bytes] | None = None

    @property
    def url(self) -> str:
        """Where a client finds the dashboard; the same after `mend`."""
        return f"http://127.0.0.1:{self.local_port}"

    def __enter__(self) -> Tunnel:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        """Return once ssh has logged in and listens.

        Raises:
            ClusterError: the host is not reached, or its sshd forwards no ports.
        """
        # A connection of its own: one that the user's config shares with other commands would keep the port open after
        # our end. And `cat`, not -N: it ends when our end of its input closes, even if we were killed.
        command = self.ssh.argv(
            self.host,
            *("-o", "ControlMaster=no", "-o", "ControlPath=none", "-o", "ExitOnForwardFailure=yes"),
            *("-L", f"127.0.0.1:{self.local_port}:127.0.0.1:{self.port}"),
        )
        self._err = tempfile.TemporaryFile()  # noqa: SIM115  # for as long as its ssh
        self._process = subprocess.Popen(
            [*command, f"echo {_READY.decode().strip()}; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._err,
            start_new_session=True,  # a Ctrl-C is for us, and the tunnel is needed until we have ended
        )
        if not self._said_ready():
            said = self.said()
            self.close()
            last = said.splitlines()[-1].rstrip(".") if said else f"no answer within {OPEN_TIMEOUT_S:.0f} s"
            hint = f"ssh {self.host.destination} shows the same"
            if "local forwarding" in last:  # the port of ours was free a moment ago
                hint = "a LocalForward of ~/.ssh/config is in use: end the ssh that has it, or --ssh-config without it"
            raise ClusterError(f"{self.host.name}: no tunnel: {last}", hint)

    def said(self) -> str:
        """What its ssh has complained of so far, such as a port of the head at which nobody listens."""
        if self._err is None:
            return ""
        self._err.seek(0)
        return self._err.read().decode("utf-8", "replace").strip()

    def is_open(self) -> bool:
        """Whether its ssh still runs."""
        return self._process is not None and self._process.poll() is None

    def mend(self) -> None:
        """Open it again, at the same port, where its connection is lost. Raises ClusterError as `open` does."""
        if not self.is_open():
            self.close()
            self.open()

    def close(self) -> None:
        """End its ssh; a second call does nothing."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.terminate()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        if self._err is not None:
            self._err.close()
            self._err = None

    def _said_ready(self) -> bool:
        assert self._process is not None
        assert self._process.stdout is not None
        said, deadline = b"", time.monotonic() + OPEN_TIMEOUT_S
        while not said.endswith(_READY):  # a login script of the user's may have printed something before
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([self._process.stdout], [], [], left_s)[0]:
                return False
            some = os.read(self._process.stdout.fileno(), 4096)
            if not some:
                return False
            said += some
        return True


def _free_port() -> int:
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        port: int = some.getsockname()[1]
        return port
