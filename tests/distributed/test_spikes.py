"""Spikes: a step that is left out leaves no trace, a run goes back to its checkpoint and on, and a resumed one decides
the same."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from launcher.checkpoint.layout import committed
from launcher.checkpoint.manifest import read as read_manifest
from launcher.checkpoint.shards import optimizer_steps, publish_masters, set_optimizer_steps, training_state
from launcher.plan.batch import batch_layout
from launcher.plan.plan import GuardPlan, Plan
from launcher.store.folder import FolderStore
from launcher.train.metrics import last_of_each_step, read
from launcher.train.verdict import Verdict
from tests.checkpoints import FIRST, checkpoint_at
from tests.distributed.group import run_group
from tests.distributed.runs import open_folder, tiny_run, variant
from tests.distributed.tiny import begun, gathered_below, quiet

pytestmark = pytest.mark.distributed

STEPS = 12
CALM = [6.0, 6.5, 5.5, 6.0]
"""Losses among which that of an untrained model is none to wonder at."""
POISONS = ("spike", "no number", "no gradient")


class NoGradient(torch.autograd.Function):
    """The loss as it is, and a gradient that is no number."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * math.nan


class Poisoned:
    """A run's loss, but for what the first rank's first micro batch gives in certain steps, counted from 1."""

    def __init__(self, loss: Any, poisons: Mapping[int, str]) -> None:
        self.loss, self.poisons = loss, poisons
        self.network, self.taken = loss.network, 0

    def logits(self, batch: Any) -> Tensor:
        return self.loss.logits(batch)

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor]:
        from launcher.train.beat import doing

        loss, correct = self.loss(batch)
        if not torch.is_grad_enabled() or dist.get_rank() or self.taken == doing.step:
            return loss, correct
        self.taken = doing.step
        poison = self.poisons.get(doing.step)
        if poison == "spike":
            loss = loss * 50
        elif poison == "no number":
            loss = loss * math.nan
        elif poison == "no gradient":
            loss = NoGradient.apply(loss)
        elif poison == "killed":
            raise KeyboardInterrupt
        return loss, correct


def guarded(spikes: Any, **changes: Any) -> GuardPlan:
    return GuardPlan(**({"spikes": spikes, "deviations": 6.0, "window": 4, "most": 10} | changes))


# A step that is left out


@contextmanager
def trainer(plan: Plan) -> Iterator[Any]:
    """A run's parts, and a function that takes one step on them. Collective."""
    from launcher.train import loop
    from launcher.train.beat import mark
    from launcher.train.metrics import MetricsLog
    from launcher.train.run import build_parts, use_device

    store = begun(Path(plan.run_dir))
    batch = batch_layout(plan.trajectory.global_batch_size, plan.layout.micro_batch_size, dist.get_world_size())
    log = MetricsLog(Path(plan.run_dir), str(FIRST), writes=False)
    with gathered_below(1000):
        parts = build_parts(plan, batch, use_device(plan), log, store, FIRST, lambda: False)
    poisoned = Poisoned(parts.loss, {})
    parts.loss = poisoned  # type: ignore[assignment]

    def step(number: int, poison: str | None = None) -> Any:
        mark("data", number)
        poisoned.poisons = {number: poison} if poison else {}
        poisoned.taken = 0
        batch = parts.train_data.global_batch(number - 1)
        return loop.optimizer_step(parts, number - 1, batch, plan.trajectory.optimizer.lr, CALM)

    yield parts, step
    parts.engine.destroy()


State = tuple[dict[str, Tensor], dict[str, int], list[Tensor]]


def state_of(engine: Any) -> State:
    """Masters and moments, the optimizer's counts, and what the next forward pass reads."""
    shards = {name: shard.held.clone() for name, shard in training_state(engine).items()}
    return shards, optimizer_steps(engine), [one.detach().clone() for one in engine.module.parameters()]


def go_back(engine: Any, state: State) -> None:
    for name, shard in training_state(engine).items():
        shard.held.copy_(state[0][name])
    set_optimizer_steps(engine, state[1])
    publish_masters(engine)


