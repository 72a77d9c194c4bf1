"""The cluster file of `ray up` and `ray submit` for machines that are there: Ray's provider "local".

What Ray does with one (2.60): it sets the head up over ssh, and from there the head's autoscaler sets up the workers.
Every command runs in `bash --login -i` after `source ~/.bashrc`, with OMP_NUM_THREADS=1, which the nodes must not hand
on to the workers of a run.
"""

from __future__ import annotations

import re
import shlex
import socket
from collections.abc import Mapping, Sequence

import yaml

from launcher.cluster.hostfile import Host
from launcher.cluster.keeper import OPEN_FILES, PATIENCE, PORT
from launcher.driver.connect import QUIET
from launcher.errors import ClusterError

TOKEN = "~/.ray/auth_token"
RAISE_OPEN_FILES = f'ulimit -S -n {OPEN_FILES} 2> /dev/null || ulimit -S -n "$(ulimit -H -n)";'
"""Shell: a group of 1,000 ranks has a connection to each other one, and many systems give 1,024."""
_PLAIN = re.compile(r"[A-Za-z0-9._/@%+=,~-]+")

_HEADER = """\
# A Ray cluster on machines that are there, as `slipway cluster render` writes it for Ray {ray}.
#
#   ray up -y {file}
#   ray submit {file} {job} RECIPE [key=value ...]
#   ray rsync-up {file}              copies the files below to the head again: before that it has the recipe as it was
#   ray down -y {file}               stops the head; the workers end when they have missed it for a minute
#
# {token} is this user's, made with mode 600 if it was missing; Ray copies it to every machine, and its value is
# in no file but that one. The head reaches the workers with {key}.
"""


