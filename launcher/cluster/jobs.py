"""Ray Jobs of a cluster, seen from outside: over ssh at `ssh://[user@]head[:port]`, or at `http://head:8265`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from launcher.cluster.hostfile import Host, parse_host
from launcher.cluster.keeper import DASHBOARD_PORT
from launcher.cluster.ssh import Ssh
from launcher.cluster.tunnel import Tunnel
from launcher.errors import ClusterError, RunFailed, UserError

ANSWER_TIMEOUT_S = 12.0
"""How long a dashboard that has just been started may take to answer."""
REQUEST_TIMEOUT_S = (10.0, 120.0)
"""To connect, and between two bytes of an answer."""
RECONNECT_S = 600.0
SILENCE_S = 15.0
"""After a log has said nothing for so long the job itself is asked whether it lives."""
_AGAIN_S = 0.5
_JOB = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_ASK_HEAD = """
state=~/.slipway/cluster/$(uname -n)
echo "slipway token $(cat ~/.ray/auth_token 2>/dev/null)"
echo "slipway python $(cat "$state/python" 2>/dev/null)"
echo "slipway port $(sed -n 's/.*"dashboard_port": *\\([0-9]*\\).*/\\1/p' "$state/node.json" 2>/dev/null)"
test -e /tmp/ray/ray_current_cluster && echo "slipway ray yes"
exit 0
"""

for _name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
    logging.getLogger(_name).setLevel(logging.WARNING)  # uploads and closed connections are ours to tell of

Say = Callable[[str], None]


@dataclass(frozen=True)
class Head:
    """What ssh tells of a cluster's head. `python` is the interpreter that `slipway cluster up` started Ray with."""

    ssh: Ssh
    host: Host
    token: str | None = field(repr=False)
    python: str | None
    port: int
    """Of its dashboard."""
    has_ray: bool


@contextlib.contextmanager
def reached(address: str, ssh_config: Path | None, say: Say) -> Iterator[Jobs]:
    """The jobs of the cluster at `address`, for the length of the block; `say` is told of lost connections.

    Raises:
        ClusterError: ssh does not reach the head, no Ray runs there, its dashboard does not answer, the token is wrong.
    """
    if address.startswith(("http://", "https://")):
        token = own_token()
        if token and address.startswith("http://") and not _is_here(address):
            say(f"the token goes to {address} unencrypted; ssh://HEAD hides it")
        yield Jobs(address.rstrip("/"), address.rstrip("/"), token, say)
        return
    if not address.startswith("ssh://"):
        raise ClusterError(
            f"--address {address}: not the address of a cluster's jobs",
            hint="ssh://[user@]HEAD goes through ssh; http://HEAD:8265 where the dashboard can be reached",
        )
    host = parse_host(address)
    with Ssh(ssh_config) as ssh:
        head = ask_head(ssh, host)
        if not head.has_ray:
            raise ClusterError(
                f"{host.name}: no Ray runs there", hint="slipway cluster up --hostfile FILE starts it on all hosts"
            )
        with Tunnel(ssh, host, head.port) as tunnel:
            yield Jobs(address, tunnel.url, head.token, say, tunnel, head)


def _is_here(url: str) -> bool:
    """Whether it stays on this machine."""
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def ask_head(ssh: Ssh, host: Host) -> Head:
    """The cluster's token and Python, as its head has them. Raises ClusterError where ssh does not reach it."""
    done = ssh.run(host, ["sh", "-s"], stdin=_ASK_HEAD.encode())
    found = dict(re.findall(r"^slipway (\w+) (.+)$", done.out, re.MULTILINE))
    port = int(found.get("port", DASHBOARD_PORT))
    return Head(ssh, host, found.get("token"), found.get("python"), port, "ray" in found)


