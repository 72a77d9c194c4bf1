"""`slipway doctor --cluster` from outside, on hosts of their own: who has joined, who is lost, whose link is slow."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from tests.cluster.hosts import Host, Hosts, needs_hosts

pytestmark = [pytest.mark.cluster, needs_hosts]


def slipway(hosts: Hosts, *arguments: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """On this machine, which is no node of the cluster."""
    files = ["--hostfile", str(hosts.hostfile()), "--ssh-config", str(hosts.ssh_config)]
    return subprocess.run(
        [sys.executable, "-m", "launcher", *arguments, *files],
        capture_output=True,
        text=True,
        env=os.environ | {"NO_COLOR": "1"},
        timeout=timeout_s,
    )


def findings(hosts: Hosts, *arguments: str) -> tuple[int, dict[str, list[dict[str, Any]]], Any]:
    """Exit code, what is found of each host, and the cluster's state."""
    done = slipway(hosts, "doctor", "--cluster", "--json", *arguments)
    assert done.stdout, done.stderr
    answer = json.loads(done.stdout)
    found: dict[str, list[dict[str, Any]]] = {}
    for each in answer["findings"]:
        found.setdefault(each["what"], []).append(each)
    return done.returncode, found, answer["cluster"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Hosts]:
    with Hosts(2) as hosts:
        done = slipway(hosts, "cluster", "up")
        assert done.returncode == 0, done.stderr
        yield hosts


def test_hosts_that_have_joined_are_named_with_interface_and_what_is_free(cluster: Hosts) -> None:
    done = slipway(cluster, "doctor", "--cluster")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    cpus = len(os.sched_getaffinity(0))
    free = f"{cpus} of {cpus} CPUs and 0 of 0 GPUs free"
    for line, host, role in zip(lines, cluster, ("head", "worker"), strict=True):
        assert line == f"ok       {host.address}  {role} {host.name}, {host.address} on eth0; {free}"


def test_from_a_node_itself_no_hostfile_is_needed(cluster: Hosts) -> None:
    done = cluster[2].run("slipway doctor --cluster --json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["findings"]
    assert [(each["what"], each["state"]) for each in found] == [("host2", "ok"), ("host1", "ok")]


@pytest.mark.long  # 39 s
def test_a_host_that_is_down_and_one_whose_keeper_was_killed_are_wrong(cluster: Hosts) -> None:
    for process in keeper(cluster[2]):
        process.send_signal(signal.SIGKILL)
        process.wait()
    code, found, _ = findings(cluster)
    assert code == 2
    (lost,) = found[cluster[2].address]
    assert lost["says"].startswith("its keeper is gone")
    assert lost["hint"] == "slipway cluster up brings it back"
    cluster[2].cut()
    try:
        code, found, _ = findings(cluster)
    finally:
        cluster[2].mend()
    assert code == 2
    (lost,) = found[cluster[2].address]
    assert lost["state"] == "wrong"
    assert "timed out" in lost["says"] or "No route to host" in lost["says"]
    assert found[cluster[1].address][0]["state"] == "ok"


def keeper(host: Host) -> list[psutil.Process]:
    return host.processes("launcher.cluster.node keep")


@pytest.mark.long
def test_the_host_with_the_slow_link_is_named_and_one_that_answers_nobody() -> None:
    with Hosts(3) as hosts:
        done = slipway(hosts, "cluster", "up")
        assert done.returncode == 0, done.stderr
        code, found, state = findings(hosts, "--bandwidth")
        assert code == 0
        assert len(state["bandwidth"]["pairs"]) == 3
        assert [each["state"] for each in found["all-reduce"]] == ["ok"]
        slow_down(hosts[3])
        code, found, state = findings(hosts, "--bandwidth")
        assert code == 0, "a warning"
        assert {tuple(pair["hosts"]) for pair in state["bandwidth"]["pairs"] if pair["slow"]} == {
            pair for pair in map(tuple, (p["hosts"] for p in state["bandwidth"]["pairs"])) if "host3" in pair
        }
        assert found["all-reduce"][1]["says"].startswith("host3 is slow with every other node: at most 0.0")
        hosts[2].run(f"ip route add blackhole {hosts[3].address}")
        code, found, state = findings(hosts, "--bandwidth")
        assert "host2 and host3: do not reach each other" in [each["says"] for each in found["all-reduce"]]


def slow_down(host: Host) -> None:
    """20 Mbit/s in both directions."""
    shape = ["tbf", "rate", "20mbit", "burst", "32kbit", "latency", "400ms"]
    subprocess.run(["tc", "qdisc", "add", "dev", host.veth, "root", *shape], check=True)
    subprocess.run(["tc", "-n", host.netns, "qdisc", "add", "dev", "eth0", "root", *shape], check=True)
