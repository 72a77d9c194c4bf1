"""One worker's run: parts from the Plan, newest checkpoint, loop, verdict.

Ray's workers call `train_run`; without Ray, `torchrun --nproc-per-node N -m launcher.train.run RUN/plan.json` does
the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher.audit import Audit
from launcher.checkpoint.lease import Attempt, acquire, begin
from launcher.checkpoint.load import load_newest
from launcher.checkpoint.saver import Saver
from launcher.checkpoint.together import together
from launcher.data.loader import EvalData, TrainData
from launcher.errors import AuditError, ModelError, SlipwayError
from launcher.model.positions import refuse_too_long
from launcher.plan.batch import BatchLayout, batch_layout
from launcher.plan.plan import Plan
from launcher.store.location import open_store
from launcher.store.spool import Spool
from launcher.store.store import Store
from launcher.train import startup
from launcher.train.beat import CONCLUDING, RESUMING, doing, mark
from launcher.train.loop import train
from launcher.train.measure import open_test_rows
from launcher.train.metrics import MetricsLog, latest_start
from launcher.train.network import build_network
from launcher.train.parts import Parts, Progress
from launcher.train.resize import resized
from launcher.train.stop import StopSignal
from launcher.train.system import own_files, sampled
from launcher.train.throughput import Stopwatch
from launcher.train.trackers.following import Following
from launcher.train.unfreeze import load_checkpoint, phase_to_begin_with
from launcher.train.verdict import Verdict, stop_requested

log = logging.getLogger(__name__)

MEASURED = ("answers-*", "predictions-*", "probe-*")
"""Files of a run's folder that evaluations write."""


def train_run(plan: Plan, launch: int, interrupted: Callable[[], bool] = lambda: False) -> Verdict:
    """Train to the plan's end, or to a stop. The process group must be open; every rank calls this.

    `launch` is the lease's number, 0 where nobody holds one; `interrupted` tells of a signal to this process.

    Raises:
        SlipwayError: found on all ranks alike, such as a model that cannot be loaded; Superseded where another launcher
            has taken the run over.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    device = use_device(plan)
    batch = batch_layout(plan.trajectory.global_batch_size, plan.layout.micro_batch_size, world_size)
    run_dir, store = Path(plan.run_dir), open_store(plan.location)
    attempt = begin_together(store, launch)
    doing.attempt = str(attempt)
    if attempt.start > 1:
        startup.forget()
    metrics = MetricsLog(run_dir, str(attempt), writes=rank == 0)
    trackers = Following(plan, tells=rank == 0)

    def stopping() -> bool:
        return interrupted() or (rank == 0 and stop_requested(run_dir))

    try:
        parts = build_parts(plan, batch, device, metrics, store, attempt, stopping)
        mark(RESUMING)
        progress = resume_point(parts)
        startup.ended("checkpoint")
        # Half a million objects of torch, transformers and DeepSpeed stay for good: looking through them takes a third
        # of a second each time, in which nothing else runs.
        gc.collect()
        gc.freeze()
        startup.ended("clean-up")
        workers = everybody(device)
        if rank == 0 and (change := resized(latest_start(run_dir), str(attempt), workers)):
            metrics.write("resize", step=progress.step, **change)
        metrics.write(
            "start",
            step=progress.step,
            world_size=world_size,
            micro_steps=batch.num_micro_steps,
            workers=workers,
        )
        if parts.saver.without_room is not None:
            metrics.write("saves_in_foreground", message=parts.saver.without_room)
        with sampled(run_dir, str(attempt), rank, plan.lifecycle.system_every_s):
            verdict = train(parts, progress)
        mark(CONCLUDING)
        trackers.finish(well=verdict.exit_code == 0 and verdict.kind != "stopped")
        parts.saver.send_alongside()  # what the end measured, where another node looks for it
        return verdict
    except AuditError as error:  # of all ranks alike, and no restart changes it
        return Verdict("error", 0, error.message, error.hint, error.exit_code)
    finally:
        metrics.close()
        trackers.let_go()


def begin_together(store: Store, launch: int) -> Attempt:
    """This start's attempt, the same on all ranks. Collective. Raises Superseded, RunFolderError."""
    rank = dist.get_rank()
    attempt = together(f"beginning in {store}", lambda: begin(store, launch) if rank == 0 else None)[0]
    assert attempt is not None
    return attempt


def everybody(device: torch.device) -> list[dict[str, Any]]:
    """Host, process and GPU of each rank, in order: for whoever has to look at one. Collective."""
    ranks: list[Any] = [None] * dist.get_world_size()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    dist.all_gather_object(ranks, {"host": socket.gethostname(), "pid": os.getpid(), "gpu": gpu})
    return ranks


def use_device(plan: Plan) -> torch.device:
    """This rank's device, with the threads that the plan gives a CPU worker."""
    if plan.layout.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        if plan.trajectory.dtype == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ModelError(
                f"{torch.cuda.get_device_name(device)} has no bf16, and fp16 with its loss scaling is not offered",
                hint="set train.dtype to fp32, or use a GPU of the Ampere generation or later",
            )
        return device
    torch.set_num_threads(plan.layout.cpus_per_worker)
    keep_freed_memory()
    return torch.device("cpu")