def same(one: State, other: State) -> bool:
    equal = all(torch.equal(one[0][name], other[0][name]) for name in one[0].keys() | other[0].keys())
    weights = all(a.shape != b.shape or torch.equal(a, b) for a, b in zip(one[2], other[2], strict=True))
    return equal and one[1] == other[1] and weights


def leave_out(plans: list[Plan]) -> dict[str, dict[str, tuple[bool, bool, bool]]]:
    """{plan: {poison: whether the step was left out, nothing changed, and the next step is what it is without}}."""
    quiet()
    found: dict[str, dict[str, tuple[bool, bool, bool]]] = {}
    for plan in plans:
        with trainer(plan) as (parts, step):
            engine = parts.engine
            untrained = state_of(engine)
            assert not step(1, "no number").learned
            assert same(untrained, state_of(engine)), "not even before the optimizer has taken a step"
            for number in (1, 2):
                assert step(number).learned
            before = state_of(engine)
            assert step(4).learned
            after = state_of(engine)
            assert not same(before, after)
            found[Path(plan.run_dir).name] = of_plan = {}
            for poison in POISONS:
                go_back(engine, before)
                result = step(3, poison)
                unchanged = same(state_of(engine), before)
                step(4)
                of_plan[poison] = (not result.learned, unchanged, same(state_of(engine), after))
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Three micro batches a step on each of two ranks."""
    return variant(
        tiny_run(tmp_path_factory.mktemp("spikes")), "base", micro_batch_size=1, guard=guarded("skip"), workers=2
    )


OFTEN = [(0, "fp32", False), (2, "bf16", True), (3, "fp32", False)]
SELDOM = [cut for cut in itertools.product((0, 1, 2, 3), ("fp32", "bf16"), (False, True)) if cut[0] or not cut[2]]


@pytest.mark.parametrize("cuts", [OFTEN, pytest.param([c for c in SELDOM if c not in OFTEN], marks=pytest.mark.long)])
def test_a_step_that_is_left_out_leaves_no_trace(base: Plan, cuts: list[tuple[int, str, bool]]) -> None:
    plans = [
        variant(base, f"zero-{zero}-{dtype}{'-offload' * offload}", zero=zero, dtype=dtype, offload=offload)
        for zero, dtype, offload in cuts
    ]
    for rank in run_group(2, leave_out, plans, timeout_s=300):
        assert len(rank) == len(plans)
        assert {(name, poison): checks for name, of in rank.items() for poison, checks in of.items()} == {
            (name, poison): (True, True, True) for name in rank for poison in POISONS
        }


# Whole runs


def train_poisoned(jobs: list[tuple[Plan, dict[int, str]]]) -> list[Verdict | None]:
    """Each plan from its newest checkpoint on, with its poisons; None for one that was killed. Collective."""
    from launcher.train import run

    quiet()
    verdicts: list[Verdict | None] = []
    build = run.build_parts
    for plan, poisons in jobs:
        open_folder(plan)

        def build_poisoned(*args: Any, poisons: dict[int, str] = poisons) -> Any:
            parts = build(*args)
            parts.loss = Poisoned(parts.loss, poisons)  # type: ignore[assignment]
            return parts

        with mock.patch.object(run, "build_parts", build_poisoned):
            verdicts.append(run.train_run(plan, launch=0))
    return verdicts


def live(jobs: list[tuple[Plan, dict[int, str]]]) -> None:
    """The same on two ranks, the first of which dies where a poison says so."""
    with pytest.raises(KeyboardInterrupt):
        run_group(2, train_poisoned, jobs)


Runs = dict[str, tuple[Plan, Verdict]]
IN_CI = ("stopped", "skipped", "too often", "back", "back, resumed")


def live_through(base: Plan, wanted: Callable[[str], bool]) -> Runs:
    """The runs whose names are `wanted`, in one process group; what is resumed was killed in another before."""
    common = {"total_steps": STEPS, "max_steps": STEPS, "checkpoint_every_steps": 4, "eval_every_steps": STEPS}
    plain = variant(base, "plain", zero=2, keep_last=9, **common)
    back = variant(plain, "back", guard=guarded("rollback"), zero=3)
    jobs: dict[str, tuple[Plan, dict[int, str]]] = {
        "warned": (variant(plain, "warned", guard=guarded("warn")), {7: "spike"}),
        "stopped": (variant(plain, "stopped", guard=guarded("stop")), {7: "spike"}),
        "skipped": (variant(plain, "skipped"), {1: "no number", 6: "spike"}),
        "too often": (variant(plain, "too-often", guard=guarded("skip", most=1)), {6: "spike", 7: "no gradient"}),
        "back": (back, {7: "spike"}),
        "back, bf16": (variant(back, "back-16", zero=1, dtype="bf16"), {7: "no number"}),
        "nowhere": (variant(back, "nowhere", zero=2), {2: "no number"}),
        "skipped, resumed": (variant(plain, "skipped-again"), {1: "no number", 6: "spike"}),
        "back, resumed": (variant(back, "back-again"), {7: "spike"}),
    }
    jobs = {name: job for name, job in jobs.items() if wanted(name)}
    for name, (plan, poisons) in jobs.items():
        if name.endswith("resumed"):  # killed after the spike, and before another checkpoint
            live([(plan, poisons | {10 if name.startswith("skipped") else 8: "killed"})])
    verdicts = run_group(2, train_poisoned, list(jobs.values()), timeout_s=300)
    assert verdicts[0] == verdicts[1]
    return {name: (plan, verdict) for (name, (plan, _)), verdict in zip(jobs.items(), verdicts[0], strict=True)}


@pytest.fixture(scope="module")
def runs(base: Plan) -> Runs:
    return live_through(base, lambda name: name in IN_CI)


@pytest.fixture(scope="module")
def all_runs(base: Plan, runs: Runs) -> Runs:
    return runs | live_through(base, lambda name: name not in IN_CI)


def lines(plan: Plan, kind: str) -> list[dict[str, Any]]:
    return [record for record in read(Path(plan.run_dir)) if record["kind"] == kind]


def progress_of(plan: Plan, step: int = STEPS) -> dict[str, Any]:
    return read_manifest(checkpoint_at(Path(plan.run_dir), step)).progress


def saved_steps(plan: Plan) -> list[int]:
    return [checkpoint.step for checkpoint in committed(FolderStore(Path(plan.run_dir)))]


@pytest.mark.long
def test_a_warning_is_a_line(all_runs: Runs) -> None:
    plan, verdict = all_runs["warned"]
    assert (verdict.kind, verdict.exit_code) == ("finished", 0)
    (spike,) = lines(plan, "spike")
    assert (spike["step"], spike["action"]) == (7, "warn")
    assert spike["deviations"] > 6
    assert spike["loss"] == last_of_each_step(Path(plan.run_dir))[7]["loss"] > spike["mean"]
    assert "standard deviations above the mean of the 4 steps before it" in spike["message"]
    assert progress_of(plan)["skipped"] == []
    assert spike["loss"] in progress_of(plan, 8)["losses"]


def test_a_stop_comes_before_the_update_and_names_rows(runs: Runs) -> None:
    plan, verdict = runs["stopped"]
    assert (verdict.kind, verdict.step, verdict.exit_code) == ("diverged", 6, 1)
    assert "the loss of step 7 is " in verdict.message
    assert verdict.message.count("rows.jsonl:") == 1  # of the micro batch that stood out
    assert verdict.hint is not None
    assert saved_steps(plan) == [4]
    assert max(last_of_each_step(Path(plan.run_dir))) == 6


def test_skipped_steps_are_told_and_not_learned_from(runs: Runs) -> None:
    plan, verdict = runs["skipped"]
    assert verdict.kind == "finished"
    assert [(line["step"], line["action"], line["loss"] is None) for line in lines(plan, "spike")] == [
        (1, "skip", True),
        (6, "skip", False),
    ]
    progress = progress_of(plan)
    assert (progress["skipped"], progress["spikes"]) == ([1, 6], 2)
    steps = last_of_each_step(Path(plan.run_dir))
    assert sorted(steps) == list(range(2, STEPS + 1))  # the loss of step 1 was no number
    assert progress["losses"] == [steps[step]["loss"] for step in range(STEPS - 3, STEPS + 1)]
    assert progress["tokens"] == sum(line["tokens"] for step, line in steps.items() if step != 6)


def test_too_many_end_the_run(runs: Runs) -> None:
    plan, verdict = runs["too often"]
    assert [(line["step"], line["action"]) for line in lines(plan, "spike")] == [(6, "skip"), (7, "stop")]
    assert (verdict.kind, verdict.step, verdict.exit_code) == ("not_finite", 6, 1)
    assert verdict.message.startswith("the gradient norm of step 7 is ")
    assert verdict.message.endswith("steps were left out 1 time before, which is guard.most")


@pytest.fixture(params=["back", pytest.param("back, bf16", marks=pytest.mark.long)])
def rolled_back(request: pytest.FixtureRequest) -> tuple[Plan, Verdict]:
    found: Runs = request.getfixturevalue("runs" if request.param in IN_CI else "all_runs")
    return found[request.param]


def test_a_rollback_leaves_out_what_came_since_the_checkpoint(rolled_back: tuple[Plan, Verdict]) -> None:
    plan, verdict = rolled_back
    assert (verdict.kind, verdict.step) == ("finished", STEPS)
    (line,) = lines(plan, "rollback")
    assert (line["step"], line["to_step"], line["skipped"]) == (7, 4, 3)
    assert progress_of(plan)["skipped"] == [5, 6, 7]
    assert read_manifest(checkpoint_at(Path(plan.run_dir), 8)).optimizer_step == 5
    assert saved_steps(plan) == [4, 8, 12]


def go_on_by_hand(plan: Plan) -> list[float]:
    """Losses of the steps 8 to 12, from the checkpoint of step 4 on. Collective."""
    from launcher.checkpoint.load import load
    from launcher.train.loop import optimizer_step
    from launcher.train.schedule import lr_factor

    quiet()
    where, losses = checkpoint_at(Path(plan.run_dir), 4), []
    with trainer(variant(plan, Path(plan.run_dir).name + "-by-hand")) as (parts, _):
        load(where, parts.engine, plan)
        for number in range(8, STEPS + 1):
            rate = plan.trajectory.optimizer.lr * lr_factor(plan.trajectory.schedule, number - 1, STEPS)
            result = optimizer_step(parts, number - 1, parts.train_data.global_batch(number - 1), rate)
            assert result is not None
            losses.append(result.loss)
    return losses


def test_after_a_rollback_it_is_the_checkpoint_that_goes_on(rolled_back: tuple[Plan, Verdict]) -> None:
    plan, _ = rolled_back
    steps = last_of_each_step(Path(plan.run_dir))
    assert run_group(2, go_on_by_hand, plan)[0] == [steps[step]["loss"] for step in range(8, STEPS + 1)]


@pytest.mark.long
def test_without_a_checkpoint_a_rollback_only_skips(all_runs: Runs) -> None:
    plan, verdict = all_runs["nowhere"]
    assert verdict.kind == "finished"
    assert lines(plan, "rollback") == []
    assert progress_of(plan)["skipped"] == [2]


@pytest.mark.parametrize("name", ["back", pytest.param("skipped", marks=pytest.mark.long)])
def test_killed_and_resumed_around_a_spike_is_as_uninterrupted(request: pytest.FixtureRequest, name: str) -> None:
    found: Runs = request.getfixturevalue("runs" if name == "back" else "all_runs")
    plan, again = found[name][0], found[f"{name}, resumed"][0]
    assert len(lines(again, "start")) == 2
    steps, resumed = last_of_each_step(Path(plan.run_dir)), last_of_each_step(Path(again.run_dir))
    assert sorted(steps) == sorted(resumed)
    for figure in ("loss", "grad_norm", "lr", "rows"):
        assert [steps[step][figure] for step in steps] == [resumed[step][figure] for step in steps], figure
    timeless = [{key: value for key, value in progress_of(run).items() if key != "elapsed_s"} for run in (plan, again)]
    assert timeless[0] == timeless[1]
    files = [read_manifest(checkpoint_at(Path(run.run_dir), STEPS)).files for run in (plan, again)]
    assert files[0] == files[1]
