"""Where Ray puts the workers, on Ray nodes of one machine with GPUs that only Ray believes in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def nodes() -> Iterator[dict[str, str]]:
    """{name: Ray node}: a head without GPUs and CPUs, and three machines of which others use one."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=0, num_gpus=0, object_store_memory=80_000_000, include_dashboard=False)
        ray.init(address=cluster.address)
        small = {"num_cpus": 4, "object_store_memory": 80_000_000}
        added = {name: cluster.add_node(num_gpus=gpus, **small) for name, gpus in (("used", 4), ("a", 2), ("b", 2))}
        cluster.wait_for_nodes()
        ids = {name: node.node_id for name, node in added.items()}
        others = ray.remote(num_gpus=1)(_Others)
        there = [others.options(label_selector={"ray.io/node-id": ids["used"]}).remote() for _ in range(2)]
        ray.get([actor.ready.remote() for actor in there])
        yield ids
    finally:
        ray.shutdown()
        cluster.shutdown()


class _Others:
    def ready(self) -> None: ...


def ranks(config: dict[str, Any]) -> list[Any] | None:
    """Ray node and local rank of each rank, at the end of the first."""
    import ray
    import torch.distributed as dist

    found: list[Any] = [None] * dist.get_world_size()
    context = ray.get_runtime_context()
    dist.all_gather_object(found, (context.get_node_id(), len(context.get_accelerator_ids()["GPU"])))
    return found


@pytest.mark.parametrize(
    ("workers", "where"),
    [
        pytest.param(2, ["a", "a"], marks=pytest.mark.long),
        (3, ["a", "a", "b"]),
        pytest.param(6, ["a", "a", "b", "b", "used", "used"], marks=pytest.mark.long),
    ],
)
def test_free_nodes_are_filled_whole_and_gpus_in_use_are_left_alone(
    nodes: dict[str, str], workers: int, where: list[str], tmp_path: Path
) -> None:
    from ray.train import RunConfig

    from launcher.driver import controller
    from launcher.driver.connect import cluster_facts
    from launcher.driver.elastic import Terms
    from launcher.driver.network import InterfaceTorchConfig
    from launcher.driver.ray_train import Trainer

    facts = {node.id: node for node in cluster_facts().nodes}
    assert [(facts[nodes[name]].gpus, facts[nodes[name]].used_gpus) for name in ("used", "a")] == [(2, 2), (2, 0)]
    trainer = Trainer(
        ranks,
        train_loop_config={},
        terms=Terms(str(tmp_path), workers, workers, 1, True, 20.0, 0, str(tmp_path / "events")),
        controller=controller.started(),
        run_config=RunConfig(name="ray", storage_path=str(tmp_path)),
        torch_config=InterfaceTorchConfig(backend="gloo", timeout_s=60),
    )
    found = trainer.fit().return_value
    order = sorted(nodes[name] for name in ("a", "b"))  # one host's name: the order of the nodes' ids
    names = dict(zip([*order, nodes["used"]], ["a", "b", "used"], strict=True))
    assert [(names[node], gpus) for node, gpus in found] == [(name, 1) for name in where]


def test_more_than_is_free_is_waited_for_and_then_given_up(nodes: dict[str, str], tmp_path: Path) -> None:
    from ray.train import RunConfig

    from launcher.driver import controller
    from launcher.driver.elastic import Terms
    from launcher.driver.network import InterfaceTorchConfig
    from launcher.driver.ray_train import Trainer

    trainer = Trainer(
        ranks,
        train_loop_config={},
        terms=Terms(str(tmp_path), 7, 7, 1, True, 2.0, 0, str(tmp_path / "events")),
        controller=controller.started(),
        run_config=RunConfig(name="ray", storage_path=str(tmp_path)),
        torch_config=InterfaceTorchConfig(backend="gloo", timeout_s=60),
    )
    with pytest.raises(Exception, match="7 workers are needed, the cluster has room for 6: free are ") as caught:
        trainer.fit()
    assert "2 of 4 (2 in use)" in str(caught.value)
    assert "waiting" in (tmp_path / "events").read_text()
