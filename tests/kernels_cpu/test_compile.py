"""Offline compilation: every op builds for GPUs that are not here, without spills, with the instructions counted on."""

from __future__ import annotations

import os
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
    assert ", 0 of them spill" in run("--sample")


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
