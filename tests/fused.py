"""E9: what a fused op computes is at most twice as far from the truth as eager PyTorch in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from launcher_kernels.reference import ulp

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def assert_e9(found: Tensor, eager: Tensor, exact: Tensor, what: str = "") -> None:
    """`found` and `eager` in one dtype, `exact` in float64; all of one shape."""
    assert found.shape == exact.shape, f"{what}: {tuple(found.shape)} for {tuple(exact.shape)}"
    assert found.dtype == eager.dtype, f"{what}: {found.dtype} for {eager.dtype}"
    if exact.numel() == 0:
        return
    assert torch.isfinite(found).all(), f"{what}: not finite"
    error = (found.double() - exact).abs().max().item()
    eager_error = (eager.double() - exact).abs().max().item()
    bound = 2 * eager_error + ulp(exact.abs().max().item(), found.dtype)
    assert error <= bound, f"{what}: error {error:.3e}, allowed {bound:.3e} (eager {eager_error:.3e})"


def assert_fused(
    fused: Callable[..., Tensor | Sequence[Tensor]],
    eager: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor],
    differentiable: Sequence[int],
) -> None:
    """Outputs and gradients of `fused` by E9; `inputs` in the dtype to be tested, gradients for those numbered.

    `eager` is run in the inputs' dtype and in float64 on the same numbers; the outputs' gradients are random.
    """
    results = []
    for function, widened in ((fused, False), (eager, False), (eager, True)):
        given = [x.double() if widened and x.is_floating_point() else x for x in inputs]
        given = [x.detach().requires_grad_(i in differentiable) for i, x in enumerate(given)]
        outputs = function(*given)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        draw = torch.Generator().manual_seed(7)
        # The same numbers for all three: drawn in the dtype under test.
        slopes = [torch.randn(y.shape, generator=draw).to(inputs[0].dtype).to(y.dtype) for y in outputs]
        moved = [(y, slope) for y, slope in zip(outputs, slopes, strict=True) if y.requires_grad]
        torch.autograd.backward([y for y, _ in moved], [slope for _, slope in moved])
        results.append((outputs, [given[i].grad for i in differentiable]))
    (found, found_grads), (by_eager, eager_grads), (exact, exact_grads) = results
    for i, (a, b, c) in enumerate(zip(found, by_eager, exact, strict=True)):
        assert_e9(a.detach(), b.detach(), c.detach(), f"output {i}")
    for i, a, b, c in zip(differentiable, found_grads, eager_grads, exact_grads, strict=True):
        assert a is not None, f"no gradient of input {i}"
        assert b is not None
        assert c is not None
        assert_e9(a, b, c, f"gradient of input {i}")
