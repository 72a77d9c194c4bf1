"""Prepared documents and packs on disk: Arrow IPC files that are mapped into memory, so that opening one reads nothing.

documents/00000.arrow ...  input_ids list<int32> | supervised list<uint8> | num_targets int32 | num_turns int32
                           | label int32 | set int8 | copies int32 | where string
                           one file a piece of a source, in the order of the sources
packs.arrow                rows list<int32>: the numbers of the documents in each row of the global batch's unit
eval.arrow, retain.arrow   rows list<int32>: the numbers of the held-out documents, in one list
classes.json               {names, weights}: of each class number, what a supervised token of it counts in the loss;
                           and `predicted`: whether its class is the one target of a document
slices.json                {column: value of each held-out document, in the order of eval.arrow}; see slices.py

A document's number counts all documents of all files in order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

DOCUMENT_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("supervised", pa.list_(pa.uint8())),
        ("num_targets", pa.int32()),
        ("num_turns", pa.int32()),
        ("label", pa.int32()),
        ("set", pa.int8()),
        ("copies", pa.int32()),
        ("where", pa.string()),
    ]
)
_LISTS_SCHEMA = pa.schema([("rows", pa.list_(pa.int32()))])
_ROWS_PER_BATCH = 65536


class Set(IntEnum):
    """What a document is for."""

    TRAIN = 0
    EVAL = 1
    TEST = 2
    RETAIN = 3
    REPLAY = 4

    @property
    def learned(self) -> bool:
        """Whether it is trained on; the others are held out."""
        return self in (Set.TRAIN, Set.REPLAY)


class Documents:
    """Documents of a prepared folder by number, mapped: a row costs the pages it lies on."""

    def __init__(self, folder: Path | str) -> None:
        self._folder = Path(folder)
        files = sorted((Path(folder) / "documents").glob("*.arrow"))
        table = pa.concat_tables([mapped(file) for file in files]) if files else DOCUMENT_SCHEMA.empty_table()
        self._ids, self._masks = Lists(table["input_ids"]), Lists(table["supervised"])
        self._where = table["where"]
        self.lengths: NDArray[np.int64] = self._ids.lengths
        """[D] tokens of each."""
        self.num_targets: NDArray[np.int64] = _numbers(table, "num_targets").astype(np.int64)
        """[D] supervised tokens of each that can be predicted."""
        self.num_turns: NDArray[np.int32] = _numbers(table, "num_turns")
        """[D] supervised assistant turns of each."""
        self.labels: NDArray[np.int32] = _numbers(table, "label")
        """[D] class number of each, -1 for none."""
        self.sets: NDArray[np.int8] = _numbers(table, "set")
        """[D] `Set` of each."""
        self.copies: NDArray[np.int32] = _numbers(table, "copies")
        """[D] how often each comes in an epoch."""

    @cached_property
    def weights(self) -> NDArray[np.float32]:
        """[D] what a supervised token of each counts in the loss."""
        return read_weights(self._folder)[self.labels]

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes of which each one's only target is one; () where tokens are the targets."""
        return predicted_classes(self._folder)

    def __len__(self) -> int:
        return len(self.lengths)

    def input_ids(self, index: int) -> NDArray[np.int32]:
        """[T], a view of the file."""
        return self._ids[index]

    def supervised(self, index: int) -> NDArray[np.uint8]:
        """[T], a view of the file."""
        return self._masks[index]

    def where(self, index: int) -> str:
        """`file:line` of the row it was made from."""
        return str(self._where[index].as_py())


