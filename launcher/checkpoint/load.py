"""Reading a checkpoint, at any world size and any ZeRO stage."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from launcher.checkpoint.manifest import Manifest, damage, damaged, newest_sound, read, verify
from launcher.checkpoint.shards import MASTER, parameter_shapes, publish_masters, set_optimizer_step, training_state
from launcher.checkpoint.together import together
from launcher.errors import CheckpointError
from launcher.plan.plan import Plan

__all__ = ["load", "load_weights", "newest_sound"]


def load(checkpoint: Path, engine: Any, plan: Plan) -> dict[str, object]:
    """Put the training state of `checkpoint` into `engine`; the `progress` it was saved with. Collective.

    The engine may have another world size, ZeRO stage or offload than the one that saved. Every file is verified before
    anything is overwritten.

    Raises the same CheckpointError on all ranks where the checkpoint is damaged, belongs to another trajectory or
    holds other parameters than the model trains.
    """
    doing = f"loading {checkpoint}"
    manifest = together(doing, lambda: _accept(checkpoint, engine, plan))[dist.get_rank()]
    state = training_state(engine)
    reader = HuggingFaceStorageReader(str(checkpoint))
    together(doing, lambda: dcp_load(dict(state), storage_reader=reader))
    set_optimizer_step(engine, manifest.optimizer_step)
    publish_masters(engine)
    return manifest.progress


def load_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All trainable parameters, whole, fp32, on CPU, by the model's own names; needs no process group.

    Raises CheckpointError where the checkpoint is damaged.
    """
    shapes = verify(checkpoint).parameters
    flat: dict[str, Any] = {f"{MASTER}.{name}": torch.empty(math.prod(shape)) for name, shape in shapes.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as we asked
        dcp_load(flat, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    return {name: flat[f"{MASTER}.{name}"].view(shape) for name, shape in shapes.items()}


def _accept(checkpoint: Path, engine: Any, plan: Plan) -> Manifest:
    """The manifest, once it fits the run and this rank's part of the files is whole."""
    manifest = read(checkpoint)
    if manifest.trajectory != plan.trajectory.hash():
        raise CheckpointError(
            f"{checkpoint} belongs to another trajectory (model, data, seed, batch, optimizer or schedule differ)",
            hint="resume with the run's own recipe, or start a new run from its exported model",
        )
    ours, stored = parameter_shapes(engine), manifest.parameters
    if differing := sorted(name for name in ours.keys() | stored.keys() if ours.get(name) != stored.get(name)):
        shown = ", ".join(f"{name} ({stored.get(name)}, not {ours.get(name)})" for name in differing[:3])
        raise CheckpointError(
            f"{checkpoint} does not hold what the model trains: {shown}{' ...' if len(differing) > 3 else ''}",
            hint="resume with the model and method of the run",
        )
    if wrong := damage(checkpoint, manifest, slice(dist.get_rank(), None, dist.get_world_size())):
        raise damaged(checkpoint, wrong)
    return manifest
