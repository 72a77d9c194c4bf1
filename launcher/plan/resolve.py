"""From a Recipe and facts to a Plan: every `auto` decided, every path absolute, every value with its origin."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from launcher import __version__
from launcher.errors import DataError, ModelError
from launcher.plan.facts import ClusterFacts
from launcher.plan.layout import choose_device, choose_dtype, resolve_layout
from launcher.plan.phases import refuse_useless
from launcher.plan.plan import (
    DataFacts,
    DataPlan,
    EarlyStoppingPlan,
    GeneratePlan,
    GuardPlan,
    Lifecycle,
    MethodPlan,
    ModelPlan,
    OptimizerPlan,
    Plan,
    RetainPlan,
    SchedulePlan,
    Trajectory,
    UnfreezePlan,
)
from launcher.plan.resolve_data import find_function
from launcher.recipe.load import LoadedRecipe, resolve_path
from launcher.recipe.schema import Recipe
from launcher.recipe.schema_evaluate import METRICS
from launcher.units import parse_bytes, parse_seconds

CHECKPOINT_WITHIN_S = 1800.0
"""A tenth of a run of weeks is days: docs/decisions/0019 has what that costs."""
EVENTS_PER_RUN = 10
"""Evaluations and checkpoints of a run whose recipe names no interval."""


def resolve(
    loaded: LoadedRecipe,
    cluster: ClusterFacts,
    model: ModelPlan,
    data: DataPlan,
    facts: DataFacts,
    parameters: int,
    name: str,
    run_dir: Path,
    location: str,
) -> Plan:
    """The whole Plan. `parameters` is the model's size, see `plan.size`; `location` as in the Plan.

    Raises:
        ClusterError: the cluster cannot hold the run.
        DataError: `evaluate` asks for rows that the data does not have.
        ModelError: a stage of `method.unfreeze` would train no step.
    """
    recipe, reasons = loaded.recipe, dict[str, str]()
    dtype, reason = choose_dtype(recipe, choose_device(cluster))
    if reason:
        reasons["train.dtype"] = reason
    if recipe.task == "sequence_classification":
        reasons["data.packing"] = "the head reads one document a row"
    trajectory = Trajectory(
        task=recipe.task,
        model=model,
        method=resolve_method(recipe),
        data=data,
        data_content_hash=facts.content_hash,
        seed=recipe.train.seed,
        dtype=dtype,
        global_batch_size=recipe.train.global_batch_size,
        label_smoothing=recipe.train.label_smoothing,
        neftune_alpha=recipe.train.neftune_alpha,
        optimizer=resolve_optimizer(recipe, reasons),
        schedule=SchedulePlan(
            kind=recipe.schedule.kind, warmup=recipe.schedule.warmup, min_lr_ratio=recipe.schedule.min_lr_ratio
        ),
    )
    lifecycle = resolve_lifecycle(loaded, facts, reasons)
    refuse_useless(trajectory.method, lifecycle.total_steps)
    return Plan(
        name=name,
        run_dir=str(run_dir),
        location=location,
        version=__version__,
        recipe_hash=loaded.hash,
        trajectory=trajectory,
        layout=resolve_layout(recipe, cluster, dtype, parameters, reasons),
        lifecycle=lifecycle,
        data=facts,
        origins=origins(loaded, reasons),
    )


def origins(loaded: LoadedRecipe, reasons: Mapping[str, str]) -> dict[str, str]:
    """{recipe key: where its value comes from}, the planner's reason where the recipe said auto or nothing."""
    # Of a key that was written in parts, such as cluster.workers.min, where the first of them was.
    parts = {".".join(key.split(".")[:2]): str(origin) for key, origin in reversed(loaded.origins.items())}
    found = {key: parts.get(key, "default") for key in _schema_keys()}
    found |= {key: str(origin) for key, origin in loaded.origins.items()}
    return found | {key: f"planner: {reason}" for key, reason in reasons.items()}


def _schema_keys() -> list[str]:
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    return [
        f"{name}.{key}"
        for name, section in sections.items()
        if hasattr(section, "model_fields")
        for key in section.model_fields  # type: ignore[union-attr]
    ]


