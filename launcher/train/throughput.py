"""Where the seconds of a step go."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

import torch

from launcher.train.beat import mark

PARTS = ("data", "forward", "backward", "step", "evaluate", "checkpoint")


class Stopwatch:
    """Seconds by part since the last `lap`, and tokens a second over all laps.

    On CUDA the parts are as the host sees them, unless `synchronize` makes each wait for the device (`slipway bench`
    does).
    """

    def __init__(self, device: torch.device, synchronize: bool = False) -> None:
        self.wait = device.type == "cuda" and synchronize
        self.seconds: dict[str, float] = defaultdict(float)
        self.started = time.perf_counter()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Charge the block's seconds to `name`, one of PARTS; whoever watches this rank is told that it begins."""
        mark(name)
        start = time.perf_counter()
        yield
        if self.wait:
            torch.cuda.synchronize()
        self.seconds[name] += time.perf_counter() - start

    def lap(self) -> dict[str, float]:
        """Seconds by part since the last lap, with `total` the wall clock; starts a new lap."""
        now = time.perf_counter()
        parts = {name: round(self.seconds[name], 6) for name in PARTS if name in self.seconds}
        parts["total"] = round(now - self.started, 6)
        self.seconds.clear()
        self.started = now
        return parts


def memory_bytes(device: torch.device) -> int:
    """Bytes in use: the peak allocated on a GPU, the resident set of this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import psutil

    return int(psutil.Process().memory_info().rss)
