"""What this machine has and lacks for training: facts looked up without importing torch, each with what it means."""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
import stat
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement

import launcher
from launcher.cluster.probe import NO_ADDRESS, keeper, own_address, token_file
from launcher.driver.connect import OBJECT_STORE_BYTES
from launcher.driver.interface import interface_of
from launcher.driver.start import MINIMUM_FREE_BYTES
from launcher.units import format_bytes

PYTHONS = ((3, 11), (3, 14))
"""From the first on, below the second."""
SHOWN = ("slipway", "torch", "deepspeed", "ray", "transformers", "peft", "bitsandbytes")
LITTLE_DISK_BYTES = 20 * 10**9
"""A checkpoint of an 8B model with its optimizer is five times that, an adapter's a hundredth."""
LITTLE_MEMORY_BYTES = 4 * 2**30
OPEN_FILES = 4096
"""Ray's raylet holds several connections a worker; with 1,024 it stops at a few hundred of them."""
CUDA_TIMEOUT_S = 60


@dataclass(frozen=True)
class Finding:
    """One fact; `wrong` keeps `slipway run` from working here."""

    state: Literal["ok", "warning", "wrong"]
    what: str
    says: str
    hint: str | None = None


def examine(folder: Path) -> list[Finding]:
    """Everything about this machine; `folder` is where runs would be."""
    return [
        python(),
        *packages(),
        *gpus(),
        *compilers(),
        disk("disk", folder),
        disk("Ray's disk", Path(os.environ.get("RAY_TMPDIR") or "/tmp")),
        memory(),
        shared_memory(Path("/dev/shm")),
        open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        network(),
        ray(),
        token(Path(token_file())),
    ]


def python() -> Finding:
    """The interpreter and its version."""
    says = f"{'.'.join(map(str, sys.version_info[:3]))} at {sys.executable}"
    if PYTHONS[0] <= sys.version_info[:2] < PYTHONS[1]:
        return Finding("ok", "python", says)
    first, after = (".".join(map(str, version)) for version in PYTHONS)
    return Finding("wrong", "python", says, f"Slipway runs on Python {first} and later, below {after}")


def packages() -> list[Finding]:
    """Versions in one line, then every package that is missing or outside of what Slipway allows, or was not tested."""
    versions = {name: _version(name) for name in SHOWN} | {"slipway": launcher.__version__}
    says = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    found = [Finding("ok", "packages", says)]
    for wanted in _requirements():
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        version = _version(wanted.name)
        if version is None:
            found.append(
                Finding("wrong", wanted.name, "is not installed", "install Slipway again: pip install slipway")
            )
        elif not wanted.specifier.contains(version, prereleases=True):
            hint = f"pip install '{wanted.name}{wanted.specifier}'"
            found.append(Finding("wrong", wanted.name, f"{version} is outside {wanted.specifier}", hint))
    tested = _tested()
    other = [
        f"{name} {version}, tested {tested[name]}"
        for name, version in versions.items()
        if version and name in tested and version.partition("+")[0] != tested[name]
    ]
    if other:
        found.append(Finding("warning", "tested set", "; ".join(other), "pip install -c constraints.txt slipway"))
    return found


def _requirements() -> list[Requirement]:
    try:
        return [Requirement(line) for line in metadata.requires("slipway") or ()]
    except metadata.PackageNotFoundError:  # a checkout that is only on PYTHONPATH
        return []


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _tested() -> dict[str, str]:
    """What constraints.txt of a checkout pins; empty for an installed wheel, which has none."""
    file = Path(launcher.__file__).parents[1] / "constraints.txt"
    if not file.is_file():
        return {}
    pins = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", file.read_text(encoding="utf-8"), re.M)
    return {name: version.partition("+")[0] for name, version in pins}


def gpus() -> list[Finding]:
    """GPUs with the driver's version, and whether this torch can use them."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=CUDA_TIMEOUT_S)
        lines = [line.split(", ") for line in done.stdout.splitlines()] if done.returncode == 0 else []
    except (OSError, subprocess.TimeoutExpired):
        lines = []
    built_for = _cuda_of_torch()
    torch = f"torch is built for CUDA {built_for}" if built_for else "torch is built for CPUs"
    if not lines:
        if Path("/proc/driver/nvidia/gpus").is_dir():
            return [Finding("wrong", "GPUs", "there are some, but nvidia-smi does not answer", "look at its message")]
        return [Finding("ok", "GPUs", f"none: training runs on the CPU; {torch}")]
    kinds = sorted({f"{name} with {memory}" for name, memory, _ in lines})
    says = f"{len(lines)}: {', '.join(kinds)}; driver {lines[0][2]}; {torch}"
    if built_for is None:
        hint = "install a torch for CUDA: https://pytorch.org/get-started"
        return [Finding("wrong", "GPUs", says, hint)]
    if trouble := _cuda_trouble():
        return [Finding("wrong", "GPUs", f"{says}; {trouble}", "the driver must be as new as that CUDA")]
    return [Finding("ok", "GPUs", says)]


def _cuda_of_torch() -> str | None:
    """The CUDA that torch was built for, from its files."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda(?:: [^=]+)? = '([^']+)'", text, re.M)
    return found.group(1) if found else None