def resolve_model(loaded: LoadedRecipe, run_dir: Path) -> ModelPlan:
    """The model with absolute paths; a hub id keeps the revision that the recipe names.

    Raises:
        ModelError: a folder or file that is not there.
    """
    section = loaded.recipe.model
    source, path = _model_path(loaded, run_dir)
    return ModelPlan(
        source=source,
        path=path,
        revision=section.revision,
        scratch=section.scratch,
        tokenizer=_folder_or_hub(loaded, "model.tokenizer", section.tokenizer) if section.tokenizer else None,
        chat_template=_template(loaded),
        template_kwargs=section.template_kwargs,
        add_tokens=section.add_tokens,
        dropout=section.dropout,
        trust_remote_code=section.trust_remote_code,
        fingerprint=None,
    )


def _model_path(loaded: LoadedRecipe, run_dir: Path) -> tuple[Literal["hub", "folder", "scratch"], str]:
    section = loaded.recipe.model
    if section.scratch is not None:
        return "scratch", str(run_dir / "base")
    assert section.path is not None
    path = _folder_or_hub(loaded, "model.path", section.path)
    return ("folder" if os.path.isabs(path) else "hub"), path


def _folder_or_hub(loaded: LoadedRecipe, key: str, value: str) -> str:
    found = resolve_path(value, loaded.origins[key])
    if found is not None:
        return str(found.resolve())
    hub_id = value.count("/") <= 1 and not value.startswith((".", "/", "~")) and not value.endswith("/")
    if not hub_id:
        raise ModelError(
            f"{loaded.origins[key]}: {key}: model folder {value} does not exist",
            hint="give a folder that save_pretrained wrote, or a hub id such as openai-community/gpt2",
        )
    return value


def _template(loaded: LoadedRecipe) -> str | None:
    value = loaded.recipe.model.chat_template
    if value is None:
        return None
    found = resolve_path(value, loaded.origins["model.chat_template"])
    if found is None or not found.is_file():
        raise ModelError(
            f"{loaded.origins['model.chat_template']}: model.chat_template: file {value} does not exist",
            hint="give a file with a Jinja chat template, or leave the key out",
        )
    return found.read_text(encoding="utf-8")


def resolve_method(recipe: Recipe) -> MethodPlan:
    """The method, with what it does not use left out."""
    method = recipe.method
    adapters = method.kind in ("lora", "qlora")
    return MethodPlan(
        kind=method.kind,
        rank=method.rank if adapters else None,
        alpha=method.alpha if adapters else None,
        dropout=method.dropout if adapters else None,
        targets=method.targets if adapters else None,
        train_last_layers=method.train_last_layers if method.kind == "freeze" else None,
        dora=method.dora,
        rslora=method.rslora,
        init=method.init,
        unfreeze=tuple(
            UnfreezePlan(at=stage.at, last_layers=None if stage.last_layers == "all" else stage.last_layers)
            for stage in method.unfreeze
        ),
        frozen=method.frozen,
    )


def resolve_optimizer(recipe: Recipe, reasons: dict[str, str]) -> OptimizerPlan:
    """The optimizer, with the betas of its paper where the recipe has none."""
    section = recipe.optimizer
    betas = section.betas
    if betas is None:
        betas = (0.9, 0.99) if section.name == "lion" else (0.9, 0.999)
        reasons["optimizer.betas"] = "as the optimizer's paper has them"
    values = section.model_dump() | {"betas": betas, "max_grad_norm": recipe.train.max_grad_norm}
    return OptimizerPlan(**values)


