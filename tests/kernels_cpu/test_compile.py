"""Offline compilation: every op builds for GPUs that are not here, without spills, with the instructions counted on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

COMPILE = Path(__file__).parents[2] / "kernels" / "bench" / "compile.py"


def run(*arguments: str) -> str:
    """In a process of its own: kernels defined for the interpreter cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(COMPILE), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_a_sample_of_every_op() -> None:
    *_, summary = lines = run("--sample").splitlines()
    assert ", 0 of them spill" in summary
    kernels = {re.split(r"\s{2,}", line)[1] for line in lines[1:-1]}
    assert kernels <= shown().keys(), "kernels/README.md knows nothing of these"
    assert len(kernels) >= 12


def test_the_page_is_of_these_kernels() -> None:
    """Of one case; counts of instructions vary with the compiler, which ones there are must not."""
    *_, line, summary = run("norm", "--targets", "sm_90", "--only", "^rms_norm bfloat16 H=4096").splitlines()
    kernel, _, spilled, _, instructions = re.split(r"\s{2,}", line)[1:]
    assert (kernel, spilled) == ("norm_backward", "0")
    assert "0 of them" in summary
    said = next(row for row in shown()[kernel] if row[0].startswith("rms_norm bfloat16 H=4096"))
    assert words(said[-1]) == words(instructions)


def shown() -> dict[str, list[list[str]]]:
    """Rows of the table in kernels/README.md, by kernel."""
    page = (COMPILE.parents[1] / "README.md").read_text(encoding="utf-8")
    rows = page.partition("<!-- compiled -->")[2].partition("<!-- end -->")[0].strip().splitlines()[2:]
    found: dict[str, list[list[str]]] = {}
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        found.setdefault(cells[1], []).append(cells)
    return found


def words(instructions: str) -> set[str]:
    return {each.split()[1] for each in instructions.split(", ")}


@pytest.mark.long
def test_every_op_for_every_gpu() -> None:
    assert ", 0 of them spill" in run()


def test_what_does_not_hold_is_found() -> None:
    """A table of nothing but sound kernels could also come from a compiler that looks at nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import norm, offline, dataclasses\n"
        "case = dataclasses.replace(norm.cases()[0], expects={'norm_forward': ['HGMMA']})\n"
        "print([each.missing for each in offline.compiled(case, 'sm_90')])"
    )
    command = [sys.executable, "-c", code, str(COMPILE.parent)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[('HGMMA',), ()]"
