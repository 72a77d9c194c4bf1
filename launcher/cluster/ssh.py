"""The user's own ssh: its config, agent, jump hosts and known hosts. Never a password, never a shell of ours."""

from __future__ import annotations

import contextlib
import json
import random
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from launcher.cluster.hostfile import Host
from launcher.errors import ClusterError, Problem, SlipwayError

T = TypeVar("T")

CONNECT_TIMEOUT_S = 10
SILENCE_S = 5
"""A connection that says nothing is asked after so many seconds, three times, before it counts as lost."""
MAX_AT_ONCE = 64
CROWDED_S = 10
"""An sshd that ten wait to log in to turns others away, by default (MaxStartups), and a jump host sees all of us at
once: whoever is turned away, before anything is run, tries again for so many seconds."""
_TURNED_AWAY = "exchange_identification"
OWN_FAILURE = 255
"""ssh's exit code where it did not reach the host; a command's own codes are others."""
_KINDS = (
    ("could not resolve", "check the name in the hostfile and in ~/.ssh/config"),
    ("permission denied", "ssh must log in with a key and no password: ssh-copy-id, or IdentityFile in ~/.ssh/config"),
    ("too many authentication failures", "name this host's key: IdentityFile and IdentitiesOnly in ~/.ssh/config"),
    (
        "host key verification failed",
        "log in once by hand with ssh and look at the key it shows; after a reinstallation, ssh-keygen -R HOST first",
    ),
    (_TURNED_AWAY, "it, or a jump host before it, takes no more logins: MaxStartups in its sshd_config"),
    ("connection refused", "no ssh server listens there: check the port, and that sshd runs"),
    ("timed out", "is it switched on, and reachable from here? ssh HOST shows the same"),
    ("no route to host", "is it switched on, and reachable from here? ssh HOST shows the same"),
    ("network is unreachable", "is it switched on, and reachable from here? ssh HOST shows the same"),
)


@dataclass(frozen=True)
class Done:
    """A command that ended on a host."""

    code: int
    out: str
    err: str

    def answer(self) -> Any:
        """The JSON of the last line that is some, since a login shell may say more; None where there is none."""
        lines = [line for line in self.out.splitlines() if line.startswith(("{", "["))]
        return json.loads(lines[-1]) if lines else None

    def last_words(self) -> str:
        """Why it failed, in its own words."""
        return (self.err.strip().splitlines() or [f"it ended with {self.code}"])[-1]


