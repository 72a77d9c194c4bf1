"""What metrics.jsonl tells of a run, read once: curves, measurements, events, and where the time went."""

from __future__ import annotations

import contextlib
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping
from heapq import merge
from pathlib import Path
from typing import Any

from launcher.evaluate.value import numbers
from launcher.report.curves import Curve
from launcher.report.events import Event, event
from launcher.report.timeline import Timeline
from launcher.train.metrics import read

STEP_FIGURES = ("loss", "accuracy", "lr", "grad_norm", "memory_bytes")
_COMPUTING = ("forward", "backward", "step")
_NO_FIGURES = {"kind", "attempt", "time", "step", "rows", "cut"}


class History:
    """A run so far."""

    def __init__(self, run_dir: Path) -> None:
        """Reads the files of a run's folder. Raises OSError where one is there and cannot be read."""
        self.steps: dict[str, Curve] = defaultdict(Curve)
        """{figure: by step}: STEP_FIGURES, `tokens_per_s` and `computing`, the share of a step in which the model was
        computed and updated."""
        self.evals: dict[str, Curve] = defaultdict(Curve)
        """{figure of the lines `eval`, dotted: by step}."""
        self.answers: dict[str, Curve] = defaultdict(Curve)
        """{figure of the lines `answers`, dotted: by step}."""
        self.last_eval: Mapping[str, Any] = {}
        self.last_answers: Mapping[str, Any] = {}
        self.events: list[Event] = []
        self.timeline = Timeline()
        self.last_start: Mapping[str, Any] | None = None
        self.failure: Mapping[str, Any] | None = None
        """The line `run_failed`, if nothing started after it."""
        self.best_steps: list[int] = []
        """Each better than those before it."""
        self.step = 0
        """The last that counts."""
        self.epoch = 0.0
        """How often that has gone through the training rows."""
        self.tokens = 0.0
        """Through the model, in all steps that count."""
        self.begin = self.end = 0.0
        """Seconds since 1970 of the first line and the last."""
        self.system: dict[str, dict[str, Curve]] = defaultdict(lambda: defaultdict(Curve))
        """{figure: {host, or GPU of a host: by seconds since the begin}}; energy in joules since the begin."""
        self._times = Curve()
        """When each step was done."""
        self._tokens = Curve()
        self._energy: dict[str, dict[str, float]] = defaultdict(dict)
        """{what: {attempt: joules}}."""
        looks = []
        for record in read(run_dir):
            if record["kind"] == "system":
                looks.append(record)
            else:
                self._hear(record)
        others = map(_lines, sorted((run_dir / "logs").glob("system-*.jsonl")))
        # A host that was the first rank's in one attempt and not in another has some of them in each place.
        for record in merge(looks, *others, key=lambda record: float(record["time"])):
            self._system(record)
        self.tokens = self._tokens.since(0)

    def step_at(self, time: float) -> int:
        """The step that had been done by then; steps that were done again count when they were done last."""
        number = bisect_right(self._times.values, time) - 1
        return int(self._times.places[number]) if number >= 0 else 0

    def _hear(self, record: dict[str, Any]) -> None:
        kind, time = record["kind"], float(record.get("time", 0.0))
        self.begin = self.begin or time
        self.end = max(self.end, time)
        self.timeline.hear(record)
        if kind == "step":
            self._step(record, time)
        elif kind == "eval":
            self._measured(self.evals, record)
            self.last_eval = record
        elif kind in ("answers", "exact_match"):
            if kind == "exact_match":  # of an earlier version
                record = {"kind": kind, "step": record["step"], "rows": record["rows"], "exact_match": record["score"]}
            self._measured(self.answers, record)
            self.last_answers = record
        else:
            self._happened(record)

    def _happened(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        if kind == "best":
            self.best_steps.append(record["step"])
        elif kind == "run_failed":
            self.failure = record
        if (happened := event(record, self.last_start)) is not None:
            self.events.append(happened)
        if kind == "start":
            self.last_start, self.failure = record, None
            self.step = record["step"]
            for curve in (*self.steps.values(), *self.evals.values(), *self.answers.values(), self._times):
                curve.cut(self.step + 1)
            self._go_back(self.step)
        elif kind == "rollback":  # the curves stay: the run goes on after them
            self._go_back(record["to_step"])

    def _go_back(self, step: int) -> None:
        """What came after `step` is not in the weights any more."""
        self.best_steps = [best for best in self.best_steps if best <= step]
        self._tokens.cut(step + 1)

    def _step(self, record: dict[str, Any], time: float) -> None:
        step, seconds, before = record["step"], record["seconds"], self.step
        self.step, self.epoch = step, float(record.get("epoch", 0.0))
        self._times.add(step, time)
        for figure in STEP_FIGURES:
            self.steps[figure].add(step, record.get(figure))
        training_s = seconds["total"] - seconds.get("evaluate", 0.0) - seconds.get("checkpoint", 0.0)
        covered = max(step - before, 1)  # a line stands for several steps where logging.every_steps says so
        tokens = record["tokens"] * covered
        self._tokens.add(step, tokens)
        self.steps["tokens_per_s"].add(step, tokens / training_s if training_s > 0 else None)
        computing = sum(seconds.get(part, 0.0) for part in _COMPUTING)
        self.steps["computing"].add(step, computing / training_s if training_s > 0 else None)

    @staticmethod
    def _measured(curves: dict[str, Curve], record: Mapping[str, Any]) -> None:
        figures = {key: value for key, value in record.items() if key not in _NO_FIGURES}
        for name, value in numbers(figures).items():  # those of single classes and slices have tables of their own
            curves[name].put(record["step"], value)  # after a stop the best step is measured, which is an earlier one

    def _system(self, record: Mapping[str, Any]) -> None:
        host, at = str(record["host"]), float(record["time"]) - self.begin
        for figure in ("cpu_percent", "memory_bytes"):
            self.system[figure][host].add(at, record.get(figure))
        gpus = record.get("gpus", ())
        for gpu in gpus:
            name = f"{host} GPU {gpu['index']}"
            for figure in ("percent", "memory_bytes", "power_w"):
                if figure in gpu:
                    self.system[f"gpu_{figure}"][name].add(at, gpu[figure])
            self._joules("gpu_energy_j", name, record, gpu.get("energy_j"), at)
        self._joules("energy_j", host, record, record.get("energy_j"), at)

    def _joules(self, figure: str, name: str, record: Mapping[str, Any], joules: float | None, at: float) -> None:
        """Each attempt counts from 0."""
        if joules is None:
            return
        of_attempts = self._energy[f"{figure} {name}"]
        of_attempts[str(record.get("attempt"))] = joules
        self.system[figure][name].add(at, sum(of_attempts.values()))


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):
                record = json.loads(line)
                if isinstance(record, dict) and record.get("kind") == "system":
                    yield record
