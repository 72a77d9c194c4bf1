"""Which of a run's checkpoints is meant: the last, the best, or that of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from launcher.checkpoint.layout import Checkpoint, committed
from launcher.checkpoint.manifest import newest_sound, read, verify
from launcher.errors import CheckpointError, DamagedCheckpoint, UserError
from launcher.plan.plan import Plan
from launcher.store.location import open_store
from launcher.store.store import Store

BEST, LAST = "best", "last"


def best_first(checkpoints: Sequence[Checkpoint], metric: str) -> list[Checkpoint]:
    """Those that carry an evaluation's value of `metric`, the best first.

    Of several that carry the same evaluation, the first was measured. Raises CheckpointError where a manifest cannot be
    read just now.
    """
    measured: dict[int, tuple[float, Checkpoint]] = {}
    for checkpoint in checkpoints:
        score, step = _evaluation(checkpoint, metric)
        if score is not None and step not in measured:
            measured[step] = (score, checkpoint)
    ranked = sorted(measured.values(), key=lambda scored: (scored[0], scored[1].step))
    return [checkpoint for _, checkpoint in ranked]


def chosen(plan: Plan, wanted: str) -> tuple[Checkpoint, list[str]]:
    """The checkpoint that `wanted` names, every byte of it verified, and a message for each that was passed over.

    `wanted`: `best` by the plan's metric, which is the last one where none was measured; `last`; or a step.

    Raises CheckpointError where there is none, or it is damaged; UserError where `wanted` names nothing.
    """
    store = open_store(plan.location)
    messages: list[str] = []
    if wanted == BEST:
        for checkpoint in best_first(committed(store), plan.lifecycle.metric):
            try:
                verify(checkpoint)
            except DamagedCheckpoint as error:
                messages.append(error.message)
            else:
                return checkpoint, messages
    elif wanted != LAST:
        return _of_step(store, wanted), messages
    newest, damaged = newest_sound(store)
    messages += [message for message in damaged if message not in messages]
    if newest is None:
        raise CheckpointError(f"{plan.location} has no sound checkpoint" + "".join(f"\n{line}" for line in messages))
    return newest, messages


def _of_step(store: Store, wanted: str) -> Checkpoint:
    there = {str(checkpoint.step): checkpoint for checkpoint in committed(store)}
    if wanted not in there:
        steps = f" of {', '.join(there)}" if there else ""
        raise UserError(f"{store} has no checkpoint of step {wanted}", hint=f"give {BEST}, {LAST} or a step{steps}")
    verify(there[wanted])
    return there[wanted]


def _evaluation(checkpoint: Checkpoint, metric: str) -> tuple[float | None, int]:
    """The score that a checkpoint carries, smaller where it is better, and the step at which it was measured."""
    try:
        progress = read(checkpoint).progress
    except DamagedCheckpoint:
        return None, checkpoint.step
    if "score" in progress:
        score = progress["score"] if progress.get("metric") == metric else None
    else:  # of a version that knew one metric only
        score = progress.get("eval_loss") if metric == "loss" else None
    step = progress.get("eval_step")
    usable = isinstance(score, int | float) and math.isfinite(score)
    return score if usable else None, step if isinstance(step, int) else checkpoint.step
