"""Ray Train's controller, begun while the model is still being made ready.

Ray Train's controller is a process of its own that imports Ray Train and torch, 3.4 s here, before it looks at anything
of the run. It is started without its task, and is given that when the trainer is called.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from launcher.driver import secrets

_started: list[Any] = []


def start() -> None:
    """Start the controller's process on this machine, and import here what the trainer needs. Ray is connected."""
    _started[:] = [_controller()]
    import launcher.driver.ray_train  # noqa: F401


def started() -> Any:
    """Handle of the controller that was started, for one run; of a new one where none was."""
    return _started.pop() if _started else _controller()


def _controller() -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(_Controller).options(scheduling_strategy=here).remote()


class _Controller:
    """An actor that becomes Ray Train's controller."""

    def __init__(self) -> None:
        import launcher.driver.ray_train  # noqa: F401

    async def run(self, environment: Mapping[str, str], settings: Mapping[str, Any]) -> Any:
        """Ray Train's Result. `environment`: what its controller and workers read, such as time limits."""
        os.environ.update(environment)
        secrets.fetch()  # the policy in it asks the run's store for checkpoints
        from ray.train.v2._internal.execution.controller import TrainController

        train = TrainController(**settings)
        await train.run()
        return train.get_result()
