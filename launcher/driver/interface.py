"""Each host's network interface, given to gloo and NCCL before the process group opens.

Left alone, gloo resolves the host's own name, which many distributions map to 127.0.x.1: ranks on other hosts then
wait for a loopback address until they time out.
"""

from __future__ import annotations

import ipaddress
import os


def interface_of(address: str) -> str | None:
    """Name of this host's network interface that carries an IP address of either version; None if none does."""
    import psutil

    wanted = _parsed(address)
    for name, addresses in psutil.net_if_addrs().items():
        if wanted is not None and any(_parsed(entry.address) == wanted for entry in addresses):
            return name
    return None


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """None for what is none, such as the MAC address that an interface has too."""
    try:
        return ipaddress.ip_address(address.partition("%")[0])  # fe80::1%eth0
    except ValueError:
        return None


def use_ray_interface() -> str | None:
    """Point gloo and NCCL at the interface that carries this worker's Ray address, unless the user has chosen one."""
    import ray

    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        # NCCL takes names for prefixes, eth1 also for eth10, unless told that they are whole; an alias such as eth0:1
        # it would take for a port of eth0. https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name.partition(':')[0]}")
    return name
