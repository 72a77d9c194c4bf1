"""Gradual unfreezing: where a stage begins the run is saved, and goes on from there with an engine that trains more.

An engine is never changed in place: its flat partitions, its moments and the hooks on its parameters are of what it was
built for. The checkpoint is cut anew for the next one, as it would be for another ZeRO stage (docs/decisions/0020).
"""

from __future__ import annotations

import contextlib
import gc
import time

import torch
import torch.distributed as dist

from launcher.checkpoint.layout import Checkpoint, committed
from launcher.checkpoint.load import load, read_together
from launcher.checkpoint.manifest import Manifest, read
from launcher.checkpoint.together import together
from launcher.errors import DamagedCheckpoint
from launcher.plan.phases import last_layers, phase_at
from launcher.plan.plan import Plan
from launcher.store.store import Store
from launcher.train.beat import RESUMING, doing, mark
from launcher.train.engine import destroy_engine
from launcher.train.network import build_network
from launcher.train.parts import Parts, Progress
from launcher.train.saving import PATIENCE_S, save_last
from launcher.train.verdict import Verdict


def phase_to_begin_with(plan: Plan, store: Store) -> int:
    """The phase that the newest checkpoint is gone on from in; one that turns out to be damaged costs an engine.
    Collective."""
    if not plan.trajectory.method.unfreeze:
        return 0

    def of_newest() -> int:
        for checkpoint in reversed(committed(store)):
            with contextlib.suppress(DamagedCheckpoint):
                return phase_after(plan, read(checkpoint))
        return 0

    first = dist.get_rank() == 0
    return together(f"looking for checkpoints in {store}", lambda: of_newest() if first else 0)[0]


def phase_after(plan: Plan, manifest: Manifest) -> int:
    """The phase of the step after a checkpoint's.

    What has been trained goes on being trained, also where a resume has made the run longer and its stages later.
    """
    return max(manifest.phase, phase_at(plan.trajectory.method, plan.lifecycle.total_steps, manifest.step))


def begins_next(parts: Parts, step: int) -> bool:
    """Whether more is to be trained after `step` steps than the engine trains."""
    return phase_at(parts.plan.trajectory.method, parts.plan.lifecycle.total_steps, step) > parts.phase


def unfreeze(parts: Parts, progress: Progress) -> Verdict | None:
    """Save, and go on from the checkpoint in the next phase; a verdict where it cannot be saved. Collective.

    Raises Superseded, CheckpointError.
    """
    if unsaved := save_last(parts, progress, PATIENCE_S):
        return unsaved
    with parts.watch.part("checkpoint"):
        progress.phase = load_checkpoint(parts, Checkpoint(parts.saver.store, progress.step)).phase
    return None


def load_checkpoint(parts: Parts, checkpoint: Checkpoint, goes_on: bool = True) -> Progress:
    """Put `checkpoint` into the engine. That is built anew where it trains something else than the step after the
    checkpoint, or has trained what the checkpoint does not hold. Collective.

    Without `goes_on` no step comes after it, and what the checkpoint holds is what the engine has.

    Raises as `checkpoint.load`.
    """
    began = time.monotonic()
    manifest = read_together(checkpoint, f"loading {checkpoint}", parts.saver.group)
    phase = phase_after(parts.plan, manifest) if goes_on else manifest.phase
    more = manifest.phase < phase
    if phase != parts.phase or (more and parts.engine.global_steps > 0):
        rebuild(parts, phase)
    mark(RESUMING)
    progress = Progress.of(load(checkpoint, parts.engine, parts.plan, parts.saver.group))
    progress.phase = phase
    if more:
        parts.log.write(
            "unfreeze",
            step=checkpoint.step,
            last_layers=last_layers(parts.plan.trajectory.method)[phase],
            parameters=trained_parameters(parts),
            seconds=round(time.monotonic() - began, 3),
        )
    return progress


def rebuild(parts: Parts, phase: int) -> None:
    """Give `parts` an engine over the base model that trains what `phase` trains; nothing of the one before is left by
    then. Collective."""
    room_before = parts.saver.without_room
    parts.saver.release()
    destroy_engine(parts.engine)
    del parts.engine, parts.loss
    gc.unfreeze()  # or what the run began with would not be looked through
    gc.collect()
    gc.freeze()
    if parts.device.type == "cuda":
        torch.cuda.empty_cache()
    doing.warm = False  # kernels are compiled anew for what has been frozen so far
    parts.phase = phase
    parts.engine, parts.loss = build_network(parts.plan, parts.batch, parts.device, phase, parts.tokenizer, audit=None)
    parts.saver.serve(parts.engine)
    if parts.saver.without_room not in (None, room_before):
        parts.log.write("saves_in_foreground", message=parts.saver.without_room)
    gc.collect()
    gc.freeze()


def trained_parameters(parts: Parts) -> int:
    """How many numbers the engine trains."""
    parameters = parts.engine.module.parameters()
    return sum(int(getattr(one, "ds_numel", one.numel())) for one in parameters if one.requires_grad)
