"""From a Recipe and facts to a Plan: every `auto` decided, every path absolute, every value with its origin."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from launcher import __version__
from launcher.errors import DataError, ModelError
from launcher.plan.facts import ClusterFacts
from launcher.plan.layout import choose_device, choose_dtype, resolve_layout
from launcher.plan.plan import (
    DataFacts,
    DataPlan,
    GeneratePlan,
    Lifecycle,
    MethodPlan,
    ModelPlan,
    OptimizerPlan,
    Plan,
    SchedulePlan,
    Trajectory,
)
from launcher.recipe.load import LoadedRecipe, resolve_path
from launcher.recipe.schema import Recipe
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
    """
    recipe, reasons = loaded.recipe, dict[str, str]()
    dtype, reason = choose_dtype(recipe, choose_device(cluster))
    if reason:
        reasons["train.dtype"] = reason
    trajectory = Trajectory(
        model=model,
        method=resolve_method(recipe),
        data=data,
        data_content_hash=facts.content_hash,
        seed=recipe.train.seed,
        dtype=dtype,
        global_batch_size=recipe.train.global_batch_size,
        optimizer=OptimizerPlan(
            name=recipe.optimizer.name,
            lr=recipe.optimizer.lr,
            betas=recipe.optimizer.betas,
            eps=recipe.optimizer.eps,
            weight_decay=recipe.optimizer.weight_decay,
            max_grad_norm=recipe.train.max_grad_norm,
        ),
        schedule=SchedulePlan(
            kind=recipe.schedule.kind, warmup=recipe.schedule.warmup, min_lr_ratio=recipe.schedule.min_lr_ratio
        ),
    )
    return Plan(
        name=name,
        run_dir=str(run_dir),
        location=location,
        version=__version__,
        recipe_hash=loaded.hash,
        trajectory=trajectory,
        layout=resolve_layout(recipe, cluster, dtype, parameters, reasons),
        lifecycle=resolve_lifecycle(recipe, facts, reasons),
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
    )


def resolve_lifecycle(recipe: Recipe, facts: DataFacts, reasons: dict[str, str]) -> Lifecycle:
    """How long and how often, in steps.

    Raises:
        DataError: generated answers are asked for and there is no test row.
    """
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
    generate: dict[str, Any] | None = evaluate.generate.model_dump() if evaluate.generate else None
    merge = recipe.export.merge
    if merge == "auto":
        merge = recipe.method.kind == "lora" and recipe.model.scratch is not None
        reasons["export.merge"] = "adapters stay adapters, unless their base exists nowhere else"
    parse_bytes(recipe.export.max_shard_size)
    return Lifecycle(
        epochs=epochs,
        max_steps=train.max_steps,
        total_steps=total,
        max_time_s=parse_seconds(train.max_time) if train.max_time else None,
        eval_every_steps=evaluate.every_steps or interval,
        eval_max_rows=evaluate.max_rows,
        generate=GeneratePlan(**generate) if generate else None,
        checkpoint_every_steps=recipe.checkpoint.every_steps or interval,
        checkpoint_within_s=None if recipe.checkpoint.every_steps else CHECKPOINT_WITHIN_S,
        keep_last=recipe.checkpoint.keep_last,
        keep_best=recipe.checkpoint.keep_best,
        keep_every=recipe.checkpoint.keep_every,
        background_saves=recipe.checkpoint.background,
        grace_s=parse_seconds(recipe.checkpoint.grace),
        log_every_steps=recipe.logging.every_steps,
        audit=recipe.audit,
        max_failures=recipe.cluster.max_failures,
        wait_s=recipe.cluster.wait_s,
        hang_timeout_s=recipe.cluster.hang_timeout_s,
        export=recipe.export.enabled,
        merge=merge,
        max_shard_size=recipe.export.max_shard_size,
    )
