"""`slipway run --resume auto`: the same command line, run again and again, begins a run once and goes on with it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.cli.app import main
from launcher.driver.resume import (
    continued,
    existing_plan,
    has_finished,
    may_change,
    refuse_other_recipe,
    resumed_plan,
    run_to_resume,
)
from launcher.driver.start import create_run_folder
from launcher.errors import RecipeError
from launcher.plan.facts import this_machine
from launcher.plan.plan import Plan
from launcher.plan.resolve import resolve, resolve_model
from launcher.plan.resolve_data import resolve_data
from launcher.recipe.load import LoadedRecipe, load
from launcher.train.verdict import Verdict
from tests.plans import data_facts

RECIPE = """
description: the first try
model: {scratch: {model_type: gpt2, n_embd: 32, n_layer: 1, n_head: 2}}
data:
  train: [{path: rows.jsonl}]
train: {max_steps: 8}
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    (tmp_path / "rows.jsonl").write_text('{"instruction": "say yes", "output": "yes"}\n')
    (tmp_path / "x.yaml").write_text(RECIPE)
    return tmp_path


def begun(folder: str, *overrides: str, end: str | None = None, age_s: float = 0) -> Plan:
    """A run as its launcher leaves it before the first step, or with an end; begun `age_s` ago."""
    loaded = load("x.yaml", overrides)
    run_dir = Path(folder).absolute()
    run_dir.mkdir(parents=True)
    model, data, facts = resolve_model(loaded, run_dir), resolve_data(loaded), data_facts()
    name = loaded.recipe.name or "x"
    plan = resolve(loaded, this_machine(), model, data, facts, 10**6, name, run_dir, str(run_dir))
    create_run_folder(plan, loaded)
    then = (run_dir / "plan.json").stat().st_mtime - age_s
    os.utime(run_dir / "plan.json", (then, then))
    if end:
        Verdict(end, 8, "so it ended").save(run_dir)  # type: ignore[arg-type]
    return plan


def found(*overrides: str, at: str | None = None) -> str | None:
    """Name of the folder that the recipe would go on with."""
    plan = run_to_resume(load("x.yaml", overrides), at)
    return None if plan is None else Path(plan.run_dir).name


def test_the_newest_that_has_not_finished_is_taken_up(here: Path) -> None:
    assert found() is None, "there is no folder runs yet"
    begun("runs/finished", end="finished")
    assert found() is None
    begun("runs/other", "name=other")
    assert found() is None
    begun("runs/older", age_s=100)
    begun("runs/newer", age_s=50)
    begun("elsewhere/newest")
    (here / "runs" / ".prepared").mkdir()
    (here / "runs" / "broken").mkdir()
    (here / "runs" / "broken" / "plan.json").write_text("{}")
    assert found() == "newer"
    assert found("name=other") == "other"
    assert found("runs=elsewhere") == "newest"
    for end in ("stopped", "out_of_time", "not_finite", "unsaved", "error"):
        Verdict(end, 3, "").save(here / "runs" / "newer")  # type: ignore[arg-type]
        assert found() == "newer", end
    Verdict("finished", 8, "").save(here / "runs" / "newer")
    assert found() == "older"


def test_a_folder_that_is_named_is_the_only_one_looked_at(here: Path) -> None:
    begun("runs/there")
    assert found(at="runs/not-there") is None
    begun("mine", end="finished")
    assert found(at="mine") == "mine"


def test_a_longer_recipe_makes_a_finished_run_unfinished() -> None:
    plan = begun("mine", end="finished")
    assert has_finished(plan, load("x.yaml"))
    assert has_finished(plan, load("x.yaml", ["train.max_steps=4"]))
    assert not has_finished(plan, load("x.yaml", ["train.max_steps=9"]))
    assert not has_finished(begun("other"), load("x.yaml"))


def test_a_run_that_stopped_early_goes_on_once_its_guards_are_otherwise() -> None:
    guards = ["data.eval.split=0.1", "evaluate.early_stopping.patience=2"]
    plan = begun("runs/mine", *guards, end="stopped_early")
    assert found(*guards) is None
    assert has_finished(plan, load("x.yaml", guards))
    assert has_finished(plan, load("x.yaml", [*guards, "train.max_steps=9"]))
    assert not has_finished(plan, load("x.yaml", [guards[0], "evaluate.early_stopping.patience=3"]))
    assert not has_finished(plan, load("x.yaml", guards[:1]))
    refuse_other_recipe(plan, load("x.yaml", [*guards, "guard.spikes=skip", "evaluate.early_stopping.patience=3"]))
    retain = "evaluate.retain={sources: [{path: rows.jsonl}], limit: 0.5}"
    refused = refusal(plan, load("x.yaml", [*guards, retain]))
    assert "evaluate.retain.sources.0.path" in {problem.key for problem in refused.problems}
    assert may_change("evaluate.retain.limit")


@pytest.mark.parametrize("key", ["evaluate", "evaluate.max_rows", "evaluate.retain.max_rows", "evaluate.retain"])
def test_what_was_measured_before_is_compared_with_the_same_rows(key: str) -> None:
    assert not may_change(key)
    plan = begun("runs/mine")
    with pytest.raises(RecipeError) as error:
        resumed_plan(plan.location, [f"{key}=5"], this_machine())
    [problem] = error.value.problems
    assert problem.key == key
    assert problem.hint is not None
    assert "evaluate.*" in problem.hint
    assert "but for which rows are measured" in problem.hint


