"""Ray Train's trainer, without what it waits for in vain where there is no dashboard."""

from __future__ import annotations

from typing import Any

from ray._private.worker import get_dashboard_url
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback


class Trainer(TorchTrainer):
    """A TorchTrainer whose placement-group cleaner runs only where a dashboard can answer it.

    The cleaner frees a dead controller's placement group, and asks the dashboard whether the controller lives. Without
    one it cannot be stopped: every run waited 12 s for it at its end (Ray 2.60). A Ray without a dashboard is one that
    we started, and it ends with us, placement groups and all.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()
        if not get_dashboard_url():
            return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]
        return callbacks
