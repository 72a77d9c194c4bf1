"""What a host's facts mean: each mistake is found, named by host, and nothing else is."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import launcher
from launcher.cluster import probe
from launcher.cluster.host_check import Wanted, findings, skew_s
from launcher.cluster.hostfile import Host
from launcher.cluster.keeper import Node

HEAD = {
    "python": [*sys.version_info[:3]],
    "executable": "/opt/python",
    "packages": {
        "slipway": launcher.__version__,
        "ray": version("ray"),
        "torch": "2.13.0+cu130",
        "deepspeed": "0.19.8",
        "transformers": "5.23.0",
        "peft": "0.21.0",
        "bitsandbytes": "0.50.2",
    },
    "address": "10.0.0.1",
    "gpus": 8,
    "driver": "580.65",
    "disk": {"HOME": {"folder": "/root", "free": 2**40, "total": 2**41, "writable": True}},
    "ports": {"6379": None},
    "token": {"hash": "a", "mode": 0o600, "environment": {}},
    "keeper": None,
    "shared": True,
    "skew_s": 0.0,
}
KEEPER = {"role": "worker", "head": "10.0.0.1:6379"}


def found(is_head: bool = False, slots: int | None = 8, **facts: Any) -> list[str]:
    """What is wrong with a host that is the head's like but for `facts`."""
    host = Host("worker-2", slots=slots, where="hostfile:2")
    wanted = Wanted("/opt/python", shared="/mnt/runs")
    problems = findings(host, copy.deepcopy(HEAD) | facts, HEAD, wanted, is_head)
    assert all(problem.hint for problem in problems)
    return [str(problem).removeprefix("worker-2: ") for problem in problems]


def packages(**versions: str | None) -> dict[str, Any]:
    return {"packages": {**HEAD["packages"], **versions}}  # type: ignore[dict-item]


def test_nothing_is_wrong() -> None:
    assert found() == []
    assert found(slots=None, gpus=0) == []
    assert found(slots=4) == [], "more GPUs than slots"
    assert found(**packages(torch="2.13.0+cpu")) == [], "the same version, built otherwise"
    assert found(keeper=KEEPER, ports={"6379": "gcs_server"}) == [], "the ports are taken by what we started"
    assert found(token=HEAD["token"] | {"environment": {"RAY_AUTH_TOKEN": "a"}}) == []  # type: ignore[operator]


def test_versions() -> None:
    assert found(python=[3, 9, 2]) == [
        f"Python 3.9 at /opt/python, here it is {sys.version_info[0]}.{sys.version_info[1]}"
    ]
    assert found(**packages(slipway="0.0.1")) == [f"slipway 0.0.1, here it is {launcher.__version__}"]
    assert found(**packages(ray=None)) == ["/opt/python has no ray"]
    assert found(**packages(torch="2.11.0", deepspeed=None)) == [
        "torch 2.11.0, on the head it is 2.13.0+cu130",
        "deepspeed is missing, on the head it is 0.19.8",
    ]


def test_hardware_disk_and_clock() -> None:
    assert found(gpus=1) == ["1 GPU (driver 580.65), the hostfile says slots=8"]
    assert found(gpus=0, driver=None) == ["0 GPUs (no NVIDIA driver), the hostfile says slots=8"]
    full = {"Ray's files": {"folder": "/tmp", "free": 2**32, "total": 2**37, "writable": False}}
    assert found(disk=full) == [
        "the disk of /tmp (Ray's files) is full: 4.0 GiB free, 97% used",
        "/tmp (Ray's files) cannot be written to",
    ]
    assert found(skew_s=4.9) == []
    assert found(skew_s=-60.2) == ["its clock is 60 s behind this machine's"]


def test_ports_shared_folder_and_token() -> None:
    assert found(ports={"6379": "redis-server, process 7", "8265": None}) == [
        "port 6379 is taken: redis-server, process 7"
    ]
    assert found(shared=False) == ["does not see in /mnt/runs what the head writes there"]
    other = {"hash": "a", "mode": 0o600, "environment": {"RAY_AUTH_TOKEN": "b"}}
    assert found(token=other) == ["RAY_AUTH_TOKEN is set there and is not the cluster's token"]


