"""MLflow: metrics with our steps and times, the Plan as parameters, events as tags."""

from __future__ import annotations

import re
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from launcher.plan.plan import Plan
from launcher.train.trackers.kept import Kept
from launcher.train.trackers.lines import Line

METRICS_AT_ONCE, PARAMETERS_AT_ONCE = 1000, 100
"""What a request may hold."""
LONGEST = 5000
"""Characters of a parameter or a tag."""
_NO_NAME = re.compile(r"[^\w\-. :/]")


class MLflow:
    """One run there, from one start of ours."""

    def __init__(self, client: MlflowClient, run: str) -> None:
        self._client, self._run = client, run

    def tell(self, lines: list[Line]) -> None:
        metrics = [
            Metric(_NO_NAME.sub("_", name), value, round(line.time * 1000), line.step)
            for line in lines
            for name, value in line.numbers.items()
        ]
        for start in range(0, len(metrics), METRICS_AT_ONCE):
            self._client.log_batch(self._run, metrics=metrics[start : start + METRICS_AT_ONCE])
        for line in lines:
            if line.words is not None:
                self._client.set_tag(self._run, f"event.{line.step:08d}.{line.kind}", line.words[:LONGEST])

    def parameters(self, plan: Plan) -> None:
        """The Plan, a parameter a value; they are those of the run's first start."""
        values = _flat(plan.model_dump(mode="json", include={"trajectory", "layout", "lifecycle", "version"}))
        found = [Param(_NO_NAME.sub("_", name)[:250], str(value)[:LONGEST]) for name, value in values.items()]
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
        run = client.create_run(number, run_name=plan.name, tags={"slipway.run": plan.location})
        kept.put(id=run.info.run_id)
    else:
        client.update_run(kept.get("id"), status="RUNNING")
    tracker = MLflow(client, kept.get("id"))
    if not kept.get("parameters"):
        tracker.parameters(plan)
        kept.put(parameters=True)
    return tracker


def _flat(values: Any, before: str = "") -> dict[str, Any]:
    """{dotted name: value} of all that is in nested dictionaries and lists."""
    items = values.items() if isinstance(values, dict) else enumerate(values)
    found: dict[str, Any] = {}
    for key, value in items:
        found |= _flat(value, f"{before}{key}.") if isinstance(value, dict | list) else {f"{before}{key}": value}
    return found
