"""`slipway cluster up` and `down` from outside, on hosts of their own: what is found, what runs, what is left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.hosts import Host, Hosts, needs_hosts

pytestmark = [pytest.mark.cluster, needs_hosts]

PYTHON = Path(sys.executable)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with Hosts(3) as hosts:
        yield hosts


def slipway(hosts: Hosts, *arguments: str | Path, hostfile: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`slipway cluster ARGUMENTS` on this machine, as a user types it."""
    verb, *options = arguments
    files = ["--hostfile", hostfile or hosts.hostfile(), "--ssh-config", hosts.ssh_config]  # the last one counts
    return subprocess.run(
        [PYTHON, "-m", "launcher", "cluster", *map(str, [verb, *files, *options])],
        capture_output=True,
        text=True,
        env=os.environ | {"NO_COLOR": "1"},
        timeout=180,
    )


def of(hosts: Hosts, *numbers: int, ending: str = "") -> Path:
    """A hostfile of some of them."""
    file = hosts.folder / "some"
    file.write_text("".join(f"{hosts[number].address}{ending}\n" for number in numbers))
    return file


def own(host: Host) -> list[psutil.Process]:
    """Processes on a host that are neither its sshd's nor what holds its namespaces."""
    found = []
    for pid in host.pids():
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if not process.name().startswith(("sshd", "unshare")):
                found.append(process)
    return found


def members(hosts: Hosts) -> dict[str, str]:
    """{address: id} of the nodes that the head takes for alive."""
    done = hosts[1].run(f"python -m launcher.cluster.members {hosts[1].address}:6379 0")
    return {node["address"]: node["id"] for node in json.loads(done.stdout)}


def until(said: Callable[[], bool], timeout_s: float, what: str) -> float:
    """Seconds until it is so."""
    began = time.monotonic()
    while not said():
        assert time.monotonic() - began < timeout_s, what
        time.sleep(0.1)
    return time.monotonic() - began


def before_bashrc(host: Host, line: str) -> None:
    """Put a line into what every command over ssh reads first."""
    host.run(f"echo {shlex.quote(line)} | cat - ~/.bashrc > ~/bashrc && mv ~/bashrc ~/.bashrc")


# Each spoils host2 and says how to undo it, what `up` is given, and what it must say.


def wrong_key(hosts: Hosts) -> tuple[list[str], str]:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", hosts.folder / "other"], check=True)
    ours = hosts.ssh_config.read_text().partition("Host *\n")[2]
    file = hosts.folder / "wrong_key"
    theirs = ours.replace(f"{hosts.folder}/id\n", f"{hosts.folder}/other\n")
    file.write_text(f"Host {hosts[2].address}\n{theirs}Host {hosts[1].address}\n{ours}")
    return ["--ssh-config", str(file)], r"Permission denied \(publickey"


def other_host_key(hosts: Hosts) -> tuple[list[str], str]:
    known = hosts.folder / "other_known_hosts"
    key = (hosts.folder / "hostkey-host1.pub").read_text()
    known.write_text(f"{hosts[1].address} {key}{hosts[2].address} {key}")
    file = hosts.folder / "other_host_key"
    file.write_text(f"UserKnownHostsFile {known}\n{hosts.ssh_config.read_text()}")
    return ["--ssh-config", str(file)], "Host key verification failed"


def host_down(hosts: Hosts) -> tuple[list[str], str]:
    hosts[2].cut()
    return [], "(No route to host|timed out)"


def no_python(hosts: Hosts) -> tuple[list[str], str]:
    hosts[1].run(f"printf '#!/bin/sh\\nexec {PYTHON} \"$@\"\\n' > ~/here && chmod +x ~/here")
    return ["--python", "./here"], "no Python at ./here"


def other_version(hosts: Hosts) -> tuple[list[str], str]:
    hosts[2].run("mkdir -p ~/old/launcher; echo '__version__ = \"0.0.1\"' > ~/old/launcher/__init__.py")
    before_bashrc(hosts[2], "export PYTHONPATH=$HOME/old")
    return [], "slipway 0.0.1, here it is "


