"""What `launcher.bench.checkpoint` compares: five ways to save the state of one engine in training."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from launcher.bench.throughput import bench_parts
from launcher.checkpoint.layout import Checkpoint
from launcher.checkpoint.save import own_shards, save
from launcher.plan.plan import Plan
from launcher.train.loop import optimizer_step
from launcher.train.parts import Parts, Progress
from launcher.train.throughput import Stopwatch

Measured = dict[str, Any]


class Lab:
    """One engine in training. A step is timed from when all ranks begin it to when all have ended it."""

    def __init__(self, plan: Plan) -> None:
        # Without copies for now: what the saver takes for them is measured when it does.
        foreground = plan.lifecycle.model_copy(update={"background_saves": False})
        parts = bench_parts(plan.model_copy(update={"lifecycle": foreground}))
        # A watch that waits for the whole device would also wait for the copies that go on beside training.
        self.parts: Parts = replace(parts, watch=Stopwatch(parts.device))
        self.plan, self.step = plan, 0
        self.group = dist.new_group(backend="gloo")
        self.folder = Path(plan.location)

    def take_step(self, save: Callable[[], None] = lambda: None) -> Measured:
        """`save`, then one optimizer step: `seconds` of both, those `inside` the calls that belong to saving, `loss`,
        `cpu` seconds of all threads of a rank, on the rank with most."""
        parts, plan = self.parts, self.plan
        self.meet()
        cpu = time.process_time()
        parts.watch.lap()
        with parts.watch.part("checkpoint"):
            save()
        global_batch = parts.train_data.global_batch(self.step)
        result = optimizer_step(parts, self.step, global_batch, plan.trajectory.optimizer.lr)
        assert result is not None  # nothing asks it to stop
        self.meet()
        self.step += 1
        lap, cpu = parts.watch.lap(), time.process_time() - cpu
        inside = self.most(lap["checkpoint"])
        return {"seconds": lap["total"], "inside": inside, "cpu": self.most(cpu), "loss": result.loss}

    def meet(self) -> None:
        """Wait for this rank's device and for the other ranks."""
        if self.parts.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        dist.barrier(self.group)

    def most(self, value: float) -> float:
        """The greatest of the ranks' values."""
        greatest = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(greatest, dist.ReduceOp.MAX, group=self.group)
        return float(greatest)

    def rank_0(self, action: Callable[[], object]) -> None:
        """Only on rank 0, while the others wait."""
        if dist.get_rank() == 0:
            action()
        dist.barrier(self.group)

    def say(self, words: str) -> None:
        """To whoever waits for the end of it."""
        if dist.get_rank() == 0:
            sys.stderr.write(words + "\n")


class Contender(ABC):
    """A way to save the same training state."""

    name: str

    def __init__(self, lab: Lab) -> None:
        self.lab, self.engine = lab, lab.parts.engine

    @abstractmethod
    def begin(self) -> None:
        """Save the state as it is now, or begin to. Collective."""

    @abstractmethod
    def place(self) -> Path:
        """The folder with the newest save."""

    def committed_after(self) -> float | None:
        """Seconds from `begin` to when the save was whole on this rank, None while it is not; 0 where `begin` waits."""
        return 0.0

    def wait(self) -> None:  # noqa: B027  nothing to wait for, unless a contender says so
        """Until the save is whole."""

    def forget(self) -> None:  # noqa: B027  nothing is kept, unless a contender says so
        """Give back the memory that is kept from save to save, where that can be done."""


class DeepSpeedSave(Contender):
    name = "deepspeed"

    def begin(self) -> None:
        self.tag = f"step-{self.lab.step:08d}"
        self.engine.save_checkpoint(str(self.lab.folder / self.name), tag=self.tag)

    def place(self) -> Path:
        return self.lab.folder / self.name / self.tag


class PlainDcp(Contender):
    """DCP's own storage, told where every range belongs."""

    name = "dcp"

    def begin(self) -> None:
        dcp_save(dict(own_shards(self.engine)), checkpoint_id=self.place())

    def place(self) -> Path:
        return self.lab.folder / self.name


class AsyncDcp(Contender):
    """DCP's `async_save` with buffers that are kept. It stages plain tensors only, so each rank's have names of their
    own: what it writes is all there, but nothing says where in a parameter it belongs. Good for its pause alone."""

    name = "dcp-async"

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.group = dist.new_group(backend="gloo")
        self.stager: DefaultStager | None = None
        self.future: Future[Any] | None = None

    def begin(self) -> None:
        started, rank = time.perf_counter(), dist.get_rank()
        on_gpu = self.lab.parts.device.type == "cuda"
        self.stager = self.stager or DefaultStager(StagingOptions(on_gpu, False, False, False))
        self.seconds: float | None = None
        state = {f"{rank}.{name}": shard.held for name, shard in own_shards(self.engine).items()}
        saving: Any = async_save(state, checkpoint_id=self.place(), process_group=self.group, async_stager=self.stager)
        self.future = getattr(saving, "upload_completion", saving)
        self.future.add_done_callback(lambda _: setattr(self, "seconds", time.perf_counter() - started))

    def place(self) -> Path:
        return self.lab.folder / self.name

    def committed_after(self) -> float | None:
        return self.seconds

    def wait(self) -> None:
        assert self.future is not None
        self.future.result()

    def forget(self) -> None:
        if self.stager is not None:
            self.stager.close()
        self.stager = None


class SlipwaySave(Contender):
    """Ours, with the loop waiting for the disk."""

    name = "slipway-sync"

    def begin(self) -> None:
        lab, saver = self.lab, self.lab.parts.saver
        self.step = lab.step
        progress = Progress(step=lab.step).as_dict()
        save(saver.store, lab.step, saver.attempt, self.engine, progress, lab.plan, saver.group)

    def place(self) -> Path:
        return self.lab.folder / Checkpoint(self.lab.parts.saver.store, self.step).folder


class SlipwaySaver(SlipwaySave):
    """Ours beside training, as the loop does it."""

    name = "slipway"

    def begin(self) -> None:
        lab = self.lab
        self.step = lab.step
        self.seconds: float | None = None
        lab.parts.saver.begin(lab.step, Progress(step=lab.step).as_dict())

    def committed_after(self) -> float | None:
        for saved in self.lab.parts.saver.finished():
            if saved.error is not None:
                raise saved.error
            self.seconds = saved.seconds
        return self.seconds

    def wait(self) -> None:
        self.lab.parts.saver.join()


CONTENDERS: tuple[type[Contender], ...] = (DeepSpeedSave, PlainDcp, AsyncDcp, SlipwaySave, SlipwaySaver)
