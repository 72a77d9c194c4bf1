"""The learning rate of every step, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from launcher.plan.plan import SchedulePlan
from launcher.train.schedule import lr_factor, warmup_steps


def factors(kind: Any, total: int, warmup: float = 0.0, min_lr_ratio: float = 0.0) -> list[float]:
    schedule = SchedulePlan(kind=kind, warmup=warmup, min_lr_ratio=min_lr_ratio)
    return [lr_factor(schedule, step, total) for step in range(total)]


def test_each_kind_in_full() -> None:
    assert factors("constant", 4) == [1, 1, 1, 1]
    assert factors("linear", 4) == [1, 0.75, 0.5, 0.25]
    assert factors("linear", 4, min_lr_ratio=0.5) == [1, 0.875, 0.75, 0.625]
    assert factors("cosine", 4) == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])
    assert factors("cosine", 3, min_lr_ratio=0.1) == pytest.approx([1, 0.775, 0.325])
    assert factors("linear", 6, warmup=2) == [0.5, 1, 1, 0.75, 0.5, 0.25]


def test_warm_up_is_a_share_below_one_and_a_number_of_steps_from_one_on() -> None:
    for warmup, total, steps in ((0.0, 100, 0), (0.03, 100, 3), (0.03, 101, 4), (0.001, 5, 1), (1, 5, 1), (7.0, 5, 5)):
        assert warmup_steps(SchedulePlan(kind="cosine", warmup=warmup, min_lr_ratio=0), total) == steps


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 0.03, 0.5, 1, 20, 50])
@pytest.mark.parametrize("total", [1, 2, 20])
def test_it_rises_to_the_peak_once_then_never_rises_and_no_step_is_wasted(kind: str, warmup: float, total: int) -> None:
    found = factors(kind, total, warmup)
    peak = max(0, warmup_steps(SchedulePlan(kind=kind, warmup=warmup, min_lr_ratio=0), total) - 1)  # type: ignore[arg-type]
    assert all(0 < factor <= 1 for factor in found)
    assert found[peak] == 1
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)


def test_the_step_after_the_last_is_at_the_floor() -> None:
    for kind in ("cosine", "linear"):
        schedule = SchedulePlan(kind=kind, warmup=0.1, min_lr_ratio=0.2)  # type: ignore[arg-type]
        assert lr_factor(schedule, 50, 50) == pytest.approx(0.2)
