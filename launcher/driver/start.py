"""A run's folder, from a recipe: what is decided before the first worker starts, and written down."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.driver.base_model import BaseModelProcess, model_settings, pinned
from launcher.driver.prepare import cluster_for, pinned_sources
from launcher.errors import RunFolderError
from launcher.plan.facts import ClusterFacts
from launcher.plan.plan import DataFacts, DataPlan, ModelPlan, Plan
from launcher.plan.resolve import resolve, resolve_model
from launcher.plan.resolve_data import resolve_data
from launcher.plan.size import parameter_count
from launcher.recipe.load import LoadedRecipe

if TYPE_CHECKING:
    from launcher.data.prepare.work import Progress

PACKAGES = ("torch", "deepspeed", "ray", "transformers", "datasets", "peft", "bitsandbytes", "flash-attn", "triton")
MINIMUM_FREE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Decided:
    """A recipe with its data prepared, before any cluster is known."""

    loaded: LoadedRecipe
    name: str
    run_dir: Path
    model: ModelPlan
    data: DataPlan
    facts: DataFacts
    parameters: int


def run_name(loaded: LoadedRecipe) -> str:
    """The recipe's `name`, or its file's."""
    return loaded.recipe.name or loaded.file.stem


def new_run_folder(loaded: LoadedRecipe, asked_for: Path | None) -> Path:
    """Absolute folder of a run that does not exist yet: as asked for, or a new one in `runs`.

    Raises:
        RunFolderError: there is a run in it.
    """
    folder = asked_for or Path(loaded.recipe.runs) / f"{run_name(loaded)}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = folder.expanduser().resolve()
    if (folder / "plan.json").exists():
        raise RunFolderError(
            f"{folder} already holds a run", hint=f"go on with it: slipway resume {folder}; or choose another --run-dir"
        )
    return folder


def decide(loaded: LoadedRecipe, run_dir: Path, report: Progress | None, address: str | None = None) -> Decided:
    """Look the model up and prepare the data, in `.prepared` beside the run's folder, which is not made yet.

    `address` is that of the cluster which prepares data that is too much for this machine.

    Raises:
        UserError: a model, file or row that cannot be used.
    """
    from launcher.data.prepare import prepare

    model = pinned(resolve_model(loaded, run_dir))
    settings = model_settings(model)
    data = pinned_sources(resolve_data(loaded))
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
    return Decided(loaded, run_name(loaded), run_dir, model, data, facts, parameters)


def base_model_process(decided: Decided) -> BaseModelProcess:
    """Start making the model ready; wait for it before the first worker starts."""
    recipe = decided.loaded.recipe
    return BaseModelProcess(
        decided.model, Path(decided.facts.folder) / "tokenizer", recipe.train.seed, recipe.data.packing
    )


def planned(decided: Decided, cluster: ClusterFacts) -> Plan:
    """The Plan on a cluster."""
    return resolve(
        decided.loaded,
        cluster,
        decided.model,
        decided.data,
        decided.facts,
        decided.parameters,
        decided.name,
        decided.run_dir,
    )


@contextlib.contextmanager
def claimed(run_dir: Path) -> Iterator[None]:
    """Make a new run's folder, and take it away again if the block fails before there is a run in it.

    A folder that was there already is left: it may be another launcher's, about to begin.

    Raises:
        RunFolderError: it cannot be made.
    """
    with writable(run_dir):
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        try:
            run_dir.mkdir()
            ours = True
        except FileExistsError:
            ours = False
    try:
        yield
    except BaseException:
        if ours and not (run_dir / "plan.json").exists():
            shutil.rmtree(run_dir, ignore_errors=True)
        raise


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
        (run_dir / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n", encoding="utf-8")
        plan.save(run_dir / "plan.json")


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Turn what the file system says about a run's folder into an error with a hint."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"cannot write to {folder}: {error.strerror or error}",
            hint="free some space, or choose another folder with --run-dir",
        ) from error


def environment() -> dict[str, Any]:
    """Versions of what decides a run's numbers, for whoever repeats it."""
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
        "command": sys.argv,
    }