class Ssh:
    """Runs commands on hosts. As a context manager it keeps one connection a host open for all of them."""

    def __init__(self, config: Path | None = None) -> None:
        self.config = config
        self._sockets: Path | None = None
        self._used: set[Host] = set()

    def __enter__(self) -> Ssh:
        # In /tmp and not TMPDIR: a socket's path may have 104 characters, and ssh adds 57.
        self._sockets = Path(tempfile.mkdtemp(prefix="slipway-ssh-", dir="/tmp"))
        return self

    def __exit__(self, *_: object) -> None:
        sockets, used = self._sockets, self._used
        assert sockets is not None
        for host in used:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                end = [*self._shared(host), "-O", "exit", "--", host.destination]
                subprocess.run(end, stdin=subprocess.DEVNULL, capture_output=True, timeout=5)
        self._sockets, self._used = None, set()
        shutil.rmtree(sockets, ignore_errors=True)

    def argv(self, host: Host, *options: str) -> list[str]:
        """The command line that reaches `host` over a connection of its own, for a command to be added to."""
        return [*self._program(host), *options, "--", host.destination]

    def run(self, host: Host, command: Sequence[str], stdin: bytes | None = None, timeout_s: float = 30) -> Done:
        """Run a command to its end; what it exits with is for the caller to judge.

        Raises:
            ClusterError: the host is not reached, or the command takes longer than `timeout_s` seconds.
        """
        # A port that the user's config forwards may be in use by a login of theirs, which must not end this one.
        options = [*self._shared(host), "-o", "ClearAllForwardings=yes"]
        argv = [*options, "--", host.destination, shlex.join(command)]
        self._used.add(host)
        began = time.monotonic()
        while True:
            code, out, said = self._once(argv, host, command, stdin, timeout_s)
            if code != OWN_FAILURE:
                return Done(code, out, said)
            if _TURNED_AWAY not in said or time.monotonic() - began > CROWDED_S:
                raise _not_reached(host, said)
            time.sleep(random.uniform(0.2, 2))

    @staticmethod
    def _once(
        argv: list[str], host: Host, command: Sequence[str], stdin: bytes | None, timeout_s: float
    ) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        # stderr goes to a file: older versions of ssh keep a pipe open for as long as the shared connection lives.
        with tempfile.TemporaryFile() as err:
            try:
                done = subprocess.run(argv, input=stdin or b"", stdout=subprocess.PIPE, stderr=err, timeout=timeout_s)
            except FileNotFoundError:
                raise ClusterError("there is no ssh program on PATH", hint="install OpenSSH's client") from None
            except subprocess.TimeoutExpired:
                raise ClusterError(
                    f"{host.name}: {_short(command)} was not done after {timeout_s:.0f} s",
                    hint=f"ssh {host.destination} shows whether the host is busy or half dead",
                ) from None
            err.seek(0)
            said = err.read().decode("utf-8", "replace")
        return done.returncode, done.stdout.decode("utf-8", "replace"), said

    def everywhere(self, hosts: Sequence[Host], ask: Callable[[Host], T]) -> dict[Host, T | SlipwayError]:
        """Ask every host at once; an answer, or why there is none, for each."""

        def one(host: Host) -> T | SlipwayError:
            try:
                return ask(host)
            except SlipwayError as error:
                return error

        with ThreadPoolExecutor(max(1, min(len(hosts), MAX_AT_ONCE))) as pool:
            return dict(zip(hosts, pool.map(one, hosts), strict=True))

    def _program(self, host: Host) -> list[str]:
        config = ["-F", str(self.config)] if self.config else []
        port = ["-p", str(host.port)] if host.port else []
        options = {
            "BatchMode": "yes",
            "ConnectTimeout": str(CONNECT_TIMEOUT_S),
            "ServerAliveInterval": str(SILENCE_S),
            "LogLevel": "ERROR",  # a config that says QUIET would hide why a host is not reached
            # What a config may have for people who log in: a terminal would echo what goes to stdin.
            "RequestTTY": "no",
            "RemoteCommand": "none",
        }
        return ["ssh", *config, *port, *(word for key, value in options.items() for word in ("-o", f"{key}={value}"))]

    def _shared(self, host: Host) -> list[str]:
        """The same over a connection that is kept, where there is a place for its socket."""
        if self._sockets is None:
            return self._program(host)
        options = ("ControlMaster=auto", f"ControlPath={self._sockets}/%C", "ControlPersist=60")
        return [*self._program(host), *(word for option in options for word in ("-o", option))]


def problems_of(answers: Mapping[Host, Any]) -> list[Problem]:
    """What went wrong on the hosts that gave no answer."""
    return [
        Problem(host.name, "", error.message.removeprefix(f"{host.name}: "), error.hint)
        for host, error in answers.items()
        if isinstance(error, SlipwayError)
    ]


def _not_reached(host: Host, said: str) -> ClusterError:
    """ssh's own failure: its last line, and what to do about that kind."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["ssh ended without a word"]
    everything = said.lower()
    hint = next((hint for words, hint in _KINDS if words in everything), f"ssh {host.destination} shows the same")
    return ClusterError(f"{host.name}: {lines[-1].rstrip('.')}", hint=hint.replace("HOST", host.destination))


def _short(command: Sequence[str]) -> str:
    words = shlex.join(command)
    return f"`{words if len(words) <= 60 else words[:57] + '...'}`"
