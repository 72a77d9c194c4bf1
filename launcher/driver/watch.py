"""The watch over a run's ranks: their beats come in, a verdict goes out, stacks are taken, the culprit is killed.

In each worker a thread sends a beat now and then to one small actor beside the driver. The driver asks it whether the
run hangs, which is `driver/hang.py`'s to decide, and acts: killed is only what stands still, and Ray Train restarts the
group as after any worker's death. Nobody waits for a beat, and a watch that dies is started anew by Ray and filled by
the next beats: a fault of the watch never ends training.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from launcher.checkpoint.lease import current
from launcher.driver.hang import Hang, Watched, beat_every_s, excused, report, sentence
from launcher.driver.stacks import Process, Seen, answer_signals, end, examine
from launcher.errors import SlipwayError
from launcher.plan.plan import Plan
from launcher.store.location import open_store
from launcher.train.beat import OPENING, Beat, Pulse, mark
from launcher.train.metrics import MetricsLog

log = logging.getLogger(__name__)

MOST_UNSENT = 20
"""Beats of one rank on their way; where the watch does not answer, further ones are dropped."""
HOST_ANSWERS_S = 60.0
ENDS_S = 10.0
"""How long the end of a run waits for the report on the hang that it ended by."""
RAY_NOTICES_S = 600.0
"""Ray Train's own limit for a worker that answers nothing; it names no cause."""

Result = TypeVar("Result")


class Watch:
    """The actor."""

    def __init__(self, timeout_s: float) -> None:
        self.watched = Watched(timeout_s)

    def hear(self, group: float, beat: Beat) -> None:
        """A rank's beat."""
        self.watched.hear(group, beat, time.monotonic())

    def look(self) -> tuple[float, Hang | None]:
        """Which worker group is watched, and whether it hangs."""
        return self.watched.group, self.watched.verdict(time.monotonic())

    def forgive(self) -> None:
        """Count anew from now on."""
        self.watched.forgive(time.monotonic())


def start_beating(watch: Any, group: float, every_s: float) -> None:
    """In a worker, before its process group opens: send what it does to the watch for as long as it lives. `group` is
    when its worker group was started."""
    import ray

    answer_signals()
    mark(OPENING)
    pulse = Pulse(ray.train.get_context().get_world_rank(), ray.get_runtime_context().get_node_id())

    def send() -> None:
        while True:
            with contextlib.suppress(Exception):  # too many are unsent, or Ray is ending
                watch.hear.remote(group, pulse.beat())
            time.sleep(every_s)

    threading.Thread(target=send, name="beat", daemon=True).start()


@contextlib.contextmanager
def watching(plan: Plan, launch: int) -> Iterator[Watcher]:
    """Watch the run's ranks for the length of the block; does nothing where the plan says so."""
    watcher = Watcher(plan, launch)
    watcher.start()
    try:
        yield watcher
    finally:
        watcher.end()


