"""What guards decide from numbers: spikes, overfitting, forgetting, the best evaluation and the end of patience."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from launcher.checkpoint.choose import best_first, chosen
from launcher.checkpoint.layout import Checkpoint, committed
from launcher.checkpoint.lease import begin
from launcher.checkpoint.retain import Keep, retain
from launcher.errors import DamagedCheckpoint, UserError
from launcher.plan.plan import EarlyStoppingPlan, GuardPlan, RetainPlan
from launcher.store.folder import FolderStore
from launcher.train.best import out_of_patience, restore, take
from launcher.train.forgetting import forgetting
from launcher.train.guards import HISTORY, heed, how_to_go_on, missed, over
from launcher.train.metrics import MetricsLog, read
from launcher.train.overfitting import BEYOND, overfitting
from launcher.train.parts import Progress
from launcher.train.spikes import judge, judge_norm, remember
from launcher.train.throughput import Stopwatch
from tests.checkpoints import FIRST, write_checkpoint
from tests.plans import lifecycle

AROUND_TWO = [2.0, 2.2, 1.8, 2.0] * 2  # mean 2, standard deviation sqrt(0.02) = 0.1414


class Engine:
    """Of a phase."""


def guard(spikes: Any = "skip", **changes: Any) -> GuardPlan:
    return GuardPlan(**({"spikes": spikes, "deviations": 6.0, "window": 8, "most": 10} | changes))


def test_a_loss_is_a_spike_beyond_so_many_deviations() -> None:
    edge = 2 + 6 * math.sqrt(0.02)
    assert judge(guard(), AROUND_TWO, 9, edge - 1e-6, finite=True) is None
    spike = judge(guard(), AROUND_TWO, 9, edge + 1e-6, finite=True)
    assert spike is not None
    assert (spike.step, spike.action, spike.left_out, spike.finite) == (9, "skip", True, True)
    assert spike.mean == pytest.approx(2)
    assert spike.deviations == pytest.approx(6, rel=1e-5)
    said = "the loss of step 9 is 2.8485, 6.0 standard deviations above the mean of the 8 steps before it (2.0000)"
    assert spike.message == said
    assert judge(guard(), AROUND_TWO, 9, -100.0, finite=True) is None


def test_before_the_window_is_full_only_what_is_no_number_counts() -> None:
    assert judge(guard(), AROUND_TWO[1:], 8, 1e9, finite=True) is None
    spike = judge(guard(), [], 1, math.nan, finite=False)
    assert spike is not None
    assert (spike.action, spike.finite, spike.message) == ("skip", False, "the loss of step 1 is nan")


@pytest.mark.parametrize(
    ("spikes", "action"), [("warn", "stop"), ("stop", "stop"), ("skip", "skip"), ("rollback", "rollback")]
)
def test_what_is_no_number_ends_a_run_that_only_warns(spikes: str, action: str) -> None:
    spike = judge(guard(spikes), AROUND_TWO, 9, math.inf, finite=False)
    assert spike is not None
    assert spike.action == action
    of_norm = judge_norm(guard(spikes), 9, 2.5, math.inf)
    assert (of_norm.action, of_norm.message) == (action, "the gradient norm of step 9 is inf, its loss 2.5000")


def test_losses_that_hardly_differ_leave_room_for_one_that_does_a_little() -> None:
    still = [2.0] * 8
    assert judge(guard(), still, 9, 2.11, finite=True) is None
    assert judge(guard(), still, 9, 2.13, finite=True) is not None  # 6 hundredths of the mean away
    assert judge(guard(), [0.0] * 8, 9, 1e-3, finite=True) is not None


def test_the_window_forgets_what_is_older() -> None:
    losses: list[float] = []
    for step in range(20):
        remember(losses, float(step), window=8)
    assert losses == [float(step) for step in range(12, 20)]


def curve(*points: tuple[float, float]) -> list[list[float]]:
    """A history from (training loss, held-out loss) of evaluations ten steps apart."""
    return [[10 * (place + 1), train, held_out] for place, (train, held_out) in enumerate(points)]


def test_overfitting_in_words() -> None:
    history = curve((3.0, 3.1), (2.0, 2.4), (1.2, 2.5), (0.6, 2.9))
    assert overfitting(history[:3]) is None  # one evaluation above the best is none
    found = overfitting(history)
    assert found is not None
    assert (found.since, found.best, found.now) == (20, 2.4, 2.9)
    assert found.message == (
        "overfitting since step 20: the training loss went on falling, from 2.0000 to 0.6000, and the held-out loss "
        "rose from its best, 2.4000, to 2.9000"
    )


def test_a_run_that_diverges_or_has_converged_does_not_overfit() -> None:
    assert overfitting(curve((2.0, 2.4), (2.5, 2.9), (3.0, 3.4))) is None  # both rise
    assert overfitting(curve((2.0, 2.4), (1.9, 2.44), (1.8, 2.44))) is None  # by less than 2%
    assert overfitting(curve((2.0, 2.4), (1.2, 2.9), (0.6, 2.6))) is None  # it comes down again
    assert overfitting([]) is None


@given(
    level=st.floats(1e-3, 1e3),
    noise=st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), max_size=60),
    slope=st.floats(0, 0.2),
)
def test_noise_within_one_per_cent_is_never_called_overfitting(
    level: float, noise: list[tuple[float, float]], slope: float
) -> None:
    width = BEYOND / 2 / (1 + BEYOND)
    points = [(level * (1 + width * a) * (1 - slope) ** i, level * (1 + width * b)) for i, (a, b) in enumerate(noise)]
    assert overfitting(curve(*points)) is None  # nor where the training loss falls for real


@given(st.integers(1, 20), st.floats(0.03, 0.2), st.floats(0.03, 0.2))
def test_a_rise_is_found_wherever_it_begins(best: int, falls: float, rises: float) -> None:
    train = [3 * (1 - falls) ** step for step in range(best + 3)]
    down = [3 * (1 - falls) ** step for step in range(best)]
    points = list(zip(train, down + [down[-1] * (1 + rises) ** step for step in range(1, 4)], strict=True))
    assert overfitting(curve(*points[:best])) is None
    found = overfitting(curve(*points))
    assert found is not None
    assert found.since == 10 * best


def measured(*values: float | None, metric: str = "loss", **early: Any) -> tuple[Progress, list[int]]:
    """The progress after evaluations at steps 10, 20, ...; and the steps at which patience was out."""
    progress, ended = Progress(), []
    stopping = EarlyStoppingPlan(**({"patience": 2, "min_delta": 0.0} | early))
    life = lifecycle(100, metric=metric, early_stopping=stopping)
    for place, value in enumerate(values):
        progress.step = 10 * (place + 1)
        take(progress, life, value)
        if out_of_patience(progress, life):
            ended.append(progress.step)
    return progress, ended


def test_patience_counts_evaluations_without_a_better_one() -> None:
    progress, ended = measured(3.0, 2.0, 2.5, 1.9, 1.9, 2.0, 2.1)
    assert (progress.best_value, progress.best_step, progress.bad_evaluations) == (1.9, 40, 3)
    assert ended == [60, 70]
    life = lifecycle(100, early_stopping=EarlyStoppingPlan(patience=2, min_delta=0.0))
    assert over(progress, life) == "loss was best (1.9000) at step 40, and no better in 3 evaluations"
    assert over(progress, lifecycle(100, early_stopping=EarlyStoppingPlan(patience=4, min_delta=0.0))) is None
    assert over(progress, lifecycle(100)) is None


def test_greater_is_better_for_all_but_losses() -> None:
    progress, ended = measured(0.1, 0.3, 0.2, metric="classes.f1_macro")
    assert (progress.best_value, progress.best_step, progress.score, ended) == (0.3, 20, -0.2, [])
    progress, _ = measured(5.0, 3.0, 4.0, metric="perplexity")
    assert (progress.best_value, progress.best_step) == (3.0, 20)


def test_a_little_better_is_the_best_and_yet_no_reason_to_wait() -> None:
    progress, ended = measured(2.0, 1.95, 1.92, min_delta=0.1)
    assert (progress.best_value, progress.best_step) == (1.92, 30)
    assert ended == [30]
    assert measured(2.0, 1.95, 1.85, 1.7, min_delta=0.1)[1] == []


def test_what_is_no_number_is_never_the_best() -> None:
    progress, ended = measured(math.nan, math.inf)
    assert (progress.best_value, progress.score, ended) == (None, None, [20])
    progress, _ = measured(2.0, math.nan, None)
    assert (progress.best_value, progress.best_step, progress.score, progress.bad_evaluations) == (2.0, 10, None, 2)


def test_another_metric_begins_anew() -> None:
    progress, ended = measured(2.0, 3.0, 4.0)
    assert ended == [30]
    stopping = EarlyStoppingPlan(patience=2, min_delta=0.0)
    assert over(progress, lifecycle(100, metric="accuracy", early_stopping=stopping)) is None  # as a resume asks
    progress.step = 40
    take(progress, lifecycle(100, metric="accuracy"), 0.5)
    assert (progress.metric, progress.best_value, progress.best_step, progress.bad_evaluations) == (
        "accuracy",
        0.5,
        40,
        0,
    )


def test_forgetting_in_words() -> None:
    life = lifecycle(100, retain=RetainPlan(max_rows=None, limit=0.1, action="stop"))
    progress = Progress(retain_before=2.0, retain_loss=2.2)
    assert forgetting(progress, life) is None
    progress.retain_loss = 2.5
    found = forgetting(progress, life)
    assert found is not None
    assert (found.before, found.now, found.limit, found.ends) == (2.0, 2.5, pytest.approx(2.2), True)
    assert over(progress, life) == found.message
    assert found.message == (
        "forgetting: the loss on evaluate.retain was 2.0000 before the first step and is 2.5000 now, +25%; "
        "its limit is +10%"
    )
    assert forgetting(progress, lifecycle(100)) is None
    warns = lifecycle(100, retain=RetainPlan(max_rows=None, limit=0.1, action="warn"))
    assert forgetting(progress, warns) is not None
    assert over(progress, warns) is None


@pytest.mark.parametrize(
    ("before", "now", "rise", "key"),
    [
        (2.0, 2.5, "+25%", "limit=0.4"),
        (2.0, 9.0, "+350%", "limit=3.6"),
        (2.0, math.nan, "+nan%", "action=warn"),
        (2.0, math.inf, "+inf%", "action=warn"),
        (math.nan, 2.0, "+nan%", "action=warn"),
        (0.0, 0.1, "+inf%", "action=warn"),
    ],
)
def test_a_run_that_forgets_is_told_how_to_go_on(before: float, now: float, rise: str, key: str) -> None:
    life = lifecycle(100, retain=RetainPlan(max_rows=None, limit=0.1, action="stop"))
    progress = Progress(retain_before=before, retain_loss=now)
    assert f"{now:.4f} now, {rise}; its limit" in str(over(progress, life))
    assert how_to_go_on(progress, life, "runs/x").endswith(f"slipway resume runs/x evaluate.retain.{key}")


def test_progress_of_another_version() -> None:
    saved = {"step": 7, "tokens": 9, "exact_match_before": 0.5, "eval_loss": 2.0}
    progress = Progress.of(saved)
    assert (progress.step, progress.tokens, progress.eval_loss, progress.score) == (7, 9, 2.0, None)
    assert Progress.of(progress.as_dict()) == progress


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    """Checkpoints of steps 1 to 5: two of an earlier version, one without a value, one of another metric."""
    found = FolderStore(tmp_path)
    assert begin(found, 0) == FIRST
    carried: dict[int, dict[str, Any]] = {
        1: {"eval_loss": 1.5, "eval_step": 1},
        2: {"eval_loss": 3.0, "eval_step": 2, "metric": "loss", "score": 1.0},
        3: {"eval_loss": 0.1, "eval_step": 3, "metric": "loss", "score": None},
        4: {"eval_loss": 0.2, "eval_step": 4, "metric": "accuracy", "score": -0.9},
        5: {"eval_loss": 2.0, "eval_step": 5, "metric": "loss", "score": 2.0},
    }
    for step, progress in carried.items():
        write_checkpoint(found, step, ranks=1, progress={"step": step} | progress)
    return found


def test_checkpoints_are_ranked_by_the_value_of_the_metric(store: FolderStore) -> None:
    def ranked(metric: str) -> list[int]:
        return [checkpoint.step for checkpoint in best_first(committed(store), metric)]

    assert ranked("loss") == [2, 1, 5]
    assert ranked("accuracy") == [4]
    assert ranked("perplexity") == []
    retain(store, Keep(last=1, best=1, metric="accuracy"), FIRST, trusted=Checkpoint(store, 5))
    assert [checkpoint.step for checkpoint in committed(store)] == [4, 5]


def test_the_best_may_have_been_saved_before_it_was_measured(tmp_path: Path) -> None:
    """A stop was faster than the evaluation of step 10, and the resumed run has measured it."""
    found = FolderStore(tmp_path)
    common = {"metric": "loss", "eval_step": None}
    write_checkpoint(found, 10, ranks=1, progress=common | {"score": None, "best_step": None})
    late = {"score": 1.0, "heeded_step": 10, "best_step": 10}
    for step in (14, 17):
        write_checkpoint(found, step, ranks=1, progress=common | late)
    assert [checkpoint.step for checkpoint in best_first(committed(found), "loss")] == [10]
    write_checkpoint(found, 30, ranks=1, progress=common | late | {"score": 2.0, "heeded_step": 30})
    there = [checkpoint for checkpoint in committed(found) if checkpoint.step in (10, 30)]
    assert [checkpoint.step for checkpoint in best_first(there, "loss")] == [10, 30]
    assert [checkpoint.step for checkpoint in best_first(there[1:], "loss")] == [30]


def test_the_checkpoint_that_is_meant(store: FolderStore, tmp_path: Path) -> None:
    from tests.distributed.tiny import tiny_plan

    plan = tiny_plan(tmp_path, zero=0)
    assert [chosen(plan, wanted)[0].step for wanted in ("best", "last", "3")] == [2, 5, 3]
    shard = f"{Checkpoint(store, 2).staging(FIRST)}/shard-00000.safetensors"
    store.write(shard, b"0" + store.read(shard)[1:])
    found, passed_over = chosen(plan, "best")
    assert found.step == 1
    assert len(passed_over) == 1
    assert "step-00000002 is damaged" in passed_over[0]
    with pytest.raises(UserError, match="no checkpoint of step 9") as error:
        chosen(plan, "9")
    assert error.value.hint == "give best, last or a step of 1, 2, 3, 4, 5"


@pytest.mark.parametrize(("spoiled", "loaded"), [((), [2]), ((2,), [2, 1]), ((2, 1), [2, 1, 5]), ((5,), [2])])
def test_damaged_ones_that_cost_the_engine_leave_the_last(
    store: FolderStore, tmp_path: Path, spoiled: tuple[int, ...], loaded: list[int]
) -> None:
    """Those of an earlier phase are found to be damaged once an engine of that phase is built."""
    tried = []

    def load_checkpoint(parts: Any, checkpoint: Checkpoint, goes_on: bool) -> Progress:
        tried.append(checkpoint.step)
        parts.engine = Engine()
        if checkpoint.step in spoiled:
            raise DamagedCheckpoint(f"{checkpoint} is damaged")
        return Progress(step=checkpoint.step)

    parts = parts_of(tmp_path, export_best=True)
    parts.engine, parts.watch = Engine(), Stopwatch(torch.device("cpu"))
    parts.saver = SimpleNamespace(store=store, group=None)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        with mock.patch("launcher.train.best.load_checkpoint", load_checkpoint):
            assert restore(parts, Progress(step=5)).step == loaded[-1]
    finally:
        dist.destroy_process_group()
    assert tried == loaded


def parts_of(tmp_path: Path, **changes: Any) -> Any:
    """As much of a run's parts as guards look at, with a real log."""
    plan = SimpleNamespace(lifecycle=lifecycle(100, **changes))
    return SimpleNamespace(plan=plan, log=MetricsLog(tmp_path, "1.1", writes=True))


