"""Checkpoints for tests: where those of a run's folder are, and small ones, written by what writes the real ones."""

from __future__ import annotations

import contextlib
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from launcher.checkpoint.layout import MANIFEST, Checkpoint
from launcher.checkpoint.lease import Attempt
from launcher.checkpoint.manifest import Commit, Manifest, ShardFile
from launcher.checkpoint.moments import KINDS
from launcher.checkpoint.shards import MASTER, FlatShard
from launcher.checkpoint.storage import ShardWriter
from launcher.store.folder import FolderStore
from launcher.store.objects import ObjectStore
from launcher.store.store import Store
from tests.unit.s3_server import BUCKET, environment, s3_server

SHAPES = {"norm.weight": (5,), "up.weight": (7, 3)}
FIRST = Attempt(0, 1)


STORES = ("folder", "s3")


@contextlib.contextmanager
def opened(kind: str, folder: Path) -> Iterator[Store]:
    """A store of one of STORES: over `folder`, or over an S3 server that ends with the block."""
    if kind == "folder":
        yield FolderStore(folder)
        return
    with s3_server() as address, pytest.MonkeyPatch.context() as patch:
        for name, value in environment(address).items():
            patch.setenv(name, value)
        yield ObjectStore(f"s3://{BUCKET}/run")


def checkpoint_at(run_dir: Path, step: int) -> Checkpoint:
    """The place of a step's checkpoint in a run's folder."""
    return Checkpoint(FolderStore(run_dir), step)


def copy_checkpoint(run_dir: Path, step: int, other: Path) -> None:
    """Give the run in `other` a checkpoint of the run in `run_dir`."""
    folder = checkpoint_at(run_dir, step).folder
    shutil.copytree(run_dir / folder, other / folder)


def values(key: str, numel: int, step: int) -> torch.Tensor:
    """What `write_checkpoint` writes: of every key and step another tensor, none of it negative."""
    return torch.arange(numel, dtype=torch.float32) + len(key) / 8 + step


def write_checkpoint(
    store: Store,
    step: int,
    attempt: Attempt = FIRST,
    ranks: int = 2,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    trajectory: str = "t",
    progress: Mapping[str, Any] | None = None,
    fill: Callable[[str, int, int], torch.Tensor] = values,
    share: Callable[[FlatShard, int, int], FlatShard] = FlatShard.share,
    commit: bool = True,
) -> Checkpoint:
    """What `save` writes on so many ranks, each of which writes its share of everything; no engine, no process group.

    Without `commit` it ends as a save does that is killed just before.
    """
    checkpoint = Checkpoint(store, step)
    whole = {
        f"{kind}.{name}": fill(f"{kind}.{name}", math.prod(shape), step)
        for name, shape in shapes.items()
        for kind in (MASTER, *KINDS)
    }
    files: dict[str, ShardFile] = {}
    for rank in range(ranks):
        shards = {
            key: share(FlatShard(tensor, 0, tensor.numel(), replicated=True), rank, ranks)
            for key, tensor in whole.items()
        }
        state: dict[str, Any] = {key: shard for key, shard in shards.items() if shard.held.numel()}
        writer = ShardWriter(store, checkpoint.staging(attempt), rank)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp_save(state, storage_writer=writer, no_dist=True)
        files |= writer.written
    manifest = Manifest(
        step=step,
        attempt=str(attempt),
        plan="p",
        trajectory=trajectory,
        layout={},
        world_size=ranks,
        optimizer_step=step,
        parameters=dict(shapes),
        progress={"step": step} if progress is None else dict(progress),
        files=files,
    )
    store.write(f"{checkpoint.staging(attempt)}/{MANIFEST}", manifest.to_json())
    if commit:
        assert store.create(checkpoint.commit, Commit.to(manifest))
    return checkpoint
