"""Weights & Biases: the run's numbers over the run's steps, nothing of the machine, the code or the terminal.

Offline (WANDB_MODE=offline) its files lie in the run's folder, under wandb/.
"""

from __future__ import annotations

from secrets import token_hex
from typing import Any

import wandb

from launcher.plan.plan import Plan
from launcher.train.trackers.kept import Kept
from launcher.train.trackers.lines import Line, settings

AXIS = "at_step"
"""W&B's own step must grow with each line, and a line `eval` is of the same step as the one before it."""


class WandB:
    """One run there, from one start of ours."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def tell(self, lines: list[Line]) -> None:
        for line in lines:
            said: dict[str, Any] = {**line.numbers}
            if line.words is not None:
                said[f"events/{line.kind}"] = line.words
            if said:
                self._run.log({AXIS: line.step, **said})

    def close(self, well: bool) -> None:
        self._run.finish(exit_code=0 if well else 1)


def opened(plan: Plan, kept: Kept) -> WandB:
    """The run that an earlier start has begun, or a new one."""
    if kept.get("id") is None:
        kept.put(id=token_hex(4))  # first, so that a start that is killed now leaves no run that nobody knows
    run = wandb.init(
        project=plan.lifecycle.project,
        name=plan.name,
        id=kept.get("id"),
        dir=plan.run_dir,
        resume="allow",
        config=settings(plan),
        allow_val_change=True,
        settings=wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            x_disable_stats=True,
        ),
    )
    run.define_metric("*", step_metric=AXIS)
    return WandB(run)
