"""The Markdown page of `launcher.bench.checkpoint`, from its raw numbers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from launcher.bench.against_trl import spread
from launcher.units import format_bytes

Measured = dict[str, Any]

TITLES = {
    "slipway": "Slipway, beside training",
    "slipway-sync": "Slipway, waiting",
    "deepspeed": "DeepSpeed `save_checkpoint`",
    "dcp": "DCP `save`",
    "dcp-async": "DCP `async_save`",
    "universal": "DeepSpeed, universal",
}
SLOWDOWN_NOTE = "\n- A stretch ends when its last save is whole.\n"


def pauses(found: Measured, name: str) -> dict[str, list[float]]:
    """Seconds that each counted save of one contender held the loop up.

    `first` and `whole`: what its first step, and all steps until it was whole, took above the ordinary steps of the
    same round; `inside`: what was spent in the calls that belong to saving; `cpu`: processor time of a rank above that
    of its ordinary steps.
    """
    held: dict[str, list[float]] = {"first": [], "whole": [], "inside": [], "cpu": []}
    for one in found["saves"]["rounds"][1:]:
        taken, ordinary = one["saves"][name]["taken"], one["ordinary"]
        held["first"].append(taken[0]["seconds"] - ordinary)
        held["whole"].append(sum(step["seconds"] - ordinary for step in taken))
        held["inside"].append(sum(step["inside"] for step in taken))
        held["cpu"].append(sum(step["cpu"] - one["ordinary_cpu"] for step in taken))
    return held


def ratios(mine: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Round by round."""
    return [one / other for one, other in zip(mine, theirs, strict=True)]


def percentile(values: Sequence[float], percent: int) -> float:
    """By linear interpolation between the values."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace(" --- ", "---") + "\n"


def pause_table(found: Measured) -> str:
    """How long each contender holds the loop up."""
    rounds = found["saves"]["rounds"]
    theirs = pauses(found, "deepspeed")
    rows = []
    for name in rounds[0]["saves"]:
        held = pauses(found, name)
        first = rounds[0]["saves"][name]["taken"]
        itself = name == "deepspeed"
        rows.append(
            [
                TITLES[name],
                spread(held["first"], ".3f"),
                f"{percentile(held['first'], 90):.3f}",
                "" if itself else spread(ratios(held["first"], theirs["first"]), ".0%"),
                spread(held["whole"], ".3f"),
                "" if itself else spread(ratios(held["whole"], theirs["whole"]), ".0%"),
                spread(held["inside"], ".3f"),
                f"{sum(step['seconds'] - rounds[0]['ordinary'] for step in first):.3f}",
            ]
        )
    head = ["contender", "pause of the step, s", "90th percentile", "of DeepSpeed's"]
    return table([*head, "until COMMIT, s", "of DeepSpeed's", "inside the calls, s", "the very first save, s"], rows)


def size_table(found: Measured) -> str:
    """When a save is whole, what it leaves on the disk, and what it takes of the memory."""
    rounds, memory = found["saves"]["rounds"][1:], found["saves"]["memory"]
    on_gpu = found["layout"]["device"] == "cuda"
    rows = []
    for name, took in memory.items():
        saves = [one["saves"][name] for one in rounds]
        row = [
            TITLES[name],
            spread([save["committed_after"] for save in saves], ".2f"),
            f"{statistics.median(len(save['taken']) for save in saves):g}",
            spread(pauses(found, name)["cpu"], ".2f"),
            f"{saves[-1]['bytes'] / 1e6:,.1f} MB",
            f"{(took['host'] + took['kept']) / 1e6:,.0f} MB",
        ]
        rows.append([*row, f"{took['device'] / 1e6:,.0f} MB"] if on_gpu else row)
    head = [
        "contender",
        "begun to whole, s",
        "steps until then",
        "processor time, s",
        "on the disk",
        "memory of a rank",
    ]
    return table([*head, "of its GPU"] if on_gpu else head, rows)


def slowdown_table(found: Measured) -> str:
    """What saving costs a stretch of training."""
    stretches, settings = found["saves"]["stretches"], found["settings"]
    saves = -(-settings["stretch"] // settings["every"])
    none = [one["none"] for one in stretches]
    rows = []
    for name in stretches[0]:
        seconds = [one[name] for one in stretches]
        cost = [(mine - without) / saves for mine, without in zip(seconds, none, strict=True)]
        saving = name != "none"
        rows.append(
            [
                TITLES[name] if saving else "no saves",
                spread(seconds, ".2f"),
                spread([ratio - 1 for ratio in ratios(seconds, none)], ".1%") if saving else "",
                spread(cost, ".2f") if saving else "",
            ]
        )
    return table([f"saves: {saves} in {settings['stretch']} steps", "seconds", "slower by", "seconds a save"], rows)


def load_table(found: Measured) -> str:
    """Time to resume: what is saved by all ranks, loaded by them and in other layouts."""
    here = {"ranks": found["layout"]["workers"], "zero": found["layout"]["zero"], "loads": found["saves"]["loads"]}
    rows = []
    for one in [here, *(one for one in found["elsewhere"] if "loads" in one)]:
        for name, load in one["loads"].items():
            converted = statistics.median(one["conversions"]) if name == "universal" else 0.0
            rows.append(
                [
                    f"{one['ranks']}, ZeRO-{one['zero']}",
                    TITLES["slipway" if name == "slipway" else name].partition(",")[0].partition(" `")[0]
                    + (", universal" if name == "universal" else ""),
                    spread(one["conversions"], ".2f") if converted else "",
                    spread(load["cold"], ".2f"),
                    spread(load["warm"], ".2f"),
                    f"{converted + statistics.median(load['cold']):.2f}",
                    f"{max(load['peak']) / 1e6:,.0f} MB",
                    f"{load['loss'][-1]:.5f}",
                ]
            )
    head = ["ranks and stage", "contender", "conversion, s", "load from the disk, s", "from the page cache, s"]
    return table([*head, "to resume, s", "memory of a rank", "next loss"], rows)


def page(found: Measured) -> str:
    """The whole page."""
    where, saves, layout, settings = found["machine"], found["saves"], found["layout"], found["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in where["packages"].items())
    ordinary = [
        step["seconds"] for one in saves["rounds"] for save in one["saves"].values() for step in save["ordinary"]
    ]
    failures = [f"\n- {one['failed']}" for one in found["elsewhere"] if "failed" in one]
    device = "" if layout["device"] == "cpu" else f" on {saves['device']}"
    threads = f"{layout['cpus_per_worker']} threads" if layout["cpus_per_worker"] > 1 else "1 thread"
    return f"""# Checkpoints beside DeepSpeed's and DCP's{device or " on a CPU"}

