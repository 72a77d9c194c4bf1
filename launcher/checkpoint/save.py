"""Writing a checkpoint: shards, then manifest, then COMMIT."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from launcher.checkpoint.layout import MANIFEST, Checkpoint
from launcher.checkpoint.lease import Attempt, fence
from launcher.checkpoint.manifest import Commit, Manifest, ShardFile, commit_of, damaged, misplaced, verify
from launcher.checkpoint.shards import FlatShard, optimizer_steps, parameter_shapes, training_state
from launcher.checkpoint.storage import ShardWriter
from launcher.checkpoint.together import together
from launcher.errors import CheckpointError, DamagedCheckpoint, RunFolderError, SlipwayError
from launcher.plan.plan import Plan
from launcher.store.store import Store

Group = dist.ProcessGroup | None

# For good, and not around the call: that goes on in a thread, and filters are the process's.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


def save(
    store: Store, step: int, attempt: Attempt, engine: Any, progress: dict[str, object], plan: Plan, group: Group = None
) -> Checkpoint:
    """Save the training state after `step` optimizer steps; the committed checkpoint. Collective.

    `progress` is JSON and comes back from `load` as it is; rank 0's is stored. A step that is committed already is not
    written again, unless it is damaged.

    Raises the same CheckpointError or RunFolderError on all ranks where any rank fails; what was committed before
    stays.
    """
    return write(store, own_shards(engine), attempt, describe(step, attempt, engine, progress, plan), group)


def own_shards(engine: Any) -> dict[str, FlatShard]:
    """What this rank writes of the training state, as views of it.

    Every rank holds all of a replicated shard; each writes its share, so that the disks share the work too.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shards = {name: shard.share(rank, world_size) for name, shard in training_state(engine).items()}
    return {name: shard for name, shard in shards.items() if shard.held.numel()}


def describe(step: int, attempt: Attempt, engine: Any, progress: dict[str, object], plan: Plan) -> Manifest:
    """The manifest of what is about to be saved, all but its files."""
    steps = optimizer_steps(engine)
    most = max(steps.values(), default=0)
    return Manifest(
        step=step,
        attempt=str(attempt),
        plan=plan.hash(),
        trajectory=plan.trajectory.hash(),
        layout=plan.layout.model_dump(mode="json"),
        world_size=dist.get_world_size(),
        optimizer_step=most,
        optimizer_steps={name: count for name, count in steps.items() if count != most},
        parameters=parameter_shapes(engine),
        progress=copy.deepcopy(progress),  # which goes on while this is written
        files={},
    )


def write(
    store: Store, shards: Mapping[str, FlatShard], attempt: Attempt, described: Manifest, group: Group = None
) -> Checkpoint:
    """Write `shards` as the checkpoint that `described` describes. Collective.

    Needs no engine: shards over copied buffers may be written beside training, on a `group` of their own.
    Raises as `save` does.
    """
    rank = dist.get_rank(group)
    checkpoint = Checkpoint(store, described.step)
    staging = checkpoint.staging(attempt)
    doing = saving(described)

    def on_rank_0(action: Callable[[], bool | None]) -> bool:
        return bool(together(doing, lambda: action() if rank == 0 else None, group)[0])

    if on_rank_0(lambda: is_sound(checkpoint)):
        return checkpoint
    try:
        on_rank_0(lambda: _open_staging(checkpoint, attempt))
        written = together(doing, lambda: _write_shards(shards, store, staging, rank), group)
        files = {name: file for part in written for name, file in part.items()}
        on_rank_0(lambda: _commit(checkpoint, attempt, described.model_copy(update={"files": files})))
    except SlipwayError:
        if rank == 0:
            _discard(checkpoint, attempt)
        raise
    return checkpoint


def saving(described: Manifest) -> str:
    """How a message about a save begins."""
    return f"checkpoint of step {described.step}"


def is_sound(checkpoint: Checkpoint) -> bool:
    """Whether it is committed and every byte of it is as it was written.

    Raises CheckpointError where that cannot be found out just now.
    """
    if not checkpoint.is_committed():
        return False
    try:
        verify(checkpoint)
    except DamagedCheckpoint:
        return False
    return True


def _committed_by(checkpoint: Checkpoint, attempt: Attempt) -> bool:
    """Whether the files that `attempt` staged are the checkpoint: then they are not to be touched."""
    promised = commit_of(checkpoint)
    return promised is not None and promised.attempt == str(attempt)


def _discard(checkpoint: Checkpoint, attempt: Attempt) -> None:
    """Delete what a save that failed has staged; in doubt it stays, for the next sweep."""
    with contextlib.suppress(OSError, SlipwayError):
        # A creation of COMMIT whose answer was lost has failed for us, and is there.
        if not _committed_by(checkpoint, attempt):
            checkpoint.store.remove(checkpoint.staging(attempt))


def _open_staging(checkpoint: Checkpoint, attempt: Attempt) -> None:
    if not checkpoint.store.is_there():
        raise RunFolderError(f"{checkpoint.store} has vanished", hint="check that its disk is mounted")
    fence(checkpoint.store, attempt)
    # Within an attempt one save is under way at a time, so whatever lies there is what a failure left, or was damaged
    # since: of a sound checkpoint nothing is written again.
    if _committed_by(checkpoint, attempt):
        checkpoint.store.remove(checkpoint.commit)
    checkpoint.store.remove(checkpoint.staging(attempt))


def _write_shards(shards: Mapping[str, FlatShard], store: Store, staging: str, rank: int) -> dict[str, ShardFile]:
    writer = ShardWriter(store, staging, rank)
    # The ranks' ranges never overlap, so there is nothing to plan together: the plan's collectives would only hold the
    # interpreter's lock, which the loop wants.
    try:
        dcp_save(dict(shards), storage_writer=writer, no_dist=True)
    except CheckpointException as error:
        raise error.failures[0][0] from None  # of this rank, which DCP takes for the only one
    return writer.written


def _commit(checkpoint: Checkpoint, attempt: Attempt, manifest: Manifest) -> None:
    """The order is what makes it safe: all shards are durable by now, the manifest is next, COMMIT the last."""
    store, staging = checkpoint.store, checkpoint.staging(attempt)
    store.write(f"{staging}/{MANIFEST}", manifest.to_json())
    # An orphan of an earlier attempt must not commit. Should it still, because it was overtaken after this line, then
    # it commits a sound checkpoint of the same trajectory, in files of its own.
    fence(store, attempt)
    for _ in range(2):
        if store.create(checkpoint.commit, Commit.to(manifest)) or _committed_by(checkpoint, attempt):
            if wrong := misplaced(checkpoint, manifest):  # a successor has swept it as an orphan's
                store.remove(checkpoint.commit)
                raise damaged(checkpoint, wrong)
            return
        if is_sound(checkpoint):  # another attempt has just committed this step
            store.remove(staging)
            return
        store.remove(checkpoint.commit)  # of a damaged checkpoint, which ours replaces
    raise CheckpointError(f"{checkpoint} is being committed by somebody else")
