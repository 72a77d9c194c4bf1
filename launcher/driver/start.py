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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from launcher.checkpoint.layout import newest_committed
from launcher.errors import ModelError, RecipeError, RunFolderError
from launcher.plan.facts import ClusterFacts
from launcher.plan.layout import choose_device, resolve_layout
from launcher.plan.plan import DataFacts, ModelPlan, Plan
from launcher.plan.resolve import origins, resolve, resolve_data, resolve_lifecycle, resolve_model
from launcher.plan.size import parameter_count
from launcher.recipe.load import LoadedRecipe, load

Reporter = Callable[[str, int, int | None], None]
"""Progress of the preparation: what, how many done, how many in all."""
PACKAGES = ("torch", "deepspeed", "ray", "transformers", "datasets", "peft", "bitsandbytes", "flash-attn", "triton")
RESUME_SECTIONS = ("evaluate", "checkpoint", "logging", "cluster", "export")
RESUME_KEYS = ("train.epochs", "train.max_steps", "train.max_time")
MINIMUM_FREE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Decided:
    """A recipe with its data prepared, before any cluster is known."""

    loaded: LoadedRecipe
    name: str
    run_dir: Path
    model: ModelPlan
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


def decide(loaded: LoadedRecipe, run_dir: Path, report: Reporter | None) -> Decided:
    """Look the model up and prepare the data, in `.prepared` beside the run's folder, which is not made yet.

    Raises:
        UserError: a model, file or row that cannot be used.
    """
    from launcher.data.prepare import prepare

    model = pinned(resolve_model(loaded, run_dir))
    settings = model_settings(model)
    facts = prepare(
        model,
        resolve_data(loaded),
        seed=loaded.recipe.train.seed,
        cache_dir=run_dir.parent / ".prepared",
        progress=report,
    )
    parameters = parameter_count({"vocab_size": facts.vocab_size} | settings)
    return Decided(loaded, run_name(loaded), run_dir, model, facts, parameters)


def planned(decided: Decided, cluster: ClusterFacts) -> Plan:
    """The Plan on a cluster."""
    return resolve(
        decided.loaded,
        cluster,
        decided.model,
        resolve_data(decided.loaded),
        decided.facts,
        decided.parameters,
        decided.name,
        decided.run_dir,
    )


def pinned(model: ModelPlan) -> ModelPlan:
    """A hub id with its branch or tag resolved to a commit, so that every node and every resume reads the same weights.

    Raises:
        ModelError: the hub does not answer and the cache does not have it, or the model is gated.
    """
    if model.source != "hub":
        return model
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = snapshot_download(model.path, revision=model.revision, allow_patterns=["config.json"])
    except GatedRepoError as error:
        raise ModelError(
            f"{model.path} is gated", hint="accept its terms on the model's page and set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{model.path} is neither a folder here nor a model on the hub",
            hint="check the path or id; set HF_TOKEN for private models",
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(
            f"{model.path} is no folder here, and the hub cannot be reached: {str(error).strip().splitlines()[0]}",
            hint="check the path; offline, download the model first and set HF_HUB_OFFLINE=1",
        ) from error
    return model.model_copy(update={"revision": Path(folder).name})


def model_settings(model: ModelPlan) -> dict[str, Any]:
    """The model's config.json, without importing transformers.

    Raises:
        ModelError: the folder has none.
    """
    if model.source == "scratch":
        assert model.scratch is not None
        return model.scratch
    if model.source == "hub":
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(model.path, "config.json", revision=model.revision))
    else:
        path = Path(model.path) / "config.json"
    if not path.is_file():
        raise ModelError(
            f"{model.path} has no config.json", hint="give a folder that save_pretrained wrote, or a hub id"
        )
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return settings


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


class BaseModelProcess:
    """`launcher.model.ready` in a process of its own: started early, waited for before the first worker."""

    def __init__(self, decided: Decided) -> None:
        request = {
            "model": decided.model.model_dump(mode="json"),
            "tokenizer_folder": str(Path(decided.facts.folder) / "tokenizer"),
            "seed": decided.loaded.recipe.train.seed,
            "packing": decided.loaded.recipe.data.packing,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launcher.model.ready"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request))
        self.process.stdin.flush()

    def wait(self) -> None:
        """Until the model is there.

        Raises:
            ModelError: as the process said, or with its last line where it ended without a word.
        """
        out, err = self.process.communicate()
        lines = out.splitlines()
        answer = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {"error": None}
        if "error" in answer:
            last = err.strip().splitlines()[-1:] or ["no output"]
            raise ModelError(
                answer["error"] or f"the model cannot be made ready: {last[0]}",
                answer.get("hint") or "check model in the recipe",
            )

    def close(self) -> None:
        """Stop it if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


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


def existing_plan(run_dir: Path) -> Plan:
    """The Plan of a run.

    Raises:
        RunFolderError: the folder holds none.
    """
    file = run_dir / "plan.json"
    if not file.is_file():
        raise RunFolderError(f"{run_dir} holds no run", hint="slipway runs lists them")
    return Plan.load(file)


def resumed_plan(run_dir: Path, overrides: list[str], cluster: ClusterFacts) -> Plan:
    """A run's Plan with the keys changed that a resume may change; its trajectory stays as it was.

    Raises:
        RecipeError: an override that a resume does not take, or a wrong value.
        ClusterError: the cluster cannot hold it.
    """
    plan = existing_plan(run_dir)
    refuse_trajectory_keys(overrides, run_dir)
    loaded = load(str(run_dir / "recipe.yaml"), overrides)
    reasons: dict[str, str] = {}
    parameters = parameter_count(model_settings(plan.trajectory.model))
    layout = resolve_layout(loaded.recipe, cluster, plan.trajectory.dtype, parameters, reasons)
    if not any(override.startswith("cluster.") for override in overrides) and layout.device == plan.layout.device:
        layout = plan.layout if fits(plan, cluster) else layout
    lifecycle = resolve_lifecycle(loaded.recipe, plan.data, reasons)
    return plan.model_copy(
        update={"layout": layout, "lifecycle": lifecycle, "origins": plan.origins | origins(loaded, reasons)}
    )


def fits(plan: Plan, cluster: ClusterFacts) -> bool:
    """Whether the cluster can hold the layout that the run had."""
    layout = plan.layout
    if layout.device == "cuda":
        return cluster.gpus >= layout.workers
    return (
        choose_device(cluster) == "cpu"
        and sum(node.cpus // layout.cpus_per_worker for node in cluster.nodes) >= layout.workers
    )


def refuse_trajectory_keys(overrides: list[str], run_dir: Path) -> None:
    """Raise RecipeError for every override that would change the numbers of a run already begun."""
    from launcher.errors import Problem

    refused = []
    for override in overrides:
        key = override.split("=", 1)[0]
        if key not in RESUME_KEYS and key.split(".")[0] not in RESUME_SECTIONS:
            hint = (
                f"a resume takes {', '.join(RESUME_KEYS)} and {', '.join(s + '.*' for s in RESUME_SECTIONS)}; "
                f"for anything else start a new run from this model: model.path={run_dir}/model"
            )
            refused.append(Problem("command line", key, "cannot change in a run already begun", hint))
    if refused:
        raise RecipeError(refused)


def has_checkpoint(run_dir: Path) -> bool:
    """Whether there is anything to go on from."""
    return newest_committed(run_dir) is not None