Measured on {where["date"]} on {where["cpu"]}, {where["cpus"]} CPUs, {where["memory"]} of memory,
{where["file_system"]}, load {where["load_before"]:.1f} when it began; Python {where["python"]}, {versions}.

    {found["command"]}

{layout["workers"]} ranks{device} of {threads}, ZeRO-{layout["zero"]}, {settings["dtype"]}, a scratch Llama of
{saves["parameters"] / 1e6:.1f}M parameters, {settings["tokens"]} tokens a rank and step; an ordinary step takes
{spread(ordinary, ".2f")} s. A rank's part of the training state is {format_bytes(saves["shard_bytes"])}.
All save the same engine in the same processes, in turns: {settings["rounds"]} rounds after one to warm up,
{settings["steps"]} ordinary steps before each save. Each figure: median, least and most; ratios are within a round.

{pause_table(found)}
- Pause of the step: what the step that began the save took above the median ordinary step of its round. Until COMMIT:
  the same, summed over all steps until the save was whole. Inside the calls: `begin` and `before_update`, or the whole
  call where the loop waits.
- DeepSpeed does not fsync: its bytes are in the page cache when it returns, and a power cut loses them. Ours and DCP's
  are on the disk; ours are hashed as well.
- `async_save` stages plain tensors only and drops the place of a range in its parameter, so each rank's tensors have
  names of their own here: its pause is comparable, what it wrote cannot be loaded by other ranks. Its buffers are kept.

{size_table(found)}
- Processor time: of the rank that takes most, all its threads, above that of its ordinary steps; what the kernel does
  by itself to write back is not in it.
- Memory: the most that a save takes above training, without steps beside it; of ours beside training, the copies that
  it keeps are counted in.

{slowdown_table(found) + SLOWDOWN_NOTE if saves["stretches"] else ""}
{load_table(found)}
- Ours is verified, every byte, before anything is overwritten; DeepSpeed's is not. From the disk: the files were
  dropped from the page cache before. The building of the engine is not counted.
- Conversion: `python -m deepspeed.checkpoint.ds_to_universal` as it comes, its start included; DeepSpeed's only way to
  other ranks. To resume: conversion and load from the disk.
- The next loss is of the same batch for all.{"".join(failures)}
"""
