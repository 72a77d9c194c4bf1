"""Numbers over steps or time, and what of a million of them a plot needs."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_POINTS = 1200
"""Of a curve in a page: two for each of 600 stretches, as many as a plot has pixels on a large screen."""
_SMOOTH_SHARE = 0.02
"""Of all values: how many lie under the triangle of weights that a smoothed one is the mean of."""
_FEWEST_SMOOTHED = 10
_LARGEST = 1e300


class Curve:
    """Values at ascending places: steps, or seconds since the run began."""

    def __init__(self) -> None:
        self.places = array("d")
        self.values = array("d")

    def __len__(self) -> int:
        return len(self.places)

    def add(self, place: float, value: float | None) -> None:
        """Add the next value; None is none. What was there from `place` on is replaced: a step that is done again."""
        places = self.places
        if places and place <= places[-1]:
            self.cut(place)
        if value is not None:
            places.append(place)
            self.values.append(value)

    def put(self, place: float, value: float) -> None:
        """Add a value wherever its place is, instead of one that is there."""
        at = bisect_left(self.places, place)
        if at < len(self.places) and self.places[at] == place:
            self.values[at] = value
        else:
            self.places.insert(at, place)
            self.values.insert(at, value)

    def cut(self, place: float) -> None:
        """Forget everything from `place` on."""
        first = bisect_left(self.places, place)
        del self.places[first:], self.values[first:]

    def since(self, place: float) -> float:
        """The sum of the values from `place` on."""
        return float(sum(self.values[bisect_left(self.places, place) :]))

    @property
    def first(self) -> float:
        return self.values[0]

    @property
    def last(self) -> float:
        return self.values[-1]

    def arrays(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """[N] places and [N] values, those that are numbers, and small enough to be added up."""
        places, values = np.array(self.places), np.array(self.values)
        kept = np.abs(values) < _LARGEST
        return places[kept], values[kept]


def thinned(places: NDArray[np.float64], values: NDArray[np.float64]) -> tuple[list[float], list[float]]:
    """At most MOST_POINTS: the least and the greatest of each stretch, so that no spike is lost, and both ends."""
    if len(places) > MOST_POINTS:
        borders = np.linspace(0, len(places), MOST_POINTS // 2).astype(int)  # one stretch less than borders
        kept = {0, len(places) - 1}
        for start, stop in pairwise(borders):
            part = values[start:stop]
            kept |= {start + int(part.argmin()), start + int(part.argmax())}
        chosen = np.array(sorted(kept))
        places, values = places[chosen], values[chosen]
    return _short(places), _short(values)


def smoothed(values: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """[N] the mean of each value and its neighbours, the near ones with more weight; None where there are too few.

    At the ends the stretch is as much shorter on both sides, so that it leans to none.
    """
    if len(values) < _FEWEST_SMOOTHED:
        return None
    half = max(round(_SMOOTH_SHARE * len(values) / 4), 1)
    return _means(_means(values, half), half)


def _means(values: NDArray[np.float64], half: int) -> NDArray[np.float64]:
    """[N] the mean of each value and `half` of them on both sides.

    Each is a sum of at most two pieces of blocks. A difference of running sums would be nothing but rounding for the
    rest of a curve after one gradient norm of 1e20.
    """
    width, at = 2 * half + 1, np.arange(len(values))
    blocks = np.pad(values, (0, -len(values) % width)).reshape(-1, width)
    ahead, back = blocks.cumsum(1).ravel(), blocks[:, ::-1].cumsum(1)[:, ::-1].ravel()
    reach = np.minimum(np.minimum(at, len(values) - 1 - at), half)
    first, last = at - reach, at + reach
    in_one = np.where(first % width == 0, ahead[last], back[first])
    sums = np.where(first // width == last // width, in_one, back[first] + ahead[last])
    found: NDArray[np.float64] = sums / (2 * reach + 1)
    return found


def spread(curves: dict[str, Curve], most: int) -> dict[str, Curve]:
    """The curves themselves, or where there are more than `most` of them their mean, least and greatest by time."""
    if len(curves) <= most:
        return curves
    places = np.concatenate([np.array(curve.places) for curve in curves.values()])
    values = np.concatenate([np.array(curve.values) for curve in curves.values()])
    edges = np.linspace(places.min(), places.max() + 1e-9, min(max(map(len, curves.values())), MOST_POINTS) + 1)
    bins = np.clip(np.searchsorted(edges, places, side="right") - 1, 0, len(edges) - 2)
    found: dict[str, Curve] = {f"mean of {len(curves)}": Curve(), "lowest": Curve(), "highest": Curve()}
    order = np.argsort(bins, kind="stable")
    starts = np.flatnonzero(np.diff(bins[order], prepend=-1))
    for part in np.split(values[order], starts[1:]) if len(order) else ():
        number = bins[order][starts[len(found["lowest"])]]
        middle = float(edges[number : number + 2].mean())
        for curve, value in zip(found.values(), (part.mean(), part.min(), part.max()), strict=True):
            curve.add(middle, float(value))
    return found


def _short(values: NDArray[Any]) -> list[float]:
    """Six digits are more than a plot shows."""
    return [
        int(value) if value.is_integer() and abs(value) < 1e15 else float(f"{value:.6g}") for value in values.tolist()
    ]
