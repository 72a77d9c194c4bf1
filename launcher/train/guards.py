"""What an evaluation means for the run: is it the best, does it overfit, does it forget, is it over?

All of it is decided from `Progress`, which is equal on all ranks and saved with every checkpoint: a resumed run decides
what the uninterrupted one would have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from launcher.evaluate.value import value_of
from launcher.plan.plan import Lifecycle
from launcher.train.best import out_of_patience, take
from launcher.train.forgetting import forgetting
from launcher.train.overfitting import best_of, overfitting
from launcher.train.parts import Parts, Progress

HISTORY = 100
"""Evaluations that are looked back on."""


def heed(
    parts: Parts, progress: Progress, evaluated: Mapping[str, Any] | None, answered: Mapping[str, Any] | None
) -> None:
    """Take the records `eval` and `answers` of the step that has just been measured in, and say what they mean.

    Raises DataError where neither has what `evaluate.metric` names, unless that is the loss, as it is by default.
    """
    life, step = parts.plan.lifecycle, progress.step
    losses, progress.heeded_step = evaluated or {}, step
    progress.retain_loss = losses.get("retain_loss")
    forgotten = forgetting(progress, life)
    if forgotten is None:
        progress.forgetting_since = None
    elif progress.forgetting_since is None:
        progress.forgetting_since = step
        said = {"before": forgotten.before, "now": forgotten.now, "limit": forgotten.limit}
        parts.log.write("forgetting", step=step, **said, message=forgotten.message)
    unasked = life.metric == "loss" and "loss" not in losses
    value = None if unasked else value_of(life.metric, evaluated, answered)
    take(progress, life, None if forgotten is not None and forgotten.ends else value)
    if progress.best_step == step:
        parts.log.write("best", step=step, metric=life.metric, value=progress.best_value)
    _look_back(parts, progress, losses.get("loss"))


def missed(progress: Progress, life: Lifecycle) -> bool:
    """Whether the evaluation of this step is still to come: a stop was faster, and the run was resumed."""
    due = progress.step % life.eval_every_steps == 0 and progress.step < life.total_steps
    return due and progress.heeded_step != progress.step


def over(progress: Progress, life: Lifecycle) -> str | None:
    """Why a guard ends the run here, where one does. Asked anew after a resume: what it may do may have changed."""
    forgotten = forgetting(progress, life)
    if forgotten is not None and forgotten.ends:
        return forgotten.message
    return out_of_patience(progress, life)


def keeps_best(progress: Progress, life: Lifecycle) -> bool:
    """Whether this step is to be saved for being the best."""
    return progress.best_step == progress.step and (life.export_best or life.early_stopping is not None)


def how_to_go_on(progress: Progress, life: Lifecycle, location: str) -> str:
    """The hint for a run that a guard has ended."""
    forgotten = forgetting(progress, life)
    if forgotten is not None and forgotten.ends:
        rise = forgotten.rise
        more = f"limit={math.ceil(10 * rise + 1) / 10:.1f}" if math.isfinite(rise) else "action=warn"
        on = f"slipway resume {location} evaluate.retain.{more}"
        return f"a new run with data.replay forgets less; to go on all the same: {on}"
    patience = progress.bad_evaluations + (life.early_stopping.patience if life.early_stopping else 0)
    return f"to go on all the same: slipway resume {location} evaluate.early_stopping.patience={patience}"


def _look_back(parts: Parts, progress: Progress, held_out: float | None) -> None:
    """Add an evaluation to the history, and say once that the model has begun to overfit."""
    if held_out is None or not math.isfinite(held_out) or not progress.loss_count:
        return
    progress.history.append([progress.step, progress.loss_sum / progress.loss_count, held_out])
    progress.loss_sum, progress.loss_count = 0.0, 0
    if len(progress.history) > HISTORY:  # the best one stays: what comes is compared with it
        del progress.history[1 if best_of(progress.history) == 0 else 0]
    found = overfitting(progress.history)
    if found is not None and found.since != progress.overfitting_since:
        progress.overfitting_since = found.since
        said = {"since": found.since, "best_step": found.since, "best": found.best, "now": found.now}
        parts.log.write("overfitting", step=progress.step, **said, message=found.message)
    elif progress.history[best_of(progress.history)][0] != progress.overfitting_since:
        progress.overfitting_since = None  # there is a better one since
