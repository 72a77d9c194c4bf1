"""Reading a checkpoint, at any world size and any ZeRO stage."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from launcher.checkpoint.layout import Checkpoint, committed
from launcher.checkpoint.manifest import Manifest, changed, damaged, folder_of, misplaced, read, verify
from launcher.checkpoint.moments import refuse_other_cut
from launcher.checkpoint.shards import (
    MASTER,
    FlatShard,
    parameter_shapes,
    publish_masters,
    set_optimizer_steps,
    training_state,
)
from launcher.checkpoint.storage import Range, ShardReader, ranges_of, uneven
from launcher.checkpoint.together import together
from launcher.errors import CheckpointError, DamagedCheckpoint
from launcher.plan.plan import Plan
from launcher.store.store import Store

Group = dist.ProcessGroup | None
Result = TypeVar("Result")


def load_newest(
    store: Store, load_one: Callable[[Checkpoint], Result], group: Group = None
) -> tuple[Checkpoint | None, Result | None, list[str]]:
    """Load the newest checkpoint that is whole: it, what `load_one` gave for it, and a message for each newer, damaged
    one. `load_one` is `load` into an engine that fits.

    None and None where nothing has been committed yet. Collective.

    Raises CheckpointError as `load`, and where there are checkpoints and none is whole: starting anew would throw work
    away that can perhaps be restored.
    """
    listed = together(f"looking for checkpoints in {store}", lambda: [c.step for c in committed(store)], group)[0]
    messages: list[str] = []
    for step in reversed(listed):
        checkpoint = Checkpoint(store, step)
        try:
            return checkpoint, load_one(checkpoint), messages
        except DamagedCheckpoint as error:
            messages.append(error.message)
    if messages:
        raise CheckpointError(
            f"no checkpoint of {store} is whole: {'; '.join(messages)}",
            hint="restore one of them, or delete the folder checkpoints to begin again",
        )
    return None, None, []


def load(checkpoint: Checkpoint, engine: Any, plan: Plan, group: Group = None) -> dict[str, Any]:
    """Put the training state of `checkpoint` into `engine`; the `progress` it was saved with. Collective.

    The engine may have another world size, ZeRO stage or offload than the one that saved. Every file is verified before
    anything is overwritten; the ranks share the reading. What was frozen up to the checkpoint and is trained from now
    on keeps the base's weights, with an optimizer that has seen none of it: the engine must have taken no step then.

    Raises the same error on all ranks: DamagedCheckpoint, or CheckpointError where the checkpoint belongs to another
    trajectory or holds other parameters than the model trained by then.
    """
    doing = f"loading {checkpoint}"
    manifest = read_together(checkpoint, doing, group)
    found = together(doing, lambda: _accept(checkpoint, manifest, engine, plan, group), group)
    if wrong := sorted({line for lines, _ in found for line in lines}):
        raise damaged(checkpoint, wrong)
    ranges = [one for _, part in found for one in part]
    state = training_state(engine, manifest.phase)
    together(doing, lambda: _be_covered(checkpoint, state, ranges), group)
    wanted = {name: (shard.start, shard.start + shard.held.numel()) for name, shard in state.items()}
    reader = ShardReader(checkpoint.store, folder_of(checkpoint, manifest), ranges, wanted)
    together(doing, lambda: _read_shards(state, reader), group)
    set_optimizer_steps(engine, {name: manifest.steps_of(name) for name in manifest.parameters})
    publish_masters(engine)
    return manifest.progress


def load_weights(checkpoint: Checkpoint, verified: bool = False) -> dict[str, torch.Tensor]:
    """All trainable parameters, whole, fp32, on CPU, by the model's own names; needs no process group.

    Every byte is read twice, once to verify it, unless the caller has `verified` it.

    Raises DamagedCheckpoint.
    """
    manifest = read(checkpoint) if verified else verify(checkpoint)
    return {
        name: tensor.view(manifest.parameters[name])
        for name, tensor in read_whole(checkpoint, manifest, MASTER, list(manifest.parameters)).items()
    }


def read_whole(checkpoint: Checkpoint, manifest: Manifest, kind: str, names: list[str]) -> dict[str, torch.Tensor]:
    """One kind of state of some parameters, whole and flat, fp32, on CPU; needs no process group."""
    folder = folder_of(checkpoint, manifest)
    ranges = [one for file in sorted(manifest.files) for one in ranges_of(checkpoint.store, folder, file)]
    flat: dict[str, Any] = {f"{kind}.{name}": torch.empty(math.prod(manifest.parameters[name])) for name in names}
    _read(flat, ShardReader(checkpoint.store, folder, ranges))
    return {name: flat[f"{kind}.{name}"] for name in names}


def read_together(checkpoint: Checkpoint, doing: str, group: Group) -> Manifest:
    """The manifest, as rank 0 reads it. Collective; raises as `manifest.read`, on all ranks."""
    manifest = together(doing, lambda: read(checkpoint) if dist.get_rank(group) == 0 else None, group)[0]
    assert manifest is not None
    return manifest


def _read_shards(state: Mapping[str, FlatShard], reader: ShardReader) -> None:
    """Each rank for itself: together, DCP would send every rank's plan to the first and back, for nothing."""
    try:
        _read(dict(state), reader)
    except CheckpointException as error:
        raise error.failures[0][0] from None  # of this rank, which DCP takes for the only one