def test_a_host_of_another_cluster() -> None:
    other = KEEPER | {"head": "10.0.0.9:6379"}
    assert found(keeper=other) == ["is worker of the cluster whose head is 10.0.0.9:6379"]
    assert found(is_head=True, keeper=KEEPER) == ["is worker of the cluster whose head is 10.0.0.1:6379"]


def test_everything_at_once() -> None:
    assert len(found(gpus=0, skew_s=99.0, shared=False, python=[3, 9, 0], ports={"1": "x"})) == 5


def test_the_round_trip_is_no_skew() -> None:
    """Asked at 100, answered at 103 on this machine's clock; the probe ran 1 s on the host's."""
    assert skew_s(100, 103, 101, 102) == 0
    assert skew_s(100, 103, 110, 111) == pytest.approx(8)
    assert skew_s(100, 103, 90, 91) == pytest.approx(-10)
    assert skew_s(100, 103, 102.5, 103.5) == pytest.approx(0.5)


def test_a_module_of_the_users_in_home_is_not_taken_for_pythons(tmp_path: Path) -> None:
    """ssh begins in HOME, and Python would look there first."""
    (tmp_path / "random.py").write_text("raise SystemExit('mine')\n")
    asked = {"packages": ["slipway"], "name": "localhost", "ports": [], "mark": None}
    command = [*Wanted(sys.executable).interpreter(), "-", json.dumps(asked)]
    with open(probe.__file__, "rb") as script:
        done = subprocess.run(command, stdin=script, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    words = Node("worker", "b", "10.0.0.2", "10.0.0.1:6379", 0, "127.0.0.1", 8265).command()
    assert words[1].startswith("-P")


def test_two_that_start_at_once_share_a_token_and_a_keeper(tmp_path: Path) -> None:
    node = json.dumps(vars(Node("worker", "b", "127.0.0.1", "127.0.0.1:9", 0, "127.0.0.1", 8265)))  # waits for a head
    environment = os.environ | {"HOME": str(tmp_path)}

    def both(*arguments: str) -> list[dict[str, Any]]:
        command = [sys.executable, "-P", "-m", "launcher.cluster.node", *arguments]
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
        started = [subprocess.Popen(command, **how) for _ in range(2)]  # type: ignore[call-overload]
        said = [process.communicate(timeout=120) for process in started]
        assert [process.returncode for process in started] == [0, 0], said
        return [json.loads(out) for out, _ in said]

    first, second = both("token")
    assert first == second
    try:
        first, second = both("start", node)
        assert first["pid"] == second["pid"]
        assert {first["started"], second["started"]} == {True, False}
    finally:
        stop = [sys.executable, "-P", "-m", "launcher.cluster.node", "stop"]
        done = subprocess.run(stop, capture_output=True, text=True, env=environment)
    assert json.loads(done.stdout) == {"running": True, "left": []}
    assert not list(tmp_path.iterdir()), "the token and all else is gone"


def test_of_both_kinds_of_address_ipv4_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a resolver gives them that prefers IPv6; both are this machine's own in the eyes of this test."""
    both = [(0, 0, 0, "", ("fd00::7", 0, 0, 0)), (0, 0, 0, "", ("10.0.0.7", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: both)
    monkeypatch.setattr(probe, "_is_own", lambda address: True)
    assert probe.own_address("worker-1") == "10.0.0.7"


def test_the_probe_needs_nothing_but_python() -> None:
    """In a Python that sees no site-packages, through stdin, as it is sent."""
    asked = {"packages": ["slipway", "ray"], "name": "localhost", "ports": [], "mark": "/nowhere/mark"}
    command = [sys.executable, "-S", "-I", "-", json.dumps(asked)]
    with open(probe.__file__, "rb") as script:
        done = subprocess.run(command, stdin=script, capture_output=True, text=True)
    facts = json.loads(done.stdout)
    assert facts["packages"] == {"slipway": None, "ray": None}
    assert facts["shared"] is False
    assert facts["clock"][0] <= facts["clock"][1]
    assert facts["token"].keys() == {"hash", "mode", "environment"}
