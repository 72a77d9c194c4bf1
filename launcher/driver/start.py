"""A run's folder, from a recipe: what is decided before the first worker starts, and written down."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.checkpoint.lease import Lease, acquire
from launcher.driver.base_model import BaseModelProcess, model_settings, pinned
from launcher.driver.prepare import cluster_for, pinned_sources
from launcher.errors import RunFolderError
from launcher.model.fingerprint import STAMPS
from launcher.plan.facts import ClusterFacts
from launcher.plan.plan import DataFacts, DataPlan, ModelPlan, Plan
from launcher.plan.resolve import resolve, resolve_model
from launcher.plan.resolve_data import resolve_data
from launcher.plan.size import parameter_count
from launcher.recipe.load import LoadedRecipe
from launcher.store.location import is_url, local_folder, open_store, run_url
from launcher.train import startup

if TYPE_CHECKING:
    from launcher.data.prepare.work import Progress

PACKAGES = ("torch", "deepspeed", "ray", "transformers", "datasets", "peft", "bitsandbytes", "flash-attn", "triton")
GIT_ANSWERS_S = 5
MINIMUM_FREE_BYTES = 64 * 2**20
DATA = "data"
"""In the spool of a run in an object store: its prepared data."""


@dataclass(frozen=True)
class Decided:
    """A recipe with its data prepared, before any cluster is known."""

    loaded: LoadedRecipe
    name: str
    location: str
    """Absolute folder or URL, see `Plan.location`."""
    run_dir: Path
    model: ModelPlan
    data: DataPlan
    facts: DataFacts
    parameters: int


def run_name(loaded: LoadedRecipe) -> str:
    """The recipe's `name`, or its file's."""
    return loaded.recipe.name or loaded.file.stem


def new_run_folder(loaded: LoadedRecipe, asked_for: str | None) -> str:
    """Where a run that does not exist yet will be, an absolute folder or a URL: as asked for, or a new one in `runs`.

    Raises:
        RunFolderError: there is a run in it; the store that was asked for cannot be read.
    """
    if asked_for is None:
        runs = loaded.recipe.runs.rstrip("/") if is_url(loaded.recipe.runs) else loaded.recipe.runs
        return whole_location(f"{runs}/{run_name(loaded)}-{time.strftime('%Y%m%d-%H%M%S')}")
    location = whole_location(asked_for)
    if holds_run(location):
        raise RunFolderError(
            f"{location} already holds a run",
            hint=f"go on with it: slipway resume {location}; or choose another --run-dir",
        )
    return location


def whole_location(location: str) -> str:
    """An absolute folder, or a URL as it is kept."""
    return run_url(location) if is_url(location) else str(local_folder(location))


def holds_run(location: str) -> bool:
    """Whether a run has begun there. Raises RunFolderError where the store cannot be read."""
    with writable(location):
        return "plan.json" in open_store(location).names()


def decide(loaded: LoadedRecipe, location: str | Path, report: Progress | None, address: str | None = None) -> Decided:
    """Look the model up and prepare the data, in `.prepared` beside the run's folder, which is not made yet.

    `address` is that of the cluster which prepares data that is too much for this machine.

    Raises:
        UserError: a model, file or row that cannot be used.
    """
    from launcher.data.prepare import prepare

    startup.ended("data imports")
    location = whole_location(str(location))
    run_dir = local_folder(location)
    model = pinned(resolve_model(loaded, run_dir))
    settings = model_settings(model)
    data = with_head(pinned_sources(resolve_data(loaded)), settings)
    workers = loaded.recipe.data.workers
    with cluster_for(loaded.recipe.data.prepare_on, data, address) as spread:
        facts = prepare(
            model,
            data,
            seed=loaded.recipe.train.seed,
            cache_dir=run_dir.parent / ".prepared",
            progress=report,
            workers=None if workers == "auto" else workers,
            spread=spread,
        )
    parameters = parameter_count({"vocab_size": facts.vocab_size} | settings)
    return Decided(loaded, run_name(loaded), location, run_dir, model, data, facts, parameters)


def with_head(data: DataPlan, settings: Mapping[str, Any]) -> DataPlan:
    """`data` of a sequence classification with the classes that the model of these settings tells apart already."""
    if data.head is None or not str(settings.get("architectures")).endswith("ForSequenceClassification']"):
        return data
    names: dict[str, str] = settings.get("id2label") or {}
    return data.model_copy(update={"head": tuple(names[number] for number in sorted(names, key=int))})


def base_model_process(decided: Decided) -> BaseModelProcess:
    """Start making the model ready, in the run's folder, which is there and holds no run; wait for it before the first
    worker starts."""
    recipe, run_dir = decided.loaded.recipe, decided.run_dir
    # Of a start that was killed, perhaps with another recipe: a base that is there would be kept.
    shutil.rmtree(run_dir / "base", ignore_errors=True)
    return BaseModelProcess(
        decided.model,
        Path(decided.facts.folder) / "tokenizer",
        recipe.train.seed,
        decided.data.packing,
        decided.facts.classes,
        run_dir / STAMPS,
    )


def planned(decided: Decided, cluster: ClusterFacts) -> Plan:
    """The Plan on a cluster, but for the model's fingerprint, see `with_fingerprint`."""
    facts = decided.facts
    if is_url(decided.location):  # at the same place on every node, whichever of them prepared it
        facts = facts.model_copy(update={"folder": str(decided.run_dir / DATA)})
    return resolve(
        decided.loaded,
        cluster,
        decided.model,
        decided.data,
        facts,
        decided.parameters,
        decided.name,
        decided.run_dir,
        decided.location,
    )


