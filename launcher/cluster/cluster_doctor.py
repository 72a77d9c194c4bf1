"""What a running cluster lacks: every host checked over ssh, and what Ray on its head says of the nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launcher.cluster.doctor import Finding
from launcher.cluster.host_check import Checked, Wanted, check_hosts
from launcher.cluster.hostfile import Host
from launcher.cluster.ssh import Ssh
from launcher.errors import ClusterError, HostsError

STATE_TIMEOUT_S = 90
BANDWIDTH_TIMEOUT_S = 900


def examine_hosts(ssh: Ssh, hosts: Sequence[Host], wanted: Wanted, bandwidth: bool) -> tuple[list[Finding], Any]:
    """Findings on every host of a hostfile, and what the cluster says of itself; None where its head does not answer.

    Raises:
        ClusterError: the head runs Ray and does not say how its nodes are.
    """
    checked: list[Checked] = []
    try:
        checked, problems = check_hosts(ssh, hosts, wanted, allow_missing=True)
    except HostsError as error:
        problems = list(error.problems)
    found = [Finding("wrong", problem.where, problem.message, problem.hint) for problem in problems]
    head = next((each for each in checked if each.host == hosts[0]), None)
    if head is None:
        return found, None
    if not head.facts["keeper"]:
        hint = "slipway cluster up starts it"
        return [*found, *(Finding("wrong", each.host.name, "no Ray of ours runs here", hint) for each in checked)], None
    state = _ask(ssh, head, head.python, bandwidth)
    living = {node["address"]: node for node in state["nodes"] if node["alive"]}
    return [*found, *(_host(each, head, living) for each in checked)], state


def examine_state(state: Any) -> list[Finding]:
    """Findings on the nodes themselves, where no hostfile says which there should be."""
    found = []
    for node in state["nodes"]:
        if node["alive"]:
            found.append(Finding("ok", node["host"], _node(node)))
        else:
            hint = "a node that was shut down stays on this list until the head is restarted"
            found.append(Finding("warning", node["host"], f"{node['address']} was there and is lost", hint))
    return found


def examine_bandwidth(measured: Any) -> list[Finding]:
    """What is slow; a finding for every pair where there are few."""
    over = "NCCL" if measured["device"] == "cuda" else "gloo"
    everyone = measured["all_gb_per_s"]
    says = f"all together {everyone:.3g} GB/s over {over}" if everyone is not None else f"not all together over {over}"
    hint = "look at its cable, its switch port and its network card's speed: ethtool INTERFACE"
    return [
        Finding("ok", "all-reduce", says),
        *(Finding("warning", "all-reduce", verdict, hint) for verdict in measured["verdicts"]),
    ]


def _ask(ssh: Ssh, head: Checked, python: str, bandwidth: bool) -> Any:
    command = [python, "-P", "-m", "launcher.cluster.state", head.facts["keeper"]["head"], *(["bandwidth"] * bandwidth)]
    limit_s = STATE_TIMEOUT_S + (BANDWIDTH_TIMEOUT_S if bandwidth else 0)
    done = ssh.run(head.host, command, timeout_s=limit_s)
    state = done.answer()
    if state is None:
        said = f"{head.host.name}: the cluster's state cannot be had: {done.last_words()}"
        raise ClusterError(said, hint="slipway cluster up")
    if "error" in state:
        raise ClusterError(f"{head.host.name}: {state['error']}", state["hint"])
    return state


def _host(each: Checked, head: Checked, living: dict[str, Any]) -> Finding:
    node, kept = living.get(each.address), each.facts["keeper"]
    if kept is None:
        says = "its keeper is gone" + (", Ray still runs: nobody will start it again" if node else ": it is lost")
        return Finding("wrong", each.host.name, says, "slipway cluster up brings it back")
    if node is None:
        says = "has not joined: its keeper runs and tries again, Ray on the head does not know it"
        return Finding("wrong", each.host.name, says, "its ~/.slipway/cluster/NAME/node.log says why")
    if each.facts["token"]["hash"] != head.facts["token"]["hash"]:
        return Finding("wrong", each.host.name, "its token is not the head's", "slipway cluster up shares it")
    role = "head" if each is head else "worker"
    return Finding("ok", each.host.name, f"{role} {node['host']}, {_node(node)}")


def _node(node: dict[str, Any]) -> str:
    cpus, gpus = node["cpus"] + node["used_cpus"], node["gpus"] + node["used_gpus"]
    says = f"{node['address']} on {node['interface'] or 'an interface that could not be asked'}"
    return f"{says}; {node['cpus']} of {cpus} CPUs and {node['gpus']} of {gpus} GPUs free"
