"""The hostfile's reader: what it understands, and every mistake at once with its line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.cluster.hostfile import Host, parse_host, read_hostfile
from launcher.cluster.ssh import Ssh
from launcher.errors import ClusterError, HostsError

ROOT = Path(__file__).parents[2]


def read(folder: Path, text: str) -> tuple[Host, ...]:
    file = folder / "hostfile"
    file.write_text(text)
    return read_hostfile(file)


def mistakes(folder: Path, text: str) -> list[str]:
    with pytest.raises(HostsError) as caught:
        read(folder, text)
    assert all(problem.hint for problem in caught.value.problems)
    return [str(problem).removeprefix(f"{folder}/") for problem in caught.value.problems]


def test_the_example_is_understood() -> None:
    assert [(host.name, host.slots) for host in read_hostfile(ROOT / "hostfile.example")] == [
        ("worker-1", 8),
        ("worker-2", 8),
    ]


def test_every_form(tmp_path: Path) -> None:
    text = """
        # the head has no GPUs
        login slots=0   # a comment behind

        worker-1.example.org slots=8
        admin@10.0.0.7:2222 slots=4
        [fd00::7]:22
        root@fd00::8 slots=1
        fe80::1%eth0
    """
    hosts = read(tmp_path, text)
    assert [(host.name, host.user, host.port, host.slots) for host in hosts] == [
        ("login", None, None, 0),
        ("worker-1.example.org", None, None, 8),
        ("10.0.0.7", "admin", 2222, 4),
        ("fd00::7", None, 22, None),
        ("fd00::8", "root", None, 1),
        ("fe80::1%eth0", None, None, None),
    ]
    assert hosts[0].where == f"{tmp_path}/hostfile:3"
    assert hosts[2].destination == "admin@10.0.0.7"


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    text = """worker-1 slots=8
worker-2 slotz=8
worker-3 slots=many gpus
worker-1 slots=8
worker-4:99999
worker-5 slots=8 slots=4
worker-6 slots=100000
"""
    assert mistakes(tmp_path, text) == [
        "hostfile:2: 'slotz': unknown key",
        "hostfile:3: slots=many: not a number of GPUs",
        "hostfile:3: 'gpus': unknown key",
        f"hostfile:4: worker-1 is already on {tmp_path}/hostfile:1",
        "hostfile:5: '99999': not a port, which is a number from 1 to 65535",
        "hostfile:6: slots is there twice",
        "hostfile:7: slots=100000: not a number of GPUs",
    ]


@pytest.mark.parametrize(
    "line",
    [
        "-oProxyCommand=touch${IFS}x",
        "root@-oProxyCommand=x",
        "-l@host",
        "host;id",
        "$(id)",
        "`id`",
        "a|b",
        "a&b",
        "a'b",
        'a"b',
        "a\\b",
        "a>b",
        "[::1;id]",
        "fe80::1%;id",
        "user;id@host",
        "@host",
        "host:",
        ":22",
        "höst",
        "a" * 300,
    ],
)
def test_what_a_shell_or_ssh_would_obey_is_no_name(tmp_path: Path, line: str) -> None:
    assert len(mistakes(tmp_path, f"{line} slots=8\n")) == 1
    with pytest.raises(ClusterError):
        parse_host(line)


@pytest.mark.parametrize("text", ["", "\n\n", "# nobody\n"])
def test_an_empty_file_names_no_machine(tmp_path: Path, text: str) -> None:
    assert mistakes(tmp_path, text) == ["hostfile: names no machine"]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="hostfile: no such file"):
        read_hostfile(tmp_path / "hostfile")
    with pytest.raises(ClusterError, match="Is a directory"):
        read_hostfile(tmp_path)
    (tmp_path / "hostfile").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ClusterError, match="not text in UTF-8"):
        read_hostfile(tmp_path / "hostfile")


def test_a_host_on_the_command_line() -> None:
    assert parse_host("ssh://admin@head:2222/") == parse_host("admin@head:2222") == Host("head", "admin", 2222)
    assert parse_host("fd00::7") == parse_host("[fd00::7]") == Host("fd00::7")
    for host in (Host("head"), Host("head", "admin", 2222), Host("fd00::7"), Host("fd00::7", "admin", 2222)):
        assert parse_host(host.url) == host
    with pytest.raises(ClusterError, match="'head two': not a name or address"):
        parse_host("head two")


def test_ssh_takes_no_name_for_an_option() -> None:
    """Even of a host that no reader would let through."""
    argv = Ssh().argv(Host("-oProxyCommand=false"))
    assert argv[-2:] == ["--", "-oProxyCommand=false"]
    assert "BatchMode=yes" in argv
    done = subprocess.run([*argv, "true"], capture_output=True, text=True)
    assert done.returncode == 255
    assert "hostname contains invalid characters" in done.stderr


def test_what_a_config_has_for_people_who_log_in_is_not_for_us(tmp_path: Path) -> None:
    """A terminal would echo what goes to stdin; a command of the config's would leave no place for ours."""
    config = tmp_path / "config"
    config.write_text("Host *\n  RequestTTY force\n  RemoteCommand tmux\n  BatchMode no\n  LogLevel QUIET\n")
    argv = Ssh(config).argv(Host("head"))
    done = subprocess.run([argv[0], "-G", *argv[1:]], capture_output=True, text=True, check=True)
    said = set(done.stdout.splitlines())
    assert {"requesttty false", "batchmode yes", "loglevel ERROR"} <= said
    assert not [line for line in said if line.startswith("remotecommand ") and line != "remotecommand none"]


@pytest.mark.parametrize("verb", ["up", "down"])
def test_ctrl_c_ends_it_with_130(tmp_path: Path, verb: str) -> None:
    (tmp_path / "hostfile").write_text("head\n")
    (tmp_path / "config").write_text(f"Host *\n  ProxyCommand sh -c 'touch {tmp_path}/asked; exec sleep 60'\n")
    files = [f"--hostfile={tmp_path}/hostfile", f"--ssh-config={tmp_path}/config"]
    # A session of its own: its ssh gets the Ctrl-C too, as from a terminal.
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher", "cluster", verb, *files],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / "asked").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopped before all hosts were " in err
    assert "hint: the same command goes on" in err


def test_no_ssh_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ClusterError, match="no ssh program") as caught:
        Ssh().run(Host("worker-1"), ["true"])
    assert caught.value.hint == "install OpenSSH's client"
