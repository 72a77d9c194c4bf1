"""Which of a run's checkpoints is meant: the last, the best, or that of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from launcher.checkpoint.layout import Checkpoint, committed
from launcher.checkpoint.manifest import first_sound, read, verify
from launcher.errors import CheckpointError, DamagedCheckpoint, UserError
from launcher.plan.plan import Plan
from launcher.store.location import open_store
from launcher.store.store import Store

BEST, LAST = "best", "last"


def best_first(checkpoints: Sequence[Checkpoint], metric: str) -> list[Checkpoint]:
    """Those that carry an evaluation's value of `metric`, oldest first in `checkpoints`; the best first.

    An evaluation that several carry was of the one of its step, or else of the first. The best so far, as the newest
    tells, may have been saved before it was measured. Raises CheckpointError where a manifest cannot be read just now.
    """
    there = {checkpoint.step: checkpoint for checkpoint in checkpoints}
    measured: dict[int, tuple[float, Checkpoint]] = {}
    best = None
    for checkpoint in checkpoints:
        progress = _progress(checkpoint, metric)
        best = progress.get("best_step", best)
        score, step = progress.get("score"), progress.get("heeded_step", progress.get("eval_step"))
        if isinstance(score, int | float) and math.isfinite(score):
            step = step if isinstance(step, int) else checkpoint.step
            measured.setdefault(step, (score, there.get(step, checkpoint)))
    if best in there:
        measured[best] = (-math.inf, there[best])
    ranked = sorted(measured.values(), key=lambda scored: (scored[0], scored[1].step))
    return [checkpoint for _, checkpoint in ranked]


def chosen(plan: Plan, wanted: str) -> tuple[Checkpoint, list[str]]:
    """The checkpoint that `wanted` names, every byte of it verified, and a message for each that was passed over.

    `wanted`: `best` by the plan's metric, which is the last one where none was measured; `last`; or a step.

    Raises CheckpointError where there is none, or it is damaged; UserError where `wanted` names nothing.
    """
    store = open_store(plan.location)
    if wanted not in (BEST, LAST):
        return _of_step(store, wanted), []
    there = committed(store)
    ranked = best_first(there, plan.lifecycle.metric) if wanted == BEST else []
    found, messages = first_sound([*ranked, *(one for one in reversed(there) if one not in ranked)])
    if found is None:
        raise CheckpointError(f"{plan.location} has no sound checkpoint" + "".join(f"\n{line}" for line in messages))
    return found, messages


def _of_step(store: Store, wanted: str) -> Checkpoint:
    there = {str(checkpoint.step): checkpoint for checkpoint in committed(store)}
    if wanted not in there:
        steps = f" of {', '.join(there)}" if there else ""
        raise UserError(f"{store} has no checkpoint of step {wanted}", hint=f"give {BEST}, {LAST} or a step{steps}")
    verify(there[wanted])
    return there[wanted]


def _progress(checkpoint: Checkpoint, metric: str) -> dict[str, Any]:
    """What a checkpoint tells of a run's evaluations by `metric`."""
    try:
        progress = read(checkpoint).progress
    except DamagedCheckpoint:
        return {}
    if "score" not in progress:  # of a version that knew one metric only
        progress = {"metric": "loss", "score": progress.get("eval_loss"), "eval_step": progress.get("eval_step")}
    return progress if progress.get("metric") == metric else {}
