"""Time on a GPU, with nothing of the contender's in the cache; and how much of it is left.

Contenders take turns, so that whatever the machine does meets all alike; the page tells medians with their spread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

_HEAD_START_CYCLES = 2_000_000
"""About a millisecond: the host launches all that is timed while the GPU waits, so that no gap is timed."""


class Timer:
    """Seconds that the device takes for a call; on a CPU the wall clock's, for dry runs."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self.scratch = torch.empty(4 * cache, dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds of `call`, and what it returned. Waits for the device."""
        if not self.on_gpu:
            began = time.perf_counter()
            returned = call()
            return time.perf_counter() - began, returned
        # Written, not read: the dirty lines that the flush leaves are written back at the contender's cost, as those
        # that the contender leaves will be at the next one's. Otherwise 60 MB of its output would go uncounted.
        self.scratch.zero_()
        torch.cuda._sleep(_HEAD_START_CYCLES)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        returned = call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1000, returned


class Deadline:
    """A moment, and the seconds until then."""

    def __init__(self, seconds: float) -> None:
        self.at = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.at - time.monotonic()

    def share(self, part: float) -> Deadline:
        """`part` of what is left, from now."""
        return Deadline(max(0.0, self.left) * part)
