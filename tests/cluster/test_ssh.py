"""Our use of the user's ssh, with a real sshd on this machine: one that takes few logins at once, and odd configs."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.cluster.hostfile import Host
from launcher.cluster.ssh import Ssh
from launcher.cluster.tunnel import Tunnel
from launcher.errors import ClusterError
from tests.cluster.hosts import needs_hosts

pytestmark = [pytest.mark.cluster, needs_hosts]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A config in which every name is an sshd that turns away whoever is the fourth to log in at once."""
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("hostkey", "id"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        port = some.getsockname()[1]
    options = {
        "AuthorizedKeysFile": folder / "id.pub",
        "ListenAddress": f"127.0.0.1:{port}",
        "MaxStartups": "3:100:3",
        "PermitRootLogin": "yes",
        "PidFile": "none",
        "StrictModes": "no",
    }
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    file = folder / "config"
    file.write_text(
        f"Host *\n  HostName 127.0.0.1\n  Port {port}\n  IdentityFile {folder}/id\n  IdentitiesOnly yes\n"
        f"  IdentityAgent none\n  UserKnownHostsFile {folder}/known\n  StrictHostKeyChecking accept-new\n"
    )
    sshd = subprocess.Popen(
        ["/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", "-h", folder / "hostkey", *words], stderr=subprocess.PIPE
    )
    try:
        assert sshd.stderr is not None
        assert b"listening" in sshd.stderr.readline()
        sshd.stderr.close()
        yield file
    finally:
        sshd.terminate()
        sshd.wait()


def test_who_is_turned_away_by_a_crowded_sshd_tries_again(config: Path) -> None:
    hosts = [Host(f"host{number}") for number in range(9)]
    with Ssh(config) as ssh:
        found = ssh.everywhere(hosts, lambda host: ssh.run(host, ["echo", host.name]).out.strip())
    assert found == {host: host.name for host in hosts}


def test_what_a_config_has_for_people_who_log_in_is_not_for_us(config: Path, tmp_path: Path) -> None:
    """A terminal would echo what goes to stdin, and end its lines with a carriage return."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        forward = f"LocalForward 127.0.0.1:{taken.getsockname()[1]} 127.0.0.1:9"
        theirs = f"  RequestTTY force\n  RemoteCommand false\n  ExitOnForwardFailure yes\n  {forward}\n"
        file = tmp_path / "config"
        file.write_text(f"Host *\n{theirs}{config.read_text()}")
        with Ssh(file) as ssh:
            assert ssh.run(Host("host1"), ["cat"], stdin=b"a\nb\n").out == "a\nb\n"
            with pytest.raises(ClusterError, match="local forwarding") as caught, Tunnel(ssh, Host("host1")):
                pass
        assert caught.value.hint is not None
        assert "LocalForward" in caught.value.hint
