"""A Plan on Ray Train: place the workers, follow them, turn their end into a verdict or a named failure.

Ray Train restarts failed workers, up to the plan's `max_failures`; each restart goes on from the newest checkpoint.
We keep no supervisor of our own.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launcher.driver.failures import collect, describe, recorded_failures, root_cause
from launcher.errors import Interrupted, RunFailed
from launcher.plan.plan import Plan
from launcher.train.metrics import FILE as METRICS_FILE
from launcher.train.metrics import read
from launcher.train.verdict import Verdict, forget, request_stop

Listener = Callable[[dict[str, Any]], None]
"""Called with every new line of metrics.jsonl, and with {"kind": "stopping"} when a stop has been asked for."""
POLL_S = 0.2
GLOO_TIMEOUT_S = 1800


def fit(plan: Plan, attempt: int, listener: Listener) -> Verdict:
    """Train `plan` on the connected cluster until its workers end. Call from the main thread: it takes SIGINT and
    SIGTERM.

    Raises:
        RunFailed: the workers failed more often than allowed; the message begins with the root cause.
        Interrupted: a second signal: nothing was saved beyond the last checkpoint.
    """
    run_dir = Path(plan.run_dir)
    forget(run_dir)
    failures_file = run_dir / "logs" / "failures.jsonl"
    failures_file.unlink(missing_ok=True)
    outcome: list[BaseException | None] = []
    trainer = build_trainer(plan, attempt)

    def target() -> None:
        try:
            trainer.fit()
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=target, name="ray-train", daemon=True)
    lines = follow(run_dir / METRICS_FILE)
    with stop_on_signals(run_dir, listener) as stopping:
        thread.start()
        while thread.is_alive():
            thread.join(POLL_S)
            for record in next(lines):
                listener(record)
    for record in next(lines):
        listener(record)
    verdict = Verdict.load(run_dir)
    if verdict is not None:
        if verdict.kind == "stopped":
            raise Interrupted(
                f"{verdict.message}",
                hint=f"slipway resume {run_dir}",
                exit_code=128 + (stopping[0] if stopping else signal.SIGINT),
            )
        return verdict
    raise named_failure(outcome[0], run_dir, plan.lifecycle.max_failures)


def build_trainer(plan: Plan, attempt: int) -> Any:
    """Ray's TorchTrainer for a Plan: one worker a rank, nodes filled in order, failures bounded."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from launcher.driver.network import InterfaceTorchConfig
    from launcher.driver.ray_train import Trainer
    from launcher.driver.worker import train_worker

    layout, gpu = plan.layout, plan.layout.device == "cuda"
    resources = {"CPU": float(layout.cpus_per_worker)} | ({"GPU": 1.0} if gpu else {})
    return Trainer(
        train_worker,
        train_loop_config={"plan": plan.model_dump(mode="json"), "attempt": attempt},
        scaling_config=ScalingConfig(
            num_workers=layout.workers, use_gpu=gpu, resources_per_worker=resources, placement_strategy="PACK"
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=plan.run_dir,
            # The default of -1 would retry a controller that cannot place its workers for ever.
            failure_config=FailureConfig(max_failures=plan.lifecycle.max_failures, controller_failure_limit=3),
        ),
        torch_config=InterfaceTorchConfig(backend="nccl" if gpu else "gloo", timeout_s=GLOO_TIMEOUT_S),
    )


def follow(path: Path) -> Iterator[list[dict[str, Any]]]:
    """At each `next`, the whole lines that were added to a JSON-lines file since the last; begins at its present
    end."""
    position = path.stat().st_size if path.exists() else 0
    rest = b""
    while True:
        records = []
        if path.exists():
            with path.open("rb") as file:
                file.seek(position)
                rest += file.read()
                position = file.tell()
            *whole, rest = rest.split(b"\n")
            for line in whole:
                with contextlib.suppress(json.JSONDecodeError):
                    records.append(json.loads(line))
        yield records


@contextlib.contextmanager
def stop_on_signals(run_dir: Path, listener: Listener) -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM asks the workers to save and end, the second ends at once. Yields the signals so
    far."""
    seen: list[int] = []

    def handler(number: int, frame: Any) -> None:
        seen.append(number)
        if len(seen) > 1:
            raise Interrupted(
                "stopped at once; steps since the last checkpoint are lost",
                hint=f"slipway resume {run_dir}",
                exit_code=128 + number,
            )
        request_stop(run_dir, signal.Signals(number).name)
        listener({"kind": "stopping", "signal": signal.Signals(number).name})

    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def named_failure(error: BaseException | None, run_dir: Path, max_failures: int) -> RunFailed:
    """The error that a failed run ends with, its root cause first."""
    worker_failures = getattr(error, "worker_failures", None)
    hint = f"mend the cause, then: slipway resume {run_dir}"
    if worker_failures:
        starts = [record for record in read(run_dir) if record["kind"] == "start"]
        hosts = [worker["host"] for worker in starts[-1]["workers"]] if starts else []
        cause = root_cause(collect(worker_failures, recorded_failures(run_dir / "logs" / "failures.jsonl"), hosts))
        return RunFailed(describe(cause, run_dir, max_failures), hint=hint)
    reason = str(error).strip() if error is not None else "the workers ended without a verdict"
    return RunFailed(f"Ray could not carry the run: {reason}", hint=hint)