def other_token(hosts: Hosts) -> tuple[list[str], str]:
    before_bashrc(hosts[2], "export RAY_AUTH_TOKEN=0123456789")
    return [], "RAY_AUTH_TOKEN is set there and is not the cluster's token"


def stale_token(hosts: Hosts) -> tuple[list[str], str]:
    hosts[2].run("mkdir -p ~/.ray/auth_token")
    return [], "auth_token: Is a directory"


def port_taken(hosts: Hosts) -> tuple[list[str], str]:
    server = hosts[2].popen("exec python -u -m http.server 52365")
    until(lambda: bool(hosts[2].processes("http.server")), 10, "no server")
    assert server.poll() is None
    until(lambda: hosts[2].run("grep -q :CC8D /proc/net/tcp").returncode == 0, 10, "no port")
    return [], r"port 52365 is taken: python\S*, process \d+"


LONG = [other_host_key, stale_token]
SPOILT = [wrong_key, host_down, no_python, other_version, other_token, port_taken]
SPOILT += [pytest.param(spoil, marks=pytest.mark.long) for spoil in LONG]


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_what_is_wrong_is_named_by_host(hosts: Hosts, spoil: Callable[[Hosts], tuple[list[str], str]]) -> None:
    options, words = spoil(hosts)
    try:
        began = time.monotonic()
        done = slipway(hosts, "up", *options, hostfile=of(hosts, 1, 2))
        took_s = time.monotonic() - began
    finally:
        hosts[2].mend()
        for process in hosts[2].processes("http.server"):
            process.kill()
        hosts[2].run("sed -i /^export/d ~/.bashrc; rm -rf ~/old ~/.ray")
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(f"^{hosts[2].address}: .*{words}", done.stderr, re.M), done.stderr
    assert "hint: " in done.stderr
    assert not done.stderr.startswith(hosts[1].address)
    assert took_s < 30
    assert not own(hosts[1])
    assert not own(hosts[2])


def test_all_hosts_are_named_at_once(hosts: Hosts) -> None:
    """Fewer GPUs than slots on all, a name that nobody knows, and one that is another's."""
    file = of(hosts, 1, 2, 3, ending=" slots=8")
    with file.open("a") as out:
        out.write("nobody.invalid slots=8\nhost1 slots=8\n")
    done = slipway(hosts, "up", hostfile=file)
    assert done.returncode == 2
    for host in hosts:
        assert f"{host.address}: 0 GPUs (no NVIDIA driver), the hostfile says slots=8" in done.stderr
    assert "nobody.invalid: ssh: Could not resolve hostname nobody.invalid" in done.stderr
    assert f"host1: is the same machine as {hosts[1].address}" in done.stderr
    assert done.stderr.count("hint: ") == 6


@pytest.fixture(scope="module")
def cluster(hosts: Hosts) -> Iterator[str]:
    """A cluster of the three, and what `up` printed. The worker's user has a token of an earlier cluster."""
    hosts[3].run("mkdir -p ~/.ray && printf earlier > ~/.ray/auth_token && chmod 644 ~/.ray/auth_token")
    began = time.monotonic()
    done = slipway(hosts, "up")
    took_s = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    print(f"up of 3 hosts took {took_s:.1f} s")
    assert took_s < 60
    yield done.stdout
    slipway(hosts, "down")


def test_up_says_what_the_cluster_has(hosts: Hosts, cluster: str) -> None:
    rows = [line.split() for line in cluster.splitlines()]
    assert rows[0] == ["host", "address", "CPUs", "GPUs", "memory"]
    for host, row in zip(hosts, rows[1:4], strict=True):
        assert row[:4] == [host.address, host.address, str(os.cpu_count()), "0"]
    assert f"slipway submit RECIPE --address ssh://{hosts[1].address}" in cluster
    assert set(members(hosts)) == {host.address for host in hosts}


