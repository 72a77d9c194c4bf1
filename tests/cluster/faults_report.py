"""What a campaign of faults found, as JSON and as the page of docs/benchmarks."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.bench.against_trl import machine, spread
from launcher.bench.checkpoint_page import table

Record = dict[str, Any]
PACKAGES = ("ray", "torch", "deepspeed")


@dataclass
class Report:
    """Filled by the tests of a campaign, in the order in which they run."""

    faults: list[Record] = field(default_factory=list)
    equal: dict[str, str] = field(default_factory=dict)
    """{fault: how equal the losses afterwards were}."""
    began: float = field(default_factory=time.time)
    machine: Record = field(default_factory=lambda: machine(PACKAGES))

    def add(self, fault: Record) -> None:
        self.faults.append(fault)
        print(f"{fault['fault']}, {fault['target']}: {fault['seconds']:.1f} s", flush=True)

    def passed(self, fault: str, equal: str = "to the last bit") -> None:
        """All of one kind: the losses afterwards are the undisturbed run's."""
        self.equal[fault] = equal

    def conclude(self, place: str | None) -> None:
        """Print the table; write `place`.json and `place`.md where a place is given."""
        if not self.faults:
            return
        found = {
            "machine": self.machine,
            "command": command(),
            "seconds": time.time() - self.began,
            "equal": self.equal,
            "faults": self.faults,
        }
        print(f"\n{fault_table(found)}\n{stage_table(found)}", flush=True)
        if place is not None:
            Path(f"{place}.json").write_text(json.dumps(found, indent=1) + "\n")
            Path(f"{place}.md").write_text(page(found))


def command() -> str:
    """What to type for the same again."""
    chosen = " ".join(f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith("SLIPWAY_FAULTS"))
    return f"{chosen} python -m pytest -n 0 -m long tests/cluster/test_faults.py".strip()


def by_kind(faults: Sequence[Record]) -> dict[str, list[Record]]:
    """In the order of the campaign."""
    kinds: dict[str, list[Record]] = {}
    for fault in faults:
        kinds.setdefault(fault["fault"], []).append(fault)
    return kinds


def fault_table(found: Record) -> str:
    """A line for each kind of fault."""
    rows = []
    for kind, faults in by_kind(found["faults"]).items():
        rows.append(
            [
                kind,
                str(len(faults)),
                str(len(faults) if kind in found["equal"] else 0),
                spread([fault["repeated"] for fault in faults], "g"),
                spread([fault["seconds"] for fault in faults], ".1f"),
                found["equal"].get(kind, "not equal, or not compared"),
            ]
        )
    head = ["fault", "tried", "survived", "steps repeated", "s until the next step", "losses afterwards"]
    return table(head, rows)


def stage_table(found: Record) -> str:
    """Where the seconds until the next step go, for the faults that restart the workers; medians."""
    rows = []
    for kind, faults in by_kind(found["faults"]).items():
        stages = [stage_seconds(fault) for fault in faults if "process" in fault]
        if stages:
            noticed, *others = (statistics.median(seconds) for seconds in zip(*stages, strict=True))
            said = any(fault["noticed"] is not None for fault in faults)
            rows.append([kind, f"{noticed:.1f}" if said else "", *(f"{seconds:.1f}" for seconds in others)])
    head = ["s, median", "until the run said so", "until new processes", "until they have loaded", "their first step"]
    return table(head, rows)


def stage_seconds(fault: Record) -> tuple[float, float, float, float]:
    """One after the other; their sum is `seconds`."""
    # A line may come a moment late.
    noticed = min(fault["noticed"] or 0.0, fault["process"])
    return (
        noticed,
        fault["process"] - noticed,
        fault["loaded"] - fault["process"],
        fault["seconds"] - fault["loaded"],
    )


def page(found: Record) -> str:
    """The whole page."""
    where = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in where["packages"].items())
    return f"""# Faults of a cluster, on a CPU

Measured on {where["date"]} on {where["cpu"]}, {where["cpus"]} CPUs, {where["memory"]} of memory,
load {where["load_before"]:.1f} when it began; Python {where["python"]}, {versions}.
In all {found["seconds"] / 60:.0f} minutes.

    {found["command"]}

Three hosts in network namespaces of that one machine, with `slipway cluster up`; a scratch Llama, ZeRO-3 over the
three, one worker a host, a checkpoint every five steps. Each fault is done to a run that trains and has saved since the
fault before; the losses are compared with those of the same run without a fault. Figures: median, least and most.

{fault_table(found)}
- Steps repeated: those after the checkpoint that the run went on from. Seconds: from the fault to the end of the next
  step. A run that is not elastic ends when a host is cut for good (`cluster.wait_s` is 5 here): seconds to its exit. Of
  a launcher that is killed and a head that begins anew: to the first step after `slipway resume`, start-up included.
- Three hosts with all of Ray's processes share {where["cpus"]} CPUs here: most of what a restart takes is the start of
  three Python processes with torch and DeepSpeed.

{stage_table(found)}
- Noticed: the run said so. A host that is silent is given up after five health checks in a row, 55 s.
"""
