"""Who has joined the cluster, asked on its head: `python -m launcher.cluster.members ADDRESS SECONDS NAME...`.

Waits until all of the names have joined, or for so many seconds, and prints one line of JSON. `--stale ID` is a node
that does not count: the head takes a machine that lost its power for alive for another 55 s.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Collection
from typing import Any

POLL_S = 0.2


def living(address: str) -> list[dict[str, Any]]:
    """The nodes that the head at `address` takes for alive; an empty list while it does not answer."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.gcs_pb2 import GcsNodeInfo

    nodes = GcsClient(address=address).get_all_node_info(timeout=2).values()
    return [
        {
            "id": node.node_id.hex(),
            "name": node.node_name,
            "host": node.node_manager_hostname,
            "address": node.node_manager_address,
            "cpus": int(node.resources_total.get("CPU", 0)),
            "gpus": int(node.resources_total.get("GPU", 0)),
            "memory": int(node.resources_total.get("memory", 0)),
        }
        for node in nodes
        if node.state == GcsNodeInfo.ALIVE
    ]


def wait(address: str, timeout_s: float, names: Collection[str], stale: Collection[str]) -> list[dict[str, Any]]:
    """The living nodes whose id is not among `stale`, once all of `names` are among them or the time is over."""
    deadline = time.monotonic() + timeout_s
    nodes: list[dict[str, Any]] = []
    while True:
        try:
            nodes = [node for node in living(address) if node["id"] not in stale]
        except Exception:  # what a head says that is only just starting; each of Ray's layers has its own
            nodes = []
        if set(names) <= {node["name"] for node in nodes} or time.monotonic() > deadline:
            return nodes
        time.sleep(POLL_S)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("timeout_s", type=float)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--stale", action="append", default=[])
    asked = parser.parse_args()
    print(json.dumps(wait(asked.address, asked.timeout_s, asked.names, asked.stale)))
