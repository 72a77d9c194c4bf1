"""Ray: start one here, or join the one that is named, and say what it has."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.errors import ClusterError, SlipwayError
from launcher.plan.facts import ClusterFacts, NodeFacts, this_machine

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 20
OBJECT_STORE_BYTES = 128 * 2**20
"""Of the Ray that we start: only the Plan travels through it."""
QUIET = {
    # No telemetry, of Ray's or Hugging Face's, unless the user asked for it in the environment.
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Warnings about what is about to change in Ray say nothing about the user's run.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Paths in the Plan are absolute; workers stay where they were started.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_DEDUP_LOGS": "0",
}


def cluster_address(address: str | None) -> str | None:
    """The cluster to join: as given, else RAY_ADDRESS; None means one of our own on this machine."""
    return address or os.environ.get("RAY_ADDRESS") or None


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[ClusterFacts]:
    """Ray for the length of the block; ours is stopped afterwards, a joined one is left.

    Raises:
        ClusterError: the address does not answer, or Ray does not start here.
    """
    target = cluster_address(address)
    authenticate(target)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    no_errors_on_stdout()
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    try:
        if target is None:
            os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # a few local workers: notice at once
            # Its machines are told to nobody beforehand that they will be taken away: there is one, this one.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
            with no_api_server():
                ray.init(
                    address="local",
                    include_dashboard=False,
                    num_cpus=this_machine().cpus,
                    object_store_memory=OBJECT_STORE_BYTES,
                    **quiet,
                )
        else:
            os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(CONNECT_TIMEOUT_S))
            ray.init(address=target, **quiet)
    except ray.exceptions.AuthenticationError as error:
        raise ClusterError(
            f"the Ray cluster at {target} wants a token that this machine does not have",
            hint="copy the head's ~/.ray/auth_token here with mode 600, or set RAY_AUTH_TOKEN",
        ) from error
    except SlipwayError:  # of a signal
        raise
    except Exception as error:  # Ray raises plain ones too: of a machine too busy to start a node in 30 s, for one
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if target is None:
            raise ClusterError(
                f"Ray does not start on this machine: {reason}",
                hint="its logs are in /tmp/ray/session_latest/logs, or under RAY_TMPDIR; a busy machine may have more "
                "time later",
            ) from error
        raise ClusterError(
            f"no Ray cluster answers at {target}: {reason}",
            hint="check --address and RAY_ADDRESS; without either, slipway starts Ray on this machine",
        ) from error
    try:
        yield cluster_facts()
    finally:
        ray.shutdown()


def no_errors_on_stdout() -> None:
    """Have Ray log what it would print on stdout, which is for our results: every death of a process, with the last 20
    lines of the raylet's log. The run itself says what happened. Ray 2.60 has no setting for it."""
    from ray._private import worker

    def to_log(data: dict[str, Any], ignore_prefix: bool) -> None:
        log.info("Ray: %s", "\n".join(data["lines"]))

    worker.print_to_stdstream = to_log


@contextlib.contextmanager
def no_api_server() -> Iterator[None]:
    """Within the block Ray is started without its API server and autoscaler, which a Ray of our own has no use for.

    `include_dashboard=False` takes away the API server's pages, not its start: Ray waits for that before it starts
    anything else, 2 s of two processes here. Ray 2.60 has no setting for it.
    """
    from ray._private.node import Node

    kept = Node.start_api_server, Node.start_monitor

    def without(node: Any, **settings: Any) -> None:
        node._webui_url = ""

    Node.start_api_server, Node.start_monitor = without, without
    try:
        yield
    finally:
        Node.start_api_server, Node.start_monitor = kept


def authenticate(target: str | None) -> None:
    """Settle Ray's token before Ray is imported, unless the user has.

    Our own Ray gets a token that only its processes know; Ray would write one to the home folder, readable by all.
    A cluster that is joined asks for the token that its nodes were started with; Ray sends it only when told to.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return
    if target is None:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        return
    named = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    if named or (Path.home() / ".ray" / "auth_token").exists():
        os.environ["RAY_AUTH_MODE"] = "token"


def cluster_facts() -> ClusterFacts:
    """The living nodes of the connected cluster with what nobody uses there, the one this process runs on first.

    A node that is about to be taken away is not among them.
    """
    import ray
    from ray._private.state import available_resources_per_node, state

    here = ray.get_runtime_context().get_node_id()
    free: dict[str, dict[str, float]] = available_resources_per_node()
    leaving = state.get_draining_nodes()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]

    def facts(node: dict[str, Any]) -> NodeFacts:
        unused = free.get(node["NodeID"], {})
        cpus, gpus = int(unused.get("CPU", 0)), int(unused.get("GPU", 0))
        return NodeFacts(
            host=node["NodeManagerHostname"],
            cpus=cpus,
            gpus=gpus,
            used_cpus=int(node["Resources"].get("CPU", 0)) - cpus,
            used_gpus=int(node["Resources"].get("GPU", 0)) - gpus,
            id=node["NodeID"],
            address=node["NodeManagerAddress"],
        )

    return ClusterFacts(
        tuple(sorted(map(facts, nodes), key=lambda node: (node.id != here, _by_number(node.host), node.id)))
    )


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts worker-2 before worker-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
