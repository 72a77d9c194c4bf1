"""What a host's facts mean: each mistake is found, named by host, and nothing else is."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest

import launcher
from launcher.cluster import probe
from launcher.cluster.host_check import Wanted, findings, skew_s
from launcher.cluster.hostfile import Host

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
