"""A run's size while it goes on: on which machines it starts, when it grows, how long it waits, which failures count.

Ray Train's controller asks one policy for sizes and another whether to go on after a failure. Here they are one object:
what a failure means depends on the machines that the workers were on. It lives in the controller, on the launcher's
machine, and tells the launcher what it does through a file there. docs/decisions/0017 says why.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private.state import state as ray_state
from ray.exceptions import ActorUnavailableError
from ray.train import FailureConfig, ScalingConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import SchedulingState
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingDecision, ScalingPolicy
from ray.train.v2.api.exceptions import ControllerError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launcher.checkpoint.layout import newest_committed
from launcher.driver import failures
from launcher.driver.connect import cluster_facts
from launcher.driver.placement import choose, freed
from launcher.driver.shared_folder import APPEAR_S, sees, told
from launcher.errors import RunFailed, SlipwayError
from launcher.plan.facts import ClusterFacts, NodeFacts
from launcher.plan.plan import Plan
from launcher.store.location import is_url, open_store
from launcher.train.request import ask_for_checkpoint

log = logging.getLogger(__name__)

GROW_EVERY_S = 10.0
"""Seconds between two looks for more room while the workers train."""
WAIT_EVERY_S = 1.0
NOTICE_S = 90.0
"""Until Ray takes a silent machine for dead; its workers' neighbours have often failed long before."""
FAILED_STARTS = 3
"""In a row: workers that end while they are started."""


@dataclass(frozen=True)
class Terms:
    """What a Plan says about size and failures."""

    location: str
    workers: int
    min_workers: int
    cpus: int
    gpu: bool
    wait_s: float
    max_failures: int
    events: str
    """File on the launcher's machine that is told what happens."""

    @classmethod
    def of(cls, plan: Plan, events: str) -> Terms:
        layout, life = plan.layout, plan.lifecycle
        gpu = layout.device == "cuda"
        sizes = (layout.workers, layout.min_workers, layout.cpus_per_worker)
        return cls(plan.location, *sizes, gpu, life.wait_s, life.max_failures, events)

    @property
    def resources(self) -> dict[str, float]:
        """Of one worker, as Ray counts them."""
        return {"CPU": float(self.cpus)} | ({"GPU": 1.0} if self.gpu else {})


@dataclass
class PinnedScalingConfig(ScalingConfig):
    """Ray's ScalingConfig, with a machine for each worker: left to itself, Ray packs them as it likes."""

    pins: tuple[str, ...] = ()
    """Ray node of each rank of the next start."""

    def _label_selector_per_worker(self, num_workers: int) -> list[dict[str, str]] | None:
        if len(self.pins) != num_workers:
            return super()._label_selector_per_worker(num_workers)
        return [{"ray.io/node-id": node} for node in self.pins]


def scaling_config(terms: Terms) -> PinnedScalingConfig:
    """For as many workers as there may be; the policy decides how many there are, and where."""
    return PinnedScalingConfig(
        num_workers=terms.workers, use_gpu=terms.gpu, resources_per_worker=terms.resources, placement_strategy="PACK"
    )


@dataclass(frozen=True)
class _Failure:
    """One end of the workers, at `time`; those on `nodes` had been started at `since`."""

    time: float
    since: float
    nodes: frozenset[str]
    progressed: bool
    """Whether a checkpoint was committed since the failure before."""


