"""Parts of a Plan for tests, with the recipe's defaults where a test says nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.plan.plan import (
    AugmentPlan,
    CleanPlan,
    DataPlan,
    GeneratePlan,
    GuardPlan,
    HeldOutPlan,
    LayoutPlan,
    Lifecycle,
    MethodPlan,
    ModelPlan,
    OptimizerPlan,
    SchedulePlan,
    SourcePlan,
    Trajectory,
)
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
