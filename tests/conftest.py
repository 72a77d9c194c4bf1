"""What holds for every test."""

from __future__ import annotations

import os

from hypothesis import settings

# Models in tests are tiny: a second thread computes nothing in them and spins while it waits, on a core that another
# process of the same test needs. Before torch is imported, here and in what the tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Kernels are defined for Triton's interpreter; they run there only where a test says so (tests/kernels_cpu).
os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples each time: a test that fails one run in a thousand is of no use to whoever sees it fail.
settings.register_profile("fixed", derandomize=True, database=None, deadline=None)
settings.load_profile("fixed")