def test_what_an_evaluation_means_is_said_once(tmp_path: Path) -> None:
    parts = parts_of(tmp_path, retain=RetainPlan(max_rows=None, limit=0.1, action="warn"))
    progress = Progress(retain_before=1.0)
    curves = [(3.0, 3.1, 1.0), (2.0, 2.4, 1.2), (1.5, 2.6, 1.3), (1.0, 2.7, 1.05), (0.5, 2.8, 1.2), (0.4, 2.0, 1.0)]
    for place, (train, held_out, retained) in enumerate(curves):
        progress.step = 10 * (place + 1)
        for _ in range(10):
            progress.learn(train, 1, 1, window=8)
        heed(parts, progress, {"loss": held_out, "retain_loss": retained}, None)
    parts.log.close()
    said = [(line["kind"], line["step"]) for line in read(tmp_path)]
    assert said == [
        ("best", 10),
        ("forgetting", 20),
        ("best", 20),
        ("overfitting", 40),
        ("forgetting", 50),
        ("best", 60),
    ]
    assert progress.overfitting_since is None, "the last is the best"
    assert progress.losses == [0.4] * 8
    assert progress.history[3] == [40, pytest.approx(1.0), 2.7]


def test_a_run_without_held_out_rows_has_no_best(tmp_path: Path) -> None:
    parts, progress = parts_of(tmp_path), Progress(step=10)
    for evaluated in (None, {"retain_loss": 2.0}):
        heed(parts, progress, evaluated, {"exact_match": 0.5})
    assert (progress.best_step, progress.score, progress.history) == (None, None, [])
    heed(parts_of(tmp_path, metric="exact_match"), progress, None, {"exact_match": 0.5})
    assert (progress.best_value, progress.best_step) == (0.5, 10)


