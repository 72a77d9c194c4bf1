"""Every host looked at before anything is started: what is wrong with each, all of it at once, named by host."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import launcher
from launcher.cluster import probe
from launcher.cluster.hostfile import Host
from launcher.cluster.keeper import DASHBOARD_PORT, PORT
from launcher.cluster.ssh import Ssh, problems_of
from launcher.errors import ClusterError, HostsError, Problem, SlipwayError
from launcher.units import format_bytes

CHECK_TIMEOUT_S = 25
MAX_CLOCK_SKEW_S = 5
MIN_FREE_BYTES = 2**30
MAX_USED = 0.95
"""Of the disk with Ray's files: past it Ray starts no more tasks there."""
LIKE_LAUNCHER = ("slipway", "ray")
LIKE_HEAD = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes")
"""Versions that must be the head's: ranks of one run. A launcher may be a laptop with other ones."""
INSTALLED = ".slipway/venv/bin/python"
"""Seen from HOME, where ssh begins: the environment that `--install` makes."""
_INSTALLED_OR = f'python=$1; shift; [ -x {INSTALLED} ] && python={INSTALLED}; exec "$python" "$@"'
_SAFE = ("env", "PYTHONSAFEPATH=1")
"""Nothing of the user's HOME, where ssh begins, takes a module's place; Pythons too old for that ignore it."""
AGENT_PORT = 52365
CLIENT_PORT = 10001
FIXED = (AGENT_PORT, CLIENT_PORT)
"""Of every node and of the head: no option of ours changes them, so a host serves one cluster at a time."""


@dataclass(frozen=True)
class Wanted:
    """What the hosts are asked to be. `python` is a path on them; `shared` a folder that all of them must see.

    Without `python` each host's is what `--install` made there, or else the one at this interpreter's own path.
    """

    python: str | None = None
    port: int = PORT
    dashboard_port: int = DASHBOARD_PORT
    shared: str | None = None

    def interpreter(self) -> list[str]:
        """A command line that runs the hosts' Python, for its arguments to be added to."""
        return [*_SAFE, *([self.python] if self.python else ["sh", "-c", _INSTALLED_OR, "sh", sys.executable])]

    def ports(self, is_head: bool) -> tuple[int, ...]:
        """What Ray listens on at fixed numbers."""
        return (self.port, self.dashboard_port, CLIENT_PORT, AGENT_PORT) if is_head else (AGENT_PORT,)


@dataclass(frozen=True)
class Checked:
    """A host that can be used, with the facts that its probe found and the address others reach it by."""

    host: Host
    facts: dict[str, Any]

    @property
    def python(self) -> str:
        return str(self.facts["executable"])

    @property
    def address(self) -> str:
        return str(self.facts["address"])

    @property
    def gpus(self) -> int:
        return int(self.facts["gpus"]) if self.host.slots is None else self.host.slots


def check_hosts(
    ssh: Ssh, hosts: Sequence[Host], wanted: Wanted, allow_missing: bool = False
) -> tuple[list[Checked], list[Problem]]:
    """Those that can be used, the head first, and what is wrong with the others.

    Raises:
        HostsError: what is wrong with all hosts; with `allow_missing` only if the head is among them.
    """
    head = hosts[0]
    mark = _mark(ssh, head, wanted.shared)
    try:
        answers = ssh.everywhere(hosts, partial(_ask, ssh, wanted, head, mark))
    finally:
        if mark is not None:
            ssh.run(head, ["rm", "-f", "--", mark])
    found = {host: problems_of({host: answer}) for host, answer in answers.items()}
    facts = {host: answer for host, answer in answers.items() if not isinstance(answer, SlipwayError)}
    first: dict[str, Host] = {}
    for host in facts:
        found[host] = findings(host, facts[host], facts.get(head), wanted, host == head)
        if len(hosts) > 1 and facts[host]["address"] == probe.NO_ADDRESS:
            hint = "write the address of its network card into the hostfile"
            found[host].append(Problem(host.name, "", "has no address that other hosts can reach", hint))
        elif (same := first.setdefault(facts[host]["address"], host)) is not host:
            hint = "a machine has one line in the hostfile, with all of its GPUs as slots"
            found[host].append(Problem(host.name, "", f"is the same machine as {same.name}", hint))
    problems = [problem for host in hosts for problem in found[host]]
    if found[head] or (problems and not allow_missing):
        raise HostsError(problems)
    return [Checked(host, facts[host]) for host in hosts if not found[host]], problems


def _mark(ssh: Ssh, head: Host, shared: str | None) -> str | None:
    """A file that the head makes in the shared folder, for the others to see."""
    if shared is None:
        return None
    done = ssh.run(head, ["mktemp", "-p", shared, ".slipway-shared-XXXXXXXX"])
    if done.code != 0:
        raise ClusterError(
            f"{head.name}: nothing can be written into the shared folder {shared}: {done.err.strip()}",
            hint="--shared takes a folder that every host has mounted under the same path",
        )
    return done.out.split()[-1]


def _ask(ssh: Ssh, wanted: Wanted, head: Host, mark: str | None, host: Host) -> dict[str, Any]:
    """Run the probe on one host. Raises ClusterError if it is not reached or has no Python."""
    asked = {
        "packages": [*LIKE_LAUNCHER, *LIKE_HEAD],
        "name": host.name,
        "ports": wanted.ports(host == head),
        "mark": mark,
    }
    script = Path(probe.__file__).read_bytes()
    python = wanted.python or sys.executable
    sent = time.time()
    done = ssh.run(host, [*wanted.interpreter(), "-", json.dumps(asked)], script, CHECK_TIMEOUT_S)
    answered = time.time()
    answer = done.answer()
    if done.code in (126, 127):
        raise ClusterError(
            f"{host.name}: no Python at {python}",
            hint="--python PATH names it, or --install makes an environment on every host",
        )
    if done.code != 0 or answer is None:
        raise ClusterError(
            f"{host.name}: {python} cannot run the check: {done.last_words()}",
            hint="--python PATH names another one, or --install makes an environment on every host",
        )
    return dict(answer) | {"skew_s": skew_s(sent, answered, *answer["clock"])}


