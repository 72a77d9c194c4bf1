"""Where an op runs: as a Triton kernel on a GPU, in PyTorch (`reference.py`) anywhere else.

Every kernel is started by `launch`, so that a test can count what ran (or it compares the reference with itself), and a
compiler can be shown the arguments of a real call without a GPU to run it on.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Triton 3.9 warns as long as it is unset and 3.10 changes what it then means: products may be fused into sums.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from torch import Tensor

launches: Counter[str] = Counter()
"""How often each kernel has been started, by its name."""


@dataclass(frozen=True)
class Launch:
    """One start of a kernel that was recorded and not run."""

    kernel: Any
    """A `triton.JITFunction`."""
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    """Positional: tensors and numbers, in the order of the kernel's parameters."""
    meta: dict[str, Any]
    """By name: constexprs, `num_warps`, `num_stages`."""


class _State:
    interpreting = False
    recorded: list[Launch] | None = None
    capability = (9, 0)


def runs_triton(tensor: Tensor) -> bool:
    """Whether ops on this tensor run as Triton kernels: on a GPU, inside `interpreted` or inside `recorded`.

    Never in float64: kernels compute in fp32, and the truth that they are compared with must not.
    """
    if tensor.dtype == torch.float64:
        return False
    return tensor.is_cuda or _State.interpreting or _State.recorded is not None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **meta: Any) -> None:
    """Start `kernel` over `grid`; an empty grid starts nothing."""
    if 0 in grid:
        return
    if _State.recorded is not None:
        _State.recorded.append(Launch(kernel, grid, arguments, meta))
        return
    launches[kernel.__name__] += 1
    with torch.cuda.device_of(arguments[0]):  # Triton starts on the current GPU, wherever the memory is
        kernel[grid](*arguments, **meta)


def capability(tensor: Tensor) -> tuple[int, int]:
    """Compute capability of the GPU that holds `tensor`, or of the one that is recorded for; (9, 4) stands for an AMD
    gfx942."""
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else _State.capability


def multiprocessors(tensor: Tensor) -> int:
    """How many programs run side by side at least, for kernels that share out work; few in the interpreter."""
    if tensor.is_cuda:
        count: int = torch.cuda.get_device_properties(tensor.device).multi_processor_count
        return count
    return 3 if _State.interpreting else 132


@contextlib.contextmanager
def interpreted() -> Iterator[Counter[str]]:
    """Run kernels on CPU tensors in Triton's interpreter: very slow, for tests. Yields the count of launches inside.

    Needs TRITON_INTERPRET=1 in the environment before this package is imported.
    """
    assert triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 must be set before Triton's kernels are defined"
    before, was = Counter(launches), _State.interpreting
    counted: Counter[str] = Counter()
    _State.interpreting = True
    try:
        yield counted
    finally:
        _State.interpreting = was
        counted.update(launches - before)


@contextlib.contextmanager
def recorded(target: tuple[int, int] = (9, 0)) -> Iterator[list[Launch]]:
    """Record launches on CPU tensors instead of running them; what the ops return is uninitialized memory.

    Must not be used with TRITON_INTERPRET=1: there is nothing to compile then.
    """
    was, wanted = _State.recorded, _State.capability
    _State.recorded, _State.capability = [], target
    try:
        yield _State.recorded
    finally:
        _State.recorded, _State.capability = was, wanted


def token_major(x: Tensor) -> Tensor:
    """Uninitialized, of x's shape [..., N, T, d], in memory [..., T, N, d]: the projections' order, into which a model
    transposes its heads back. Itself no view, for autograd would forbid to change that in place."""
    heads, length, size = x.shape[-3:]
    batch = (length * heads * size,) * (x.dim() - 3)
    return x.new_empty_strided(x.shape, (*batch, size, heads * size, 1))


def rows(x: Tensor) -> Tensor:
    """[..., H] as [T, H] whose rows are contiguous; a view where that is possible, else a copy."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()
