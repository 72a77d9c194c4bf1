"""The summed cross entropy against its definition in float64, loss and gradient. S supervised tokens, V vocabulary."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from launcher_kernels.cross_entropy import cross_entropy_sum


def oracle(logits_SV: Tensor, targets_S: Tensor) -> tuple[Tensor, Tensor]:
    """Loss sum and its gradient: sum of log(sum(exp(l))) - l[target], and softmax(l) minus one at the target."""
    logits = logits_SV.double()
    shifted = logits - logits.amax(-1, keepdim=True)
    log_total = shifted.exp().sum(-1).log()
    gradient = (shifted - log_total[:, None]).exp()
    rows = torch.arange(len(targets_S))
    loss = (log_total - shifted[rows, targets_S]).sum()
    gradient[rows, targets_S] -= 1
    return loss, gradient


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 2), (7, 301), (300, 5003)])
def test_loss_and_gradient(dtype: torch.dtype, bound: float, tokens: int, vocabulary: int) -> None:
    torch.manual_seed(0)
    logits = (8 * torch.randn(tokens, vocabulary)).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,))
    loss, correct = cross_entropy_sum(logits, targets)
    (3.0 * loss).backward()  # the loop scales it; the gradient has to carry that
    expected, gradient = oracle(logits.detach(), targets)
    assert loss.dtype == correct.dtype == torch.float32
    # Computed in fp32 whatever the logits are, so the loss is exact in bf16 too; the gradient is rounded to bf16 once.
    assert abs(loss.item() - expected.item()) <= 1e-6 * expected.item()
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    assert (logits.grad.double() - 3.0 * gradient).abs().max() <= bound * 3.0
    assert correct.item() == (logits.argmax(-1) == targets).sum().item()


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e38, 3e38, 0.0]], requires_grad=True)
    loss, correct = cross_entropy_sum(logits, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == 0.0
    assert correct.item() == 2
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_it_is_a_sum_over_parts() -> None:
    torch.manual_seed(1)
    logits, targets = torch.randn(10, 50), torch.randint(50, (10,))
    whole = cross_entropy_sum(logits, targets)
    parts = [cross_entropy_sum(logits[part], targets[part]) for part in (slice(0, 1), slice(1, 7), slice(7, 10))]
    for found, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert sum(piece.item() for piece in pieces) == pytest.approx(found.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_supervised_token_is_a_loss_of_zero_with_gradients_of_zero(dtype: torch.dtype) -> None:
    """The micro batch of a rank that has nothing left to learn: it must join the backward, and add nothing."""
    weight = torch.randn(5, 4, dtype=dtype, requires_grad=True)
    logits = torch.randn(3, 4, dtype=dtype)[torch.empty(0, dtype=torch.int64)] @ weight.T
    loss, correct = cross_entropy_sum(logits, torch.empty(0, dtype=torch.int64))
    (loss * 7.0).backward()
    assert (loss.item(), correct.item()) == (0.0, 0.0)
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros_like(weight))
