"""What the machine does meanwhile: use of CPUs, memory and GPUs, power and energy, now and then.

One process of each host looks, from a thread of its own; a look takes 0.06 ms of a CPU, and what GPUs add to that has
not been measured. The first rank's host writes lines `system` to metrics.jsonl, every other one to
logs/system-<host>.jsonl. What a machine does not tell is left out: GPUs need NVIDIA's driver and the package
nvidia-ml-py, the CPUs' energy a kernel that lets us read it (mostly root alone: Lipp et al., "PLATYPUS", 2021).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.train.metrics import FILE, MetricsLog

log = logging.getLogger(__name__)

POWERCAP = Path("/sys/class/powercap")
LAST_LOOK_S = 10.0
"""How long the end of a run waits for it: a driver may hang."""


@contextlib.contextmanager
def sampled(run_dir: Path, attempt: str, rank: int, every_s: float | None) -> Iterator[None]:
    """Look every `every_s` seconds for as long as the block runs, and once at its end, in the first of a host's
    processes; None: never. Raises nothing and ends nothing."""
    if every_s is None or not own_files():
        yield
        return
    name = FILE if rank == 0 else own_files()[0]
    ended = threading.Event()
    thread = threading.Thread(target=_sample, args=(run_dir, attempt, name, every_s, ended), name="system", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(LAST_LOOK_S)


def own_files() -> list[str]:
    """What this process writes where it is the first of its host, and the host is not the first rank's; below the
    run's folder."""
    return [f"logs/system-{socket.gethostname()}.jsonl"] if os.environ.get("LOCAL_RANK", "0") == "0" else []


def _sample(run_dir: Path, attempt: str, name: str, every_s: float, ended: threading.Event) -> None:
    try:
        machine = Machine()
        # A log of its own: the loop's is for the loop's thread. Lines are appended whole.
        metrics = MetricsLog(run_dir, attempt, writes=True, name=name)
        over = False
        while not over:
            over = ended.wait(every_s)
            metrics.write("system", **machine.look())
        metrics.close()
        machine.close()
    except Exception as error:  # of whatever kind: a driver's, a container's, a kernel's
        log.warning("what the machine does is not measured any more: %s", error)


class Machine:
    """This host."""

    def __init__(self) -> None:
        import psutil

        self._psutil = psutil
        self._gpus = _Gpus.found()
        self._cpu_energy = _CpuEnergy()
        psutil.cpu_percent()  # what is asked is since the last time

    def look(self) -> dict[str, Any]:
        """{"host", "cpu_percent" of all CPUs since the last look, "memory_bytes" in use, "gpus" where there are any,
        "energy_j" of the CPUs since the first look where it can be read}."""
        memory = self._psutil.virtual_memory()
        values: dict[str, Any] = {
            "host": socket.gethostname(),
            "cpu_percent": self._psutil.cpu_percent(),
            "memory_bytes": memory.total - memory.available,
            "memory_total_bytes": memory.total,
        }
        if self._gpus is not None:
            values["gpus"] = self._gpus.look()
        if (energy := self._cpu_energy.since_first()) is not None:
            values["energy_j"] = round(energy, 1)
        return values

    def close(self) -> None:
        """Let the GPUs' driver go."""
        if self._gpus is not None:
            self._gpus.close()


class _Gpus:
    """Those of this host that the run may use, as NVIDIA's management library knows them."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._handles = dict(enumerate(self._visible()))
        self._first: dict[int, float] = {}

    @classmethod
    def found(cls) -> _Gpus | None:
        """None without the package, the driver or a GPU."""
        try:
            import pynvml
        except ImportError:
            if Path("/proc/driver/nvidia").exists():
                log.info("GPU use is not measured: pip install nvidia-ml-py")
            return None
        try:
            pynvml.nvmlInit()
            gpus = cls(pynvml)
        except pynvml.NVMLError:
            return None
        return gpus if gpus._handles else None

    def look(self) -> list[dict[str, Any]]:
        """{"index", "percent" of the last second in which it computed, "memory_bytes", "power_w", "energy_j" since the
        first look} of each; what a GPU does not tell is left out."""
        return [self._one(index, handle) for index, handle in self._handles.items()]

    def close(self) -> None:
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    def _one(self, index: int, handle: Any) -> dict[str, Any]:
        nvml, found = self._nvml, dict[str, Any](index=index)
        with contextlib.suppress(nvml.NVMLError):  # a slice of a GPU (MIG) does not tell
            found["percent"] = nvml.nvmlDeviceGetUtilizationRates(handle).gpu
        with contextlib.suppress(nvml.NVMLError):
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            found["memory_bytes"], found["memory_total_bytes"] = memory.used, memory.total
        with contextlib.suppress(nvml.NVMLError):
            found["power_w"] = nvml.nvmlDeviceGetPowerUsage(handle) / 1000
        with contextlib.suppress(nvml.NVMLError):  # from Volta on
            joules = nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
            found["energy_j"] = round(joules - self._first.setdefault(index, joules), 1)
        return found

    def _visible(self) -> Iterator[Any]:
        """In the order of CUDA's numbers, as torch counts them on this host."""
        nvml, named = self._nvml, os.environ.get("CUDA_VISIBLE_DEVICES")
        if named is None:
            names = [str(number) for number in range(nvml.nvmlDeviceGetCount())]
        else:
            names = [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
        for name in names:
            if name.isdecimal():
                yield nvml.nvmlDeviceGetHandleByIndex(int(name))
            else:  # GPU-<uuid>, MIG-<uuid>
                yield nvml.nvmlDeviceGetHandleByUUID(name)


class _CpuEnergy:
    """Joules that the CPU packages have taken, from the kernel's counters, which start over now and then."""

    def __init__(self) -> None:
        # intel-rapl:0 is a package, intel-rapl:0:1 a part of it; AMD's have the same names.
        packages = [zone for zone in POWERCAP.glob("*-rapl:*") if zone.name.count(":") == 1 and _is_package(zone)]
        self._zones = {zone: _read(zone / "energy_uj") for zone in packages}
        self._joules = 0.0

    def since_first(self) -> float | None:
        """None where they cannot be read."""
        for zone, before in self._zones.items():
            now = _read(zone / "energy_uj")
            if now is None or before is None:
                return None
            around = _read(zone / "max_energy_range_uj") if now < before else 0
            self._joules += (now - before + (around or 0)) / 1e6
            self._zones[zone] = now
        return self._joules if self._zones else None


def _is_package(zone: Path) -> bool:
    with contextlib.suppress(OSError):
        return (zone / "name").read_text().startswith("package")
    return False


def _read(file: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(file.read_text())
    return None
