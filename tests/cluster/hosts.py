"""Real hosts on one machine: each a network namespace with its own address, name, processes, HOME, /tmp/ray and sshd.

They share every other folder with this machine, as nodes share a network disk. This machine is outside of the cluster,
at the bridge's address. Needs root, and Debian's iproute2, openssh-server and rsync.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import psutil
import pytest

NEEDED = ("ip", "ssh", "ssh-keygen", "/usr/sbin/sshd", "unshare", "rsync")
BEDS = range(1, 200)

needs_hosts = pytest.mark.skipif(
    os.geteuid() != 0 or any(shutil.which(tool) is None for tool in NEEDED),
    reason="hosts in network namespaces need root, iproute2, openssh-server and rsync",
)


class Host:
    """One of them. Its processes are this machine's too, under other process ids."""

    def __init__(self, bed: Hosts, number: int) -> None:
        self.bed = bed
        self.name = f"host{number}"
        self.address = f"10.77.{bed.number}.{10 + number}"
        self.netns = f"slip{bed.number}h{number}"
        self.folder = bed.folder / self.name
        self.init: subprocess.Popen[bytes] | None = None

    @property
    def home(self) -> Path:
        """Where its HOME's own files are, seen from this machine."""
        return Path(f"/proc/{self.shell_pid()}/root") / Path.home().relative_to("/")

    def start(self) -> None:
        """Boot: sshd answers when this returns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        etc = Path("/etc/netns") / self.netns
        etc.mkdir(parents=True, exist_ok=True)
        # `ip netns exec` mounts it over /etc/hosts
        others = "".join(f"{other.address} {other.name}\n" for other in self.bed.hosts)
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n{others}")
        _run("ip", "netns", "add", self.netns)
        _run("ip", "link", "add", self.veth, "type", "veth", "peer", "name", "eth0", "netns", self.netns)
        _run("ip", "link", "set", self.veth, "master", self.bed.bridge, "up")
        _run("ip", "-n", self.netns, "addr", "add", f"{self.address}/24", "dev", "eth0")
        _run("ip", "-n", self.netns, "link", "set", "eth0", "up")
        _run("ip", "-n", self.netns, "link", "set", "lo", "up")
        self.boot()

    def boot(self) -> None:
        """Start its processes: sshd as the first of them."""
        key = self.bed.folder / f"hostkey-{self.name}"
        if not key.exists():
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
        # Its shells read nothing of this machine's start-up files: pyenv's take a lock, and where its owner was killed
        # each login waits a minute for it.
        home, own = shlex.quote(str(Path.home())), shlex.quote(str(self.folder))
        sshd = [
            *("/usr/sbin/sshd", "-D", "-e", "-h", str(key), "-o", f"AuthorizedKeysFile={self.bed.folder}/id.pub"),
            *("-o", "StrictModes=no", "-o", "PermitRootLogin=yes", "-o", "PidFile=none", "-o", "MaxStartups=100"),
        ]
        script = f"""hostname {self.name}
            mount -t tmpfs tmpfs {own} && mkdir {own}/up {own}/work {own}/ray
            mount -t overlay overlay -o lowerdir={home},upperdir={own}/up,workdir={own}/work {home}
            rm -f {home}/.bashrc {home}/.profile {home}/.bash_profile {home}/.bash_login
            : > {home}/.bashrc; echo '. ~/.bashrc' > {home}/.profile
            mkdir -p /tmp/ray && mount --bind {own}/ray /tmp/ray
            exec {shlex.join(sshd)}"""
        command = ["ip", "netns", "exec", self.netns, "unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc"]
        with (self.bed.folder / f"{self.name}.log").open("ab") as log:
            # A session of its own: a Ctrl-C that a test sends is not for the hosts.
            self.init = subprocess.Popen(
                [*command, "sh", "-euc", script], stdout=log, stderr=log, start_new_session=True
            )
        self.wait_for_ssh()

    def wait_for_ssh(self, timeout_s: float = 20) -> None:
        for _ in range(int(timeout_s / 0.1)):
            done = subprocess.run(self.ssh("true", "-o", "ConnectTimeout=2"), capture_output=True)
            if done.returncode == 0:
                return
            assert self.init is not None
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.init.wait(0.1)
                raise AssertionError((self.bed.folder / f"{self.name}.log").read_text())
        raise AssertionError(f"{self.name} does not answer: {done.stderr.decode()}")

    @property
    def veth(self) -> str:
        return f"slip{self.bed.number}v{self.name.removeprefix('host')}"

    def ssh(self, command: str, *options: str) -> list[str]:
        return ["ssh", "-F", str(self.bed.ssh_config), *options, self.address, command]

    def run(self, command: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """A shell line on the host, over ssh, with this Python's programs on its PATH."""
        line = f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH; {command}"
        return subprocess.run(self.ssh(line), capture_output=True, text=True, timeout=timeout_s)

    def popen(self, command: str, *options: str) -> subprocess.Popen[str]:
        """The same, followed while it goes on; with the option -tt a terminal, whose end is the command's."""
        line = f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH; {command}"
        return subprocess.Popen(
            self.ssh(line, *options),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def pids(self) -> list[int]:
        """Its processes as this machine numbers them."""
        done = subprocess.run(["ip", "netns", "pids", self.netns], capture_output=True, text=True)
        return [int(word) for word in done.stdout.split()]

    def processes(self, words: str) -> list[psutil.Process]:
        """Those whose command line has `words` in it."""
        found = []
        for pid in self.pids():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if words in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def shell_pid(self) -> int:
        """A process in the host's mounts: its sshd."""
        return self.processes("sshd: /usr/sbin/sshd")[0].pid

    def pid_here(self, inner: int) -> int:
        """This machine's number for the process that the host knows as `inner`. Raises LookupError."""
        for pid in self.pids():
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{pid}/status").read_text()
                numbers = next(line.split()[1:] for line in status.splitlines() if line.startswith("NSpid:"))
                if len(numbers) > 1 and int(numbers[-1]) == inner:
                    return pid
        raise LookupError(f"{self.name} has no process {inner}")

    def cut(self) -> None:
        """Pull its cable."""
        _run("ip", "link", "set", self.veth, "down")

    def mend(self) -> None:
        _run("ip", "link", "set", self.veth, "up")

    def power_off(self) -> None:
        """Every process gone at once, the cable pulled first: nobody hears a connection close."""
        self.cut()
        self.kill_processes()

    def kill_processes(self) -> None:
        for _ in range(50):
            pids = self.pids()
            if not pids:
                break
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=5)
        if self.init is not None:
            self.init.kill()
            self.init.wait()
            self.init = None

    def remove(self) -> None:
        self.kill_processes()
        subprocess.run(["ip", "netns", "del", self.netns], capture_output=True)
        subprocess.run(["ip", "link", "del", self.veth], capture_output=True)
        shutil.rmtree(Path("/etc/netns") / self.netns, ignore_errors=True)