def with_fingerprint(plan: Plan, fingerprint: str | None) -> Plan:
    """The Plan of a model that is ready."""
    model = plan.trajectory.model.model_copy(update={"fingerprint": fingerprint})
    return plan.model_copy(update={"trajectory": plan.trajectory.model_copy(update={"model": model})})


@contextlib.contextmanager
def claimed(location: str) -> Iterator[Lease]:
    """Make a new run's folder and hold the run for the block; the folder is taken away again if the block fails before
    there is a run in it.

    A folder that was there already is left: it may be another launcher's, about to begin.

    Raises:
        RunFolderError: it cannot be made, or another launcher holds it.
    """
    run_dir = local_folder(location)
    with writable(location):
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        try:
            run_dir.mkdir()
            ours = True
        except FileExistsError:
            ours = False
    try:
        with acquire(open_store(location)) as lease:
            if is_url(location) and not ours:  # of a run that is no more in the store, or never came to be
                clear(run_dir)
            yield lease
    except BaseException:
        if ours and not (run_dir / "plan.json").exists():
            shutil.rmtree(run_dir, ignore_errors=True)
        raise


def clear(folder: Path) -> None:
    """Empty a folder; links are removed, not followed."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def create_run_folder(plan: Plan, loaded: LoadedRecipe) -> None:
    """Fill the run's folder: recipe.yaml, environment.json, and plan.json last, which makes it a run.

    Raises:
        RunFolderError: it cannot be written, or its disk is full.
    """
    run_dir = Path(plan.run_dir)
    with writable(run_dir):
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(run_dir).free
        if free < MINIMUM_FREE_BYTES:
            raise RunFolderError(
                f"no space left in {run_dir}: {free / 2**20:.0f} MiB free",
                hint="free some, or choose another --run-dir",
            )
        (run_dir / "recipe.yaml").write_text(loaded.text, encoding="utf-8")
        found = environment(loaded.file.parent)
        (run_dir / "environment.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        plan.save(run_dir / "plan.json")


@contextlib.contextmanager
def writable(place: Path | str) -> Iterator[None]:
    """Turn what the file system, or the object store, says about a run's place into an error with a hint."""
    try:
        yield
    except OSError as error:
        if is_url(str(place)):
            from launcher.store.objects import ObjectStore

            ObjectStore(str(place)).check(writes=False)  # tells what to do where it fails too
            raise RunFolderError(
                f"{place}: {error.strerror or error}", hint="check the connection, the bucket and the credentials"
            ) from error
        raise RunFolderError(
            f"cannot write to {place}: {error.strerror or error}",
            hint="free some space, or choose another folder with --run-dir",
        ) from error


def environment(folder: Path) -> dict[str, Any]:
    """Versions of what decides a run's numbers, for whoever repeats it; `folder` is the recipe's."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": versions,
        "git": git_state(folder),
        "command": sys.argv,
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """{"commit", "changed": whether files of it differ from that} of the repository that a folder is in; None for
    none."""
    told = []
    for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(
                ["git", "-C", folder, *command], capture_output=True, text=True, timeout=GIT_ANSWERS_S
            )
        except (OSError, subprocess.TimeoutExpired):  # no git, or a repository on a slow disk
            return None
        if done.returncode:
            return None
        told.append(done.stdout.strip())
    return {"commit": told[0], "changed": bool(told[1])}
