"""A run already begun: its Plan where it lies now, with what a resume may change changed."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from launcher.driver import remote
from launcher.driver.base_model import model_settings
from launcher.driver.start import DATA, holds_run, run_name, whole_location, writable
from launcher.errors import DataError, Problem, RecipeError, RunFolderError
from launcher.model.fingerprint import STAMPS, check_unchanged
from launcher.plan.facts import ClusterFacts
from launcher.plan.layout import choose_device, resolve_layout
from launcher.plan.plan import Plan
from launcher.plan.resolve import origins, resolve_lifecycle
from launcher.plan.size import parameter_count
from launcher.recipe.load import LoadedRecipe, load
from launcher.recipe.schema import Recipe
from launcher.store.location import local_folder, open_store
from launcher.store.store import Store
from launcher.train.trackers.needed import require
from launcher.train.verdict import FILE as VERDICT_FILE
from launcher.train.verdict import Verdict

RESUME_SECTIONS = ("evaluate", "guard", "checkpoint", "logging", "cluster", "export")
RESUME_KEYS = ("train.epochs", "train.max_steps", "train.max_time", "audit", "model.attention", "model.kernels")
ROWS_KEYS = ("evaluate", "evaluate.max_rows", "evaluate.retain", "evaluate.retain.sources", "evaluate.retain.max_rows")
"""What says which rows are measured: of others the loss before, the best one and patience would mean nothing."""
LAYOUT_KEYS = ("cluster.workers", "cluster.cpus_per_worker")
"""Those that ask for another layout: the rest of `cluster` is about failures."""
NOT_OF_THE_RUN = ("extends", "name", "description", "runs", "data.workers", "data.prepare_on")
"""Keys of a recipe that decide nothing of a run already begun: what it is called, and who prepares its data."""


def existing_plan(location: str | Path) -> Plan:
    """The Plan of a run, which may have been moved since: its paths are those of today.

    Raises:
        RunFolderError: there is no run, or its plan.json cannot be understood.
    """
    location = whole_location(str(location))
    try:
        with writable(location):
            content = open_store(location).read("plan.json")
    except RunFolderError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            raise RunFolderError(f"{location} holds no run", hint="slipway runs lists them") from None
        raise
    try:
        return rebased(Plan.model_validate_json(content), location)
    except ValidationError as error:
        raise RunFolderError(
            f"plan.json of {location} cannot be understood: it is damaged, or of another version of Slipway",
            hint="use the version that its environment.json names, or start a new run",
        ) from error


def rebased(plan: Plan, location: str) -> Plan:
    """The Plan of a run that lies at `location` now: what it names of its own folder and beside it has moved along."""
    before, now = Path(plan.run_dir), local_folder(location)
    if before == now and plan.location == location:
        return plan
    model = plan.trajectory.model
    if model.source == "scratch" and Path(model.path).is_relative_to(before):
        model = model.model_copy(update={"path": str(now / Path(model.path).relative_to(before))})
    return plan.model_copy(
        update={
            "run_dir": str(now),
            "location": location,
            "trajectory": plan.trajectory.model_copy(update={"model": model}),
            "data": plan.data.model_copy(update={"folder": str(_data_now(Path(plan.data.folder), before, now))}),
        }
    )


def _data_now(folder: Path, before: Path, now: Path) -> Path:
    """The prepared data: in the run's folder, where it was, or in `.prepared` beside the run's new place."""
    if folder.is_relative_to(before):
        return now / folder.relative_to(before)
    beside = now.parent / folder.parent.name / folder.name
    return beside if not folder.is_dir() and beside.is_dir() else folder


def ready_again(plan: Plan) -> Plan:
    """Have on this machine what the run needs beside its checkpoints, as it was when it began: the Plan that names it.

    Raises:
        ModelError: the base model is gone or is another one by now.
        DataError: the prepared data is gone, and what its sources hold now is something else.
        RunFolderError: the store refuses.
    """
    remote.fetch(plan, "base", DATA)
    model = plan.trajectory.model
    if model.fingerprint is not None:
        check_unchanged(Path(model.path), model.fingerprint, Path(plan.run_dir) / STAMPS)
    if Path(plan.data.folder).is_dir():
        return plan
    return plan.model_copy(update={"data": plan.data.model_copy(update={"folder": str(_prepared_again(plan))})})


def _prepared_again(plan: Plan) -> Path:
    """Where the run was moved without its data: make it from the sources, which must still be what they were.

    Lies where `existing_plan` finds it from now on.
    """
    from launcher.data.prepare import prepare

    folder, run_dir, trajectory = Path(plan.data.folder), Path(plan.run_dir), plan.trajectory
    cache = run_dir.parent / ".prepared"
    hint = f"bring {folder} back from where the run has been, or start a new run"
    try:
        facts = prepare(trajectory.model, trajectory.data, seed=trajectory.seed, cache_dir=cache)
    except DataError as error:
        raise DataError(f"the run's prepared data {folder} is gone; and {error.message}", hint=hint) from error
    if facts.content_hash != plan.data.content_hash:
        raise DataError(
            f"the run's prepared data {folder} is gone, and its sources hold something else by now", hint=hint
        )
    place = folder if folder.is_relative_to(run_dir) else cache / folder.name
    if Path(facts.folder) != place:  # other versions of what prepares it give it another name
        place.symlink_to(facts.folder, target_is_directory=True)
    return place


def resumed_plan(location: str | Path, overrides: list[str], cluster: ClusterFacts) -> Plan:
    """A run's Plan with the keys changed that a resume may change; its trajectory stays as it was.

    The run's recipe.yaml and plan.json change with it: the next resume goes on from what this one was told.

    Raises:
        RecipeError: an override that a resume does not take, or a wrong value.
        ClusterError: the cluster cannot hold it.
        RunFolderError: the folder cannot be written.
    """
    plan = existing_plan(location)
    refuse_trajectory_keys(overrides, plan.location)
    loaded = load(str(Path(plan.run_dir) / "recipe.yaml"), overrides)
    return continued(plan, loaded, cluster, any(override.startswith(LAYOUT_KEYS) for override in overrides))


def continued(plan: Plan, loaded: LoadedRecipe, cluster: ClusterFacts, asks_for_workers: bool) -> Plan:
    """As `resumed_plan`, for a recipe that differs from the run's in nothing but what a resume may change.

    Unless it `asks_for_workers` in another way than before, the layout stays where the cluster can hold it, but for the
    kernels that the recipe names: the audit may have found something in those that the run had.
    """
    run_dir, reasons = Path(plan.run_dir), dict[str, str]()
    parameters = parameter_count(model_settings(plan.trajectory.model))
    layout = resolve_layout(loaded.recipe, cluster, plan.trajectory.dtype, parameters, reasons)
    if not asks_for_workers and layout.device == plan.layout.device and fits(plan, cluster):
        named = {"attention": loaded.recipe.model.attention, "kernels": loaded.recipe.model.kernels}
        layout = plan.layout.model_copy(update={key: kernel for key, kernel in named.items() if kernel != "auto"})
    lifecycle = resolve_lifecycle(loaded, plan.data, reasons)
    refuse_new_slices(lifecycle.slices, plan, loaded)
    require(lifecycle.trackers)
    resumed = plan.model_copy(
        update={"layout": layout, "lifecycle": lifecycle, "origins": plan.origins | origins(loaded, reasons)}
    )
    with writable(run_dir):
        (run_dir / "recipe.yaml").write_text(loaded.text, encoding="utf-8")
        resumed.save(run_dir / "plan.json")
    remote.refresh(resumed)
    return resumed


def refuse_new_slices(slices: tuple[str, ...], plan: Plan, loaded: LoadedRecipe) -> None:
    """Raise RecipeError for a column whose values the held-out rows have not kept."""
    kept = plan.trajectory.data.slices
    new = ", ".join(column for column in slices if column not in kept)
    if new:
        message = f"the run's data was prepared without {new}"
        hint = f"it has {', '.join(kept)}" if kept else "start a new run, or leave the slices out"
        raise RecipeError([Problem(str(loaded.origin("evaluate.slices.0")), "evaluate.slices", message, hint)])


def fits(plan: Plan, cluster: ClusterFacts) -> bool:
    """Whether the cluster can hold the layout that the run had, at its smallest."""
    layout, gpu = plan.layout, plan.layout.device == "cuda"
    same = choose_device(cluster) == layout.device
    return same and cluster.room(layout.cpus_per_worker, gpu) >= layout.min_workers


def refuse_trajectory_keys(overrides: list[str], location: str | Path) -> None:
    """Raise RecipeError for every override that would change the numbers of a run already begun."""
    keys = [override.split("=", 1)[0] for override in overrides]
    refused = [_refusal("command line", key, location) for key in keys if not may_change(key)]
    if refused:
        raise RecipeError(refused)


def may_change(key: str) -> bool:
    """Whether a resume takes this key."""
    if ".".join(key.split(".")[:3]) in ROWS_KEYS:
        return False
    return key in RESUME_KEYS or key.split(".")[0] in RESUME_SECTIONS


def _refusal(where: str, key: str, location: str | Path) -> Problem:
    hint = (
        f"a resume takes {', '.join(RESUME_KEYS)} and {', '.join(s + '.*' for s in RESUME_SECTIONS)}, "
        "but for which rows are measured; "
        f"for anything else start a new run from this model: model.path={location}/model"
    )
    return Problem(where, key, f"cannot change in a run already begun: {location}", hint)


def run_to_resume(loaded: LoadedRecipe, asked_for: str | None) -> Plan | None:
    """The run that `--resume auto` goes on with: the one at `asked_for`, else the newest in the recipe's `runs` of its
    name that has not finished; None where there is none.

    Raises:
        RunFolderError: the folder or store cannot be read, or its plan cannot be understood.
    """
    if asked_for is not None:
        location = whole_location(asked_for)
        return existing_plan(location) if holds_run(location) else None
    runs = whole_location(loaded.recipe.runs)
    with writable(runs):
        store = open_store(runs)
        begun = {name: store.modified(f"{name}/plan.json") for name in names_of_runs(store)}
    for name in sorted(begun, key=lambda name: begun[name], reverse=True):
        with contextlib.suppress(RunFolderError):  # an unreadable one is not ours to go on with
            plan = existing_plan(f"{runs}/{name}")
            verdict = latest_verdict(plan.location)
            if plan.name == run_name(loaded) and not (verdict and verdict.kind in ("finished", "stopped_early")):
                return plan
    return None


def names_of_runs(store: Store) -> list[str]:
    """The runs directly in a folder or below a URL, sorted. Raises OSError."""
    return [name for name in store.names() if not name.startswith(".") and "plan.json" in store.names(name)]


def latest_verdict(location: str) -> Verdict | None:
    """How a run ended last, None while it has not; also where that cannot be read."""
    with contextlib.suppress(OSError):
        return Verdict.parse(open_store(location).read(VERDICT_FILE))
    return None


def has_finished(plan: Plan, loaded: LoadedRecipe) -> bool:
    """Whether a run has done all that a recipe asks for, which may be more than when it began. One that a guard has
    ended may go on where the recipe has its guards otherwise by now."""
    verdict, before = latest_verdict(plan.location), plan.lifecycle
    now = resolve_lifecycle(loaded, plan.data, {})
    if verdict is not None and verdict.kind == "stopped_early":
        guards = ("metric", "early_stopping", "retain")
        return all(getattr(now, guard) == getattr(before, guard) for guard in guards)
    return verdict is not None and verdict.kind == "finished" and verdict.step >= now.total_steps


def refuse_other_recipe(plan: Plan, loaded: LoadedRecipe) -> None:
    """Raise RecipeError for every key whose value differs from the run's and that a resume does not take."""
    ours, theirs = leaves(run_recipe(plan)), leaves(merged_recipe(loaded))
    differing = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
    refused = [key for key in differing if not may_change(key) and key not in NOT_OF_THE_RUN]
    if refused:
        problems = [_refusal(str(loaded.origin(key)), key, plan.location) for key in refused]
        raise RecipeError(
            [replace(problem, hint=f"{problem.hint}; or begin another: --resume never") for problem in problems]
        )


def run_recipe(plan: Plan) -> Recipe:
    """The recipe that a run was told last."""
    with writable(plan.location):
        text = open_store(plan.location).read("recipe.yaml").decode()
    return _parsed(text)


def merged_recipe(loaded: LoadedRecipe) -> Recipe:
    """A recipe as it would be kept with its run: paths are absolute."""
    return _parsed(loaded.text)


def _parsed(text: str) -> Recipe:
    with tempfile.TemporaryDirectory(prefix="slipway-") as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(text, encoding="utf-8")
        return load(str(file)).recipe


def leaves(recipe: Recipe) -> dict[str, Any]:
    """{dotted key: value} of all that is in a recipe; an empty list or mapping counts as a value."""

    def inside(value: Any, key: str) -> dict[str, Any]:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        found = {leaf: end for name, inner in items for leaf, end in inside(inner, f"{key}.{name}").items()}
        return found or {key: value}

    values = recipe.model_dump(mode="json")
    return {leaf: end for name, value in values.items() for leaf, end in inside(value, name).items()}
