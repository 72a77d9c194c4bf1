"""The best evaluation of a run so far: how long ago it was, and the way back to its weights."""

from __future__ import annotations

import itertools
import math
import weakref

import torch.distributed as dist

from launcher.checkpoint.choose import best_first
from launcher.checkpoint.layout import Checkpoint, committed
from launcher.checkpoint.together import together
from launcher.errors import DamagedCheckpoint
from launcher.evaluate.value import better, smaller_is_better
from launcher.plan.plan import Lifecycle
from launcher.train.parts import Parts, Progress
from launcher.train.unfreeze import load_checkpoint


def take(progress: Progress, life: Lifecycle, value: float | None) -> None:
    """Rank the latest evaluation by its `value` of `evaluate.metric`; None: there is none, or it is not to be chosen.

    What is not a number is never the best.
    """
    if progress.metric != life.metric:  # changed by a resume: numbers of the one say nothing about the other
        progress.metric, progress.best_value, progress.best_step = life.metric, None, None
        progress.better_than, progress.bad_evaluations = None, 0
    if value is None or not math.isfinite(value):
        progress.score = None
        progress.bad_evaluations += 1
        return
    progress.score = value if smaller_is_better(life.metric) else -value
    if progress.best_value is None or better(life.metric, value, progress.best_value):
        progress.best_value, progress.best_step = value, progress.step
    enough = life.early_stopping.min_delta if life.early_stopping else 0.0
    if progress.better_than is None or better(life.metric, value, progress.better_than, enough):
        progress.better_than, progress.bad_evaluations = value, 0
    else:
        progress.bad_evaluations += 1


def out_of_patience(progress: Progress, life: Lifecycle) -> str | None:
    """Why early stopping ends the run, where it does."""
    if life.early_stopping is None or progress.bad_evaluations < life.early_stopping.patience:
        return None
    if progress.metric != life.metric:  # changed by a resume: nothing has been measured by it yet
        return None
    none = f"no better in {progress.bad_evaluations} evaluation{'s' * (progress.bad_evaluations > 1)}"
    if progress.best_value is None:
        return f"{life.metric} was {none} and never a number"
    return f"{life.metric} was best ({progress.best_value:.4f}) at step {progress.best_step}, and {none}"


def restore(parts: Parts, progress: Progress) -> Progress:
    """Where the plan makes the model from the best checkpoint, have that one in the engine; the progress of what is in
    it then. Collective.

    A damaged one is passed over for the next best, and said. Raises CheckpointError.
    """
    life, saver = parts.plan.lifecycle, parts.saver
    if not life.export_best:
        return progress
    engine = weakref.ref(parts.engine)  # weakly: where another is built, this one's memory is to go first
    first = dist.get_rank() == 0
    doing = f"looking for the best checkpoint in {saver.store}"
    ranked = together(
        doing,
        lambda: [found.step for found in best_first(committed(saver.store), life.metric)] if first else [],
        saver.group,
    )[0]
    with parts.watch.part("checkpoint"):
        for step in itertools.takewhile(lambda step: step != progress.step, ranked):
            try:
                return load_checkpoint(parts, Checkpoint(saver.store, step), goes_on=False)
            except DamagedCheckpoint as error:
                parts.log.write("damaged_checkpoint", message=error.message)
        if parts.engine is engine():
            return progress
        # One that turned out to be damaged was of an earlier phase, and the engine was built anew for it.
        return load_checkpoint(parts, Checkpoint(saver.store, progress.step), goes_on=False)


def introduced(progress: Progress, chosen: Progress, said: bool) -> str:
    """A clause of a run's last words: whose weights the model has, where they are not those of the last step, or where
    it was `said` before which one was best."""
    if chosen.step == progress.step and not said:
        return ""
    best = not said and chosen.step == progress.best_step and progress.best_value is not None
    where = f", where {progress.metric} was best ({progress.best_value:.4f})" if best else ""
    return f"; the model is that of step {chosen.step}{where}"
