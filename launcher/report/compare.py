"""Two runs beside each other: what differs in settings, data, environment and result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.plan.plan import Plan
from launcher.report.ending import ending
from launcher.report.fetch import read_history
from launcher.report.history import History
from launcher.report.outcome import duration_s, energy_wh, figures, tokens_per_s, training_loss, useful_share
from launcher.report.settings import FINGERPRINT, settings

NOT_COMPARED = ("command",)
"""Of environment.json: every run has its own."""
SECTIONS = ("settings", "data", "environment", "result")


@dataclass(frozen=True)
class Difference:
    """One value that two runs do not share; None: one of them has none."""

    key: str
    values: tuple[Any, Any]
    origins: tuple[str, str] = ("", "")
    """Where each comes from; of settings alone."""

    def as_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        found: dict[str, Any] = {"key": self.key, "values": list(self.values)}
        return found | ({"origins": list(self.origins)} if any(self.origins) else {})


def compare(one: Plan, other: Plan) -> dict[str, list[Difference]]:
    """{section of SECTIONS: what differs}.

    Raises RunFolderError where a run cannot be read.
    """
    runs = [(plan, read_history(plan)) for plan in (one, other)]
    return {
        "settings": _settings(one, other),
        "data": _differences(_data(one), _data(other)),
        "environment": _differences(*(_environment(*run) for run in runs)),
        "result": _differences(*(_result(*run) for run in runs)),
    }


def _settings(one: Plan, other: Plan) -> list[Difference]:
    first, second = settings(one), settings(other)
    found = []
    for key in dict.fromkeys((*first, *second)):
        pair = first.get(key), second.get(key)
        values = tuple(setting.value if setting else None for setting in pair)
        # A scratch model lies in its run's own folder.
        own = key == "model.path" and one.trajectory.model.source == other.trajectory.model.source == "scratch"
        # What follows from others says nothing more, but weights under the same name may be others by now.
        follows = key.startswith("(") and key != FINGERPRINT
        if values[0] != values[1] and not own and not follows:
            origins = tuple(setting.origin if setting else "" for setting in pair)
            found.append(Difference(key, (values[0], values[1]), (origins[0], origins[1])))
    return found


def _data(plan: Plan) -> dict[str, Any]:
    facts = plan.data.model_dump(mode="json", exclude={"folder", "dropped", "formats"})
    return facts | {f"left out: {reason}": count for reason, count in plan.data.dropped.items()}


def _environment(plan: Plan, history: History) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads((Path(plan.run_dir) / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        values = {}
    found: dict[str, Any] = {"slipway": plan.version}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= {inner if name == "packages" else f"{name}.{inner}": version for inner, version in value.items()}
        elif name not in NOT_COMPARED:
            found[name] = value
    start = history.last_start or {}
    kinds = [str(worker.get("gpu") or "CPU") for worker in start.get("workers", [])]
    found["workers"] = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)) or None
    return found


def _result(plan: Plan, history: History) -> dict[str, Any]:
    found: dict[str, Any] = {
        "end": ending(plan, history).words,
        "steps": history.step,
        "training loss": training_loss(history),
    }
    for figure in figures(history):
        found |= {f"{figure.name}, first": figure.first, f"{figure.name}, best": figure.best}
        found[f"{figure.name}, last"] = figure.last
    return found | {
        "tokens per second": tokens_per_s(history),
        "duration, s": duration_s(history),
        "time that trained": useful_share(history),
        "energy, Wh": energy_wh(history),
    }


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Difference]:
    keys = dict.fromkeys((*one, *other))
    return [Difference(key, (one.get(key), other.get(key))) for key in keys if one.get(key) != other.get(key)]