def test_the_token_is_in_its_file_alone(hosts: Hosts, cluster: str) -> None:
    token = hosts[1].run("cat ~/.ray/auth_token").stdout
    assert re.fullmatch("[0-9a-f]{64}", token)
    for host in hosts:
        shown = host.run("stat -c %a ~/.ray ~/.ray/auth_token; cat ~/.ray/auth_token").stdout
        assert shown == f"700\n600\n{token}"
        for pid in host.pids():
            for file in ("cmdline", "environ"):
                with contextlib.suppress(OSError):  # it has ended since
                    assert token.encode() not in Path(f"/proc/{pid}/{file}").read_bytes()
        done = subprocess.run(host.ssh("grep -rlFf - /tmp/ray ~/.slipway"), input=token, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (1, ""), done
    assert token not in cluster


def test_nobody_joins_without_the_token(hosts: Hosts, cluster: str) -> None:
    line = f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN=0123 python -m launcher.cluster.members {hosts[1].address}:6379 0"
    assert hosts[2].run(line).stdout == "[]\n"


def test_the_dashboard_is_on_loopback(hosts: Hosts, cluster: str) -> None:
    listening = hosts[1].run("cat /proc/net/tcp").stdout
    assert "0100007F:2049" in listening  # 127.0.0.1:8265
    assert "00000000:2049" not in listening


@pytest.mark.long  # a run does without one in test_faults, too
def test_a_raylet_that_is_killed_comes_back(hosts: Hosts, cluster: str) -> None:
    before = members(hosts)
    for process in hosts[2].processes("raylet/raylet"):
        process.kill()
    address = hosts[2].address
    took_s = until(lambda: members(hosts).get(address, before[address]) != before[address], 60, "it stays away")
    print(f"a raylet came back after {took_s:.1f} s")
    until(lambda: len(members(hosts)) == 3, 30, "the dead node stays")


def test_down_leaves_nothing(hosts: Hosts, cluster: str) -> None:
    done = slipway(hosts, "down")
    assert (done.returncode, done.stdout) == (0, "down: Ray ran on 3 of 3 hosts\n"), done.stderr
    for host in hosts:
        assert not own(host), [process.cmdline() for process in own(host)]
        earlier = ".ray\n" if host is hosts[3] else ""
        assert host.run("ls -A ~ | grep -E '^.(ray|slipway)$'").stdout == earlier
    assert hosts[3].run("cat ~/.ray/auth_token").stdout == "earlier", "what was there is put back"
    done = slipway(hosts, "down")
    assert (done.returncode, done.stdout) == (0, "down: Ray ran on 0 of 3 hosts\n")


@pytest.mark.long  # 30 s, most of it venv
def test_install_makes_an_environment(hosts: Hosts) -> None:
    """Without a network pip is told to take the wheel alone; what it depends on is then found missing, and lent."""
    for line in ("export PIP_NO_INDEX=1", "export PIP_NO_DEPS=1"):
        before_bashrc(hosts[1], line)
    file = of(hosts, 1)
    done = slipway(hosts, "up", "--install", "--python", PYTHON, hostfile=file)
    assert done.returncode == 2
    assert f"{hosts[1].address}: {Path.home()}/.slipway/venv/bin/python has no ray" in done.stderr
    assert "slipway" not in done.stderr.partition("has no ray")[0].replace(".slipway", "")
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    lent = hosts[1].run(f"echo {packages} > $(echo ~/.slipway/venv/lib/python3*/site-packages)/lent.pth")
    assert lent.returncode == 0, lent.stderr
    began = hosts[1].run("stat -c %Y ~/.slipway/venv/pyvenv.cfg").stdout
    try:
        done = slipway(hosts, "up", "--install", "--python", PYTHON, hostfile=file)
        assert done.returncode == 0, done.stderr
        assert hosts[1].run("stat -c %Y ~/.slipway/venv/pyvenv.cfg").stdout == began, "made again"
        ours = f"{Path.home()}/.slipway/venv"
        assert hosts[1].processes(f"{ours}/bin/python -P -m launcher.cluster.node keep")
        code = "import launcher; print(launcher.__file__)"
        done_ = subprocess.run(hosts[1].ssh(f"cd /; {ours}/bin/python -c '{code}'"), capture_output=True, text=True)
        assert done_.stdout.startswith(ours)
    finally:
        assert slipway(hosts, "down", hostfile=file).returncode == 0
        hosts[1].run("sed -i /^export/d ~/.bashrc; rm -rf ~/.slipway/venv")
    assert not own(hosts[1])


def test_install_without_a_wheel(hosts: Hosts, tmp_path: Path) -> None:
    done = slipway(hosts, "up", "--wheel", tmp_path / "nothing.whl")
    assert done.returncode == 2
    assert "nothing.whl: no wheel" in done.stderr


@pytest.mark.long
def test_a_lost_host_is_named_and_brought_back(hosts: Hosts) -> None:
    """`up` again: those that run are left alone."""
    assert slipway(hosts, "up").returncode == 0
    before = members(hosts)
    hosts[3].power_off()
    done = slipway(hosts, "up")
    assert done.returncode == 2
    assert re.match(f"{hosts[3].address}: .*(No route to host|timed out)\n", done.stderr), done.stderr
    done = slipway(hosts, "up", "--allow-missing")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"note: without {hosts[3].address}: ")
    hosts[3].mend()
    hosts[3].boot()
    done = slipway(hosts, "up")
    assert done.returncode == 0, done.stderr
    after = members(hosts)
    assert after[hosts[1].address] == before[hosts[1].address]
    assert after[hosts[2].address] == before[hosts[2].address]
    assert after[hosts[3].address] != before[hosts[3].address]
    assert slipway(hosts, "down").returncode == 0


