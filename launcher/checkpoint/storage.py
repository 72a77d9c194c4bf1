"""DCP's storage for saving: one safetensors file a rank, streamed; read back by DCP's own HuggingFaceStorageReader.

DCP's HuggingFaceStorageWriter writes the same format, but builds the whole file in memory out of copies of the tensors:
2.7 times a rank's state above training (measured), and another read of every file for its hash. This one writes each
tensor from where it lies and hashes on the way.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from launcher.checkpoint.layout import SHARD_SUFFIX
from launcher.checkpoint.manifest import ShardFile


class ShardWriter(StorageWriter):
    """Writes this rank's fp32 ranges into `<folder>/shard-<rank>.safetensors`; the folder must be there."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f"shard-{rank:05d}{SHARD_SUFFIX}"
        self.written: dict[str, ShardFile] = {}
        """After saving: the file by its name; empty where this rank holds nothing."""

    def reset(self, checkpoint_id: Any = None) -> None:
        """Part of the interface; one writer serves one save."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Part of the interface; nothing depends on the role."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """As they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write, sync and hash the file. Raises OSError."""
        results: Future[list[WriteResult]] = Future()
        sizes = [item.tensor_data.chunk.sizes.numel() * 4 for item in plan.items if item.tensor_data is not None]
        if plan.items:
            digest = hashlib.sha256()
            with open(self.path, "wb", buffering=0) as file:
                for content in _contents(plan, planner):
                    digest.update(content)
                    _write_all(file.fileno(), content)
                os.fsync(file.fileno())
                size = file.tell()
            self.written = {self.path.name: ShardFile(bytes=size, sha256=digest.hexdigest())}
        results.set_result([WriteResult(item.index, size, None) for item, size in zip(plan.items, sizes, strict=True)])
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Nothing to add: every file says where its ranges belong."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Never chosen by DCP itself."""
        return False


def _header(plan: SavePlan) -> bytes:
    """The file's head: its length, then JSON with the place of each tensor in the file and in the whole parameter."""
    entries: dict[str, Any] = {}
    places = {}
    end = 0
    for item in plan.items:
        data = item.tensor_data
        assert data is not None
        assert data.properties.dtype == torch.float32, f"{item.index.fqn} is {data.properties.dtype}"
        start, end = end, end + data.chunk.sizes.numel() * 4
        entries[item.index.fqn] = {"dtype": "F32", "shape": list(data.chunk.sizes), "data_offsets": [start, end]}
        places[item.index.fqn] = {"saved_offsets": list(data.chunk.offsets)}
    described = {"__metadata__": {"DCP_SHARDING_INFO": json.dumps(places), "format": "pt"}, **entries}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the first tensor to eight bytes
    return len(text).to_bytes(8, "little") + text


def _contents(plan: SavePlan, planner: SavePlanner) -> Iterator[bytes | memoryview]:
    """What the file is made of; on the CPU each tensor's bytes where they lie, from a GPU one tensor at a time."""
    yield _header(plan)
    for item in plan.items:
        tensor: Any = planner.resolve_data(item)
        yield memoryview(tensor.detach().cpu().contiguous().numpy()).cast("B")


def _write_all(descriptor: int, content: bytes | memoryview) -> None:
    """One write call may take less than it is given: 2 GiB at most on Linux, or what a full disk still holds."""
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]
