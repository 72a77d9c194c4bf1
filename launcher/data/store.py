"""Prepared documents and packs on disk: Arrow IPC files that are mapped into memory, so that opening one reads nothing.

train.arrow, eval.arrow   input_ids list<int32> | supervised list<uint8> | num_targets int32 | where string
packs.arrow               documents list<int32>: indices into train.arrow, a row of the global batch's unit each
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from launcher.data.template import Document

DOCUMENT_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("supervised", pa.list_(pa.uint8())),
        ("num_targets", pa.int32()),
        ("where", pa.string()),
    ]
)
PACK_SCHEMA = pa.schema([("documents", pa.list_(pa.int32()))])
_PACKS_PER_BATCH = 65536


class DocumentWriter:
    """Appends documents to an Arrow file; a context manager. Remembers their lengths and hashes what it writes."""

    def __init__(self, path: Path) -> None:
        self._writer = pa.ipc.new_file(str(path), DOCUMENT_SCHEMA)
        self._digest = hashlib.sha256()
        self.lengths: list[int] = []
        self.num_targets: list[int] = []

    def write(self, documents: Sequence[Document], where: Sequence[str]) -> None:
        """Append one record batch."""
        if not documents:
            return
        num_targets = [document.num_targets for document in documents]
        ids, masks = [d.input_ids for d in documents], [d.supervised for d in documents]
        columns = [_lists(ids), _lists(masks), pa.array(num_targets, pa.int32()), pa.array(where, pa.string())]
        self._writer.write_batch(pa.record_batch(columns, schema=DOCUMENT_SCHEMA))
        self.lengths += [len(d.input_ids) for d in documents]
        self.num_targets += num_targets
        for values in (np.array([len(row) for row in ids], dtype="<i8"), *ids, *masks):
            self._digest.update(values.tobytes())

    @property
    def digest(self) -> str:
        """SHA-256 of all lengths, tokens and masks so far, in order."""
        return self._digest.hexdigest()

    def __enter__(self) -> DocumentWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._writer.close()


class Documents:
    """Documents of an Arrow file by index, mapped: a row costs the pages it lies on."""

    def __init__(self, path: Path) -> None:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
        self._ids, self._masks = Lists(table["input_ids"]), Lists(table["supervised"])
        self._where = table["where"]
        self.lengths: NDArray[np.int64] = self._ids.lengths
        """[D] tokens of each."""
        self.num_targets: NDArray[np.int64] = table["num_targets"].to_numpy().astype(np.int64)
        """[D] supervised tokens of each that can be predicted."""

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


def write_packs(path: Path, packs: Sequence[NDArray[np.int32]]) -> None:
    """Write packs.arrow: the document indices of each row."""
    with pa.ipc.new_file(str(path), PACK_SCHEMA) as writer:
        for start in range(0, len(packs), _PACKS_PER_BATCH):
            rows = packs[start : start + _PACKS_PER_BATCH]
            writer.write_batch(pa.record_batch([_lists(rows)], schema=PACK_SCHEMA))


def read_packs(path: Path) -> Lists:
    """The document indices of each row, mapped."""
    with pa.memory_map(str(path)) as source:
        return Lists(pa.ipc.open_file(source).read_all()["documents"])


def _lists(rows: Iterable[NDArray[Any]]) -> pa.ListArray:
    rows = list(rows)
    offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows)))
