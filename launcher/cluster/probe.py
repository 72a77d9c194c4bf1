"""What a host has, as one line of JSON: a script of the standard library alone, since the host may have no Slipway yet.

`host_check` sends this file through ssh to the host's Python; it also runs under Pythons too old for Slipway.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
from typing import Any

NVIDIA_SMI_TIMEOUT_S = 15  # without persistence mode the driver loads itself at each call
NO_ADDRESS = "127.0.0.1"


def state_folder() -> str:
    """Where this host's keeper has its files: a folder a host, since hosts may share HOME."""
    return os.path.join(os.path.expanduser("~"), ".slipway", "cluster", socket.gethostname())


def token_file() -> str:
    """Where Ray looks for its token."""
    return os.path.join(os.path.expanduser("~"), ".ray", "auth_token")


def started_at(pid: int) -> int | None:
    """When a process began, in ticks since boot, which tells it from a later one of its number; None if it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            words = file.read().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if words[0] == "Z" else int(words[19])


def boot() -> str:
    """Names the time since this host was switched on, in which a process id means what it meant."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def latest_keeper() -> dict[str, Any] | None:
    """The settings of the latest keeper since this host was switched on, which may be dead; None without one."""
    try:
        with open(os.path.join(state_folder(), "node.json")) as file:
            node: dict[str, Any] = json.load(file)
        return node if node.get("boot") == boot() else None
    except (OSError, ValueError):
        return None


def keeper() -> dict[str, Any] | None:
    """The settings of the keeper that runs on this host, or None."""
    node = latest_keeper()
    return node if node is not None and started_at(node["pid"]) == node["started"] else None


def session_of_dead_keeper() -> int | None:
    """The session of what a keeper that was killed has left; None if none was, or its number is another's by now."""
    node = latest_keeper()
    return node["pid"] if node is not None and not os.path.exists(f"/proc/{node['pid']}") else None


def own_address(name: str) -> str:
    """The address by which other hosts reach this one.

    What its name means, if that is an address of its own; else the one that ssh came in by; else that of the default
    route. Many distributions map a host's own name to 127.0.1.1, which is of no use to others.
    """
    found: list[str] = []
    with contextlib.suppress(OSError, UnicodeError):
        named = [str(entry[4][0]) for entry in socket.getaddrinfo(name, None, 0, socket.SOCK_STREAM)]
        found += sorted(named, key=lambda address: ":" in address)  # of both, IPv4: the other hosts may have no IPv6
    found += os.environ.get("SSH_CONNECTION", "").split()[2:3]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing
        found.append(probe.getsockname()[0])
    return next((address for address in found if not _is_loopback(address) and _is_own(address)), NO_ADDRESS)


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address in ("::1", "0.0.0.0", "::") or address.lower().startswith("fe80")


def _is_own(address: str) -> bool:
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def _packages(names: list[str]) -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    spec = importlib.util.find_spec("launcher")
    if spec is not None and spec.origin:  # a checkout's metadata may be older than its code
        with open(spec.origin) as file:
            match = re.search("^__version__ = [\"'](.+?)[\"']", file.read(), re.M)
        versions["slipway"] = match.group(1) if match else versions.get("slipway")
    return versions


def _gpus() -> tuple[int, str | None]:
    """Number of NVIDIA GPUs and the driver's version; (0, None) without a driver."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=NVIDIA_SMI_TIMEOUT_S,
        )  # fmt: skip
        lines = done.stdout.decode().split()
        if done.returncode == 0 and lines:
            return len(lines), lines[0]
    except (OSError, subprocess.TimeoutExpired):
        pass
    try:
        return len(os.listdir("/proc/driver/nvidia/gpus")), _driver_version()
    except OSError:
        return 0, None


def _driver_version() -> str | None:
    with open("/proc/driver/nvidia/version") as file:
        match = re.search(r"\b(\d+\.\d+(\.\d+)?)\b", file.read())
    return match.group(1) if match else None


def _disk() -> dict[str, dict[str, Any]]:
    ray = os.path.join(os.environ.get("RAY_TMPDIR") or "/tmp", "ray")
    places = {"Ray's files": ray if os.path.isdir(ray) else os.path.dirname(ray), "HOME": os.path.expanduser("~")}
    found = {}
    for what, folder in places.items():
        usage = shutil.disk_usage(folder)
        found[what] = {"folder": folder, "free": usage.free, "total": usage.total, "writable": os.access(folder, 2)}
    return found


def _port_holder(port: int) -> str | None:
    """Who listens on a port, as far as this user may know; None if it is free."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what lingers in TIME_WAIT is no holder
        probe.bind(("0.0.0.0", port))
        return None
    inodes = set()
    ours = session_of_dead_keeper()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            with open(table) as file:
                rows = [line.split() for line in file.readlines()[1:]]
        except OSError:
            continue
        inodes |= {row[9] for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
            if any(link == f"socket:[{inode}]" for link in links for inode in inodes):
                if os.getsid(int(pid)) == ours:
                    return None  # `node start` ends it
                with open(f"/proc/{pid}/comm") as file:
                    return f"{file.read().strip()}, process {pid}"
        except OSError:
            continue
    return "another user's process"


def _token() -> dict[str, Any]:
    """Which token is there: hashes, never itself; and those that the environment puts before it."""
    found: dict[str, Any] = {"hash": _hash_of_file(token_file()), "mode": None, "environment": {}}
    if os.path.exists(token_file()):
        found["mode"] = stat.S_IMODE(os.stat(token_file()).st_mode)
    if os.environ.get("RAY_AUTH_TOKEN"):
        found["environment"]["RAY_AUTH_TOKEN"] = token_hash(os.environ["RAY_AUTH_TOKEN"])
    if os.environ.get("RAY_AUTH_TOKEN_PATH"):
        found["environment"]["RAY_AUTH_TOKEN_PATH"] = _hash_of_file(os.environ["RAY_AUTH_TOKEN_PATH"])
    return found


def _hash_of_file(path: str) -> str | None:
    try:
        with open(path) as file:
            return token_hash(file.read())
    except (OSError, ValueError):
        return None


def token_hash(token: str) -> str:
    """What two hosts' tokens are compared by."""
    return hashlib.sha256(token.strip().encode()).hexdigest()


def main(asked: dict[str, Any]) -> None:
    """Print the facts: `asked` has the names of packages, the host's own name, ports, and a file to look for."""
    began = time.time()
    gpus, driver = _gpus()
    facts: dict[str, Any] = {
        "python": list(sys.version_info[:3]),
        "executable": sys.executable,
        "packages": _packages(asked["packages"]),
        "hostname": socket.gethostname(),
        "address": own_address(asked["name"]),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": gpus,
        "driver": driver,
        "disk": _disk(),
        "ports": {str(port): _port_holder(port) for port in asked["ports"]},
        "token": _token(),
        "keeper": keeper(),
        "shared": None if asked["mark"] is None else os.path.exists(asked["mark"]),
    }
    facts["clock"] = [began, time.time()]
    print(json.dumps(facts))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
