"""What holds for every test."""

from __future__ import annotations

import os

# Models in tests are tiny: a second thread computes nothing in them and spins while it waits, on a core that another
# process of the same test needs. Before torch is imported, here and in what the tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Kernels are defined for Triton's interpreter; they run there only where a test says so (tests/kernels_cpu).
os.environ.setdefault("TRITON_INTERPRET", "1")
