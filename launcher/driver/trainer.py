"""A Plan on Ray Train: place the workers, follow them, turn their end into a verdict or a named failure.

Ray Train restarts failed workers, up to the plan's `max_failures`; each restart goes on from the newest checkpoint.
We keep no supervisor of our own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from launcher.checkpoint.lease import current
from launcher.driver import controller, remote, secrets
from launcher.driver.failures import collect, death, describe, recorded_failures, restarted, root_cause
from launcher.driver.signals import handled, must_end_soon
from launcher.driver.watch import Watcher, watching
from launcher.errors import Interrupted, RunFailed, SlipwayError, Superseded
from launcher.plan.plan import Plan
from launcher.store.location import is_url, open_store
from launcher.train import startup
from launcher.train.metrics import FILE as METRICS_FILE
from launcher.train.metrics import follow, read
from launcher.train.verdict import Verdict, forget

Listener = Callable[[dict[str, Any]], None]
"""Called with every new line of metrics.jsonl, with {"kind": "stopping"} when a stop has been asked for, and with
{"kind": "lost"}, {"kind": "waiting"} and {"kind": "growing"} when machines are gone, missed or there again, and with
{"kind": "hanging"} when ranks stand still."""
POLL_S = 0.2
EVENTS = "events.jsonl"
"""Beside what Ray Train keeps: what the policy in its controller has to say, see `driver.elastic`."""
START_TIMEOUT_S = 30
"""Workers are started only where there was room a moment before; Ray would wait a minute for what is gone by then."""
GLOO_TIMEOUT_S = 1800


def fit(plan: Plan, launch: int, listener: Listener) -> Verdict:
    """Train `plan` on the connected cluster until its workers end; `launch` is the number of the lease held. Call from
    the main thread: it takes SIGINT and SIGTERM.

    Raises:
        RunFailed: the workers failed more often than allowed; the message begins with the root cause.
        Superseded: another launcher has taken the run over.
        Interrupted: stopped and saved; or a signal before the first step, a second one, or the end of the grace time:
            nothing was saved beyond the last checkpoint.
    """
    run_dir = Path(plan.run_dir)
    forget(run_dir)
    remote.forget_end(plan)
    with contextlib.suppress(OSError):  # on a disk that takes no change nothing new is recorded either
        (run_dir / "logs" / "failures.jsonl").unlink(missing_ok=True)
    lines, stopping = follow(run_dir / METRICS_FILE), Stopping(plan, launch, listener)
    with tempfile.TemporaryDirectory(prefix="slipway-ray-", ignore_cleanup_errors=True) as scratch:
        events = follow(Path(scratch) / EVENTS)
        for each in (lines, events):
            next(each)  # what comes is what comes from here on
        mirrored = remote.mirrored_metrics(plan, launch)
        with handled(stopping.on_signal), mirrored, secrets.offered(), watching(plan, launch) as watcher:
            training = Training(build_trainer(plan, launch, scratch, watcher))
            training.start()
            while training.is_alive():
                training.join(POLL_S)
                for record in next(lines):
                    stopping.heard(record)
                for event in next(events):
                    stopping.told(event)
                for event in watcher.said():
                    listener(event)
                stopping.act()
    for record in next(lines):
        stopping.heard(record)
    verdict = training.verdict or remote.found_verdict(plan, launch)
    if verdict is None:
        raise named_failure(training.error, plan, launch, watcher.blamed)
    number = stopping.signals[0] if stopping.signals else signal.SIGINT
    if verdict.kind == "stopped":
        raise Interrupted(verdict.message, hint=f"slipway resume {plan.location}", exit_code=128 + number)
    if verdict.exit_code == 0 and stopping.signals and plan.lifecycle.export:
        message = f"{verdict.message}; stopped before the model was exported"
        raise Interrupted(message, hint=f"slipway export {plan.location}", exit_code=128 + number)
    return verdict


class Training(threading.Thread):
    """Ray Train at work; `verdict` is what the first worker returned, `error` what Ray raised."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(name="ray-train", daemon=True)
        self.trainer = trainer
        self.verdict: Verdict | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            said = self.trainer.fit().return_value
            self.verdict = Verdict(**said) if said is not None else None
        except BaseException as error:
            self.error = error


