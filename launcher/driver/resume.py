"""A run already begun: its Plan, with what a resume may change changed."""

from __future__ import annotations

from pathlib import Path

from launcher.driver.base_model import model_settings
from launcher.driver.start import writable
from launcher.errors import Problem, RecipeError, RunFolderError
from launcher.plan.facts import ClusterFacts
from launcher.plan.layout import choose_device, resolve_layout
from launcher.plan.plan import Plan
from launcher.plan.resolve import origins, resolve_lifecycle
from launcher.plan.size import parameter_count
from launcher.recipe.load import load

RESUME_SECTIONS = ("evaluate", "checkpoint", "logging", "cluster", "export")
RESUME_KEYS = ("train.epochs", "train.max_steps", "train.max_time")


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

    The folder's recipe.yaml and plan.json change with it: the next resume goes on from what this one was told.

    Raises:
        RecipeError: an override that a resume does not take, or a wrong value.
        ClusterError: the cluster cannot hold it.
        RunFolderError: the folder cannot be written.
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
    resumed = plan.model_copy(
        update={"layout": layout, "lifecycle": lifecycle, "origins": plan.origins | origins(loaded, reasons)}
    )
    with writable(run_dir):
        (run_dir / "recipe.yaml").write_text(loaded.text, encoding="utf-8")
        resumed.save(run_dir / "plan.json")
    return resumed


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
