"""Ray Train's process group, opened on each host's own network interface: see `driver.interface`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from launcher.driver.interface import use_ray_interface
from launcher.driver.watch import start_beating
from launcher.train import startup


def _first_moments() -> None:
    startup.begin()
    startup.ended("worker group")
    use_ray_interface()


class _InterfaceBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_first_moments)
        if backend_config.watch is not None:
            worker_group.execute(start_beating, backend_config.watch, time.time(), backend_config.beat_every_s)
        super().on_start(worker_group, backend_config)


@dataclass
class InterfaceTorchConfig(TorchConfig):
    """Ray's TorchConfig, with the interface chosen on each host before the process group opens, and each rank sending
    beats to the watch from then on."""

    watch: Any = None
    """The actor; None where nobody watches."""
    beat_every_s: float = 0.0

    @property
    def backend_cls(self) -> type[_InterfaceBackend]:
        return _InterfaceBackend
