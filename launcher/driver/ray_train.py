"""Ray Train's trainer with our own policy, and without what it waits for in vain where there is no dashboard."""

from __future__ import annotations

from typing import Any

import ray
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray._private.worker import get_dashboard_url
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate

from launcher.driver.elastic import StartedGroups, Terms, policy, scaling_config


class Trainer(TorchTrainer):
    """A TorchTrainer whose size and restarts `elastic.Policy` decides, by `terms`, and whose placement-group cleaner
    runs only where a dashboard can answer it. It runs in `controller`, a process that `driver.controller` has started.

    The cleaner frees a dead controller's placement group, and asks the dashboard whether the controller lives. Without
    one it cannot be stopped: every run waited 12 s for it at its end (Ray 2.60). A Ray without a dashboard is one that
    we started, and it ends with us, placement groups and all.
    """

    def __init__(self, train_loop: Any, *, terms: Terms, controller: Any, **settings: Any) -> None:
        super().__init__(train_loop, scaling_config=scaling_config(terms), **settings)
        self.terms = terms
        self.controller = controller

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        ours = policy(self.terms)
        settings |= {"scaling_policy": ours, "failure_policy": ours}
        # As Ray Train does, but in the process that has been started for it.
        environment = {RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: "0"} | get_env_vars_to_propagate()
        return ray.get(self.controller.run.remote(environment, settings))

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = [StartedGroups(self.terms), *super()._create_default_callbacks()]
        if not get_dashboard_url():
            return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]
        return callbacks
