"""What `slipway doctor` says of this machine, and what it makes of a cluster's answers."""

from __future__ import annotations

import json
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from launcher.cli.app import main
from launcher.cluster import doctor
from launcher.cluster.cluster_doctor import examine_bandwidth, examine_state
from launcher.driver.interface import interface_of


def test_every_fact_of_this_machine_is_there_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)["findings"]
    assert code == (2 if any(each["state"] == "wrong" for each in found) else 0)
    facts = [each["what"] for each in found if each["what"] in ("python", "GPUs", "compiler", "memory", "Ray", "token")]
    assert facts == ["python", "GPUs", "compiler", "memory", "Ray", "token"]
    packages = next(each for each in found if each["what"] == "packages")
    assert "torch 2." in packages["says"]
    assert "ray 2.60" in packages["says"]
    assert all(each["hint"] for each in found if each["state"] != "ok"), "what is not right says what to do"


def test_a_torch_is_not_imported_for_it() -> None:
    code = (
        "import sys; from launcher.cli.app import main; main(['doctor']); "
        "assert not {'torch', 'ray'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_a_compiler_it_says_what_that_means(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = doctor.compilers()
    assert (found.state, found.says) == (
        "warning",
        "no C++ compiler and no ninja: with parallel.offload torch's AdamW updates on the CPU, slower",
    )


def test_a_token_that_others_can_read_is_a_warning(tmp_path: Path) -> None:
    file = tmp_path / "auth_token"
    assert doctor.token(file).state == "ok"
    file.write_text("secret")
    file.chmod(0o644)
    found = doctor.token(file)
    assert (found.state, found.hint) == ("warning", f"chmod 600 {file}")
    assert "secret" not in found.says
    file.chmod(0o600)
    assert doctor.token(file).state == "ok"


def test_a_full_disk_is_wrong_and_a_small_one_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def free(num_bytes: int) -> str:
        usage = type(shutil.disk_usage("/"))(10**12, 10**12 - num_bytes, num_bytes)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        return doctor.disk("disk", tmp_path / "not" / "there").state

    assert [free(10**6), free(10**9), free(10**11)] == ["wrong", "warning", "ok"]


def test_few_open_files_are_a_warning() -> None:
    assert doctor.open_files(1024).state == "warning"
    assert doctor.open_files(65536).state == "ok"
    assert doctor.open_files(resource.RLIM_INFINITY).says == "no limit"


def test_options_of_a_cluster_need_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--bandwidth"]) == 2
    assert "hint: add --cluster" in capsys.readouterr().err


def test_the_interface_of_every_address_of_this_machine() -> None:
    checked = 0
    for name, addresses in psutil.net_if_addrs().items():
        for entry in addresses:
            if entry.family in (socket.AF_INET, socket.AF_INET6):
                assert interface_of(entry.address) == name
                checked += 1
    assert checked
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.9") is None
    assert interface_of("no address") is None


def test_an_ipv6_address_is_found_however_it_is_written() -> None:
    if "::1" not in {entry.address for entry in psutil.net_if_addrs()["lo"]}:
        pytest.skip("no IPv6 on the loopback")
    assert interface_of("0:0:0:0:0:0:0:1") == "lo"


def node(host: str, **values: object) -> dict[str, object]:
    facts = {"cpus": 1, "gpus": 0, "used_cpus": 1, "used_gpus": 8, "interface": "eth0", "alive": True}
    return {"host": host, "address": f"10.0.0.{host[-1]}", **facts, **values}


def test_a_lost_node_is_told_from_those_that_are_there() -> None:
    found = examine_state({"nodes": [node("host1"), node("host2", alive=False)]})
    assert [each.state for each in found] == ["ok", "warning"]
    assert found[0].says == "10.0.0.1 on eth0; 1 of 2 CPUs and 0 of 8 GPUs free"
    assert found[1].says == "10.0.0.2 was there and is lost"


def test_slow_links_are_warnings() -> None:
    measured = {"device": "cpu", "all_gb_per_s": 0.5, "verdicts": ["c is slow"], "pairs": []}
    assert [(each.state, each.says) for each in examine_bandwidth(measured)] == [
        ("ok", "all together 0.5 GB/s over gloo"),
        ("warning", "c is slow"),
    ]