def test_an_evaluation_that_a_stop_prevented_is_made_up_for(tmp_path: Path) -> None:
    parts, progress = parts_of(tmp_path, eval_every_steps=10), Progress(step=20, heeded_step=10)
    life = parts.plan.lifecycle
    assert missed(progress, life)
    heed(parts, progress, {"loss": 2.0}, None)
    assert not missed(progress, life)
    assert [missed(Progress(step=step, heeded_step=20), life) for step in (21, 30, 100)] == [False, True, False]


def test_an_evaluation_that_is_no_number_hides_no_overfitting(tmp_path: Path) -> None:
    parts, progress = parts_of(tmp_path), Progress()
    for place, held_out in enumerate((math.nan, 2.4, 2.6, 2.9)):
        progress.step = 10 * (place + 1)
        progress.learn(3.0 / (place + 1), 1, 1, window=8)
        heed(parts, progress, {"loss": held_out}, None)
    assert progress.overfitting_since == 20
    assert progress.history[0] == [20, pytest.approx(2.25), 2.4]


def test_the_history_keeps_the_best(tmp_path: Path) -> None:
    parts, progress = parts_of(tmp_path), Progress()
    for place in range(HISTORY + 50):
        progress.step = place + 1
        progress.learn(1.0, 1, 1, window=8)
        heed(parts, progress, {"loss": 1.0 if place == 3 else 2.0 + place}, None)
    assert len(progress.history) == HISTORY
    assert progress.history[0] == [4, 1.0, 1.0]
    assert progress.history[1][0] == 52
