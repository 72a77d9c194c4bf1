"""DCP's storage: one safetensors file a rank, written from where the tensors lie, and read back range by range.

DCP's own HuggingFaceStorageWriter builds the whole file in memory out of copies of the tensors: 2.7 times a rank's
state above training (measured), and another read of every file for its hash. This one streams and hashes on the way.
Its HuggingFaceStorageReader maps files, which an object store does not have, and opens every file on every rank to
learn what is in it; here each rank reads the heads of its share and the ranks tell each other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from launcher.checkpoint.layout import SHARD_SUFFIX
from launcher.checkpoint.manifest import ShardFile
from launcher.store.store import Store

READERS = 8
"""Ranges read at once: enough to hide an object store's latency."""
_DTYPES = {torch.float32: "F32", torch.uint8: "U8"}
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}
_PLACES = "DCP_SHARDING_INFO"
"""The name under which DCP's own safetensors files keep where their tensors belong."""


@dataclass(frozen=True)
class Range:
    """One tensor of a file: values [start, start + numel) of the flattened whole."""

    file: str
    name: str
    dtype: str
    start: int
    numel: int
    byte: int
    """Where in the file it begins."""


class ShardWriter(StorageWriter):
    """Writes this rank's ranges into `<folder>/shard-<rank>.safetensors`."""

    def __init__(self, store: Store, folder: str, rank: int) -> None:
        self.store, self.folder = store, folder
        self.name = f"shard-{rank:05d}{SHARD_SUFFIX}"
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
        """Write and hash the file. Raises OSError."""
        results: Future[list[WriteResult]] = Future()
        if plan.items:
            digest, size = xxhash.xxh3_128(), 0
            with self.store.writing(f"{self.folder}/{self.name}") as write:
                for content in _contents(plan, planner):
                    write(content)
                    digest.update(content)
                    size += len(content)
            self.written = {self.name: ShardFile(bytes=size, xxh3_128=digest.hexdigest())}
        results.set_result([WriteResult(item.index, _num_bytes(item), None) for item in plan.items])
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Nothing to add: every file says where its ranges belong."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Never chosen by DCP itself."""
        return False


class ShardReader(StorageReader):
    """Reads ranges that `ranges_of` found out of the files in `folder`."""

    def __init__(
        self, store: Store, folder: str, ranges: list[Range], wanted: Mapping[str, tuple[int, int]] | None = None
    ) -> None:
        """`wanted`: of each tensor the values [start, end) that will be asked for; None: any of them."""
        self.store, self.folder, self.ranges, self.wanted = store, folder, ranges, wanted

    def reset(self, checkpoint_id: Any = None) -> None:
        """Part of the interface; one reader serves one load."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What is stored, as DCP wants to know it: the size of every tensor, and where what is wanted of it lies."""
        tensors: dict[str, Any] = {}
        places: dict[MetadataIndex, Range] = {}
        ends: dict[str, int] = {}
        for found in self.ranges:
            end = found.start + found.numel
            if found.name not in tensors:
                properties = TensorProperties(dtype=_BY_NAME[found.dtype])
                tensors[found.name] = TensorStorageMetadata(properties, torch.Size([0]), [])
            ends[found.name] = max(ends.get(found.name, 0), end)
            # A thousand ranks leave a thousand ranges of each tensor, of which a rank wants one or two. DCP's own words
            # for all of them took each rank 5.5 s and 0.4 GB after an 8B model's save by 1,000 (docs/decisions/0019).
            first, last = (0, end) if self.wanted is None else self.wanted.get(found.name, (0, 0))
            if found.start < last and end > first:
                chunk = ChunkStorageMetadata(torch.Size([found.start]), torch.Size([found.numel]))
                tensors[found.name].chunks.append(chunk)
                places[MetadataIndex(found.name, chunk.offsets)] = found
        for name, whole in tensors.items():
            whole.size = torch.Size([ends[name]])
        return Metadata(tensors, storage_data=places)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Take the places from the metadata."""
        self.places = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the tensors, on a CPU where they lie. Raises OSError, EOFError."""

        def fill(item: ReadItem) -> None:
            place: Range = self.places[item.storage_index]
            target = planner.resolve_tensor(item).detach()
            on_cpu = (
                target
                if target.device.type == "cpu" and target.is_contiguous()
                else torch.empty_like(target, device="cpu")
            )
            byte = place.byte + item.storage_offsets[0] * target.element_size()
            self.store.read_into(f"{self.folder}/{place.file}", byte, _bytes_of(on_cpu))
            if on_cpu is not target:
                target.copy_(on_cpu)
            planner.commit_tensor(item, target)

        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(fill, (item for item in plan.items if item.lengths.numel())))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Never chosen by DCP itself."""
        return False


def ranges_of(store: Store, folder: str, file: str) -> list[Range]:
    """What a shard's head says of its content. Raises OSError, EOFError, and ValueError where it is no such head."""
    size = bytearray(8)
    store.read_into(f"{folder}/{file}", 0, memoryview(size))
    head = bytearray(int.from_bytes(size, "little"))
    store.read_into(f"{folder}/{file}", 8, memoryview(head))
    entries: Mapping[str, Any] = json.loads(head)
    places = json.loads(entries["__metadata__"][_PLACES])
    return [
        Range(
            file=file,
            name=name,
            dtype=entry["dtype"],
            start=places[name]["saved_offsets"][0],
            numel=entry["shape"][0],
            byte=8 + len(head) + entry["data_offsets"][0],
        )
        for name, entry in entries.items()
        if name != "__metadata__"
    ]


def uneven(ranges: Iterable[Range], numel: int) -> str | None:
    """How ranges fail to cover [0, numel) exactly once; None where they do."""
    end = 0
    for one in sorted(ranges, key=lambda one: (one.start, one.numel)):
        if one.start > end:
            return f"values {end} to {one.start} are missing"
        if one.start < end:
            return f"values {one.start} to {min(end, one.start + one.numel)} are stored twice"
        end += one.numel
    if end < numel:
        return f"values {end} to {numel} are missing"
    return f"{end} values instead of {numel}" if end > numel else None


def _num_bytes(item: Any) -> int:
    data = item.tensor_data
    return int(data.chunk.sizes.numel()) * data.properties.dtype.itemsize


def _header(plan: SavePlan) -> bytes:
    """The file's head: its length, then JSON with the place of each tensor in the file and in the whole parameter."""
    entries: dict[str, Any] = {}
    places = {}
    end = 0
    for item in plan.items:
        data = item.tensor_data
        assert data is not None
        start, end = end, end + _num_bytes(item)
        dtype = _DTYPES[data.properties.dtype]
        entries[item.index.fqn] = {"dtype": dtype, "shape": list(data.chunk.sizes), "data_offsets": [start, end]}
        places[item.index.fqn] = {"saved_offsets": list(data.chunk.offsets)}
    described = {"__metadata__": {_PLACES: json.dumps(places), "format": "pt"}, **entries}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the first tensor to eight bytes
    return len(text).to_bytes(8, "little") + text


def _contents(plan: SavePlan, planner: SavePlanner) -> Iterator[bytes | memoryview]:
    """What the file is made of; on the CPU each tensor's bytes where they lie, from a GPU one tensor at a time."""
    yield _header(plan)
    for item in plan.items:
        tensor: Any = planner.resolve_data(item)
        yield _bytes_of(tensor.detach().cpu().contiguous())


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    array: Any = tensor.numpy()
    return memoryview(array).cast("B")
