"""Writing a checkpoint: staging, shards, manifest, rename, and COMMIT last."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from launcher.checkpoint.durable import sync_folder, write_synced
from launcher.checkpoint.layout import (
    COMMIT,
    MANIFEST,
    checkpoint_dir,
    checkpoints_dir,
    is_committed,
    staging_dir,
)
from launcher.checkpoint.lease import current_attempt
from launcher.checkpoint.manifest import Manifest, ShardFile, verify
from launcher.checkpoint.retain import remove, sweep_staging
from launcher.checkpoint.shards import FlatShard, optimizer_step, parameter_shapes, training_state
from launcher.checkpoint.storage import ShardWriter
from launcher.checkpoint.together import together
from launcher.errors import CheckpointError, RunFolderError, SlipwayError
from launcher.plan.plan import Plan


def save(run_dir: Path, step: int, attempt: int, engine: Any, progress: dict[str, object], plan: Plan) -> Path:
    """Save the training state after `step` optimizer steps; the committed checkpoint's folder. Collective.

    `attempt` is the lease's, 0 where nobody holds one (plain torchrun). `progress` is JSON and comes back from `load`
    as it is; rank 0's is stored. A step that is committed already is not written again, unless it is damaged.

    Raises the same CheckpointError or RunFolderError on all ranks where any rank fails; what was committed before
    stays.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # Every rank holds all of a replicated shard; each writes its share, so that the disks share the work too.
    shards = {name: shard.share(rank, world_size) for name, shard in training_state(engine).items()}
    described = Manifest(
        step=step,
        attempt=attempt,
        trajectory=plan.trajectory.hash(),
        layout=plan.layout.model_dump(mode="json"),
        world_size=world_size,
        optimizer_step=optimizer_step(engine),
        parameters=parameter_shapes(engine),
        progress=progress,
        files={},
    )
    return write(run_dir, shards, described)


def write(
    run_dir: Path, shards: Mapping[str, FlatShard], described: Manifest, group: dist.ProcessGroup | None = None
) -> Path:
    """Write `shards` as the checkpoint that `described` describes, all but its files; its folder. Collective.

    Needs no engine: shards over copied buffers may be written beside training, on a `group` of their own.
    Raises as `save` does.
    """
    rank = dist.get_rank(group)
    final = checkpoint_dir(run_dir, described.step)
    staging = staging_dir(run_dir, described.step, described.attempt)
    doing = f"checkpoint of step {described.step}"

    def on_rank_0(action: Callable[[], bool | None]) -> bool:
        return bool(together(doing, lambda: action() if rank == 0 else None, group)[0])

    if on_rank_0(lambda: _is_there(final)):
        return final
    try:
        on_rank_0(lambda: _open_staging(run_dir, staging, described.attempt))
        written = together(doing, lambda: _write_shards(shards, staging, rank, group), group)
        files = {name: file for part in written for name, file in part.items()}
        on_rank_0(lambda: _commit(run_dir, staging, final, described.model_copy(update={"files": files})))
    except SlipwayError:
        if rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    return final


def _is_there(final: Path) -> bool:
    if not is_committed(final):
        return False
    try:
        verify(final)
    except CheckpointError:
        return False
    return True


def _open_staging(run_dir: Path, staging: Path, attempt: int) -> None:
    if not run_dir.is_dir():
        raise RunFolderError(f"the run's folder {run_dir} has vanished", hint="check that its disk is mounted")
    _fence(run_dir, attempt)
    # Within an attempt one save is under way at a time, so whatever lies there is what a crash left.
    sweep_staging(run_dir, before=attempt + 1)
    staging.mkdir(parents=True)
    sync_folder(run_dir)


def _write_shards(
    shards: Mapping[str, FlatShard], staging: Path, rank: int, group: dist.ProcessGroup | None
) -> dict[str, ShardFile]:
    writer = ShardWriter(staging, rank)
    dcp_save(dict(shards), storage_writer=writer, process_group=group)
    return writer.written


def _commit(run_dir: Path, staging: Path, final: Path, manifest: Manifest) -> None:
    content = manifest.to_json()
    write_synced(staging / MANIFEST, content)
    _fence(run_dir, manifest.attempt)
    if final.exists():  # damaged, or never committed
        remove(final)
    staging.rename(final)
    sync_folder(checkpoints_dir(run_dir))
    write_synced(final / COMMIT, hashlib.sha256(content).hexdigest().encode() + b"\n")


def _fence(run_dir: Path, attempt: int) -> None:
    """An orphan of an earlier attempt must not commit over its successor's work. Attempt 0 runs without a lease."""
    current = current_attempt(run_dir)
    if attempt and current is not None and current > attempt:
        raise CheckpointError(
            f"attempt {attempt} may no longer save: attempt {current} has taken {run_dir} over",
            hint="stop this launcher, the other one goes on",
        )
