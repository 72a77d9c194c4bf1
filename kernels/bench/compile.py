"""Compile every op at the shapes of 1B to 70B models for GPUs that are not here, and print what came out.

python kernels/bench/compile.py                              everything (minutes); exit 1 where a kernel spills
python kernels/bench/compile.py --sample                     each op's first case, sm_90 only
python kernels/bench/compile.py norm rope --only 'bfloat16.*8B' --markdown      the table of kernels/README.md
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from offline import TARGETS, Report, compiled

OPS = ("norm", "rope", "glu", "linear_cross_entropy", "nf4", "lora", "attention")
PAGE = Path(__file__).parents[1] / "README.md"
SHOWN = r"bfloat16.*(8B|Llama-3\)$|gpt_oss|gemma2 9B)"
"""Cases in the table of PAGE."""
HEAD = ("case", "kernel", "registers", "spilled bytes", "shared memory", "instructions")


def report(op: str, position: int, target: str) -> list[Report]:
    """One case of an op for one GPU."""
    return compiled(importlib.import_module(op).cases()[position], target)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every kernel for GPUs that are not here.")
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}; all where left out")
    parser.add_argument("--targets", default="sm_80,sm_90,sm_100,gfx942", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name it finds")
    parser.add_argument("--sample", action="store_true", help="each op's first case, for sm_90")
    parser.add_argument("--page", action="store_true", help="write what is worth showing into kernels/README.md")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    arguments = parser.parse_args()
    targets = ["sm_90"] if arguments.sample else arguments.targets.split(",")
    only = SHOWN if arguments.page else arguments.only
    work = []
    for op in arguments.ops or OPS:
        names = [case.name for case in importlib.import_module(op).cases()]
        positions = [position for position, name in enumerate(names) if re.search(only, name)]
        work += [
            (op, position, target) for position in positions[: 1 if arguments.sample else None] for target in targets
        ]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        reports = [each for found in pool.map(report, *zip(*work, strict=True)) for each in found]
    lines = table(reports, targets)
    if arguments.page:
        write_page(lines)
    else:
        widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
        for line in lines:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    unsound = [each for each in reports if not each.sound]
    for each in unsound:
        lacks = f", lacks {', '.join(each.missing)}" if each.missing else ""
        print(f"UNSOUND: {each.case}, {each.kernel} for {each.target}{lacks}")
    print(f"{len(reports)} kernels compiled, {len(unsound)} of them spill, are too large or lack an instruction")
    return 1 if unsound else 0


def table(reports: list[Report], targets: list[str]) -> list[tuple[str, ...]]:
    """A line a kernel; numbers in the order of `targets`, instructions of sm_90, or of the only one."""
    kernels: dict[tuple[str, str, int], dict[str, Report]] = {}
    for each in reports:
        # A kernel that a case launches in two forms has two lines.
        form = sum(1 for key, found in kernels.items() if key[:2] == (each.case, each.kernel) and each.target in found)
        kernels.setdefault((each.case, each.kernel, form), {})[each.target] = each
    lines: list[tuple[str, ...]] = [HEAD]
    for (case, kernel, _), found in kernels.items():
        numbers = [
            " ".join(str(getattr(found[target], name)) if target in found else "-" for target in targets)
            for name in ("registers", "spill_bytes", "shared_bytes")
        ]
        shown = found.get("sm_90") or next(iter(found.values()))
        line = (case, kernel, *numbers, ", ".join(f"{n} {word}" for word, n in shown.instructions.items()))
        if line not in lines:  # a rotation's backward pass is the same code as its forward pass
            lines.append(line)
    return lines


def write_page(lines: list[tuple[str, ...]]) -> None:
    """The table of PAGE, between its two marks."""
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition("<!-- compiled -->\n")
    _, mark, after = rest.partition("<!-- end -->")
    assert mark, f"{PAGE} has no marks"
    found = "\n".join([rows[0], "|" + "---|" * len(HEAD), *rows[1:]])
    PAGE.write_text(f"{before}<!-- compiled -->\n{found}\n{mark}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