class Watcher:
    """The driver's end of the watch."""

    def __init__(self, plan: Plan, launch: int) -> None:
        self.plan, self.launch = plan, launch
        self.timeout_s = plan.lifecycle.hang_timeout_s
        self.actor: Any = None
        """What `start_beating` sends to; None where nobody watches."""
        self.blamed: str | None = None
        """Why workers were killed, until others have taken their place."""
        self._of_group = 0.0
        self._attempt = f"{launch}.0"
        self._said: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    @property
    def every_s(self) -> float:
        return beat_every_s(self.timeout_s) if self.timeout_s is not None else 0.0

    def start(self) -> None:
        """Make the actor, on this node, and begin to ask it."""
        if self.timeout_s is None:
            return
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # Ray Train ends a worker that answers nothing, without a cause: only after us.
        os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(max(RAY_NOTICES_S, 2 * self.timeout_s)))
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"num_cpus": 0, "max_restarts": -1, "max_pending_calls": MOST_UNSENT, "scheduling_strategy": here}
        self.actor = ray.remote(Watch).options(**options).remote(self.timeout_s)
        self._thread.start()

    def end(self) -> None:
        """Watch no more, once what is being written is."""
        self._ended.set()
        if self.actor is not None:
            import ray

            self._thread.join(ENDS_S)
            with contextlib.suppress(Exception):
                ray.kill(self.actor)

    def said(self) -> Iterator[dict[str, Any]]:
        """{"kind": "hanging", "what", "stacks"} for each hang since this was asked last; never waits."""
        for _ in range(self._said.qsize()):
            yield self._said.get()

    def _watch(self) -> None:
        failing = False
        while not self._ended.wait(self.every_s):
            try:
                hang = self._look()
                if hang is not None:
                    self._act(hang)
                failing = False
            except Exception as error:  # of whatever kind: it must not end the watch for good
                if not failing and not self._ended.is_set():
                    log.warning("the watch over the run's ranks does not answer: %s", error)
                failing = True

    def _look(self) -> Hang | None:
        import ray

        group, hang = ray.get(self.actor.look.remote(), timeout=10 * self.every_s)
        if group > self._of_group:
            self._of_group, self.blamed = group, None
        found: Hang | None = hang
        return found

    def _act(self, hang: Hang) -> None:
        found = {seen.rank: seen for seen in self._on_their_hosts(hang.beats, examine)}
        what = sentence(hang, found)
        excuse = "it goes on" if self._look() is None else excused(hang, found)
        if excuse is not None:
            log.info("not taken for a hang: %s: %s", what, excuse)
        else:
            file = Path(self.plan.run_dir) / "logs" / f"hang-{hang.attempt or self.launch}-{hang.step}.log"
            self.blamed = f"{what}; stacks: {file}"
            self._said.put({"kind": "hanging", "what": what, "stacks": str(file)})
            self._kill(hang, found)
            self._write_down(hang, what, file, report(hang, found, what))
        self.actor.forgive.remote()

    def _kill(self, hang: Hang, found: Mapping[int, Seen]) -> None:
        """SIGKILL to the culprits; to all where nobody is to blame, or where it does not end them: their host is cut
        off, or they wait for a disk."""
        to_blame = [beat for beat in hang.culprits if beat.rank in found]
        ended = self._on_their_hosts(to_blame, end) if to_blame else []
        if not ended:
            self._on_their_hosts([beat for beat in hang.beats if beat.rank in found and beat not in to_blame], end)

    def _on_their_hosts(
        self, beats: Sequence[Beat], action: Callable[[Sequence[Process]], list[Result]]
    ) -> list[Result]:
        """`action` on the processes of each node, there and on all nodes at once; those that do not answer are left
        out."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        by_node: dict[str, list[Process]] = defaultdict(list)
        for beat in beats:
            output = Path(self.plan.run_dir) / "logs" / f"worker-{beat.rank}.log"
            by_node[beat.node].append(Process(beat.rank, beat.pid, beat.born, str(output)))
        task = ray.remote(num_cpus=0, max_retries=0)(action)
        pending = [
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(processes)
            for node, processes in by_node.items()
        ]
        results: list[Result] = []
        deadline = time.monotonic() + HOST_ANSWERS_S
        while pending and time.monotonic() < deadline and not self._ended.is_set():
            done, pending = ray.wait(pending, num_returns=len(pending), timeout=self.every_s)
            for one in done:
                with contextlib.suppress(ray.exceptions.RayError):  # a node that is no more
                    results += ray.get(one)
            with contextlib.suppress(Exception):
                self._look()  # a watch that hears and is asked nothing would take itself for stopped
        for one in pending:
            with contextlib.suppress(Exception):
                ray.cancel(one, force=True)
        return results

    def _write_down(self, hang: Hang, what: str, file: Path, stacks: str) -> None:
        """In the run's folder, unless another launcher has taken it over; raises nothing."""
        try:
            latest = current(open_store(self.plan.location))
            if latest is not None and latest.launch > self.launch:
                return
            with file.open("a", encoding="utf-8") as out:
                out.write(stacks)
        except (OSError, SlipwayError) as error:
            log.warning("%s cannot be written: %s", file, error)
        first = hang.culprits[0] if hang.culprits else None
        who = {"rank": first.rank if first else None, "host": first.host if first else None}
        self._attempt = hang.attempt or self._attempt
        metrics = MetricsLog(Path(self.plan.run_dir), self._attempt, writes=True)
        metrics.write("hang", step=hang.step, **who, what=what, stacks=str(file))
        metrics.close()