def test_a_run_that_stopped_early_is_said_to_have(capsys: pytest.CaptureFixture[str]) -> None:
    guards = ["data.eval.split=0.1", "evaluate.early_stopping.patience=2", "export.enabled=false"]
    plan = begun("mine", *guards)
    Verdict("stopped_early", 8, "stopped early at step 8: loss was best").save(Path(plan.run_dir))
    assert main(["run", "x.yaml", *guards, "--run-dir", "mine", "--resume", "auto"]) == 0
    assert capsys.readouterr().err == "note: mine has stopped early at step 8: loss was best\n"


def refusal(plan: Plan, loaded: LoadedRecipe) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        refuse_other_recipe(plan, loaded)
    assert caught.value.exit_code == 2
    return caught.value


def test_what_would_change_the_numbers_is_named_and_the_rest_is_taken(here: Path) -> None:
    plan = begun("mine", "optimizer.lr=1e-3")
    (here / "x.yaml").write_text(RECIPE.replace("first", "second") + "name: y\nschedule: {kind: linear}\n")
    refused = refusal(plan, load("x.yaml", ["train.seed=5", "data.workers=2", "runs=there"]))
    # In the order of the keys: what the run has and the recipe has no more, what it has otherwise, what is new.
    assert [(problem.key, problem.where) for problem in refused.problems] == [
        ("optimizer.lr", "default"),
        ("schedule.kind", "x.yaml:8"),
        ("train.seed", "command line"),
    ]
    for problem in refused.problems:
        assert problem.message == f"cannot change in a run already begun: {here / 'mine'}"
        assert str(problem.hint).endswith(f"model.path={here / 'mine'}/model; or begin another: --resume never")
    (here / "x.yaml").write_text(RECIPE)
    told = [
        "optimizer.lr=1e-3",
        "train.max_steps=12",
        "train.max_time=1h",
        "checkpoint.keep_last=7",
        "logging.every_steps=3",
    ]
    loaded = load("x.yaml", told)
    refuse_other_recipe(plan, loaded)
    longer = continued(plan, loaded, this_machine(), asks_for_workers=False)
    life = longer.lifecycle
    assert (life.total_steps, life.max_time_s, life.keep_last, life.log_every_steps) == (12, 3600.0, 7, 3)
    assert longer.trajectory == plan.trajectory
    assert existing_plan("mine") == longer
    # The recipe is the run's from now on: without them it is as it was.
    refuse_other_recipe(longer, load("x.yaml", told[:1]))
    again = continued(longer, load("x.yaml", told[:1]), this_machine(), asks_for_workers=False)
    assert again.lifecycle == plan.lifecycle


def test_a_longer_wait_for_lost_machines_leaves_the_layout_as_it_was() -> None:
    plan = begun("mine")
    odd = plan.model_copy(update={"layout": plan.layout.model_copy(update={"micro_batch_size": 3})})
    odd.save(Path("mine") / "plan.json")
    longer = resumed_plan("mine", ["cluster.wait_s=5", "cluster.hang_timeout_s=null"], this_machine())
    assert (longer.lifecycle.wait_s, longer.lifecycle.hang_timeout_s) == (5.0, None)
    assert longer.layout == odd.layout
    assert resumed_plan("mine", ["cluster.workers=1"], this_machine()).layout == plan.layout


def test_the_same_files_from_another_place_are_the_same(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "recipes").mkdir()
    (here / "x.yaml").rename(here / "recipes" / "x.yaml")
    (here / "recipes" / "x.yaml").write_text(RECIPE + "\noptimizer: {betas: [0.9, 0.95]}\n")
    loaded = load("recipes/x.yaml")
    run_dir = here / "mine"
    run_dir.mkdir()
    model, data, facts = resolve_model(loaded, run_dir), resolve_data(loaded), data_facts()
    plan = resolve(loaded, this_machine(), model, data, facts, 10**6, "x", run_dir, str(run_dir))
    create_run_folder(plan, loaded)
    monkeypatch.chdir(here / "recipes")
    refuse_other_recipe(plan, load("x.yaml", [f"data.train.0.path={here}/rows.jsonl"]))
    (here / "recipes" / "rows.jsonl").write_text("{}\n")
    refused = refusal(plan, load("x.yaml", ["optimizer.betas=[0.9, 0.99]"]))
    assert [problem.key for problem in refused.problems] == ["data.train.0.path", "optimizer.betas.1"]


def test_a_finished_run_is_said_to_be_and_its_model_named(capsys: pytest.CaptureFixture[str]) -> None:
    plan = begun("mine", end="finished")
    model = Path(plan.run_dir) / "model"
    model.mkdir()
    (model / "slipway.json").write_text("{}")
    assert main(["run", "x.yaml", "--run-dir", "mine", "--resume", "auto"]) == 0
    out, err = capsys.readouterr()
    assert out == "model: mine/model\n"
    assert err == "note: mine has finished\n"
    assert main(["run", "x.yaml", "--run-dir", "mine", "--resume", "never"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["run", "x.yaml", "--resume", "maybe"]) == 2
    assert "'maybe' is not one of 'auto', 'never'" in capsys.readouterr().err


def test_without_a_model_to_export_there_is_none_to_name(capsys: pytest.CaptureFixture[str]) -> None:
    begun("mine", "export.enabled=false", end="finished")
    assert main(["run", "x.yaml", "export.enabled=false", "--run-dir", "mine", "--resume", "auto"]) == 0
    assert capsys.readouterr() == ("", "note: mine has finished\n")
