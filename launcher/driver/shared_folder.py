"""Do all nodes see the run's folder? Each rank writes its part of every checkpoint there and reads data beside it."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.driver.start import writable
from launcher.errors import ClusterError
from launcher.plan.plan import LayoutPlan, Plan
from launcher.store.location import is_url

ANSWER_S = 60.0
"""A node has to start a process to look, which imports Slipway."""
APPEAR_S = 5.0
"""A network disk may show a new file a moment late."""


@contextlib.contextmanager
def shared_by_all(plan: Plan) -> Iterator[None]:
    """Let every node of the connected cluster that could get one of the run's workers look for a file in its folder.

    They look while the block runs, since each starts a process for it, 2 s; what they saw is told at its end. Nothing
    is asked of a cluster of one such node, or for a run in an object store.

    Raises:
        ClusterError: some node does not see it.
        RunFolderError: nothing can be written there.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if is_url(plan.location):
        yield
        return
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"] and has_room(node["Resources"], plan.layout)}
    others = {name: node for name, node in nodes.items() if name != ray.get_runtime_context().get_node_id()}
    if not others:
        yield
        return
    run_dir, token = Path(plan.run_dir), f".seen-by-all-{secrets.token_hex(8)}"
    look = ray.remote(num_cpus=0, max_retries=0)(sees)
    try:
        with writable(run_dir):
            (run_dir / token).touch()
        asked = {
            name: look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(name, soft=False)).remote(
                str(run_dir / token), APPEAR_S
            )
            for name in others
        }
        yield
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_S)
        blind = [others[name]["NodeManagerHostname"] for name, answer in asked.items() if not told(answer)]
    finally:
        with contextlib.suppress(OSError):
            (run_dir / token).unlink()
    if blind:
        who = f"{', '.join(sorted(blind))} {'does' if len(blind) == 1 else 'do'} not see it"
        raise ClusterError(
            f"{run_dir} is not shared: {who}, and every rank writes its part of each checkpoint there",
            hint="put runs on storage that all nodes share, or in an object store: --run-dir s3://bucket/..",
        )


def has_room(resources: dict[str, float], layout: LayoutPlan) -> bool:
    """Whether a node with these resources, all of them free, could hold a worker."""
    gpus = 1 if layout.device == "cuda" else 0
    return resources.get("CPU", 0) >= layout.cpus_per_worker and resources.get("GPU", 0) >= gpus


def sees(file: str, patience_s: float) -> bool:
    """On a node: whether a file appears there within some seconds."""
    deadline = time.monotonic() + patience_s
    while not os.path.exists(file):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def told(answer: Any) -> bool:
    """What a node said; one that said nothing in time, or could not be asked, does not see the folder."""
    import ray

    try:
        return bool(ray.get(answer, timeout=0.1))
    except ray.exceptions.RayError:
        return False