class Lists:
    """A column of lists as numpy views, without copying."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._offsets = [chunk.offsets.to_numpy() for chunk in column.chunks]
        self._values = [chunk.values.to_numpy() for chunk in column.chunks]
        self._starts = np.cumsum([0, *(len(chunk) for chunk in column.chunks)])
        lengths = [np.diff(offsets) for offsets in self._offsets]
        self.lengths: NDArray[np.int64] = np.concatenate([np.empty(0, np.int64), *lengths])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> NDArray[Any]:
        chunk = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = index - self._starts[chunk]
        start, end = self._offsets[chunk][row : row + 2]
        values: NDArray[Any] = self._values[chunk][start:end]
        return values

    def sums(self, values: NDArray[Any]) -> NDArray[Any]:
        """[len(self)] for each list, the sum of `values` at the numbers in it; no list may be empty."""
        found = [np.empty(0, values.dtype)]
        for offsets, numbers in zip(self._offsets, self._values, strict=True):
            if len(offsets) > 1:
                found.append(np.add.reduceat(values[numbers[: offsets[-1]]], offsets[:-1]))
        return np.concatenate(found)


def write_classes(folder: Path, names: Sequence[str], weights: Sequence[float], predicted: bool = False) -> None:
    """Write classes.json."""
    content = {"names": list(names), "weights": list(weights), "predicted": predicted}
    (folder / "classes.json").write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


def predicted_classes(folder: Path) -> tuple[str, ...]:
    """Names of the classes that the documents' one target is one of; () where tokens are the targets."""
    found = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
    return tuple(found["names"]) if found.get("predicted") else ()


def read_weights(folder: Path) -> NDArray[np.float32]:
    """[classes + 1] weight of each class number; the last, which is that of -1, is 1."""
    found = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
    return np.array([*found["weights"], 1.0], dtype=np.float32)


def write_lists(path: Path, rows: Sequence[NDArray[np.integer]]) -> None:
    """Write packs.arrow or eval.arrow: lists of document numbers."""
    with pa.ipc.new_file(str(path), _LISTS_SCHEMA) as writer:
        for start in range(0, len(rows), _ROWS_PER_BATCH):
            batch = as_lists([row.astype(np.int32) for row in rows[start : start + _ROWS_PER_BATCH]])
            writer.write_batch(pa.record_batch([batch], schema=_LISTS_SCHEMA))


def read_lists(path: Path) -> Lists:
    """What `write_lists` wrote, mapped."""
    return Lists(mapped(path)["rows"])


def write_slices(folder: Path, values: Mapping[str, Sequence[str]]) -> None:
    """Write slices.json: of each column the value of every held-out document, in the order of eval.arrow."""
    (folder / "slices.json").write_text(json.dumps(values, ensure_ascii=False) + "\n", encoding="utf-8")


def read_slices(folder: Path, columns: Iterable[str]) -> dict[str, list[str]]:
    """What `write_slices` wrote, of these columns. Raises KeyError for one that the data was not prepared with."""
    found = json.loads((folder / "slices.json").read_text(encoding="utf-8"))
    return {column: found[column] for column in columns}


def as_lists(rows: Iterable[NDArray[Any]]) -> pa.ListArray:
    """Arrays of one dtype as an Arrow column; their values are copied once. At most 2**31 values."""
    rows = list(rows)
    offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64).astype(np.int32)
    values = np.concatenate(rows) if rows else np.empty(0, np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def digest(table: pa.Table) -> str:
    """SHA-256 of all lengths, tokens, masks, classes and copies of a file's documents, in order."""
    found = hashlib.sha256()
    for batch in table.to_batches():
        for name in ("input_ids", "supervised"):
            column = batch.column(name)
            lengths = np.diff(column.offsets.to_numpy()).astype("<i8")
            found.update(lengths.tobytes())
            found.update(np.ascontiguousarray(column.flatten().to_numpy()).data)
        for name in ("label", "set", "copies"):
            found.update(batch.column(name).to_numpy().tobytes())
    return found.hexdigest()


def mapped(path: Path) -> pa.Table:
    """The table of an Arrow IPC file; its columns are views of it."""
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def _numbers(table: pa.Table, name: str) -> NDArray[Any]:
    values: NDArray[Any] = table[name].to_numpy()
    return values