def keep_freed_memory() -> None:
    """Have glibc keep what a tensor frees for the next one; where malloc is another's, nothing happens.

    Left alone it maps every large tensor anew and the kernel zeroes each of its pages: 100,000 page faults and 9% of a
    CPU step of 4,000 tokens. The process holds 4% more memory for it.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def build_parts(
    plan: Plan,
    batch: BatchLayout,
    device: torch.device,
    metrics: MetricsLog,
    store: Store,
    attempt: Attempt,
    stopping: Callable[[], bool],
) -> Parts:
    """Model, engine and data of one rank, audited.

    Raises:
        SlipwayError: found on all ranks alike; AuditError where the plan has the audit strict.
    """
    from transformers import AutoTokenizer

    trajectory, folder = plan.trajectory, Path(plan.data.folder)
    tokenizer, test_rows = AutoTokenizer.from_pretrained(folder / "tokenizer"), open_test_rows(plan)
    refuse_too_long(plan, test_rows or ())
    phase = phase_to_begin_with(plan, store)
    engine, loss = build_network(plan, batch, device, phase, tokenizer, Audit(plan, device, metrics.write))
    life, retain = plan.lifecycle, plan.lifecycle.retain
    spool = Spool(store, Path(plan.run_dir))
    return Parts(
        plan=plan,
        batch=batch,
        phase=phase,
        engine=engine,
        loss=loss,
        train_data=TrainData(folder, trajectory.global_batch_size, trajectory.seed),
        eval_data=EvalData(folder, life.eval_max_rows, slices=life.slices),
        retain_data=EvalData(folder, retain.max_rows if retain else 0, "retain.arrow"),
        test_rows=test_rows,
        tokenizer=tokenizer,
        device=device,
        log=metrics,
        watch=Stopwatch(device),
        saver=Saver(store, attempt, plan, engine, device, alongside=lambda: spool.push(spooled(Path(plan.run_dir)))),
        stopping=stopping,
    )


def spooled(run_dir: Path) -> list[str]:
    """What of this rank goes up with a checkpoint where the run is in an object store."""
    rank = dist.get_rank()
    names = [f"logs/worker-{rank}.log", *own_files()]
    if rank == 0:
        measured = sorted(path.name for kind in MEASURED for path in run_dir.glob(kind))
        names += ["metrics.jsonl", "logs/failures.jsonl", "trackers.json", "tensorboard", *measured]
    return names


def resume_point(parts: Parts) -> Progress:
    """Load the newest sound checkpoint, if there is one."""
    saver = parts.saver
    checkpoint, progress, damaged = load_newest(saver.store, lambda one: load_checkpoint(parts, one), saver.group)
    for message in damaged:
        if dist.get_rank() == 0:
            log.warning("%s", message)
        parts.log.write("damaged_checkpoint", message=message)
    if checkpoint is None or progress is None:
        return Progress()
    saver.newest = checkpoint.step
    return progress


def main(plan_file: str) -> int:
    """Entry for torchrun: opens the process group from the environment, trains, returns the exit code."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    plan = Plan.load(Path(plan_file))
    dist.init_process_group("nccl" if plan.layout.device == "cuda" else "gloo")
    code = train_alone(plan)
    dist.destroy_process_group()
    return code


def train_alone(plan: Plan) -> int:
    """Train without a driver: hold the lease, heed signals, write the verdict; the exit code. Collective."""
    try:
        use_device(plan)  # before the first collective: NCCL refuses two ranks on one GPU
        with StopSignal() as signal, lease(plan) as launch:
            verdict = replace(train_run(plan, launch, lambda: signal.received is not None), launch=launch)
            if dist.get_rank() == 0:
                with contextlib.suppress(OSError):  # a disk that takes nothing; the exit code tells as well
                    verdict.save(Path(plan.run_dir))
                sys.stderr.write(verdict.message + "\n" + (f"hint: {verdict.hint}\n" if verdict.hint else ""))
    except SlipwayError as error:
        sys.stderr.write(f"error: {error.message}\n" + (f"hint: {error.hint}\n" if error.hint else ""))
        return error.exit_code
    if verdict.kind == "stopped" and signal.received is not None:
        return 128 + signal.received
    return verdict.exit_code


@contextlib.contextmanager
def lease(plan: Plan) -> Iterator[int]:
    """Rank 0 holds the run for all, since torchrun has no launcher of ours; the lease's number. Collective.

    Raises RunFolderError on all ranks where another launcher holds it.
    """
    store, rank = open_store(plan.location), dist.get_rank()
    with contextlib.ExitStack() as held:
        held_by_0 = together("taking the run", lambda: held.enter_context(acquire(store)).launch if rank == 0 else 0)
        yield held_by_0[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