def resolve_lifecycle(loaded: LoadedRecipe, facts: DataFacts, reasons: dict[str, str]) -> Lifecycle:
    """How long and how often, in steps.

    Raises:
        DataError: generated answers are asked for and there is no test row, or a metric that is not there.
    """
    recipe = loaded.recipe
    train, evaluate = recipe.train, recipe.evaluate
    epochs = train.epochs if train.epochs is not None or train.max_steps is not None else 1.0
    steps_per_epoch = math.ceil(facts.train_rows / train.global_batch_size)
    bounds = [math.ceil(epochs * steps_per_epoch)] if epochs is not None else []
    bounds += [train.max_steps] if train.max_steps is not None else []
    total = min(bounds)
    interval = max(1, math.ceil(total / EVENTS_PER_RUN))
    for key, value in (
        ("evaluate.every_steps", evaluate.every_steps),
        ("checkpoint.every_steps", recipe.checkpoint.every_steps),
    ):
        if value is None:
            reasons[key] = f"a tenth of {total} steps"
    if recipe.checkpoint.every_steps is None:
        reasons["checkpoint.every_steps"] += f", and every {CHECKPOINT_WITHIN_S / 60:g} minutes"
    if evaluate.generate is not None and facts.test_documents == 0:
        raise DataError("evaluate.generate is set and data.test has no usable row", hint="name a file in data.test")
    if evaluate.retain is not None and facts.retain_documents == 0:
        raise DataError("evaluate.retain is set and the data was prepared without it", hint="start a new run")
    generate = None
    if evaluate.generate:
        metrics = tuple(_metric(loaded, number, name) for number, name in enumerate(evaluate.generate.metrics))
        generate = GeneratePlan(**evaluate.generate.model_dump(exclude={"metrics"}), metrics=metrics)
    best = recipe.export.checkpoint == "best"
    if recipe.export.checkpoint == "auto":
        best = evaluate.early_stopping is not None or (evaluate.retain is not None and evaluate.retain.action == "stop")
        reasons["export.checkpoint"] = "the best where the run may stop early, otherwise the last"
    if best and evaluate.metric == "loss" and facts.eval_documents == 0:
        raise DataError("the best checkpoint is asked for and no row is held out", hint="hold more out in data.eval")
    merge = recipe.export.merge
    if merge == "auto":
        whole = recipe.model.scratch is not None or recipe.task == "sequence_classification"
        merge = recipe.method.kind == "lora" and whole
        reasons["export.merge"] = "adapters stay adapters, unless their base, or the head, exists nowhere else"
    parse_bytes(recipe.export.max_shard_size)
    return Lifecycle(
        epochs=epochs,
        max_steps=train.max_steps,
        total_steps=total,
        max_time_s=parse_seconds(train.max_time) if train.max_time else None,
        eval_every_steps=evaluate.every_steps or interval,
        eval_max_rows=evaluate.max_rows,
        generate=generate,
        metric=evaluate.metric,
        early_stopping=EarlyStoppingPlan(**evaluate.early_stopping.model_dump()) if evaluate.early_stopping else None,
        slices=evaluate.slices,
        retain=RetainPlan(**evaluate.retain.model_dump(exclude={"sources"})) if evaluate.retain else None,
        guard=GuardPlan(**recipe.guard.model_dump()),
        checkpoint_every_steps=recipe.checkpoint.every_steps or interval,
        checkpoint_within_s=None if recipe.checkpoint.every_steps else CHECKPOINT_WITHIN_S,
        keep_last=recipe.checkpoint.keep_last,
        keep_best=recipe.checkpoint.keep_best,
        keep_every=recipe.checkpoint.keep_every,
        background_saves=recipe.checkpoint.background,
        grace_s=parse_seconds(recipe.checkpoint.grace),
        log_every_steps=recipe.logging.every_steps,
        system_every_s=recipe.logging.system_every_s,
        trackers=recipe.logging.trackers,
        project=recipe.logging.project or "slipway",
        audit=recipe.audit,
        max_failures=recipe.cluster.max_failures,
        wait_s=recipe.cluster.wait_s,
        hang_timeout_s=recipe.cluster.hang_timeout_s,
        export=recipe.export.enabled,
        export_best=best,
        merge=merge,
        max_shard_size=recipe.export.max_shard_size,
    )


def _metric(loaded: LoadedRecipe, number: int, name: str) -> str:
    """A metric's name, and of a function of the user's its absolute file too. Raises DataError."""
    if name in METRICS:
        return name
    file, function = find_function(loaded, f"evaluate.generate.metrics.{number}", name)
    return f"{file}:{function}"
