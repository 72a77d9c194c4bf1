"""The last words of a run that came to an end of its own."""

from __future__ import annotations

from typing import Literal

from launcher.train.best import introduced
from launcher.train.guards import how_to_go_on, over
from launcher.train.overfitting import at_the_end
from launcher.train.parts import Parts, Progress
from launcher.train.verdict import Verdict

Ended = Literal["finished", "stopped_early", "out_of_time"]


def ended(parts: Parts, progress: Progress, of_model: Progress, kind: Ended) -> Verdict:
    """The verdict, once `of_model` is in the engine; of a run that a guard has ended also its line in metrics.jsonl."""
    life = parts.plan.lifecycle
    why = over(progress, life) if kind == "stopped_early" else None
    message = {
        "finished": f"finished {progress.step} steps",
        "out_of_time": f"train.max_time is over: saved at step {progress.step}",
        "stopped_early": f"stopped early at step {progress.step}: {why}",
    }[kind]
    message += introduced(progress, of_model, said=kind == "stopped_early")
    if progress.overfitting_since is not None:
        message += f"; {at_the_end(progress.history, progress.overfitting_since)}"
    if why is None:
        return Verdict(kind, progress.step, message)
    best = {"best_step": progress.best_step, "best": progress.best_value, "metric": life.metric}
    parts.log.write("stopped_early", step=progress.step, **best, message=message)
    return Verdict(kind, progress.step, message, how_to_go_on(progress, life, parts.plan.location))