class Hosts:
    """`count` hosts on a bridge of their own; nothing of them is left at the end of the block."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __enter__(self) -> Hosts:
        self._lock, self.number = _free_number()
        self.bridge, self.address = f"slip{self.number}", f"10.77.{self.number}.1"
        self.folder = Path(tempfile.mkdtemp(prefix="slipway-hosts-"))
        _clear(self.number)
        self.hosts = [Host(self, number) for number in range(1, self.count + 1)]
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _build(self) -> None:
        Path("/run/sshd").mkdir(exist_ok=True)
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "id"))
        names = "".join(f"Host {host.name}\n  HostName {host.address}\n" for host in self.hosts)
        self.ssh_config.write_text(
            f"{names}Host *\n  IdentityFile {self.folder}/id\n  IdentitiesOnly yes\n  IdentityAgent none\n"
            f"  UserKnownHostsFile {self.folder}/known_hosts\n  StrictHostKeyChecking accept-new\n  LogLevel ERROR\n"
        )
        _run("ip", "link", "add", self.bridge, "type", "bridge")
        _run("ip", "addr", "add", f"{self.address}/24", "dev", self.bridge)
        _run("ip", "link", "set", self.bridge, "up")
        for host in self.hosts:
            host.start()

    @property
    def ssh_config(self) -> Path:
        return self.folder / "ssh_config"

    def hostfile(self, slots: int | None = None, *others: str) -> Path:
        """A hostfile of all of them, by address; `others` are lines after theirs."""
        file = self.folder / "hostfile"
        ending = "" if slots is None else f" slots={slots}"
        file.write_text("".join(f"{line}\n" for line in [*(f"{h.address}{ending}" for h in self.hosts), *others]))
        return file

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            host.remove()
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def __getitem__(self, number: int) -> Host:
        """`hosts[1]` is host1."""
        return self.hosts[number - 1]

    def __iter__(self) -> Iterator[Host]:
        return iter(self.hosts)


def _free_number() -> tuple[IO[str], int]:
    """A number that no other test process on this machine uses now, and what holds it."""
    folder = Path(tempfile.gettempdir()) / "slipway-hosts-numbers"
    folder.mkdir(exist_ok=True)
    for number in BEDS:
        file = (folder / str(number)).open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file, number
        except OSError:
            file.close()
    raise AssertionError("every number is taken")


def _clear(number: int) -> None:
    """Remove what a test process that was killed has left under this number, which is ours now."""
    named = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.split()
    for netns in [word for word in named if word.startswith(f"slip{number}h")]:
        pids = subprocess.run(["ip", "netns", "pids", netns], capture_output=True, text=True).stdout.split()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", netns], capture_output=True)
        shutil.rmtree(Path("/etc/netns") / netns, ignore_errors=True)
        subprocess.run(["ip", "link", "del", f"slip{number}v{netns.partition('h')[2]}"], capture_output=True)
    subprocess.run(["ip", "link", "del", f"slip{number}"], capture_output=True)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"
