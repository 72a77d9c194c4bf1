"""Overfitting, told from the losses of the evaluations so far. Pure functions.

The evaluations ask the same rows each time, so their loss moves by little unless the model does. Curves that stay
within 1% of a level, however they jump about in it, are never called overfitting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BEYOND = 0.02
"""Of the loss: by how much more than this the evaluation loss must have risen and the training loss fallen."""

Measured = tuple[int, float, float]
"""A step, the mean training loss since the evaluation before, and the evaluation loss."""


@dataclass(frozen=True)
class Overfitting:
    """Training falls, validation rises."""

    since: int
    """The step of the best evaluation, after which there were only worse ones."""
    best: float
    """The evaluation loss there."""
    now: float
    message: str


def overfitting(history: Sequence[Sequence[float]]) -> Overfitting | None:
    """Whether a model overfits after the evaluations in `history`, each a `Measured`, oldest first.

    It does where the last two evaluations are both more than 2% above the best one, the later at least as high as the
    earlier, and where the training loss has fallen meanwhile: by more than 2% since the best one, and no less lately.
    """
    if len(history) < 3:
        return None
    best = best_of(history)
    if len(history) - best < 3:
        return None
    step, train, held_out = history[best]
    (_, before_train, before), (_, now_train, now) = history[-2:]
    rises = held_out * (1 + BEYOND) < before <= now
    falls = now_train <= before_train < train * (1 - BEYOND)
    if not (rises and falls):
        return None
    since = int(step)
    message = (
        f"overfitting since step {since}: the training loss went on falling, from {train:.4f} to {now_train:.4f}, and "
        f"the held-out loss rose from its best, {held_out:.4f}, to {now:.4f}"
    )
    return Overfitting(since, held_out, now, message)


def best_of(history: Sequence[Sequence[float]]) -> int:
    """The place of the lowest evaluation loss, the first of equal ones."""
    losses = [held_out for _, _, held_out in history]
    return losses.index(min(losses))


def at_the_end(history: Sequence[Sequence[float]], since: int) -> str:
    """The same in a run's last words, whether its last evaluation was a little better than the one before or not."""
    best, last = history[best_of(history)][2], history[-1][2]
    return f"overfitting since step {since}: the held-out loss was best there, {best:.4f}, and was {last:.4f} last"