class Policy(ScalingPolicy, FailurePolicy):
    """Both of Ray's policies for one run; made by `policy`."""

    def __init__(self, terms: Terms) -> None:
        ScalingPolicy.__init__(self, scaling_config(terms))
        FailurePolicy.__init__(self, FailureConfig(max_failures=terms.max_failures))
        self.terms = terms
        self.pinned = PinnedScalingConfig()
        """The one that the controller starts workers by."""
        self.state: Any = None
        self.started: Any = None
        """The worker group that was started last."""
        self.group: tuple[NodeFacts, ...] = ()
        """The machine of each of its ranks."""
        self.held: tuple[str, ...] = ()
        """The Ray node of each of its ranks while their resources are ours."""
        self.since = 0.0
        self.seen: dict[str, NodeFacts] = {}
        """Every Ray node that ran workers of ours."""
        self.gone: dict[str, float] = {}
        """Those that were found dead, and when."""
        self.failures: list[_Failure] = []
        self.failed_starts = 0
        self.newest_at_failure: int | None = None
        self.waiting_since: float | None = None
        self.said = ""
        self.shared: set[str] = set()
        """Ray nodes that see the run's folder."""
        self.answers: dict[str, Any] = {}
        """Of those that have been asked whether they do, and have not said yes."""
        self.looked = time.monotonic()
        self.asked: int | None = None
        """While a checkpoint has been asked for, so that the run can grow: the step of the newest before it."""

    def __reduce__(self) -> tuple[Any, tuple[Terms]]:
        # Ray pickles its two policies and the callbacks one by one; in the controller they are one object again.
        return policy, (self.terms,)

    def after_controller_start(self, train_run_context: Any) -> None:
        self.pinned = train_run_context.scaling_config
        # What Ray does here starts an actor, for an autoscaler: only where there is one is it worth the wait.
        if ray_state.get_max_resources_from_cluster_config():
            super().after_controller_start(train_run_context)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        self.state = current_state

    def _get_num_workers_for_resource_request(self) -> int:
        return self.terms.workers

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Start as many as there is room for; with less than the least wait, and give up in the end.

        Raises RunFailed, which ends the run.
        """
        self._ask_autoscaler()
        now = time.monotonic()
        self.waiting_since = self.waiting_since or now
        cluster = self._look()
        if cluster is not None:
            chosen = self._chosen(cluster)
            if len(chosen) >= self.terms.min_workers:
                return self._start_on(chosen)
            shortage = self._shortage(cluster, len(chosen))
            if now - self.waiting_since > self.terms.wait_s:
                raise RunFailed(
                    f"{shortage}; waited {self.terms.wait_s:g} s for more",
                    hint=f"when it is back, go on: slipway resume {self.terms.location}",
                )
            if shortage != self.said:
                self.said = shortage
                self._tell("waiting", message=shortage, wait_s=self.terms.wait_s)
        time.sleep(WAIT_EVERY_S)  # Ray asks again at once
        return NoopDecision()

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        """Grow where there is room for more, as soon as a checkpoint has been committed that was asked for."""
        self._ask_autoscaler()
        if self.said:
            self._tell("placed")
        self.waiting_since, self.failed_starts, self.said = None, 0, ""
        if self.asked is not None:
            if self._newest() <= self.asked:
                return NoopDecision()
            self.asked = None
            return self._grown() or NoopDecision()
        now = time.monotonic()
        if len(self.group) < self.terms.workers and now - self.looked >= (
            WAIT_EVERY_S if self.answers else GROW_EVERY_S
        ):
            self.looked = now
            if chosen := self._room_for_more():
                self.asked = self._newest()
                self._tell("growing", workers=len(chosen))
                worker_group_state.workers[0].execute_async(ask_for_checkpoint)
        return NoopDecision()

    def on_controller_start_worker_group(self, *, scaling_config: Any, num_workers: int) -> None:
        """Look once more, now that the workers before are ended: that waits until Ray knows which of their machines is
        gone, and it would wait another START_TIMEOUT_S for one that was chosen before. Raises
        WorkerGroupStartupFailedError."""
        cluster = self._look()
        if cluster is not None and not set(self.held) <= {node.id for node in cluster.nodes}:
            raise WorkerGroupStartupFailedError("a machine was lost before workers were started there")

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """Whether to go on. What does not count: a machine that was lost, if a checkpoint had been committed since the
        failure before, or it was the first."""
        cause = getattr(training_failed_error, "controller_failure", None)
        if isinstance(cause, SlipwayError):
            return FailureDecision.RAISE
        self.asked = None
        self._look()
        if isinstance(training_failed_error, ControllerError):
            return self._after_failed_start(cause)
        newest = self._newest()
        before, self.newest_at_failure = self.newest_at_failure, newest
        nodes = frozenset(node.id for node in self.group)
        self.failures.append(_Failure(time.time(), self.since, nodes, before is None or newest > before))
        self._tell_cause(getattr(training_failed_error, "worker_failures", {}))
        if self._num_failures() > self.terms.max_failures and _unexplained(training_failed_error):
            self._wait_for_news(nodes)
        return FailureDecision.RETRY if self._num_failures() <= self.terms.max_failures else FailureDecision.RAISE

    def _after_failed_start(self, cause: BaseException | None) -> FailureDecision:
        if not isinstance(self.state, SchedulingState):
            return FailureDecision.RAISE
        self.held = ()
        # Ray 2.60 forgets workers that it has started when it cannot connect them, and their resources stay taken.
        if self.started is not None and self.started.has_started():
            with contextlib.suppress(Exception):
                self.started.shutdown()
        if isinstance(cause, WorkerGroupStartupTimeoutError):  # what was free is not, or not any more
            in_time = self.waiting_since is None or time.monotonic() - self.waiting_since <= self.terms.wait_s
            return FailureDecision.RETRY if in_time else FailureDecision.RAISE
        lost = any(node.id in self.gone for node in self.group)
        if not lost:
            self.failed_starts += 1
        echo = failures.Failure(0, None, str(cause), None, died=False).collateral
        again = lost or echo or isinstance(cause, WorkerGroupStartupFailedError)
        return FailureDecision.RETRY if again and self.failed_starts <= FAILED_STARTS else FailureDecision.RAISE

    def _num_failures(self) -> int:
        """Those that count, by what is known by now: in a row, without a checkpoint between them."""

        def excused(failure: _Failure) -> bool:
            deaths = (self.gone[node] for node in failure.nodes if node in self.gone)
            return failure.progressed and any(failure.since <= death <= failure.time + NOTICE_S for death in deaths)

        number = 0
        for failure in self.failures:
            number = (0 if failure.progressed else number) + (not excused(failure))
        return number

    def _wait_for_news(self, nodes: frozenset[str]) -> None:
        """Before the last failure is held against the run: Ray may only be about to notice that a machine is gone."""
        if len(nodes) < 2:
            return
        deadline = time.monotonic() + NOTICE_S
        while time.monotonic() < deadline and not any(node in self.gone for node in nodes):
            time.sleep(WAIT_EVERY_S)
            self._look()

    def _look(self) -> ClusterFacts | None:
        """The cluster as it would be without our workers; None where Ray does not answer now."""
        try:
            cluster = cluster_facts()
        except Exception as error:  # of whatever kind: it is asked again
            log.warning("the cluster cannot be looked at: %s", error)
            return None
        alive = {node.id for node in cluster.nodes}
        lost = self.seen.keys() - alive - self.gone.keys()
        self.gone |= dict.fromkeys(lost, time.time())
        if hosts := sorted({node.host for node in self.group if node.id in lost}):
            self._tell("lost", hosts=hosts)
        return freed(cluster, self.held, self.terms.cpus, self.terms.gpu)

    def _chosen(self, cluster: ClusterFacts) -> list[NodeFacts]:
        nodes = [node for node in cluster.nodes if self._sees_folder(node)]
        return choose(nodes, self.terms.workers, self.terms.cpus, self.terms.gpu)

    def _sees_folder(self, node: NodeFacts) -> bool:
        """Whether a node may have workers. One that joins later, such as a host whose disk is not mounted yet, would
        fail the whole group each time. Never waits: the answer counts when it is there, and a no is asked again."""
        if is_url(self.terms.location) or not self.seen:  # the launcher has asked those that were there at first
            self.shared.add(node.id)
        if node.id not in self.shared and node.room(self.terms.cpus, self.terms.gpu):
            if node.id in self.answers:
                answer = self.answers[node.id]
                if ray.wait([answer], timeout=0)[0]:
                    del self.answers[node.id]
                    if told(answer):
                        self.shared.add(node.id)
            else:
                there = NodeAffinitySchedulingStrategy(node.id, soft=False)
                look = ray.remote(num_cpus=0, max_retries=0)(sees).options(scheduling_strategy=there)
                self.answers[node.id] = look.remote(str(Path(self.terms.location) / "plan.json"), APPEAR_S)
        return node.id in self.shared

    def _start_on(self, chosen: list[NodeFacts]) -> ResizeDecision:
        self.group, self.held = tuple(chosen), tuple(node.id for node in chosen)
        self.pinned.pins = self.held
        self.seen |= {node.id: node for node in chosen}
        self.since, self.looked = time.time(), time.monotonic()
        return ResizeDecision(num_workers=len(chosen), resources_per_worker=self.terms.resources)

    def _room_for_more(self) -> list[NodeFacts]:
        """The machines of a larger group, if there is room for one."""
        cluster = self._look()
        chosen = self._chosen(cluster) if cluster is not None else []
        return chosen if len(chosen) > len(self.group) else []

    def _grown(self) -> ResizeDecision | None:
        chosen = self._room_for_more()
        return self._start_on(chosen) if chosen else None

    def _newest(self) -> int:
        """Step of the newest checkpoint, -1 where there is none; as it was where the store does not answer."""
        with contextlib.suppress(OSError, SlipwayError):
            newest = newest_committed(open_store(self.terms.location))
            return newest.step if newest is not None else -1
        return next((known for known in (self.asked, self.newest_at_failure) if known is not None), -1)

    def _shortage(self, cluster: ClusterFacts, room: int) -> str:
        terms = self.terms
        least = "workers are the least" if terms.min_workers < terms.workers else "workers are needed"
        alive = {(node.host, node.address) for node in cluster.nodes}
        lost = {
            f"{node.host} ({node.address}) is gone since {time.strftime('%H:%M:%S', time.localtime(self.gone[key]))}"
            for key, node in self.seen.items()
            if key in self.gone and (node.host, node.address) not in alive
        }
        why = ", ".join(sorted(lost)) or f"free are {cluster}"
        return f"{terms.min_workers} {least}, the cluster has room for {room}: {why}"

    def _tell_cause(self, worker_failures: Mapping[int, BaseException]) -> None:
        found = failures.collect(worker_failures, [], [node.host for node in self.group])
        if found:
            cause = failures.root_cause(found)
            # Where all only heard of another's end a machine is gone, and Ray will say which.
            if not cause.collateral and self.group[cause.rank].id not in self.gone:
                self._tell("failed", rank=cause.rank, host=cause.host, message=cause.message)

    def _ask_autoscaler(self) -> None:
        if self._coordinator_client is not None:
            self._maybe_send_resource_request()

    def _tell(self, kind: str, **values: Any) -> None:
        with contextlib.suppress(OSError), Path(self.terms.events).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind} | values) + "\n")


@functools.cache
def policy(terms: Terms) -> Policy:
    """The policy of a run, one in each process."""
    return Policy(terms)


class StartedGroups(WorkerGroupCallback):
    """Shows the policy each worker group before it is connected; comes before Ray's own callbacks."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms

    def after_worker_group_start(self, worker_group: Any) -> None:
        policy(self.terms).started = worker_group


def _unexplained(error: Any) -> bool:
    """Whether a failed rank only cannot be reached, or all of them only heard of another's end."""
    found: Mapping[int, Any] = getattr(error, "worker_failures", {})
    unreached = any(
        isinstance(getattr(one, "health_check_failure", one), ActorUnavailableError) for one in found.values()
    )
    return unreached or all(failure.collateral for failure in failures.collect(found, []))