@pytest.mark.long
def test_down_goes_on_without_a_dead_host(hosts: Hosts) -> None:
    assert slipway(hosts, "up", hostfile=of(hosts, 1, 2)).returncode == 0
    hosts[2].cut()
    try:
        done = slipway(hosts, "down", hostfile=of(hosts, 1, 2))
    finally:
        hosts[2].mend()
    assert done.returncode == 2
    assert re.match(f"{hosts[2].address}: .*(No route to host|timed out)\n", done.stderr)
    assert not own(hosts[1])
    assert slipway(hosts, "down", hostfile=of(hosts, 1, 2)).stdout == "down: Ray ran on 1 of 2 hosts\n"


@pytest.mark.long
def test_it_heals(hosts: Hosts) -> None:
    """A cut of 20 s is a pause; after one of 80 s, and after a restart of the head, nodes come back by themselves."""
    file = of(hosts, 1, 2)
    assert slipway(hosts, "up", hostfile=file).returncode == 0
    try:
        first = members(hosts)
        hosts[2].cut()
        time.sleep(20)
        hosts[2].mend()
        time.sleep(45)  # longer than what it would take to give the node up
        assert members(hosts) == first
        hosts[2].cut()
        print(f"given up after {until(lambda: len(members(hosts)) == 1, 70, 'a silent node stays'):.0f} s")
        time.sleep(20)
        hosts[2].mend()
        print(f"back after {until(lambda: len(members(hosts)) == 2, 90, 'it stays away'):.0f} s")
        for process in hosts[1].processes("gcs/gcs_server"):
            process.kill()
        head = hosts[1].address
        until(lambda: members(hosts).get(head, first[head]) != first[head], 60, "the head stays away")
        print(f"joined the new head after {until(lambda: len(members(hosts)) == 2, 120, 'it stays away'):.0f} s")
        for process in hosts[2].processes("node keep"):
            process.kill()
        assert slipway(hosts, "up", hostfile=file).returncode == 0, "a keeper that was killed is replaced"
    finally:
        assert slipway(hosts, "down", hostfile=file).returncode == 0
    assert not own(hosts[1])
    assert not own(hosts[2])
