"""A run's checkpoints, written beside training: the loop waits for a copy in host memory, and not for the disk.

DCP's own `async_save` stages a custom shard as a plain tensor, which loses its place in the whole. So the copies are
made here, into buffers that are kept, and a plain save of them goes on in a thread, on a process group of its own: the
training group's collectives would mix with it.

Masters and moments change in one place only, the optimizer's step. So the copying too goes on beside the next forward
and backward pass, and the loop waits for its end right before that step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist

from launcher.checkpoint.layout import GROUP
from launcher.checkpoint.lease import Attempt, fence
from launcher.checkpoint.manifest import Manifest
from launcher.checkpoint.retain import Keep, retain
from launcher.checkpoint.room import missing_room
from launcher.checkpoint.save import describe, own_shards, saving, write
from launcher.checkpoint.shards import FlatShard
from launcher.checkpoint.together import explained, together
from launcher.errors import SlipwayError, Superseded
from launcher.plan.plan import Plan
from launcher.store.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """What became of one save."""

    step: int
    seconds: float
    """From `begin` to COMMIT, most of it beside training."""
    error: SlipwayError | None
    """Why it is no checkpoint; the same on all ranks."""


class Saver:
    """One rank's end of the saving; every rank makes one, and calls the same methods in the same order."""

    def __init__(
        self,
        store: Store,
        attempt: Attempt,
        plan: Plan,
        engine: Any,
        device: torch.device,
        alongside: Callable[[], None] = lambda: None,
    ) -> None:
        """Collective. `alongside` is called on each rank before COMMIT: what goes up with a checkpoint."""
        life = plan.lifecycle
        self.store, self.attempt, self.plan, self.device = store, attempt, plan, device
        # Where the model may be made from the best one, that one stays.
        needed = life.export_best or life.early_stopping is not None
        self.keep = Keep(life.keep_last, max(life.keep_best, int(needed)), life.keep_every, life.metric)
        self.alongside = alongside
        # A write may hang for hours (a network disk, a server) and then go on; where a wait has timed out once, the
        # group is of no more use. A rank that is gone is noticed by its closed connection all the same.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(days=7), group_desc=GROUP)
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._outcomes: SimpleQueue[Saved] = SimpleQueue()
        self.newest: int | None = None
        """Step of the newest checkpoint that this run has written or gone on from."""
        self.superseded = False
        """Another launcher has taken the run over: nothing more can be saved."""
        self.serve(engine)

    def serve(self, engine: Any) -> None:
        """Save this engine from now on. Collective."""
        self.engine = engine
        self.without_room: str | None = None
        """Why the loop waits for the disk although the plan says `background`."""
        self.background = self.plan.lifecycle.background_saves
        shards = own_shards(engine) if self.background else {}
        if self.background:
            num_bytes = sum(shard.held.nbytes for shard in shards.values())
            self.without_room = missing_room(num_bytes, self.device.type, self.group)
            self.background = self.without_room is None
        self._copies = _Copies(self.device) if self.background else None
        if self._copies is not None:
            # Now, beside the first steps: the first save would wait for the kernel to hand out the pages.
            self._start(lambda: self._make_copies(shards))

    def release(self) -> None:
        """Let go of the engine and of the copies, once nothing is being written; `serve` comes before the next save."""
        self.join()
        self.engine = self._copies = None

    def begin(self, step: int, progress: dict[str, object]) -> None:
        """Save the state as it is now. Collective; waits where the last one is not written yet.

        Raises nothing that the disk is to blame for: `finished` tells how it went.
        """
        self.join()
        started = time.perf_counter()
        shards = own_shards(self.engine)
        described = describe(step, self.attempt, self.engine, progress, self.plan)
        if self._copies is None:
            self._write(shards, described, started)
        else:
            self._copied.clear()
            self._copies.mark()
            self._start(lambda: self._copy_and_write(shards, described, started))

    def before_update(self) -> None:
        """Wait until the weights may change: a copy that is being made still reads them."""
        self._copied.wait()

    def finished(self) -> list[Saved]:
        """The saves that have ended since this was asked last, oldest first; never waits."""
        return [self._outcomes.get() for _ in range(self._outcomes.qsize())]

    def join(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _start(self, action: Callable[[], None]) -> None:
        # A daemon: where another rank has died, its collectives may wait for ever, and the process must still end.
        self._thread = threading.Thread(target=action, name="checkpoint", daemon=True)
        self._thread.start()

    def _make_copies(self, shards: Mapping[str, FlatShard]) -> None:
        assert self._copies is not None
        try:
            self._copies.make(shards)
        except (RuntimeError, MemoryError) as error:  # tried again, and told, at the first save
            log.warning("no memory for copies yet: %s", error)

    def _copy_and_write(self, shards: Mapping[str, FlatShard], described: Manifest, started: float) -> None:
        copies, doing = self._copies, saving(described)
        assert copies is not None
        copied: dict[str, FlatShard] = {}

        def copy() -> None:
            try:
                copied.update(copies.of(shards))
            finally:
                self._copied.set()

        self._write(copied, described, started, before=lambda: together(doing, copy, self.group))

    def _write(
        self,
        shards: Mapping[str, FlatShard],
        described: Manifest,
        started: float,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        failure: SlipwayError | None = None
        doing = saving(described)
        try:
            before()
            first = dist.get_rank(self.group) == 0
            together(doing, lambda: fence(self.store, self.attempt) if first else None, self.group)
            self.send_alongside()
            checkpoint = write(self.store, shards, self.attempt, described, self.group)
        except Exception as error:
            failure = explained(doing, error)
            log.warning("step %d is not saved: %s", described.step, failure)
        if failure is None:
            self.newest = described.step
        self.superseded |= isinstance(failure, Superseded)
        self._outcomes.put(Saved(described.step, time.perf_counter() - started, failure))
        if failure is None and dist.get_rank(self.group) == 0:
            retain(self.store, self.keep, self.attempt, trusted=checkpoint)

    def send_alongside(self) -> None:
        """Send up what goes with a checkpoint; what the store refuses goes with the next."""
        try:
            self.alongside()
        except (OSError, SlipwayError) as error:
            log.warning("metrics and logs stay behind: %s", error)


class _Copies:
    """Host memory as large as this rank's shards, taken once: pinned where it is filled from a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device if device.type == "cuda" else None
        self.stream = torch.cuda.Stream(device) if self.cuda is not None else None
        self.ready: Any = None
        self.buffers: dict[str, torch.Tensor] = {}

    def make(self, shards: Mapping[str, FlatShard]) -> None:
        """Take the memory, where it is not there in these sizes yet, and touch every page of it."""
        wanted = {name: (shard.held.numel(), shard.held.dtype) for name, shard in shards.items()}
        if {name: (buffer.numel(), buffer.dtype) for name, buffer in self.buffers.items()} == wanted:
            return
        self.buffers = {}  # give the old back first
        for dtype in {dtype for _, dtype in wanted.values()}:
            sizes = {name: numel for name, (numel, kind) in wanted.items() if kind == dtype}
            whole = torch.empty(sum(sizes.values()), dtype=dtype, pin_memory=self.cuda is not None)
            whole.zero_()
            self.buffers |= dict(zip(sizes, whole.split(list(sizes.values())), strict=True))

    def mark(self) -> None:
        """What the GPU has been told so far is what the copies hold."""
        if self.cuda is not None:
            self.ready = torch.cuda.Event()
            self.ready.record()

    def of(self, shards: Mapping[str, FlatShard]) -> dict[str, FlatShard]:
        """The same shards over copies of their values, which are all made when this returns."""
        self.make(shards)
        if self.cuda is not None:
            assert self.stream is not None
            with torch.cuda.device(self.cuda), torch.cuda.stream(self.stream):
                self.stream.wait_event(self.ready)
                for name, shard in shards.items():
                    self.buffers[name].copy_(shard.held, non_blocking=True)
            self.stream.synchronize()
        else:
            for name, shard in shards.items():
                self.buffers[name].copy_(shard.held)
        return {name: FlatShard(self.buffers[name], shard.start, shard.full_numel) for name, shard in shards.items()}