def cluster_file(
    hosts: Sequence[Host],
    python: str,
    mounts: Mapping[str, str] | None = None,
    ssh_user: str = "",
    ssh_private_key: str | None = None,
    file: str = "cluster.yaml",
    job: str = "launcher/job.py",
) -> str:
    """The cluster file as text. The first host is the head.

    `python` is the interpreter on the hosts that has Slipway; `~/` is each host's home. `mounts` are files to copy,
    {place on the hosts: place here}. `ssh_private_key` is copied to the head, which reaches the workers with it;
    without one the head must have a key of its own. `file` and `job` are for the comments.

    Raises:
        ClusterError: a host that Ray's command runner cannot reach: by IPv6, another port, or another user than the
            rest; a name without an address; a mount that Ray would break in its shell lines.
    """
    import ray

    addresses = [address(host) for host in hosts]
    for host, found in zip(hosts, addresses, strict=True):
        if found.startswith("127.") and len(hosts) > 1:
            raise ClusterError(
                f"{_where(host)}{host.name} is {found} here, by which no other host reaches it",
                hint="write the address of its network card instead of its name",
            )
    users = {host.user or ssh_user for host in hosts}
    if len(users) > 1:
        raise ClusterError(
            f"hosts of several users: {', '.join(sorted(users))}; a cluster file of Ray's has one",
            hint="give all hosts one user, or use `slipway cluster up`, which takes them as they are",
        )
    for place in mounts or {}:
        if not _PLAIN.fullmatch(place):
            raise ClusterError(
                f"{place!r} cannot be copied: Ray puts such a name unquoted into a shell line",
                hint="rename it; letters, digits and . _ - + = , @ % are safe",
            )
    values = {
        "cluster_name": f"slipway-{addresses[0].replace('.', '-')}",
        "provider": {"type": "local", "head_ip": addresses[0], "worker_ips": addresses[1:]},
        "max_workers": len(hosts) - 1,
        "auth": {"ssh_user": users.pop()} | ({"ssh_private_key": ssh_private_key} if ssh_private_key else {}),
        "file_mounts": {TOKEN: TOKEN} | dict(mounts or {}),
        "setup_commands": [f"chmod 700 ~/.ray && chmod 600 {TOKEN}"],
        "head_setup_commands": [_on_path(python)],
        "head_start_ray_commands": [
            f"{_path(python)} ray stop",
            # Ray puts RAY_enable_autoscaler_v2=1 before it. Version 2 takes a head of the provider "local" for
            # terminated and starts no worker.
            f"{_environment(python)} export RAY_enable_autoscaler_v2=0; ray start --head --port={PORT}"
            f" --node-ip-address={addresses[0]} --dashboard-host=127.0.0.1 --disable-usage-stats"
            f"{_gpus(hosts[0].slots)} --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": [
            f"{_path(python)} ray stop",
            # The third word is the address at which the head has reached this host. --block, in a session of its own:
            # `ray down` stops the head only, and this ends Ray's other processes once the raylet has missed the head
            # for a minute. Without it the log monitor is left for good. SIGHUP comes as soon as the command is read.
            f"{_environment(python)} set -- $SSH_CONNECTION; {_worker_gpus(hosts[1:], addresses[1:])}"
            f"trap '' HUP; "
            f'setsid ray start --block --address={addresses[0]}:{PORT} --node-ip-address="$3" $gpus'
            " < /dev/null > ~/.ray/node-$(uname -n).log 2>&1 &",
        ],
    }
    key = in_comment(ssh_private_key) if ssh_private_key else "a key of its own"
    header = _HEADER.format(ray=ray.__version__, file=in_comment(file), job=in_comment(job), token=TOKEN, key=key)
    return header + yaml.safe_dump(values, sort_keys=False, width=1000)


def address(host: Host) -> str:
    """The host's IPv4 address. Raises ClusterError where it has none here, or a port of its own."""
    if host.port not in (None, 22):
        raise ClusterError(
            f"{_where(host)}port {host.port}: Ray's cluster launcher knows port 22 only",
            hint="use `slipway cluster up`, or let its sshd listen on port 22",
        )
    try:
        return socket.gethostbyname(host.name)
    except OSError:
        raise ClusterError(
            f"{_where(host)}{host.name} has no IPv4 address here, and Ray's cluster launcher needs one",
            hint="write its address instead of its name, or use `slipway cluster up`",
        ) from None


def in_comment(text: str) -> str:
    """On one line, as a shell takes it."""
    return " ".join(shlex.quote(text).split())


def _where(host: Host) -> str:
    return f"{host.where}: " if host.where else ""


def _path(python: str) -> str:
    return f"export PATH={folder(python)}:$PATH;"


def _environment(python: str) -> str:
    """Shell: what Ray's processes are started with."""
    values = QUIET | PATIENCE | {"RAY_AUTH_MODE": "token"}
    return (
        f"{_path(python)} {RAISE_OPEN_FILES} unset OMP_NUM_THREADS PYTHONWARNINGS;"
        f" export {' '.join(f'{key}={value}' for key, value in values.items())};"
    )


def _on_path(python: str) -> str:
    """Shell: let login shells on the head find `python`. `ray submit` runs `python ~/job.py` in one and `ray down` runs
    `ray stop`, and nothing but start-up files decides what these find: where it is another, ~/.bashrc gets a line.
    """
    line = f"export PATH={folder(python)}:$PATH  # for ray submit, by slipway"
    return f'[ "$(command -v python)" = {folder(python)}/python ] || echo {shlex.quote(line)} >> ~/.bashrc'


def folder(python: str) -> str:
    """Shell: the folder of an interpreter, quoted; `~/` is the home of whoever runs it."""
    path = python.rpartition("/")[0]
    return f'"$HOME"/{shlex.quote(path[2:])}' if path.startswith("~/") else shlex.quote(path)


def _gpus(slots: int | None) -> str:
    return "" if slots is None else f" --num-gpus={slots}"


def _worker_gpus(hosts: Sequence[Host], addresses: Sequence[str]) -> str:
    """Shell: sets `gpus` for the host whose address is in $3."""
    cases = [
        f"{address}) gpus={_gpus(host.slots).strip()};;"
        for host, address in zip(hosts, addresses, strict=True)
        if host.slots is not None
    ]
    return f'case "$3" in {" ".join(cases)} *) gpus=;; esac; '
