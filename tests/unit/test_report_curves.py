"""Curves of the report: no spike lost, no value under another step than its own, energy once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.report.curves import MOST_POINTS, Curve, smoothed, spread, thinned
from launcher.report.history import History
from launcher.report.outcome import energy_wh
from tests.reports import BEGIN


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5000), st.integers(0, 10**6))
def test_thinning_loses_no_spike(values: list[float], seed: int) -> None:
    many = np.array(values * (1 + 4000 // len(values)))
    at = seed % len(many)
    many[at] = 1e9
    x, y = thinned(np.arange(len(many), dtype=float), many)
    assert len(x) == len(y) <= MOST_POINTS + 2
    assert x == sorted(set(x))
    assert (at, 1e9) in zip(x, y, strict=True)
    assert min(y) == pytest.approx(float(many.min()), rel=1e-5)
    assert (x[0], x[-1]) == (0, len(many) - 1)


def test_a_smoothed_curve_leans_to_neither_side() -> None:
    line = np.arange(1000.0)
    found = smoothed(line)
    assert found is not None
    assert found == pytest.approx(line)
    assert smoothed(np.ones(5)) is None


@given(st.integers(10, 500), st.integers(0, 10**6))
def test_a_smoothed_value_is_the_mean_of_means_of_its_neighbours(count: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(2, 0.1, count)
    half = max(round(0.005 * count), 1)

    def means(of: list[float]) -> list[float]:
        reach = [min(i, count - 1 - i, half) for i in range(count)]
        return [math.fsum(of[i - r : i + r + 1]) / (2 * r + 1) for i, r in enumerate(reach)]

    assert smoothed(values) == pytest.approx(means(means(values.tolist())), rel=1e-12)


def test_one_huge_value_spoils_a_smoothed_curve_near_it_alone() -> None:
    values = np.full(1000, 2.0)
    values[300] = 1e20
    found = smoothed(values)
    assert found is not None
    assert (found[320:] == 2.0).all()
    assert (found[:280] == 2.0).all()


def test_a_step_that_is_done_again_replaces_what_came_after_it() -> None:
    curve = Curve()
    for step in (1, 2, 3, 4):
        curve.add(step, step)
    curve.add(3, 30.0)
    assert (list(curve.places), list(curve.values)) == ([1, 2, 3], [1, 2, 30])
    curve.add(2, None)
    assert list(curve.places) == [1]


def test_many_gpus_are_shown_by_their_mean_and_both_ends() -> None:
    curves = {f"GPU {i}": Curve() for i in range(64)}
    for i, curve in enumerate(curves.values()):
        for at in range(50):
            curve.add(10 * at + i / 100, float(i))
    found = spread(curves, 8)
    assert list(found) == ["mean of 64", "lowest", "highest"]
    assert [found[name].values[20] for name in found] == pytest.approx([31.5, 0, 63])
    assert 45 <= len(found["lowest"]) <= 50
    assert spread(dict(list(curves.items())[:8]), 8) == dict(list(curves.items())[:8])


def test_curves_and_rates_of_a_run_that_was_resumed_are_those_of_the_steps_that_count(tmp_path: Path) -> None:
    """A line every ten steps; killed after step 40, gone on with from the checkpoint of step 37, and still at it."""
    seconds = {"total": 10.0, "forward": 5.0}
    line = {"kind": "step", "attempt": "1.1", "tokens": 100, "loss": 1.0, "seconds": seconds, "epoch": 0.5}
    start = {"kind": "start", "attempt": "1.1", "step": 0, "world_size": 1, "workers": []}
    measured = {"kind": "eval", "attempt": "1.1", "step": 40, "loss": 2.0}
    best = {"kind": "best", "attempt": "1.1", "step": 40}
    lines = [start, *(line | {"step": step} for step in (10, 20, 30, 40)), measured, best]
    lines += [start | {"attempt": "2.1", "step": 37}]
    history = history_of(tmp_path, lines)
    assert history.step == 37
    assert list(history.steps["loss"].places) == [10, 20, 30]
    assert not history.evals["loss"].places
    assert history.best_steps == []
    assert history.tokens == 3000
    history = history_of(tmp_path, [*lines, line | {"attempt": "2.1", "step": 40, "seconds": {"total": 3.0}}])
    assert list(history.steps["tokens_per_s"].values) == pytest.approx([100] * 4), "of three steps in three seconds"
    assert history.step == 40


def history_of(run_dir: Path, lines: list[dict[str, Any]], **others: list[dict[str, Any]]) -> History:
    """Of a run with these lines, a second apart where they say no time, and what `others` wrote: {host: lines}."""
    (run_dir / "logs").mkdir(exist_ok=True)
    files = {"metrics.jsonl": lines} | {f"logs/system-{host}.jsonl": told for host, told in others.items()}
    for name, records in files.items():
        text = "".join(json.dumps({"time": BEGIN + i} | record) + "\n" for i, record in enumerate(records))
        (run_dir / name).write_text(text)
    return History(run_dir)


def test_a_host_that_changes_its_place_keeps_what_it_measured_and_energy_counts_once(tmp_path: Path) -> None:
    """The first rank's in the attempts 1 and 3, another's in the second; a line of the first comes late, by an orphan
    that counts for nothing more, and may not count what the others took a second time."""

    def look(at: float, attempt: str, joules: float) -> dict[str, Any]:
        return {"kind": "system", "time": BEGIN + at, "attempt": attempt, "host": "a", "cpu_percent": at} | {
            "energy_j": joules
        }

    start = {"kind": "start", "time": BEGIN, "attempt": "1.1", "step": 0, "world_size": 1, "workers": []}
    lines = [start, look(1, "1.1", 0), look(2, "1.1", 10), look(7, "1.3", 0), look(8, "1.3", 5)]
    history = history_of(tmp_path, lines, a=[look(4, "1.2", 0), look(5, "1.2", 20), look(5.5, "1.1", 12)])
    assert list(history.system["cpu_percent"]["a"].values) == [1, 2, 4, 5, 5.5, 7, 8]
    assert energy_wh(history) == pytest.approx((12 + 20 + 5) / 3600)