def _cuda_trouble() -> str | None:
    """Why torch cannot use the GPUs, asked of torch in a process of its own; None where it can."""
    code = "import torch; torch.cuda.init(); torch.zeros(1, device='cuda')"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=CUDA_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"torch has not found one in {CUDA_TIMEOUT_S} s"
    last = done.stderr.strip().splitlines()[-1:] or ["torch ended without a word"]
    return last[0] if done.returncode else None


def compilers() -> list[Finding]:
    """DeepSpeed compiles its CPU optimizer where it is first used."""
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    missing = [name for name, there in (("C++ compiler", compiler), ("ninja", shutil.which("ninja"))) if not there]
    if not missing:
        return [Finding("ok", "compiler", f"{compiler} and ninja")]
    says = f"no {' and no '.join(missing)}: with parallel.offload torch's AdamW updates on the CPU, slower"
    return [Finding("warning", "compiler", says, "install g++ and ninja if you offload the optimizer")]


def disk(what: str, folder: Path) -> Finding:
    """Room for files, where they may be written; `folder` may not be there yet."""
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    says = f"{format_bytes(free)} free at {there}"
    if not os.access(there, os.W_OK):
        return Finding("wrong", what, f"{there} cannot be written to", "runs are in `runs:` of the recipe or --run-dir")
    if free < MINIMUM_FREE_BYTES:
        return Finding("wrong", what, says, "make room on it")
    if free < LITTLE_DISK_BYTES:
        return Finding("warning", what, says, "checkpoints of a large model may need more")
    return Finding("ok", what, says)


def memory() -> Finding:
    """Of the machine."""
    found = psutil.virtual_memory()
    says = f"{format_bytes(found.available)} of {format_bytes(found.total)} free"
    little = found.available < LITTLE_MEMORY_BYTES
    return Finding("warning" if little else "ok", "memory", says, "end what else runs here" if little else None)


def shared_memory(folder: Path) -> Finding:
    """Ray's objects and NCCL's buffers; Docker gives 64 MiB."""
    if not folder.is_dir():
        return Finding("warning", str(folder), "is not there", "Ray keeps objects on the disk instead")
    free = shutil.disk_usage(folder).free
    says = f"{format_bytes(free)} free"
    if free >= 2 * OBJECT_STORE_BYTES:
        return Finding("ok", str(folder), says)
    return Finding("warning", str(folder), says, "of a container: docker run --shm-size=1g, or --ipc=host; NCCL fails")


def open_files(limit: int) -> Finding:
    """What one process may open at once."""
    if limit == resource.RLIM_INFINITY or limit >= OPEN_FILES:
        return Finding("ok", "open files", f"{limit:,} a process" if limit >= 0 else "no limit")
    return Finding("warning", "open files", f"{limit:,} a process", "ulimit -n 65536, or LimitNOFILE of the service")


def network() -> Finding:
    """The address by which other machines reach this one, and what was chosen for gloo and NCCL."""
    address = own_address(socket.gethostname())
    name = interface_of(address)
    chosen = {key: os.environ[key] for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if key in os.environ}
    says = f"{address} on {name}" + "".join(f"; {key}={value} is kept" for key, value in chosen.items())
    if address == NO_ADDRESS:
        says = "no address that other machines reach; this one alone can train"
    return Finding("ok", "network", says)


def ray() -> Finding:
    """Whether this machine is a node of a cluster."""
    count = sum(process.info["name"] == "raylet" for process in psutil.process_iter(["name"]))
    kept = keeper()
    if kept:
        return Finding(
            "ok", "Ray", f"{kept['role']} of the cluster whose head is {kept['head']}: --address auto joins it"
        )
    if count:
        return Finding("ok", "Ray", f"{count} node{'s' * (count > 1)} run{'s' * (count == 1)} here")
    return Finding("ok", "Ray", "none runs here: `slipway run` starts one for itself")


def token(file: Path) -> Finding:
    """Ray's token: whoever reads it may run anything on the cluster."""
    if not file.exists():
        return Finding("ok", "token", f"no {file}: needed to join a cluster")
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & 0o077:
        return Finding("warning", "token", f"{file} has mode {mode:o}: others can read it", f"chmod 600 {file}")
    return Finding("ok", "token", f"{file}, mode {mode:o}")