def own_token() -> str | None:
    """This user's token, where Ray looks for it; None without one.

    Raises:
        ClusterError: RAY_AUTH_TOKEN_PATH names a file that cannot be read.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    try:
        return Path(named or Path.home() / ".ray" / "auth_token").read_text(encoding="utf-8").strip() or None
    except OSError as error:
        if named is None:
            return None
        raise ClusterError(
            f"RAY_AUTH_TOKEN_PATH: {named}: {error.strerror or error}", hint="a copy of the head's ~/.ray/auth_token"
        ) from None


class Jobs:
    """The jobs at `address`, which the user knows; `url` is where they are spoken to."""

    def __init__(
        self,
        address: str,
        url: str,
        token: str | None,
        say: Say,
        tunnel: Tunnel | None = None,
        head: Head | None = None,
    ) -> None:
        self.address, self.head = address, head
        self._url, self._token, self._say, self._tunnel = url, token, say, tunnel
        self._client = self._connect(ANSWER_TIMEOUT_S)

    def submit(
        self, job: str, entrypoint: str, package: Path | None, env: dict[str, str], about: dict[str, str]
    ) -> None:
        """Start a job. `env` is shown by Ray to whoever asks.

        Raises:
            ClusterError: the cluster refuses it.
        """
        runtime_env: dict[str, Any] = {"env_vars": env}
        if package is not None:
            runtime_env["working_dir"] = str(package)
        try:
            self._client.submit_job(entrypoint=entrypoint, submission_id=job, runtime_env=runtime_env, metadata=about)
        except (RuntimeError, OSError) as error:
            raise ClusterError(
                f"{self.address} does not take the job: {_reason(error)}", hint=f"slipway runs --address {self.address}"
            ) from error

    def info(self, job: str) -> JobDetails:
        """What Ray knows of a job.

        Raises:
            UserError: there is none.
            OSError, RuntimeError: the connection is lost.
        """
        if not _JOB.fullmatch(job):
            raise self._unknown(job)
        try:
            return self._client.get_job_info(job)
        except RuntimeError as error:
            if "status code 404" in str(error):
                raise self._unknown(job) from None
            raise

    def submitted(self) -> list[JobDetails]:
        """Every job that was submitted, the oldest first. Raises ClusterError where the connection is lost."""
        with self._answers():
            jobs = [job for job in self._client.list_jobs() if job.submission_id is not None]
        return sorted(jobs, key=lambda job: job.start_time or 0)

    def stop(self, job: str) -> bool:
        """Ask a job to save and end; False where it has ended. Raises UserError where there is none."""
        with self._answers():
            if self.info(job).status.is_terminal():
                return False
            return bool(self._client.stop_job(job))

    def log(self, job: str) -> str:
        """A job's output so far. Raises UserError where there is none."""
        with self._answers():
            self.info(job)
            return self._client.get_job_logs(job)

    def follow(self, job: str, write: Say, shown: int = 0) -> JobDetails:
        """Hand on a job's output as it comes, after the first `shown` characters; how it ended.

        A connection that is lost is made again.

        Raises:
            UserError: there is no such job.
            RunFailed: there is none any more: the cluster's Ray was started anew.
            ClusterError: the connection stays lost.
        """
        self.info(job)
        for text in self._output(job, shown):
            write(text)
        return self.info(job)

    def _output(self, job: str, shown: int) -> Iterator[str]:
        """A job's output after the first `shown` characters, until it has ended."""
        while True:
            try:
                begin = 0
                for text in self._tail(job):
                    new = text[max(0, shown - begin) :]
                    begin += len(text)
                    shown = max(shown, begin)
                    if new:
                        yield new
                if self.info(job).status.is_terminal():
                    return
                time.sleep(_AGAIN_S)
            except UserError as error:
                raise RunFailed(
                    f"{self.address} knows job {job} no more: its Ray was started anew",
                    hint="the run's checkpoints are there: slipway resume RUN, on the head",
                ) from error
            except Exception as error:  # requests, aiohttp, sockets and Ray each have theirs
                self._say(f"the connection to {self.address} is lost ({_reason(error)}); the job goes on without it")
                if self._tunnel is not None and not self._tunnel.is_open():
                    self._tunnel.close()
                self._client = self._connect(RECONNECT_S)
                self._say("connected again")

    def _tail(self, job: str) -> Iterator[str]:
        """A job's output from its beginning, until it ends or the connection does."""
        # In a thread: the main one must be free for signals.
        lines: queue.Queue[str | Exception | None] = queue.Queue()
        client = self._client

        async def listen() -> None:
            async for text in client.tail_job_logs(job):
                lines.put(text)

        def pump() -> None:
            try:
                asyncio.run(listen())
                lines.put(None)
            except Exception as error:
                lines.put(error)

        self.info(job)  # through _do_request, which looks whether the tunnel is open: what follows does not
        threading.Thread(target=pump, name="job-log", daemon=True).start()
        while True:
            try:
                said = lines.get(timeout=SILENCE_S)
            except queue.Empty:
                self.info(job)
                continue
            if said is None:
                return
            if isinstance(said, Exception):
                raise said
            yield said

    def _connect(self, timeout_s: float) -> _Client:
        """A client that has been answered. Raises ClusterError where there is none within `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                if self._tunnel is not None:
                    self._tunnel.mend()
                return _Client(self._url, self._token, self._tunnel)
            except AuthenticationError:
                raise self._wrong_token() from None
            except Exception as error:
                if time.monotonic() > deadline:
                    raise self._no_answer(error) from error
                time.sleep(_AGAIN_S)

    @contextlib.contextmanager
    def _answers(self) -> Iterator[None]:
        try:
            yield
        except AuthenticationError:
            raise self._wrong_token() from None
        except (RuntimeError, OSError) as error:
            raise self._no_answer(error) from error

    def _unknown(self, job: str) -> UserError:
        return UserError(f"{self.address} has no job {job}", hint=f"slipway runs --address {self.address} lists them")

    def _wrong_token(self) -> ClusterError:
        if self._token is None:
            what, hint = "wants a token, and there is none here", "copy the head's ~/.ray/auth_token here with mode 600"
        else:
            what, hint = "takes another token", "copy the head's ~/.ray/auth_token here with mode 600 once more"
        if self.head is not None:
            what += f": ~/.ray/auth_token of {self.head.host.name} is not the one that its Ray was started with"
            hint = "slipway cluster down, then up: all hosts get one token"
        return ClusterError(f"{self.address} {what}", hint)

    def _no_answer(self, error: Exception) -> ClusterError:
        reason, hint = _reason(error), "is Ray up there, and port 8265 reachable from here? ssh://HEAD needs only ssh"
        if self._tunnel is not None:
            said = self._tunnel.said().lower()
            reason = f"Ray runs there, but its dashboard does not answer at 127.0.0.1:{self._tunnel.port}"
            hint = "ray start --head --include-dashboard=true, with ray[default] installed; its log: dashboard.log"
            if "administratively prohibited" in said:
                reason, hint = "its sshd forwards no ports", "AllowTcpForwarding yes in its sshd_config"
        return ClusterError(f"{self.address}: {reason}", hint)


class _Client(JobSubmissionClient):
    """Ray's client with time limits, and at the address it is given: Ray's own would prefer RAY_ADDRESS."""

    def __init__(self, url: str, token: str | None, tunnel: Tunnel | None) -> None:
        self._tunnel = tunnel
        hidden = {name: os.environ.pop(name, None) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
        try:
            super().__init__(url, headers={"Authorization": f"Bearer {token}"} if token else {})
        finally:
            os.environ.update({name: value for name, value in hidden.items() if value is not None})

    def _do_request(self, *args: Any, **kwargs: Any) -> Any:
        if self._tunnel is not None and not self._tunnel.is_open():  # another's process may listen there by now
            raise ConnectionError("the tunnel is closed")
        # A proxy for the world outside does not know our end of a tunnel.
        return super()._do_request(*args, timeout=REQUEST_TIMEOUT_S, proxies={"no_proxy": "127.0.0.1"}, **kwargs)


def exit_code(job: JobDetails) -> int:
    """What a job that has ended ends its launcher with; never 0 unless it succeeded."""
    if job.status == JobStatus.SUCCEEDED:
        return 0
    if job.status == JobStatus.STOPPED:
        return 143
    code = job.driver_exit_code
    return 128 - code if code is not None and code < 0 else code or 1


def unsaid(job: JobDetails) -> RunFailed | None:
    """What a job's own output cannot say of its end: that nobody was left to say it."""
    code, hint = exit_code(job), "the run's checkpoints are there: slipway resume RUN, on the head"
    if job.status == JobStatus.FAILED and job.driver_exit_code is None:
        lines = (job.message or "").strip().splitlines() or ["without a word"]
        return RunFailed(f"Ray could not carry job {job.submission_id}: {lines[0]}", hint)
    if code > 128 and code not in (130, 143):
        return RunFailed(f"the launcher of job {job.submission_id} was killed by signal {code - 128}", hint)
    return None


def _reason(error: Exception) -> str:
    """What went wrong, in one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
