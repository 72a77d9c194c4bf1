"""Who has joined the cluster, asked on its head: `python -m launcher.cluster.members ADDRESS SECONDS NAME...`.

Waits until all of the names have joined, or for so many seconds, and prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
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


def wait(address: str, timeout_s: float, names: list[str]) -> list[dict[str, Any]]:
    """The living nodes, once all of `names` are among them or the time is over."""
    deadline = time.monotonic() + timeout_s
    nodes: list[dict[str, Any]] = []
    while True:
        try:
            nodes = living(address)
        except Exception:  # what a head says that is only just starting; each of Ray's layers has its own
            nodes = []
        if set(names) <= {node["name"] for node in nodes} or time.monotonic() > deadline:
            return nodes
        time.sleep(POLL_S)


if __name__ == "__main__":
    print(json.dumps(wait(sys.argv[1], float(sys.argv[2]), sys.argv[3:])))
