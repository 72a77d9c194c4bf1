"""Every value of a Plan under the key that a user writes in a recipe, with where it comes from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from launcher.plan.plan import Plan
from launcher.recipe.addresses import without_secrets

FINGERPRINT = "(model) fingerprint"
_KEYS = {
    "trajectory.optimizer.max_grad_norm": "train.max_grad_norm",
    "trajectory.task": "task",
    "trajectory.model.source": "(model) source",
    "trajectory.model.fingerprint": FINGERPRINT,
    "trajectory.model.": "model.",
    "trajectory.method.": "method.",
    "trajectory.data.retain": "evaluate.retain.sources",
    "trajectory.data.head": "(data) head",
    "trajectory.data.slices": "evaluate.slices",
    "trajectory.data.": "data.",
    "trajectory.data_content_hash": "(data) content hash",
    "trajectory.optimizer.": "optimizer.",
    "trajectory.schedule.": "schedule.",
    "trajectory.": "train.",
    "layout.workers": "cluster.workers",
    "layout.min_workers": "cluster.workers.min",
    "layout.cpus_per_worker": "cluster.cpus_per_worker",
    "layout.device": "(layout) device",
    "layout.zero": "parallel.zero",
    "layout.offload": "parallel.offload",
    "layout.attention": "model.attention",
    "layout.kernels": "model.kernels",
    "layout.": "train.",
    "lifecycle.epochs": "train.epochs",
    "lifecycle.max_steps": "train.max_steps",
    "lifecycle.max_time_s": "train.max_time",
    "lifecycle.total_steps": "(lifecycle) total steps",
    "lifecycle.eval_every_steps": "evaluate.every_steps",
    "lifecycle.eval_max_rows": "evaluate.max_rows",
    "lifecycle.generate": "evaluate.generate",
    "lifecycle.metric": "evaluate.metric",
    "lifecycle.early_stopping": "evaluate.early_stopping",
    "lifecycle.slices": "evaluate.slices",
    "lifecycle.retain": "evaluate.retain",
    "lifecycle.guard.": "guard.",
    "lifecycle.checkpoint_every_steps": "checkpoint.every_steps",
    "lifecycle.checkpoint_within_s": "(lifecycle) checkpoint within, s",
    "lifecycle.keep_": "checkpoint.keep_",
    "lifecycle.background_saves": "checkpoint.background",
    "lifecycle.grace_s": "checkpoint.grace",
    "lifecycle.log_every_steps": "logging.every_steps",
    "lifecycle.system_every_s": "logging.system_every_s",
    "lifecycle.trackers": "logging.trackers",
    "lifecycle.project": "logging.project",
    "lifecycle.audit": "audit",
    "lifecycle.max_failures": "cluster.max_failures",
    "lifecycle.wait_s": "cluster.wait_s",
    "lifecycle.hang_timeout_s": "cluster.hang_timeout_s",
    "lifecycle.export_best": "export.checkpoint",
    "lifecycle.export": "export.enabled",
    "lifecycle.merge": "export.merge",
    "lifecycle.max_shard_size": "export.max_shard_size",
}
"""{how a value's place in the Plan begins: how its key does}; the first that fits counts. A name in brackets is no key:
it follows from others."""

_WORDS: dict[str, dict[Any, str]] = {
    "export.checkpoint": {True: "best", False: "last"},
    "parallel.offload": {True: "cpu", False: "none"},
}
"""What a recipe calls values that the Plan has as yes and no."""


@dataclass(frozen=True)
class Setting:
    """One value."""

    value: Any
    """As JSON has it."""
    origin: str
    """file:line, command line, default, or the planner's reason; empty where it follows from data or machine."""

    @property
    def text(self) -> str:
        """As YAML has it."""
        return self.value if isinstance(self.value, str) else json.dumps(self.value, ensure_ascii=False)


def settings(plan: Plan) -> dict[str, Setting]:
    """{key: value and origin}, in the order of the Plan; without passwords in URLs."""
    found: dict[str, Setting] = {}
    for part in ("trajectory", "layout", "lifecycle"):
        for place, value in _leaves(json.loads(without_secrets(getattr(plan, part).model_dump_json())), part):
            key = _key(place)
            shown = _WORDS[key][value] if key in _WORDS else value
            found[key] = Setting(shown, _origin(key, plan.origins))
    return found


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Lists of plain values count as one."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{place}.{name}")
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{place}.{number}")
    else:
        yield place, value


def _key(place: str) -> str:
    for begins, key in _KEYS.items():
        if place.startswith(begins):
            return key + place.removeprefix(begins)
    return place


def _origin(key: str, origins: dict[str, str]) -> str:
    """Of the key, of the first in its list, or of the section that it is in where that was written as one value."""
    if key.startswith("("):
        return ""
    for known in (key, f"{key}.0"):
        if known in origins:
            return origins[known]
    section = ".".join(key.split(".")[:2])
    if section == key or any(known.startswith(f"{section}.") for known in origins):
        return "default"  # others in the section were written, this one was not
    return origins.get(section, "default")
