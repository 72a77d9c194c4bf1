"""The process of `gpu.py` that owns the device: measures its rates, holds the contests, prints a JSON line for each.

A contender that loses the device (an illegal address, say) ends the process; `gpu.py` starts another for the rest.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import platform
import sys
from importlib import metadata
from typing import Any

import floors
import torch
from contest import Contest, hold
from timing import Deadline

WEIGHTS = {"linear_cross_entropy": 1.5, "attention": 1.5, "norm": 1.0, "glu": 1.0, "rope": 1.0, "nf4": 0.5, "lora": 1.0}
"""{op: a contest's share of the time}, in the order in which they are held."""
PACKAGES = ("torch", "triton", "liger-kernel", "flash-attn", "bitsandbytes", "peft", "transformers", "slipway")


def contests(ops: list[str], dry: bool) -> list[Contest]:
    return [each for op in ops for each in importlib.import_module(f"timed_{op}").contests(dry)]


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    found: dict[str, Any] = {"python": platform.python_version(), "packages": {}}
    for package in PACKAGES:
        try:
            found["packages"][package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found["packages"][package] = None
    if device.type != "cuda":
        return found | {"device": "CPU"}
    properties = torch.cuda.get_device_properties(device)
    return found | {
        "device": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--ops", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--done", type=int, default=0, help="contests that another process has held")
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    deadline = Deadline(options.seconds)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not be taken for an answer

    def say(**what: Any) -> None:
        answers.write(json.dumps(what) + "\n")

    torch.manual_seed(0)
    device = torch.device("cpu" if options.dry else "cuda")
    wanted = contests(options.ops.split(","), options.dry)[options.done :]
    say(machine=machine(device), rates=dataclasses.asdict(floors.measure(device, options.dry)))
    weights = [WEIGHTS[contest.op] for contest in wanted]
    for number, contest in enumerate(wanted):
        say(begin={"key": contest.key, "op": contest.op, "name": contest.name})
        share = deadline.share(weights[number] / sum(weights[number:]))
        held = hold(contest, device, share, options.rounds)
        parts = {name: dataclasses.asdict(part) for name, part in contest.parts.items()}
        say(result=held | {"parts": parts})
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
