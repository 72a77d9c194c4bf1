"""The measuring half of `launcher.bench.checkpoint`: one rank, in a process group of its own.

`torchrun -m launcher.bench.checkpoint_measures PLAN JOB`, where JOB is a JSON file. `{"task": "saves", ...}` trains and
saves; `{"task": "loads", ...}` loads what such a job has left. Rank 0 writes what was found to the job's `answer`.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher.bench.checkpoint_contenders import CONTENDERS, Contender, DeepSpeedSave, Lab, Measured, SlipwaySave
from launcher.checkpoint.layout import FOLDER, Checkpoint
from launcher.checkpoint.load import load
from launcher.checkpoint.save import own_shards
from launcher.checkpoint.saver import Saver
from launcher.errors import RunFailed
from launcher.plan.plan import Plan
from launcher.store.folder import FolderStore


def measure_saves(lab: Lab, job: Measured) -> Measured:
    """Every contender's saves, in turns; then whole stretches of training, memory, and loading."""
    parts = lab.parts
    found: Measured = {
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in parts.engine.module.parameters()),
        "shard_bytes": lab.most(sum(shard.held.nbytes for shard in own_shards(parts.engine).values())),
        "optimizer": type(parts.engine.optimizer).__name__,
        "device": torch.cuda.get_device_name(parts.device) if parts.device.type == "cuda" else "CPU",
    }
    for _ in range(job["warmup"]):
        lab.take_step()
    before = start_peak(parts.device)
    saver = Saver(parts.saver.store, parts.saver.attempt, lab.plan, parts.engine, parts.device)
    saver.join()
    if saver.without_room is not None:
        raise RunFailed(f"no copies can be made: {saver.without_room}", hint="measure fewer --parameters")
    copies_bytes = resident_bytes("VmRSS") - before["host"]
    lab.parts = replace(parts, saver=saver)

    contenders = [kind(lab) for kind in CONTENDERS if kind.name in job["contenders"]]
    found["rounds"] = []
    for number in range(job["rounds"] + 1):  # the first one warms up
        turn = rotated(contenders, number)
        measured = {one.name: save_once(lab, one, job["steps"]) for one in turn}
        steps = [step for one in measured.values() for step in one["ordinary"]]
        ordinary = statistics.median(step["seconds"] for step in steps)
        ordinary_cpu = statistics.median(step["cpu"] for step in steps)
        found["rounds"].append({"ordinary": ordinary, "ordinary_cpu": ordinary_cpu, "saves": measured})
        for name, one in measured.items():
            first, total = excess(one, ordinary)
            lab.say(f"round {number}, step {ordinary:.3f} s, {name}: pause {first:.3f} s, until COMMIT {total:.3f} s")
    found["stretches"] = measure_stretches(lab, contenders, job)
    found["memory"] = {one.name: peak_of(lab, one) for one in contenders}
    if "slipway" in found["memory"]:
        found["memory"]["slipway"]["kept"] = lab.most(copies_bytes)
    found |= measure_loads(lab, contenders, job)
    return found


def rotated(turn: list[Any], number: int) -> list[Any]:
    """Another one begins each time."""
    first = number % len(turn)
    return turn[first:] + turn[:first]


def excess(save: Measured, ordinary: float) -> tuple[float, float]:
    """Seconds that the first step of a save, and all its steps, took longer than ordinary ones."""
    seconds = [step["seconds"] for step in save["taken"]]
    return seconds[0] - ordinary, sum(seconds) - ordinary * len(seconds)


def save_once(lab: Lab, contender: Contender, steps: int) -> Measured:
    """Some ordinary steps, then those from the beginning of a save until it is whole."""
    clear(lab)
    ordinary = [lab.take_step() for _ in range(steps)]
    taken = [lab.take_step(contender.begin)]
    while lab.most(float(contender.committed_after() is None)):
        taken.append(lab.take_step())
    seconds = contender.committed_after()
    contender.wait()
    return {
        "ordinary": ordinary,
        "taken": taken,
        "committed_after": lab.most(seconds or taken[0]["inside"]),
        "bytes": bytes_in(contender.place()),
    }


def clear(lab: Lab) -> None:
    """Delete all saves and let the disk come to rest, so that none pays for what another has left behind."""
    store = FolderStore(lab.folder)
    for name in (FOLDER, *(kind.name for kind in CONTENDERS)):
        lab.rank_0(lambda name=name: store.remove(name))  # type: ignore[misc]
    lab.rank_0(os.sync)


def bytes_in(folder: Path) -> int:
    """Of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure_stretches(lab: Lab, contenders: list[Contender], job: Measured) -> list[dict[str, float]]:
    """Seconds of equal numbers of steps without saves, with ours and with DeepSpeed's every few steps; in turns."""
    savers: list[Contender | None] = [None, *(one for one in contenders if one.name in ("slipway", "deepspeed"))]
    found = []
    for number in range(job["stretches"]):
        turn = rotated(savers, number)
        seconds = {one.name if one else "none": stretch(lab, one, job["stretch"], job["every"]) for one in turn}
        found.append(seconds)
        lab.say(f"{job['stretch']} steps: " + ", ".join(f"{name} {time_s:.2f} s" for name, time_s in seconds.items()))
    return found


