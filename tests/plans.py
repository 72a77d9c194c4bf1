"""Parts of a Plan for tests, with the recipe's defaults where a test says nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.errors import RecipeError
from launcher.plan.plan import (
    AugmentPlan,
    CleanPlan,
    DataFacts,
    DataPlan,
    GeneratePlan,
    GuardPlan,
    HeldOutPlan,
    LayoutPlan,
    Lifecycle,
    MethodPlan,
    ModelPlan,
    OptimizerPlan,
    Plan,
    SchedulePlan,
    SourcePlan,
    Trajectory,
)
from launcher.recipe.load import load
from launcher.recipe.schema_data import Augment, Clean, Data, Source
from launcher.recipe.schema_evaluate import Generate
from launcher.recipe.schema_train import Guard, Method, Optimizer


def source_plan(path: Path | str, **changes: Any) -> SourcePlan:
    values = {"kind": "local"} | Source(path=str(path)).model_dump() | changes
    return SourcePlan(**values)


def held_out(split: float | None = None, rows: int | None = None, sources: tuple[SourcePlan, ...] = ()) -> HeldOutPlan:
    return HeldOutPlan(split=split, rows=rows, sources=sources)


def clean_plan(**changes: Any) -> CleanPlan:
    return CleanPlan(**(Clean().model_dump() | changes))


def augment_plan(**changes: Any) -> AugmentPlan:
    values = Augment().model_dump(exclude={"function"}) | {"function_file": None, "function_name": None}
    return AugmentPlan(**(values | changes))


def data_plan(*train: SourcePlan, **changes: Any) -> DataPlan:
    parts: dict[str, Any] = {"train": train, "eval": held_out(), "test": held_out(), "retain": (), "slices": ()}
    parts |= {"head": None}
    parts |= {"clean": clean_plan(), "augment": augment_plan()}
    values = Data().model_dump(exclude={"workers", "prepare_on"}) | parts | changes
    return DataPlan(**values)


def model_plan(path: Path | str, **changes: Any) -> ModelPlan:
    values: dict[str, Any] = {
        "source": "folder",
        "path": str(path),
        "revision": None,
        "scratch": None,
        "tokenizer": None,
        "chat_template": None,
        "template_kwargs": {},
        "add_tokens": (),
        "dropout": None,
        "trust_remote_code": False,
        "fingerprint": None,
    }
    return ModelPlan(**(values | changes))


def method_plan(kind: str = "full", **changes: Any) -> MethodPlan:
    """As `resolve_method` makes it: what the method does not use is None."""
    values = Method(kind=kind).model_dump()  # type: ignore[arg-type]
    unused = () if kind in ("lora", "qlora") else ("rank", "alpha", "dropout", "targets")
    unused += () if kind == "freeze" else ("train_last_layers",)
    return MethodPlan(**(values | dict.fromkeys(unused) | changes))


def optimizer_plan(**changes: Any) -> OptimizerPlan:
    values = Optimizer().model_dump() | {"max_grad_norm": 1.0, "betas": (0.9, 0.999)}
    return OptimizerPlan(**(values | changes))


def trajectory(model: ModelPlan, data: DataPlan, **changes: Any) -> Trajectory:
    """Of a full fine-tune in fp32 at a constant rate."""
    values: dict[str, Any] = {
        "task": "causal_lm",
        "model": model,
        "method": method_plan(),
        "data": data,
        "data_content_hash": "",
        "seed": 0,
        "dtype": "fp32",
        "global_batch_size": 6,
        "label_smoothing": 0.0,
        "neftune_alpha": None,
        "optimizer": optimizer_plan(),
        "schedule": SchedulePlan(kind="constant", warmup=0.0, min_lr_ratio=1.0),
    }
    return Trajectory(**(values | changes))


def layout_plan(**changes: Any) -> LayoutPlan:
    """Of one CPU worker."""
    values: dict[str, Any] = {
        "workers": 1,
        "min_workers": 1,
        "device": "cpu",
        "cpus_per_worker": 1,
        "zero": 0,
        "offload": False,
        "micro_batch_size": 6,
        "gradient_checkpointing": False,
        "attention": "sdpa",
        "kernels": "eager",
    }
    return LayoutPlan(**(values | changes))


def generate_plan(**changes: Any) -> GeneratePlan:
    return GeneratePlan(**(Generate().model_dump() | changes))


def lifecycle(steps: int, **changes: Any) -> Lifecycle:
    """`steps` steps in which nothing else happens; what happens at the end of a run is a checkpoint alone."""
    values: dict[str, Any] = {
        "epochs": None,
        "max_steps": steps,
        "total_steps": steps,
        "max_time_s": None,
        "eval_every_steps": steps,
        "eval_max_rows": None,
        "generate": None,
        "metric": "loss",
        "early_stopping": None,
        "slices": (),
        "retain": None,
        "guard": GuardPlan(**Guard().model_dump()),
        "checkpoint_every_steps": steps,
        "checkpoint_within_s": None,
        "keep_last": 2,
        "keep_best": 0,
        "keep_every": None,
        "background_saves": True,
        "grace_s": 25.0,
        "log_every_steps": 1,
        "system_every_s": None,
        "trackers": (),
        "project": "slipway",
        "audit": "off",
        "max_failures": 0,
        "wait_s": 600.0,
        "hang_timeout_s": None,
        "export": False,
        "export_best": False,
        "merge": False,
        "max_shard_size": "5GB",
    }
    return Lifecycle(**(values | changes))


def data_facts(**changes: Any) -> DataFacts:
    """Of prepared data that is nowhere."""
    values: dict[str, Any] = {
        "folder": "/prepared",
        "content_hash": "0123",
        "train_rows": 1000,
        "train_documents": 3000,
        "train_tokens": 500_000,
        "train_supervised_tokens": 200_000,
        "eval_documents": 20,
        "eval_supervised_tokens": 1000,
        "test_documents": 5,
        "dropped": {},
        "vocab_size": 300,
        "formats": {},
        "classes": (),
        "retain_documents": 0,
    }
    return DataFacts(**(values | changes))


def whole_plan(run_dir: Path, **parts: Any) -> Plan:
    """Of a run in `run_dir`, on one CPU worker; `parts` are the rest, at least name, trajectory, lifecycle and data."""
    values = {"run_dir": str(run_dir), "location": str(run_dir), "version": "0", "recipe_hash": "", "origins": {}}
    return Plan(**(values | {"layout": layout_plan()} | parts))


def short_run(
    root: Path, model: ModelPlan, data: DataPlan, facts: DataFacts, steps: int, global_batch_size: int, **changes: Any
) -> Plan:
    """A Plan of few steps for data and a model that lie ready in `root`; `changes` are of the trajectory."""
    settings = {
        "data_content_hash": facts.content_hash,
        "seed": 24,  # one by which every batch of the first steps of `runs` has rows of both kinds
        "global_batch_size": global_batch_size,
        "optimizer": optimizer_plan(lr=2e-3, betas=(0.9, 0.99), weight_decay=0.1),
        "schedule": SchedulePlan(kind="cosine", warmup=3, min_lr_ratio=0.1),
    }
    return whole_plan(
        root / "run",
        name=root.name,
        trajectory=trajectory(model, data, **(settings | changes)),
        layout=layout_plan(micro_batch_size=global_batch_size),
        lifecycle=lifecycle(steps),
        data=facts,
    )


def recipe_problems(folder: Path, text: str) -> list[str]:
    """Why a recipe of `text` is refused, `key: message; hint` each; empty where it is taken."""
    file = folder / "x.yaml"
    file.write_text(text, encoding="utf-8")
    try:
        load(str(file))
    except RecipeError as error:
        return [f"{problem.key}: {problem.message}; {problem.hint}" for problem in error.problems]
    return []
