"""The simulation of failures: it adds up, agrees with the formula where there is one, and orders policies sensibly."""

from __future__ import annotations

import random
from dataclasses import astuple, replace

import pytest

from launcher.bench.scale import (
    DAY_S,
    Policy,
    Setting,
    best_interval,
    expected_goodput,
    main,
    mean_spent,
    simulate,
)

PLAIN = Setting(nodes=8, failures_per_node_day=0.0, interval_s=99.0, stall_s=1.0)
HOURLY = Setting(nodes=24, failures_per_node_day=1 / 6, interval_s=3600.0, stall_s=300.0, restart_s=600.0)
"""Daly's own figures: 6 hours between failures, 5 minutes to save, 10 to restart."""
LARGE = Setting(
    nodes=125,
    failures_per_node_day=0.0065,
    interval_s=480.0,
    stall_s=1.0,
    write_s=85.0,
    detect_s=60.0,
    restart_s=300.0,
    lost_share=0.78,
)


def one_run(setting: Setting, days: float = 28) -> tuple[float, ...]:
    return astuple(simulate(setting, days * DAY_S, random.Random(1)))


def test_without_failures_only_saves_cost() -> None:
    spent = simulate(PLAIN, 100.0 * 10_000, random.Random(0))
    assert spent.goodput == 0.99
    assert spent.stalled == 10_000.0
    assert (spent.failures, spent.repeated, spent.restarting, spent.waiting, spent.smaller) == (0, 0, 0, 0, 0)


def test_writing_longer_than_the_interval_makes_the_next_save_wait() -> None:
    spent = simulate(replace(PLAIN, write_s=200.0), 200.0 * 1000, random.Random(0))
    assert spent.stalled == 1000.0


@pytest.mark.parametrize(
    ("setting", "days"),
    [
        (HOURLY, 28),
        (replace(HOURLY, nodes=4), 100),
        (replace(HOURLY, nodes=96, interval_s=600.0), 14),
        (replace(HOURLY, detect_s=120.0, repair_s=1800.0, lost_share=0.5), 28),
        (replace(LARGE, write_s=0.0, repair_s=4 * 3600.0), 200),
    ],
)
def test_waste_is_what_the_formula_says(setting: Setting, days: float) -> None:
    wasted = 1 - mean_spent(setting, days, runs=200).goodput
    assert wasted == pytest.approx(1 - expected_goodput(setting), rel=0.03)


def test_best_interval_is_dalys() -> None:
    """His optimum is 117 minutes at 24 hours between failures and 57 at 6; Young's first order comes near."""
    assert best_interval(replace(HOURLY, nodes=6)) / 60 == pytest.approx(117, rel=0.03)
    assert best_interval(HOURLY) / 60 == pytest.approx(57, rel=0.05)
    best = expected_goodput(replace(HOURLY, interval_s=best_interval(HOURLY)))
    assert all(expected_goodput(replace(HOURLY, interval_s=minutes * 60.0)) < best + 1e-3 for minutes in range(5, 300))
    assert best_interval(replace(HOURLY, write_s=9999.0)) == 9999.0


@pytest.mark.parametrize("policy", ["wait", "elastic", "spares"])
def test_all_seconds_are_accounted_for(policy: Policy) -> None:
    setting = replace(LARGE, policy=policy, spares=2, repair_s=DAY_S, failures_per_node_day=0.05)
    *seconds, failures = one_run(setting)
    assert sum(seconds) == pytest.approx(28 * DAY_S)
    assert failures > 50
    assert min(seconds) >= 0


def test_equal_seeds_give_equal_runs() -> None:
    assert one_run(LARGE) == one_run(LARGE)
    assert mean_spent(LARGE, runs=3) == mean_spent(LARGE, runs=3)
    assert mean_spent(LARGE, runs=3, seed=1) != mean_spent(LARGE, runs=3)


def test_a_run_shrinks_by_whole_micro_batches() -> None:
    one, eight = replace(LARGE, micro_steps=1), replace(LARGE, micro_steps=8)
    assert [setting.speed(125) for setting in (one, eight)] == [1, 1]
    assert [setting.speed(124) for setting in (one, eight)] == [1 / 2, 8 / 9]
    assert eight.speed(100) == 8 / 10


def test_elastic_is_better_where_repair_is_long() -> None:
    def goodput(policy: Policy, repair_s: float) -> float:
        return mean_spent(replace(LARGE, policy=policy, repair_s=repair_s), runs=50).goodput

    for hours in (1, 4, 24):
        assert goodput("elastic", hours * 3600.0) > goodput("wait", hours * 3600.0)
    # It starts twice for each lost node, which a node that is back at once is not worth.
    assert goodput("elastic", 60.0) < goodput("wait", 60.0)


def test_spares_help_as_long_as_they_last() -> None:
    setting = replace(LARGE, repair_s=DAY_S, policy="spares")
    none, *some = [mean_spent(replace(setting, spares=spares), runs=50).goodput for spares in (0, 1, 2, 4)]
    assert none == mean_spent(replace(setting, policy="wait"), runs=50).goodput
    assert none < some[0] < some[1] < some[2] < 1


def test_what_is_not_committed_yet_is_lost() -> None:
    slow, quick = (mean_spent(replace(LARGE, write_s=write_s), runs=50) for write_s in (400.0, 0.0))
    failures = pytest.approx(slow.failures, rel=0.1)
    assert quick.failures == failures
    # Half an interval is lost on average, and with it what was being written.
    assert quick.repeated / quick.failures == pytest.approx(240, rel=0.1)
    assert slow.repeated / slow.failures == pytest.approx(240 + 400, rel=0.1)


def test_the_tables_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--runs", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| 1,000 ") for line in lines) == 2 * 3 * 5
    assert "| 8B | 1,000 | 96 GB | 0.10 GB | 10 s |" in "\n".join(lines)
    assert any(line.startswith("| as planned | 9") for line in lines)
