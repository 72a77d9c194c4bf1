"""MLflow: metrics with our steps and times, the Plan as parameters, events as tags."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from launcher.plan.plan import Plan
from launcher.recipe.addresses import without_secrets
from launcher.train.trackers.kept import Kept
from launcher.train.trackers.lines import Line, settings

METRICS_AT_ONCE, PARAMETERS_AT_ONCE = 1000, 100
"""What a request may hold."""
LONGEST, LONGEST_NAME = 5000, 250
"""Characters of a parameter or a tag, and of what it is called."""
_NO_NAME = re.compile(r"[^\w\-. /]")


class MLflow:
    """One run there, from one start of ours."""

    def __init__(self, client: MlflowClient, run: str) -> None:
        self._client, self._run = client, run

    def tell(self, lines: list[Line]) -> None:
        metrics = [
            Metric(as_name(name), value, round(line.time * 1000), line.step)
            for line in lines
            for name, value in line.numbers.items()
        ]
        for start in range(0, len(metrics), METRICS_AT_ONCE):
            self._client.log_batch(self._run, metrics=metrics[start : start + METRICS_AT_ONCE])
        for line in lines:
            if line.words is not None:
                # A step may have several of a kind, such as what an audit finds.
                tag = f"event.{line.step:08d}.{line.kind}.{_digest(line.words)[:8]}"
                self._client.set_tag(self._run, tag, line.words[:LONGEST])

    def parameters(self, plan: Plan) -> None:
        """The Plan, a parameter a value; they are those of the run's first start."""
        values = settings(plan)
        values = _flat({part: values[part] for part in ("version", "trajectory", "layout", "lifecycle")})
        found = [Param(as_name(name), str(value)[:LONGEST]) for name, value in values.items()]
        for start in range(0, len(found), PARAMETERS_AT_ONCE):
            self._client.log_batch(self._run, params=found[start : start + PARAMETERS_AT_ONCE])

    def close(self, well: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if well else "KILLED")


def opened(plan: Plan, kept: Kept) -> MLflow:
    """The run that an earlier start has begun, or a new one."""
    client = MlflowClient()
    if kept.get("id") is None:
        name = plan.lifecycle.project
        experiment = client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else client.create_experiment(name)
        run = client.create_run(number, run_name=plan.name, tags={"slipway.run": without_secrets(plan.location)})
        kept.put(id=run.info.run_id)
    else:
        client.update_run(kept.get("id"), status="RUNNING")
    tracker = MLflow(client, kept.get("id"))
    if not kept.get("parameters"):
        tracker.parameters(plan)
        kept.put(parameters=True)
    return tracker


def as_name(path: str) -> str:
    """A path as MLflow takes it. What it refuses is spelled by its number: slices called <50 and >50 stay two."""
    spelled = _NO_NAME.sub(lambda found: f"_{ord(found[0]):x}_", path)
    name = "/".join(piece if piece.strip(".") else f"_{piece}" for piece in spelled.split("/"))
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 17]}_{_digest(name)[:16]}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()


def _flat(values: Any, before: str = "") -> dict[str, Any]:
    """{dotted name: value} of all that is in nested dictionaries and lists."""
    items = values.items() if isinstance(values, dict) else enumerate(values)
    found: dict[str, Any] = {}
    for key, value in items:
        found |= _flat(value, f"{before}{key}.") if isinstance(value, dict | list) else {f"{before}{key}": value}
    return found
