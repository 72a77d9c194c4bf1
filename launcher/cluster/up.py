"""From a list of hosts to a running Ray cluster, and back to nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.cluster.host_check import Wanted, check_hosts
from launcher.cluster.hostfile import Host
from launcher.cluster.keeper import GRACE_S, Node
from launcher.cluster.node import START_TIMEOUT_S
from launcher.cluster.ssh import Ssh, problems_of
from launcher.errors import ClusterError, HostsError, Problem, SlipwayError

MARGIN_S = 20
_STOP = """
file=$HOME/.slipway/cluster/$(uname -n)/python
if [ -f "$file" ]; then exec "$(cat "$file")" -P -m launcher.cluster.node stop; fi
echo '{"running": false, "left": []}'
"""
"""`down` needs no --python: `up` has left word of the one it used."""


@dataclass(frozen=True)
class Cluster:
    """What runs now: the head, its nodes as Ray sees them, and what is wrong with hosts that are not among them."""

    head: Host
    address: str
    nodes: list[dict[str, Any]]
    missing: list[Problem]


def up(
    ssh: Ssh,
    hosts: Sequence[Host],
    wanted: Wanted,
    dashboard_host: str,
    timeout_s: float,
    allow_missing: bool,
    say: Callable[[str], None],
) -> Cluster:
    """Check the hosts, share a token, start Ray on each that does not run it yet, wait until all have joined.

    Raises:
        HostsError: hosts that cannot be used or did not join within `timeout_s` seconds, each with the reason;
            with `allow_missing` only if the head is among them.
    """
    say(f"checking {len(hosts)} host{'s' * (len(hosts) != 1)}")
    checked, missing = check_hosts(ssh, hosts, wanted, allow_missing)
    head = checked[0]
    address = f"[{head.address}]:{wanted.port}" if ":" in head.address else f"{head.address}:{wanted.port}"
    hint = "--port as it was, or slipway cluster down first"
    if elsewhere := [
        Problem(host.host.name, "", f"runs Ray of {host.facts['keeper']['head']}, not of {address}", hint)
        for host in checked
        if host.facts["keeper"] and host.facts["keeper"]["head"] != address
    ]:
        raise HostsError(elsewhere)
    pythons = {host.host: host.python for host in checked}
    say("sharing a token")
    _share_token(ssh, pythons)
    nodes = {
        host.host: Node(
            role="worker" if number else "head",
            name=host.host.name,
            address=host.address,
            head=address,
            gpus=host.gpus,
            dashboard_host=dashboard_host,
            dashboard_port=wanted.dashboard_port,
        )
        for number, host in enumerate(checked)
    }
    members = [checked[0].python, "-P", "-m", "launcher.cluster.members", address]
    stale: list[str] = []
    idle = {host.host.name for host in checked if not host.facts["keeper"]}
    if idle and head.host.name not in idle:  # it may still count a machine that has restarted since
        stale = [node["id"] for node in _answer(head.host, ssh, [*members, "0"]) if node["name"] in idle]
    say("starting Ray")
    # All at once: a worker's keeper waits for the head by itself.
    started = ssh.everywhere(
        list(nodes), lambda host: _call(ssh, pythons[host], host, "start", json.dumps(vars(nodes[host])))
    )
    problems = problems_of(started)
    if problems and not (allow_missing and not isinstance(started[head.host], SlipwayError)):
        raise HostsError(problems)
    names = [host.name for host, answer in started.items() if not isinstance(answer, SlipwayError)]
    say(f"waiting for {len(names)} host{'s' * (len(names) != 1)} to join")
    wait = [*members, str(timeout_s), *names, *(f"--stale={node}" for node in stale)]
    joined = _answer(head.host, ssh, wait, timeout_s=timeout_s + MARGIN_S)
    late = [host for host in nodes if host.name in names and host.name not in {node["name"] for node in joined}]
    reasons = ssh.everywhere(late, lambda host: _why(ssh, pythons[host], timeout_s, host))
    problems += problems_of(reasons) + [reason for reason in reasons.values() if isinstance(reason, Problem)]
    if late and (head.host in late or not allow_missing):
        raise HostsError(problems)
    order = {host.name: number for number, host in enumerate(hosts)}
    joined.sort(key=lambda node: order.get(node["name"], len(order)))
    return Cluster(head.host, address, joined, missing + problems)


def down(ssh: Ssh, hosts: Sequence[Host]) -> int:
    """Stop what `up` started on every host and remove what it put there; the number of hosts where something ran.

    Raises:
        HostsError: hosts that are not reached, or where something is left; all others are down.
    """

    def stop(host: Host) -> dict[str, Any]:
        return dict(_answer(host, ssh, ["sh", "-s"], _STOP.encode(), timeout_s=GRACE_S + MARGIN_S))

    answers = ssh.everywhere(hosts, stop)
    problems = problems_of(answers)
    for host, answer in answers.items():
        if not isinstance(answer, SlipwayError) and answer["left"]:
            hint = "the processes do not end even when killed: dmesg on the host may say what they wait for"
            problems.append(Problem(host.name, "", f"left: {'; '.join(answer['left'])}", hint))
    if problems:
        raise HostsError(problems)
    return sum(not isinstance(answer, SlipwayError) and answer["running"] for answer in answers.values())


def _share_token(ssh: Ssh, pythons: dict[Host, str]) -> None:
    """The head's token, or a new one, on every host; here it is in memory alone. Raises HostsError."""
    head = next(iter(pythons))
    token = str(_call(ssh, pythons[head], head, "token")["token"])
    prepared = ssh.everywhere(
        list(pythons), lambda host: _call(ssh, pythons[host], host, "prepare", stdin=token.encode())
    )
    if problems := problems_of(prepared):
        raise HostsError(problems)


def _why(ssh: Ssh, python: str, timeout_s: float, host: Host) -> Problem:
    """Why a host did not join, in its keeper's last words."""
    lines = _call(ssh, python, host, "log")["lines"]
    said = "".join(f"\n  {line}" for line in lines)
    hint = "once that is mended, the same command again brings it in; --allow-missing goes on without it"
    return Problem(host.name, "", f"did not join within {timeout_s:.0f} s; its log ends so:{said}", hint)


def _call(ssh: Ssh, python: str, host: Host, verb: str, *arguments: str, stdin: bytes | None = None) -> dict[str, Any]:
    """One of `launcher.cluster.node`'s verbs on a host."""
    # -P: ssh begins in HOME, where a random.py of the user's would be taken for Python's.
    command = [python, "-P", "-m", "launcher.cluster.node", verb, *arguments]
    return dict(_answer(host, ssh, command, stdin, timeout_s=START_TIMEOUT_S + MARGIN_S))


def _answer(host: Host, ssh: Ssh, command: Sequence[str], stdin: bytes | None = None, timeout_s: float = 30) -> Any:
    """The JSON that a command of ours prints. Raises ClusterError with its last words if it fails."""
    done = ssh.run(host, command, stdin, timeout_s)
    answer = done.answer()
    if done.code == 0 and answer is not None:
        return answer
    raise ClusterError(
        f"{host.name}: {done.last_words()}", hint=f"ssh {host.destination}, and look at ~/.slipway/cluster there"
    )
