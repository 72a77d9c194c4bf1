"""Compile every op at the shapes of 1B to 70B models for GPUs that are not here, and print what came out.

python kernels/bench/compile.py                        everything (minutes); exit 1 where a kernel spills
python kernels/bench/compile.py --sample               the smallest shapes, sm_90 only
python kernels/bench/compile.py norm rope --markdown   a table of two ops
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from concurrent.futures import ProcessPoolExecutor

from offline import TARGETS, Report, compiled

OPS = ("norm",)


def report(op: str, position: int, target: str) -> list[Report]:
    """One case of an op for one GPU."""
    return compiled(importlib.import_module(op).cases()[position], target)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every kernel for GPUs that are not here.")
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}; all where left out")
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated")
    parser.add_argument("--sample", action="store_true", help="each op's first case, for sm_90")
    parser.add_argument("--markdown", action="store_true", help="print a table for a page")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    arguments = parser.parse_args()
    targets = ["sm_90"] if arguments.sample else arguments.targets.split(",")
    work = []
    for op in arguments.ops or OPS:
        count = 1 if arguments.sample else len(importlib.import_module(op).cases())
        work += [(op, position, target) for position in range(count) for target in targets]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        reports = [each for found in pool.map(report, *zip(*work, strict=True)) for each in found]
    for line in table(reports, arguments.markdown):
        print(line)
    unsound = [each for each in reports if not each.sound]
    print(f"{len(reports)} kernels compiled, {len(unsound)} of them spill, are too large or lack an instruction")
    return 1 if unsound else 0


def table(reports: list[Report], markdown: bool) -> list[str]:
    """A line a kernel."""
    head = ("case", "kernel", "GPU", "registers", "spilled bytes", "shared memory", "instructions", "")
    lines = [head]
    for each in reports:
        code = ", ".join(f"{word} x {count}" for word, count in each.instructions.items())
        verdict = "" if each.sound else f"UNSOUND {' '.join(each.missing)}".strip()
        numbers = (str(each.registers), str(each.spill_bytes), str(each.shared_bytes))
        lines.append((each.case, each.kernel, each.target, *numbers, code, verdict))
    if markdown:
        rows = ["| " + " | ".join(line[:-1]) + " |" for line in lines]
        return [rows[0], "|" + "---|" * (len(head) - 1), *rows[1:]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


if __name__ == "__main__":
    sys.exit(main())