def skew_s(sent: float, answered: float, began: float, ended: float) -> float:
    """The smallest skew in seconds that fits: [began, ended] on the host's clock lies in [sent, answered] on ours."""
    least, most = ended - answered, began - sent
    if least <= 0 <= most:
        return 0.0
    return least if least > 0 else most


def findings(
    host: Host, facts: dict[str, Any], head_facts: dict[str, Any] | None, wanted: Wanted, is_head: bool
) -> list[Problem]:
    """Everything that keeps a host from being used."""
    found = [
        *(*_python(facts), *_versions(facts, head_facts)),
        *(*_hardware(host, facts), *_disk(facts), *_clock(facts), *_places(facts, wanted)),
        *(*_keeper(facts, head_facts, is_head), *_token(facts, head_facts)),
    ]
    return [Problem(host.name, "", message, hint) for message, hint in found]


Finding = tuple[str, str]
"""What is wrong, and what to do about it."""


def _python(facts: dict[str, Any]) -> list[Finding]:
    here, there = sys.version_info[:2], tuple(facts["python"][:2])
    if here == there:
        return []
    says = f"Python {there[0]}.{there[1]} at {facts['executable']}, here it is {here[0]}.{here[1]}"
    return [(says, "--python PATH names another one on the hosts")]


def _versions(facts: dict[str, Any], head_facts: dict[str, Any] | None) -> list[Finding]:
    found = []
    own = {"slipway": launcher.__version__, "ray": version("ray")}
    for name in LIKE_LAUNCHER:
        there = facts["packages"][name]
        if there is None:
            hint = "--install puts Slipway on every host; --python PATH names a Python that has it"
            found.append((f"{facts['executable']} has no {name}", hint))
        elif _public(there) != _public(own[name]):
            found.append((f"{name} {there}, here it is {own[name]}", "install the same version; --install does it"))
    for name in LIKE_HEAD if head_facts else ():
        assert head_facts is not None
        there, head = facts["packages"][name], head_facts["packages"][name]
        if _public(there) != _public(head):
            says = f"{name} {there or 'is missing'}, on the head it is {head or 'missing'}"
            found.append((says, "the workers of one run need the same version on every host"))
    return found


def _public(number: str | None) -> str | None:
    """A version without the build it is, such as +cu128."""
    return number and number.partition("+")[0]


def _hardware(host: Host, facts: dict[str, Any]) -> list[Finding]:
    if host.slots is None or facts["gpus"] >= host.slots:
        return []
    has = f"{facts['gpus']} GPU{'s' * (facts['gpus'] != 1)}"
    driver = f"driver {facts['driver']}" if facts["driver"] else "no NVIDIA driver"
    return [(f"{has} ({driver}), the hostfile says slots={host.slots}", f"nvidia-smi on the host; {host.where}")]


def _clock(facts: dict[str, Any]) -> list[Finding]:
    skew_s = facts["skew_s"]
    if abs(skew_s) <= MAX_CLOCK_SKEW_S:
        return []
    says = f"its clock is {abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} this machine's"
    return [(says, "switch on NTP: timedatectl set-ntp true")]


def _disk(facts: dict[str, Any]) -> list[Finding]:
    found = []
    for what, disk in facts["disk"].items():
        used = 1 - disk["free"] / max(disk["total"], 1)
        if disk["free"] < MIN_FREE_BYTES or (what != "HOME" and used > MAX_USED):
            room = f"{format_bytes(disk['free'])} free, {used:.0%} used"
            found.append((f"the disk of {disk['folder']} ({what}) is full: {room}", "make room on it"))
        if not disk["writable"]:
            found.append((f"{disk['folder']} ({what}) cannot be written to", "it must belong to the user who logs in"))
    return found


def _places(facts: dict[str, Any], wanted: Wanted) -> list[Finding]:
    found = []
    if facts["shared"] is False:
        found.append(
            (f"does not see in {wanted.shared} what the head writes there", "mount the shared folder at the same path")
        )
    if not facts["keeper"]:  # else the ports are taken by what we started
        for port, holder in facts["ports"].items():
            if holder:
                hint = "stop that" + ("" if int(port) in FIXED else ", or see --port and --dashboard-port")
                found.append((f"port {port} is taken: {holder}", hint))
    return found


def _keeper(facts: dict[str, Any], head_facts: dict[str, Any] | None, is_head: bool) -> list[Finding]:
    """A host serves one cluster of a user's at a time."""
    running = facts["keeper"]
    if not running or head_facts is None:
        return []
    role = "head" if is_head else "worker"
    if running["role"] != role or running["head"].rpartition(":")[0].strip("[]") != head_facts["address"]:
        hint = "slipway cluster down with that cluster's hostfile"
        return [(f"is {running['role']} of the cluster whose head is {running['head']}", hint)]
    return []


def _token(facts: dict[str, Any], head_facts: dict[str, Any] | None) -> list[Finding]:
    """What Ray would read before ~/.ray/auth_token, where that is not the head's token."""
    right = head_facts["token"]["hash"] if head_facts else None
    return [
        (f"{variable} is set there and is not the cluster's token", f"take {variable} out of the host's environment")
        for variable, hash in facts["token"]["environment"].items()
        if head_facts and (right is None or hash != right)
    ]
