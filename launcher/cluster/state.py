"""What a running cluster says of itself: `python -m launcher.cluster.state ADDRESS [bandwidth]` on one of its nodes.

Prints one line of JSON, {"nodes": [...], "bandwidth": {...} or null}, or {"error", "hint"}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from launcher.driver.connect import connected
from launcher.errors import SlipwayError
from launcher.plan.facts import ClusterFacts

ANSWER_TIMEOUT_S = 20


def ask(address: str, with_bandwidth: bool, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Every node that the cluster knows with its interface, and how fast they reach each other.

    Raises:
        ClusterError: no cluster answers at the address.
    """
    with connected(address) as cluster:
        return {
            "nodes": _nodes(cluster),
            "bandwidth": _bandwidth(cluster, say) if with_bandwidth and len(cluster.nodes) > 1 else None,
        }


def _nodes(cluster: ClusterFacts) -> list[dict[str, Any]]:
    import ray

    interfaces = _interfaces(cluster)
    nodes = [asdict(node) | {"alive": True, "interface": interfaces.get(node.id)} for node in cluster.nodes]
    addresses = {node["address"] for node in nodes}
    for dead in ray.nodes():  # a host that came back is there twice
        if not dead["Alive"] and dead["NodeManagerAddress"] not in addresses:
            addresses.add(dead["NodeManagerAddress"])
            nodes.append({"host": dead["NodeManagerHostname"], "address": dead["NodeManagerAddress"], "alive": False})
    return nodes


def _interfaces(cluster: ClusterFacts) -> dict[str, str | None]:
    """The interface of each node that answers; one that does not within ANSWER_TIMEOUT_S is missing."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from launcher.driver.interface import interface_of

    task = ray.remote(num_cpus=0, max_retries=0)(interface_of)
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(node.address): node
        for node in cluster.nodes
    }
    ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_TIMEOUT_S)
    found = {}
    for answer in ready:
        try:
            found[asked[answer].id] = ray.get(answer)
        except ray.exceptions.RayError:
            continue
    return found


def _bandwidth(cluster: ClusterFacts, say: Callable[[str], None]) -> dict[str, Any]:
    from launcher.cluster.bandwidth import measure, verdicts

    found = measure(cluster, say)
    pairs = [{"hosts": pair, "gb_per_s": speed, "slow": pair in found.slow} for pair, speed in found.pairs.items()]
    return {"device": found.device, "pairs": pairs, "all_gb_per_s": found.everyone, "verdicts": verdicts(found)}


if __name__ == "__main__":
    try:
        print(json.dumps(ask(sys.argv[1], "bandwidth" in sys.argv[2:])))
    except SlipwayError as error:
        print(json.dumps({"error": error.message, "hint": error.hint}))