def stretch(lab: Lab, contender: Contender | None, steps: int, every: int) -> float:
    """Seconds of `steps` steps with a save before each `every`th, until the last save is whole."""
    clear(lab)
    lab.take_step()  # the disk's rest has let the caches grow cold
    began = time.perf_counter()
    for number in range(steps):
        lab.take_step(contender.begin if contender and number % every == 0 else lambda: None)
    if contender:
        contender.wait()
    lab.meet()
    return lab.most(time.perf_counter() - began)


def peak_of(lab: Lab, contender: Contender) -> dict[str, float]:
    """Bytes that a save alone, without steps beside it, takes on the rank that takes most; of the GPU's as well."""
    clear(lab)
    contender.forget()
    lab.meet()
    before = start_peak(lab.parts.device)
    contender.begin()
    contender.wait()
    host, device = taken_since(before, lab.parts.device)
    contender.committed_after()  # raises what went wrong
    return {"host": lab.most(host), "device": lab.most(device), "kept": 0.0}


def start_peak(device: torch.device) -> dict[str, int]:
    """Reset the marks of the most memory held; what is held now. Freed memory is given back first, or a peak would
    hide in it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return {
        "host": resident_bytes("VmRSS"),
        "device": torch.cuda.memory_allocated(device) if device.type == "cuda" else 0,
    }


def taken_since(before: dict[str, int], device: torch.device) -> tuple[int, int]:
    """The most that was held at once above `before`, in host and in device memory."""
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return resident_bytes("VmHWM") - before["host"], on_device - before["device"]


def resident_bytes(field: str) -> int:
    """VmRSS, what this process holds, or VmHWM, the most it has held."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def measure_loads(lab: Lab, contenders: list[Contender], job: Measured) -> Measured:
    """Ours and DeepSpeed's load of what the same ranks saved, and where it is left for others to load."""
    clear(lab)
    saved = {one.name: one for one in contenders}
    ours, theirs = saved["slipway-sync"], saved["deepspeed"]
    for one in (ours, theirs):
        one.begin()
    assert isinstance(ours, SlipwaySave)
    assert isinstance(theirs, DeepSpeedSave)
    left = {"step": ours.step, "tag": theirs.tag, "ours": str(ours.place()), "deepspeed": str(theirs.place())}
    checkpoint = Checkpoint(lab.parts.saver.store, ours.step)
    ways = {"slipway": (lambda: load_ours(lab, checkpoint), ours.place())}
    ways["deepspeed"] = (lambda: load_deepspeed(lab, theirs.place()), theirs.place())
    return {"left": left, "loads": loaded(lab, ways, job["loads"])}


def loaded(lab: Lab, ways: dict[str, tuple[Callable[[], None], Path]], times: int) -> dict[str, Measured]:
    """Each way to load so many times, from the disk and again from the page cache: seconds, memory, the next loss."""
    found: dict[str, Measured] = {name: {"cold": [], "warm": [], "peak": [], "loss": []} for name in ways}
    for _, (name, (action, folder)) in itertools.product(range(times), ways.items()):
        for kind in ("cold", "warm"):
            if kind == "cold":
                lab.rank_0(lambda folder=folder: drop_from_cache(folder))  # type: ignore[misc]
            before = start_peak(lab.parts.device)
            lab.meet()
            began = time.perf_counter()
            action()
            lab.meet()
            found[name][kind].append(lab.most(time.perf_counter() - began))
            found[name]["peak"].append(lab.most(taken_since(before, lab.parts.device)[0]))
            lab.step = 0
            found[name]["loss"].append(lab.take_step()["loss"])
        lab.say(f"load, {name}: {found[name]['cold'][-1]:.3f} s from the disk, {found[name]['warm'][-1]:.3f} s again")
    return found


def load_ours(lab: Lab, checkpoint: Checkpoint) -> None:
    load(checkpoint, lab.parts.engine, lab.plan, lab.parts.saver.group)


def load_deepspeed(lab: Lab, folder: Path) -> None:
    where, _ = lab.parts.engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if where is None:
        raise RunFailed(f"DeepSpeed has not loaded {folder}", hint="its own log says why")


def drop_from_cache(folder: Path) -> None:
    """Have the next reader read the disk."""
    os.sync()
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_elsewhere(lab: Lab, job: Measured) -> Measured:
    """Load what other ranks have left: ours as it is, DeepSpeed's from its universal form."""
    lab.take_step()  # whatever the first step allocates belongs to none of them
    left = job["left"]
    checkpoint = Checkpoint(FolderStore(Path(job["saved_in"])), left["step"])
    ways = {"slipway": (lambda: load_ours(lab, checkpoint), Path(left["ours"]))}
    if job["universal"]:
        # What the key checkpoint.load_universal of its configuration sets, and nothing else reads.
        lab.parts.engine._config.load_universal_checkpoint = True
        ways["universal"] = (lambda: load_deepspeed(lab, Path(job["universal"])), Path(job["universal"]))
    return {"loads": loaded(lab, ways, job["loads"])}


def main(plan_file: str, job_file: str) -> None:
    """Entry for torchrun."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    plan, job = Plan.load(Path(plan_file)), json.loads(Path(job_file).read_text(encoding="utf-8"))
    dist.init_process_group("nccl" if plan.layout.device == "cuda" else "gloo")
    lab = Lab(plan)
    found = measure_saves(lab, job) if job["task"] == "saves" else measure_elsewhere(lab, job)
    lab.rank_0(lambda: Path(job["answer"]).write_text(json.dumps(found), encoding="utf-8"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
