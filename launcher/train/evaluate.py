"""Loss and token accuracy on held-out rows. Collective.

It may take longer than a preempted machine has left: it breaks off when any rank says that it is to stop, all ranks
after the same batch, and then gives no figure.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.data.loader import EvalData, MicroBatch
from launcher.evaluate.slices import with_gap
from launcher.evaluate.value import perplexity
from launcher.train.agreement import agreed
from launcher.train.beat import mark
from launcher.train.loss import SupervisedLoss

AGREE_EVERY = 8
"""Batches of the loss between two questions whether to stop; batches of generation are slow and ask each time."""


@contextlib.contextmanager
def evaluating(engine: Any) -> Iterator[None]:
    """Dropout off and no gradients; training mode again afterwards."""
    engine.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        engine.train()


@contextlib.contextmanager
def outside_of_the_engine(module: torch.nn.Module) -> Iterator[None]:
    """Calls of the engine's module itself, such as those of `generate`. Under ZeRO-3 DeepSpeed gathers what a layer
    reads of another one, as fused layers do, only within the engine's own forward, unless it has seen it there."""
    kept = [part._parameters for part in module.modules() if hasattr(part._parameters, "_in_forward")]
    for parameters in kept:
        parameters._in_forward = True
    try:
        yield
    finally:
        for parameters in kept:
            parameters._in_forward = False


def evaluate_loss(
    engine: Any,
    loss: SupervisedLoss,
    data: EvalData,
    token_budget: int,
    device: torch.device,
    stopping: Callable[[], bool],
) -> tuple[float, float] | None:
    """Mean loss over all supervised evaluation tokens, and the share of them that were the most likely token.

    None where `stopping` of any rank said so on the way.
    """
    sums = evaluate_sums(engine, loss, data, token_budget, device, stopping)
    return None if sums is None else means(sums)


def evaluate_sums(
    engine: Any,
    loss: Callable[[MicroBatch], tuple[Tensor, Tensor]],
    data: EvalData,
    token_budget: int,
    device: torch.device,
    stopping: Callable[[], bool],
) -> Tensor | None:
    """[C, 3] fp64 of each of the C combinations of the slices' values: loss sum, correct tokens, supervised tokens.

    None where `stopping` of any rank said so on the way.
    """
    totals = torch.zeros(len(data.combinations), 3, dtype=torch.float64, device=device)
    with evaluating(engine):
        # As many batches on every rank: see `EvalData.micro_batches`.
        for i, batch in enumerate(data.micro_batches(token_budget, dist.get_world_size(), dist.get_rank())):
            if i % AGREE_EVERY == 0 and agreed(stopping(), device):
                return None
            mark("evaluate")
            loss_sum, correct = loss(batch)
            count = torch.tensor(float(len(batch.targets)), device=device)
            totals[batch.combination] += torch.stack([loss_sum.double(), correct.double(), count.double()])
    dist.all_reduce(totals)
    return totals


def means(sums: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy from some rows of `evaluate_sums`."""
    loss_total, correct_total, count_total = sums.sum(0).tolist()
    return loss_total / count_total, correct_total / count_total


def eval_figures(sums: Tensor, data: EvalData) -> dict[str, Any]:
    """{loss, accuracy, perplexity, slices?} of a record `eval`."""
    loss, accuracy = means(sums)
    figures: dict[str, Any] = {"loss": loss, "accuracy": accuracy, "perplexity": perplexity(loss)}
    if columns := list(data.combinations[0]):
        figures["slices"] = {column: _of_column(column, sums, data) for column in columns}
    return figures


def _of_column(column: str, sums: Tensor, data: EvalData) -> dict[str, Any]:
    of_values = {}
    for value in sorted({combination[column] for combination in data.combinations}):
        having = [i for i, combination in enumerate(data.combinations) if combination[column] == value]
        loss, accuracy = means(sums[having])
        of_values[value] = {"rows": sum(data.rows_of[i] for i in having), "loss": loss, "accuracy": accuracy}
    return with_gap(of_values)
