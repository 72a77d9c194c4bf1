"""A run in a few numbers: what its page begins with, and what two runs are compared by."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from launcher.evaluate.value import is_share, smaller_is_better
from launcher.report.curves import Curve, smoothed
from launcher.report.history import History
from launcher.report.timeline import TRAINING

EVALUATED = {
    "loss": "held-out loss",
    "accuracy": "held-out accuracy",
    "perplexity": "held-out perplexity",
    "retain_loss": "loss on what is to be kept",
}
"""Figures of the lines `eval`, in words."""
WH = 3600.0
"""Joules."""


@dataclass(frozen=True)
class Figure:
    """A measurement from its first to its last."""

    name: str
    smaller_is_better: bool
    share: bool
    """Whether it lies between 0 and 1."""
    first: float
    first_step: int
    last: float
    last_step: int
    best: float
    best_step: int

    @classmethod
    def of(cls, name: str, metric: str, curve: Curve) -> Figure:
        places, values = curve.arrays()
        smaller = smaller_is_better(metric)
        at = int(values.argmin() if smaller else values.argmax())
        (first, first_step), (last, last_step), (best, best_step) = (
            (float(values[end]), int(places[end])) for end in (0, -1, at)
        )
        return cls(name, smaller, is_share(metric), first, first_step, last, last_step, best, best_step)

    @property
    def gain(self) -> float:
        """How far the last is better than the first; below 0: worse."""
        return self.first - self.last if self.smaller_is_better else self.last - self.first


def figures(history: History) -> list[Figure]:
    """What was measured on held-out rows, then on answers."""
    named = [(EVALUATED.get(name, f"held-out {name}"), name, curve) for name, curve in history.evals.items()]
    named += [(name, name, curve) for name, curve in history.answers.items()]
    return [Figure.of(*one) for one in named if len(one[-1].arrays()[0])]


def training_loss(history: History) -> float | None:
    """Of the last steps: their mean where there are many, else the last one's."""
    _, values = history.steps["loss"].arrays()
    if not len(values):
        return None
    smooth = smoothed(values)
    if smooth is None:
        return float(values[-1])
    return float(values[-max(len(values) // 50, 5) :].mean())


def tokens_per_s(history: History) -> float | None:
    """In the middle one of all steps."""
    rates = history.steps["tokens_per_s"].values
    return median(rates) if len(rates) else None


def duration_s(history: History) -> float:
    """Of all launches together."""
    return sum(history.timeline.seconds().values())


def useful_share(history: History) -> float | None:
    """Goodput: the share of the time in which steps were trained that counted."""
    total = duration_s(history)
    return history.timeline.seconds()[TRAINING] / total if total > 0 else None


def energy_wh(history: History) -> float | None:
    """Of GPUs and CPUs, as far as they told; None where none did."""
    parts = [
        curve for figure in ("gpu_energy_j", "energy_j") for curve in history.system[figure].values() if len(curve)
    ]
    return sum(curve.last for curve in parts) / WH if parts else None
