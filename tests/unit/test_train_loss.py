"""Label smoothing: torch's own, on every path that the loss takes, and never in an evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from launcher.data.loader import MicroBatch
from launcher.model.fuse import fuse
from launcher.train.evaluate import evaluating
from launcher_kernels import dispatch
from launcher_kernels.cross_entropy import cross_entropy_sum
from tests.model_families import loss_of, pack, tiny_model

SMOOTHING = 0.15


def expected(model: Any, batch: MicroBatch, smoothing: float) -> Tensor:
    """By torch, from the logits of the supervised tokens."""
    logits = loss_of(model).logits(batch)
    losses = F.cross_entropy(logits, batch.targets, reduction="none", label_smoothing=smoothing)
    return losses.sum() if batch.weights is None else (losses * batch.weights).sum()


@pytest.mark.parametrize("seed", [0, 1], ids=["plain", "weighted"])
@pytest.mark.parametrize("family", ["llama", "gptj", "cohere2"])
def test_smoothed_as_torch_has_it_in_training_alone(family: str, seed: int) -> None:
    """Packed, padded (GPT-J), and with logits that are scaled."""
    model, batch = tiny_model(family).train(), pack(seed=seed)
    loss = loss_of(model, SMOOTHING)
    found, correct = loss(batch)
    found.backward()
    gradient = model.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    wanted = expected(model, batch, SMOOTHING)
    wanted.backward()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    torch.testing.assert_close(gradient, model.get_input_embeddings().weight.grad, rtol=1e-5, atol=1e-7)
    with evaluating(model):
        measured, still_correct = loss(batch)
        assert measured.item() == pytest.approx(expected(model, batch, 0.0).item(), rel=1e-6)
    assert still_correct == correct
    assert measured.item() != pytest.approx(found.item(), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "cohere2"])
def test_the_fused_head_smooths_too(family: str) -> None:
    batch, eager, fused = pack(seed=1), tiny_model(family).train(), tiny_model(family).train()
    fuse(fused)
    loss = loss_of(fused, SMOOTHING)
    with dispatch.interpreted() as launches:
        found, _ = loss(batch)
        found.backward()
        with evaluating(fused):
            measured, _ = loss(batch)
    assert launches["cross_entropy"] == 2
    wanted = expected(eager, batch, SMOOTHING)
    wanted.backward()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert measured.item() == pytest.approx(expected(eager, batch, 0.0).item(), rel=1e-5)
    gradients = (model.get_output_embeddings().weight.grad for model in (fused, eager))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_of_classes_it_is_the_same_function() -> None:
    logits, targets = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)), torch.arange(7) % 3
    found, correct = cross_entropy_sum(logits, targets, None, 0.2)
    p = torch.full((7, 3), 0.2 / 3).scatter_add_(1, targets[:, None], torch.full((7, 1), 0.8))
    assert found.item() == pytest.approx(-(p * logits.log_softmax(-1)).sum().item(), rel=1e-6)
    assert correct.item() == (logits.argmax(-1) == targets).sum()
