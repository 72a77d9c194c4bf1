"""Tests that need a CUDA device. On a machine that has one, from the repository's root:

TRITON_INTERPRET=0 PYTHONPATH=.:kernels python -m pytest tests/gpu -n 0

Without TRITON_INTERPRET=0 the kernels are defined for Triton's interpreter, as every other test wants them, and these
are skipped. Where packages were carried along in a folder, PYTHONPATH names it, too.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import triton

BENCH = str(Path(__file__).parents[2] / "kernels" / "bench")
if BENCH not in sys.path:
    sys.path.append(BENCH)  # the contests of kernels/bench/gpu.py are what is tested here


@pytest.fixture
def device() -> torch.device:
    """The GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if triton.knobs.runtime.interpret:
        pytest.skip("the kernels are defined for Triton's interpreter: set TRITON_INTERPRET=0")
    return torch.device("cuda")
