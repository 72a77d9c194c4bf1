"""A made-up run for the report: its files as a real run leaves them, with everything that can happen in one."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from launcher.plan.plan import Plan
from tests.plans import (
    data_facts,
    data_plan,
    generate_plan,
    layout_plan,
    lifecycle,
    model_plan,
    optimizer_plan,
    source_plan,
    trajectory,
    whole_plan,
)

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u202e"
BEGIN = 1_790_000_000.0


def made_plan(run_dir: Path, **changes: Any) -> Plan:
    """Of a run in `run_dir`; `changes` go to its lifecycle or optimizer."""
    optimizer = {key: changes.pop(key) for key in ("lr", "weight_decay") if key in changes}
    steps = changes.pop("steps", 100)
    return whole_plan(
        run_dir,
        name="made up",
        version="0.1",
        trajectory=trajectory(
            model_plan("meta/some-model", source="hub", revision="abc"),
            data_plan(source_plan("/data/rows.jsonl")),
            optimizer=optimizer_plan(**({"lr": 2e-4} | optimizer)),
        ),
        layout=layout_plan(workers=2, min_workers=2, device="cuda", zero=2),
        lifecycle=lifecycle(steps, generate=generate_plan(), **changes),
        data=data_facts(
            folder=str(run_dir / "none"),
            content_hash="1234",
            train_rows=400,
            train_documents=1000,
            train_tokens=409_600,
            train_supervised_tokens=90_000,
            eval_documents=50,
            eval_supervised_tokens=4000,
            test_documents=50,
            dropped={"duplicate": 3},
            formats={"/data/rows.jsonl": "alpaca"},
            retain_documents=10,
        ),
        origins={
            "optimizer.lr": "tiny.yaml:7",
            "parallel.zero": "planner: two ranks have something to spread",
            "cluster.workers": "command line",
        },
    )


def write_run(run_dir: Path, steps: int = 100, verdict: dict[str, Any] | None = None, **changes: Any) -> Plan:
    """The folder of a run of so many steps, and its Plan."""
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    plan = made_plan(run_dir, steps=steps, **changes)
    plan.save(run_dir / "plan.json")
    (run_dir / "recipe.yaml").write_text("name: made up  # " + EVIL + "\n", encoding="utf-8")
    environment = {"python": "3.11", "packages": {"torch": "2.13.0"}, "git": {"commit": "abc", "changed": True}}
    (run_dir / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    if verdict is not None:
        (run_dir / "verdict.json").write_text(json.dumps(verdict), encoding="utf-8")
    for step, right in ((0, False), (steps, True)):
        lines = [
            {"where": f"/data/test.jsonl:{n}", "prompt": f"Question {n}? {EVIL}", "reference": str(n)}
            | {"answer": str(n) if right and n % 3 else EVIL, "correct": right and n % 3 > 0}
            for n in range(50)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run_dir / f"answers-{step:08d}.jsonl").write_text(text, encoding="utf-8")
    lines = [json.dumps(record) + "\n" for record in metrics(steps)]
    (run_dir / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    return plan


def metrics(steps: int) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl: a restart after half of the steps that repeats a twentieth of them, a spike after a third
    and most of what else can happen."""
    run = _Lines()
    run.add("start", 0, step=0, world_size=2, micro_steps=1, workers=_workers())
    run.add("answers", 3, step=0, **_answered(0.0))
    run.add("eval", 1, step=0, **_evaluated(0.0))
    for step in range(1, steps // 2 + 1):
        run.step(step, steps)
    run.add("hang", 20, step=steps // 2, what="rank 1 on b waits for nothing", stacks="hang.log")
    run.attempt, run.began = "1.2", run.time
    run.add("audit", 8, seconds=1.0, checked=[], findings=0)
    run.add("resize", 2, step=steps // 2 - steps // 20, **{"from": 2, "to": 1, "why": "b is gone"})
    run.add("start", 0, step=steps // 2 - steps // 20, world_size=1, micro_steps=2, workers=_workers()[:1])
    for step in range(steps // 2 - steps // 20 + 1, steps + 1):
        run.step(step, steps)
    run.add("forgetting", 0, step=steps, before=1.5, now=1.9, limit=0.1, message=f"it forgets: {EVIL}")
    return run.records


class _Lines:
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.time, self.attempt = BEGIN, "1.1"
        self.began = BEGIN
        """When the attempt did."""
        self.draw = random.Random(7)

    def add(self, kind: str, after_s: float, **values: Any) -> None:
        self.time += after_s
        self.records.append({"kind": kind, "time": round(self.time, 3), "attempt": self.attempt} | values)

    def step(self, step: int, steps: int) -> None:
        """A step, and what comes with some of them."""
        seconds = {"data": 0.01, "forward": 0.3, "backward": 0.6, "step": 0.05}
        spike = step == steps // 3
        loss = 9.0 if spike else 2.2 * math.exp(-3 * step / steps) + 0.5 + self.draw.gauss(0, 0.08)
        total = round(1 + 0.2 * self.draw.random(), 6)
        self.time += total
        if spike:
            self.add("spike", 0, step=step, loss=9.0, mean=1.2, deviations=12.0, action="skip")
        self.add(
            "step",
            0,
            step=step,
            epoch=step / steps,
            loss=loss,
            accuracy=max(1 - loss / 4, 0.0),
            lr=2e-4 * (1 - step / steps),
            grad_norm=None if spike else 1 + self.draw.random(),
            rows=[1, 2],
            tokens=4096,
            supervised_tokens=900,
            seconds=seconds | {"total": total},
            memory_bytes=3 << 30,
        )
        if step % max(steps // 10, 1) == 0:
            self.add("eval", 0, step=step, **_evaluated(step / steps))
            self.add("answers", 0, step=step, **_answered(step / steps))
            self.add("checkpoint", 0, step=step, path=f"step-{step:08d}", seconds=1.0)
            self.add("system", 0, **_system(self.time - self.began))


def _workers() -> list[dict[str, Any]]:
    return [{"host": host, "pid": 1, "gpu": "NVIDIA H200"} for host in ("a", "b")]


def _evaluated(share: float) -> dict[str, Any]:
    loss = 2.6 - 1.8 * share
    groups = {EVIL: {"rows": 40, "loss": loss}, "long": {"rows": 33, "loss": loss + 0.5}}
    gap = {"least_rows": 20, "loss": 0.5}
    values = {
        "loss": loss,
        "accuracy": 0.3 + 0.5 * share,
        "perplexity": math.exp(loss),
        "retain_loss": 1.5 + 0.4 * share,
    }
    return values | {"slices": {"kind": groups | {"gap": gap}}}


def _answered(share: float) -> dict[str, Any]:
    return {"rows": 50, "exact_match": 0.1 + 0.7 * share, "rouge": {"rouge_l": 0.2 + 0.4 * share}, "bleu": 3 + share}


def _system(elapsed_s: float) -> dict[str, Any]:
    """At 640 W a GPU; energy counts from the attempt's start."""
    gpus = [
        {"index": i, "percent": 97.0, "memory_bytes": 100 << 30, "power_w": 640.0, "energy_j": 640 * elapsed_s}
        for i in range(2)
    ]
    return {"host": "a", "cpu_percent": 35.0, "memory_bytes": 60 << 30, "gpus": gpus, "energy_j": 200 * elapsed_s}
