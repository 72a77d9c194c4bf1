"""Each host's network interface, given to gloo and NCCL before the process group opens.

Left alone, gloo resolves the host's own name, which many distributions map to 127.0.x.1: ranks on other hosts then
wait for a loopback address until they time out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


def interface_of(address: str) -> str | None:
    """Name of this host's network interface that carries an IP address; None if none does."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return name
    return None


def use_ray_interface() -> str | None:
    """Point gloo and NCCL at the interface that carries this worker's Ray address, unless the user has chosen one."""
    import os

    import ray

    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
    return name


class _InterfaceBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(use_ray_interface)
        super().on_start(worker_group, backend_config)


@dataclass
class InterfaceTorchConfig(TorchConfig):
    """Ray's TorchConfig, with the interface chosen on each host before the process group opens."""

    @property
    def backend_cls(self) -> type[_InterfaceBackend]:
        return _InterfaceBackend