class Stopping:
    """What signals have asked for while `fit` waits.

    The first asks the workers to save and end, or ends at once where they have not begun: there is nothing to save. The
    second ends at once. After SIGTERM the run must have ended within the plan's grace time.
    """

    def __init__(self, plan: Plan, launch: int, listener: Listener) -> None:
        self.plan, self.launch, self.listener = plan, launch, listener
        self.signals: list[int] = []
        self.answered = 0
        """How many of them."""
        self.deadline: float | None = None
        self.saved: int | None = None
        """Step of the newest checkpoint, as far as the workers have told."""
        self.begun = False
        self.waiting = False
        """For room: there are no workers who could save."""

    def heard(self, record: dict[str, Any]) -> None:
        """Pass a line of metrics.jsonl on, unless workers of another launch wrote it that have not ended yet."""
        if str(record.get("attempt")).partition(".")[0] != str(self.launch):
            return
        self.begun = self.begun or record["kind"] == "start"
        self.waiting = self.waiting and record["kind"] != "start"
        if record["kind"] in ("start", "checkpoint"):
            self.saved = record["step"] or None
        self.listener(record)

    def told(self, event: dict[str, Any]) -> None:
        """Pass on what the policy in Ray's controller has to say."""
        self.waiting = self.waiting or event["kind"] == "waiting"
        # Of a run in an object store their own word, the line `start`, may come with the first checkpoint only.
        if event["kind"] == "placed" and is_url(self.plan.location):
            self.waiting = False
        self.listener(event)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Handler of SIGINT and SIGTERM. What follows from it is for `act`: what is raised here may get lost."""
        self.signals.append(number)

    def act(self) -> None:
        """Do what signals ask for. Raises Interrupted where the run is not to be waited for any longer."""
        while self.answered < len(self.signals):
            self.answered += 1
            self._answer(self.signals[self.answered - 1])
        if self.answered and self.waiting:  # the workers were lost before they had saved
            raise self._interrupted(f"stopped while waiting for room; {self._lost()}", self.signals[0])
        if self.deadline is not None and time.monotonic() > self.deadline:
            grace = f"the grace time of {self.plan.lifecycle.grace_s:g} s is over before the workers had saved"
            raise self._interrupted(f"{grace}; {self._lost()}", signal.SIGTERM)

    def _answer(self, number: int) -> None:
        if not self.begun and not remote.has_begun(self.plan, self.launch):
            raise self._interrupted("stopped before the first step", number)
        if self.waiting:
            return
        if self.answered > 1:
            raise self._interrupted(f"stopped at once; {self._lost()}", number)
        name = signal.Signals(number).name
        grace_s = self.plan.lifecycle.grace_s if number == signal.SIGTERM else None
        if grace_s is not None:
            self.deadline = time.monotonic() + grace_s
        self.listener({"kind": "stopping", "signal": name, "grace_s": grace_s})
        if not remote.ask_to_stop(self.plan, name):
            raise self._interrupted(f"the workers cannot be asked to save: {self._lost()}", number)

    def _lost(self) -> str:
        since = f"since the checkpoint of step {self.saved}" if self.saved is not None else "so far"
        return f"steps {since} are lost"

    def _interrupted(self, message: str, number: int) -> Interrupted:
        must_end_soon(number, message)
        return Interrupted(message, hint=f"slipway resume {self.plan.location}", exit_code=128 + number)


def build_trainer(plan: Plan, launch: int, scratch: str, watcher: Watcher) -> Any:
    """Ray's TorchTrainer for a Plan: one worker a rank; where, how many and how often is for `driver.elastic`.

    `scratch` is a folder on this machine for what Ray Train keeps: nothing, as no checkpoint goes through it. Ray wants
    it shared by all nodes only for those, and its controller, which runs here, dies where it cannot be written: so it
    is not the run's folder, whose disk may fill up or vanish.
    """
    from ray.train import RunConfig

    from launcher.driver.elastic import Terms
    from launcher.driver.network import InterfaceTorchConfig
    from launcher.driver.ray_train import Trainer
    from launcher.driver.worker import train_worker

    startup.ended("training imports")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_TIMEOUT_S))
    gpu = plan.layout.device == "cuda"
    return Trainer(
        train_worker,
        train_loop_config={"plan": plan.model_dump(mode="json"), "launch": launch, "startup": startup.so_far()},
        terms=Terms.of(plan, str(Path(scratch) / EVENTS)),
        controller=controller.started(),
        run_config=RunConfig(name="ray", storage_path=scratch),
        torch_config=InterfaceTorchConfig(
            backend="nccl" if gpu else "gloo",
            timeout_s=GLOO_TIMEOUT_S,
            watch=watcher.actor,
            beat_every_s=watcher.every_s,
        ),
    )


def named_failure(error: BaseException | None, plan: Plan, launch: int, hang: str | None = None) -> SlipwayError:
    """The error that a failed run ends with, its root cause first: the `hang` that its last workers were killed for."""
    run_dir = Path(plan.run_dir)
    with contextlib.suppress(OSError, SlipwayError):
        latest = current(open_store(plan.location))
        if latest is not None and latest.launch > launch:
            return Superseded(
                f"another launcher has taken {plan.location} over: this one trains no more",
                hint="nothing is lost: the other one goes on",
            )
    given_up = getattr(error, "controller_failure", None)
    if isinstance(given_up, SlipwayError):  # by the policy, in the controller
        return given_up
    worker_failures = getattr(error, "worker_failures", None)
    hint = f"mend the cause, then: slipway resume {plan.location}"
    if hang is not None:
        return RunFailed(f"the run hung: {hang}{restarted(plan.lifecycle.max_failures)}", hint=hint)
    if worker_failures:
        hosts: list[str] = []
        recorded: list[dict[str, Any]] = []
        with contextlib.suppress(OSError):  # the cause may be that very disk
            starts = [record for record in read(run_dir) if record["kind"] == "start"]
            hosts = [worker["host"] for worker in starts[-1]["workers"]] if starts else []
            recorded = recorded_failures(run_dir / "logs" / "failures.jsonl")
        cause = root_cause(collect(worker_failures, recorded, hosts))
        return RunFailed(describe(cause, run_dir, plan.lifecycle.max_failures), hint=hint)
    reason = str(error).strip() if error is not None else "the workers ended without a verdict"
    if death(error) is not None:  # of Ray Train's controller, which runs on this very machine
        return RunFailed(
            f"Ray has ended, on this machine or on its head: {reason}",
            hint=f"slipway doctor --cluster shows what is there; then: slipway resume {plan.location}",
        )
    return RunFailed(f"Ray could not carry the run: {reason}", hint=hint)