def _read(state: dict[str, Any], reader: ShardReader) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as we asked
        dcp_load(state, storage_reader=reader, no_dist=True)


def _be_covered(checkpoint: Checkpoint, state: Mapping[str, FlatShard], ranges: list[Range]) -> None:
    """Raise DamagedCheckpoint where a value would stay as it is: DCP fills what is stored, and says nothing of the
    rest."""
    stored: dict[str, list[Range]] = {}
    for one in ranges:
        stored.setdefault(one.name, []).append(one)
    sizes = {name: shard.full_numel for name, shard in state.items()}
    wrong = [f"{name}: {said}" for name, numel in sizes.items() if (said := uneven(stored.get(name, []), numel))]
    if wrong:
        raise damaged(checkpoint, wrong[:5])


def _accept(
    checkpoint: Checkpoint, manifest: Manifest, engine: Any, plan: Plan, group: Group
) -> tuple[list[str], list[Range]]:
    """What is wrong with this rank's part of the files, and what is in them, once the manifest fits the run."""
    if manifest.trajectory != plan.trajectory.hash():
        raise CheckpointError(
            f"{checkpoint} belongs to another trajectory (model, data, seed, batch, optimizer or schedule differ)",
            hint="resume with the run's own recipe, or start a new run from its exported model",
        )
    refuse_other_cut(plan, dist.get_world_size(), manifest.layout, manifest.world_size)
    ours, stored = parameter_shapes(engine, manifest.phase), manifest.parameters
    if differing := sorted(name for name in ours.keys() | stored.keys() if ours.get(name) != stored.get(name)):
        shown = ", ".join(f"{name} ({stored.get(name)}, not {ours.get(name)})" for name in differing[:3])
        raise CheckpointError(
            f"{checkpoint} does not hold what the model trains: {shown}{' ...' if len(differing) > 3 else ''}",
            hint="resume with the model and method of the run",
        )
    assert len(parameter_shapes(engine)) == len(ours) or engine.global_steps == 0, "trained what is not in it"
    if wrong := misplaced(checkpoint, manifest):
        return wrong, []
    mine = sorted(manifest.files)[dist.get_rank(group) :: dist.get_world_size(group)]
    if wrong := changed(checkpoint, manifest, mine):
        return wrong, []
    folder = folder_of(checkpoint, manifest)
    return [], [one for file in mine for one in ranges_of(checkpoint.store, folder, file)]
