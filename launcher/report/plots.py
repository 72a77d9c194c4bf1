"""Which plots a run's report has, as data that the page's script draws."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from launcher.evaluate.value import is_share
from launcher.plan.plan import Plan
from launcher.report.curves import Curve, smoothed, spread, thinned
from launcher.report.history import History
from launcher.report.outcome import EVALUATED

Unit = Literal["", "share", "percent", "bytes", "per_s", "watt", "joule"]
MOST_LINES = 8
"""GPUs or hosts shown one by one; beyond them their mean, least and greatest."""


@dataclass(frozen=True)
class Line:
    """One curve of a plot."""

    name: str
    x: list[float | None]
    """Steps, or seconds since the run began; None where the line is broken."""
    y: list[float | None]
    look: Literal["line", "faint", "points"] = "line"


@dataclass(frozen=True)
class Plot:
    """One plot."""

    id: str
    title: str
    lines: list[Line]
    unit: Unit = ""
    axis: Literal["step", "time"] = "step"
    wide: bool = False
    zero: bool = False
    """Whether its axis begins at 0."""
    log: bool = False
    """Whether a logarithmic axis may say more."""

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    @property
    def summary(self) -> str:
        """For whoever cannot see it."""
        parts = []
        for line in self.lines:
            points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None and x is not None]
            if not points or line.look == "faint":
                continue
            lowest, highest = min(points, key=lambda point: point[1]), max(points, key=lambda point: point[1])
            where = f" at step {lowest[0]:g}" if self.axis == "step" else ""
            parts.append(
                f"{line.name} from {points[0][1]:.4g} to {points[-1][1]:.4g}, "
                f"least {lowest[1]:.4g}{where}, greatest {highest[1]:.4g}"
            )
        return f"{self.title}: {'; '.join(parts)}"


def plots(plan: Plan, history: History) -> list[Plot]:
    """Every plot for which there are numbers."""
    steps, evals, system = history.steps, history.evals, history.system
    found = [
        Plot(
            "loss",
            "Loss",
            [*_both("training loss", steps["loss"]), *_points(evals, ("loss", "retain_loss"))],
            wide=True,
            log=True,
        ),
        Plot(
            "accuracy",
            "Token accuracy" if plan.trajectory.task == "causal_lm" else "Accuracy",
            [*_both("training", steps["accuracy"]), *_points(evals, ("accuracy",))],
            "share",
        ),
        Plot("answers", "Generated answers", _answered(history, shares=True), "share", zero=True),
        Plot("scores", "Generated answers, other scores", _answered(history, shares=False)),
        Plot("perplexity", "Perplexity", _points(evals, ("perplexity",)), log=True),
        Plot("classes", "Classes", _points(evals, [name for name in evals if name.endswith("_macro")]), "share"),
        Plot("lr", "Learning rate", [_line("learning rate", steps["lr"])], zero=True),
        Plot("grad_norm", "Gradient norm", _both("before clipping", steps["grad_norm"]), zero=True, log=True),
        Plot("tokens_per_s", "Tokens per second", _both("all ranks", steps["tokens_per_s"]), "per_s", zero=True),
        Plot(
            "computing",
            "Share of a step in forward, backward and update",
            _both("first rank", steps["computing"]),
            "share",
            zero=True,
        ),
        Plot(
            "memory",
            "Memory of the first rank" + (", GPU peak" if plan.layout.device == "cuda" else ""),
            [_line("first rank", steps["memory_bytes"])],
            "bytes",
            zero=True,
        ),
        _over_time("cpu", "CPU use", system["cpu_percent"], "percent"),
        _over_time("host_memory", "Memory in use, whole host", system["memory_bytes"], "bytes"),
        _over_time("gpu", "GPU use", system["gpu_percent"], "percent"),
        _over_time("gpu_memory", "GPU memory in use", system["gpu_memory_bytes"], "bytes"),
        _over_time("power", "GPU power", system["gpu_power_w"], "watt"),
        _over_time("gpu_energy", "GPU energy", system["gpu_energy_j"], "joule"),
        _over_time("cpu_energy", "CPU energy", system["energy_j"], "joule"),
    ]
    kept = [Plot(**(vars(plot) | {"lines": [line for line in plot.lines if line.x]})) for plot in found]
    return [plot for plot in kept if plot.lines]


def _over_time(identity: str, title: str, curves: dict[str, Curve], unit: Unit) -> Plot:
    if len(curves) == 1:  # nobody asks which host
        curves = {title.partition(",")[0]: curve for curve in curves.values()}
    lines = [_line(name, curve, broken=True) for name, curve in spread(curves, MOST_LINES).items()]
    return Plot(identity, title, lines, unit, "time", zero=True)


def _line(name: str, curve: Curve, broken: bool = False) -> Line:
    places, values = curve.arrays()
    x, y = thinned(places, values)
    return _with_gaps(name, x, y) if broken else Line(name, [*x], [*y])


def _with_gaps(name: str, x: list[float], y: list[float]) -> Line:
    """Nothing is drawn where nobody measured, such as between two launches of a run."""
    far = 5 * float(np.median(np.diff(x))) if len(x) > 2 else float("inf")
    places: list[float | None] = []
    values: list[float | None] = []
    for at, value in zip(x, y, strict=True):
        if places and at - (places[-1] or 0.0) > far:
            places.append(at)
            values.append(None)
        places.append(at)
        values.append(value)
    return Line(name, places, values)


def _both(name: str, curve: Curve) -> list[Line]:
    """Each value, and where there are enough of them the mean with its neighbours."""
    places, values = curve.arrays()
    smooth = smoothed(values)
    if smooth is None:
        return [_of(name, places, values, "line")]
    return [_of(f"{name}, each step", places, values, "faint"), _of(name, places, smooth, "line")]


def _of(name: str, places: NDArray[np.float64], values: NDArray[np.float64], look: Literal["line", "faint"]) -> Line:
    x, y = thinned(places, values)
    return Line(name, [*x], [*y], look)


def _points(curves: dict[str, Curve], names: Iterable[str]) -> list[Line]:
    lines = [_line(EVALUATED.get(name, name), curves[name]) for name in names if name in curves]
    return [Line(line.name, line.x, line.y, "points") for line in lines]


def _answered(history: History, shares: bool) -> list[Line]:
    names = [name for name in history.answers if is_share(name) is shares]
    return _points(history.answers, names)
