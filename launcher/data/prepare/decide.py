"""What becomes of each row, decided over all rows together: left out, held out, or trained on so many times.

Pure: a function of the scans alone, the same however many processes made them. The training sources' rows go through
these in order: repeats an earlier row (duplicate), held out (split), asks what a held-out row asks (overlap), nearly
repeats a held-out or an earlier row (near duplicate), the sources' weights, balance. Rows to replay are cleaned in the
same way, and are neither held out nor balanced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from launcher.data.classified import class_names
from launcher.data.clean.near import first_wins
from launcher.data.prepare.balance import balance, independent_draws, source_copies
from launcher.data.prepare.replay import candidates
from launcher.data.prepare.roles import SETS, roles
from launcher.data.prepare.scan import CONTAMINATED
from launcher.data.prepare.split import Digests, as_digests, group_digests, split
from launcher.data.store import Set
from launcher.errors import DataError
from launcher.plan.plan import DataPlan

LEFT_OUT = -1
DUPLICATE, NEAR_DUPLICATE, OVERLAP = "duplicate", "near duplicate", "asks what a held-out row asks"
UNDERSAMPLED, UNDERWEIGHTED = "undersampled", "source weight below 1"


@dataclass(frozen=True)
class Decisions:
    """N conversations of all pieces in order."""

    starts: NDArray[np.int64]
    """[pieces + 1] number of the first conversation of each piece, and N."""
    sets: NDArray[np.int8]
    """[N] `Set`, or -1 for what is left out."""
    copies: NDArray[np.int32]
    """[N] times an epoch."""
    dropped: dict[int, tuple[str, str]]
    """{row: (reason, detail)} of what was left out here; what scanning left out is in the scans."""
    repeats: dict[str, int | None]
    """How many training rows repeat what is elsewhere, left out or not: exact, near, overlap_with_held_out,
    contaminated; None: not looked for."""
    classes: tuple[str, ...]
    labels: NDArray[np.int32]
    """[N] number of each row's class, -1 for none."""
    class_rows: NDArray[np.int64]
    """[classes] training rows of each, before weights and balance."""

    def of_piece(self, number: int) -> tuple[NDArray[np.int8], NDArray[np.int32], NDArray[np.int32]]:
        """Sets, copies and class numbers of one piece's conversations."""
        part = slice(self.starts[number], self.starts[number + 1])
        return self.sets[part], self.copies[part], self.labels[part]


def decide(data: DataPlan, sources: Sequence[int], scans: Sequence[pa.Table]) -> Decisions:
    """Decide on the rows of `scans`, one a piece; `sources` has the number of each piece's source.

    Raises DataError where a set would be empty, a class is missing that is needed, or rows overlap and may not.
    """
    return _Deciding(data, sources, scans).run()


class _Deciding:
    def __init__(self, data: DataPlan, sources: Sequence[int], scans: Sequence[pa.Table]) -> None:
        self.data = data
        sizes = [scan.num_rows for scan in scans]
        self.starts = np.cumsum([0, *sizes])
        self.table = pa.concat_tables(scans)
        self.source = np.repeat(np.array(sources, dtype=np.int64), sizes)
        self.digests = self._digests("digest")
        self.sets = np.array([SETS[role] for role in roles(data)], dtype=np.int8)[self.source]
        self.sets[self.table["reason"].is_valid().to_numpy()] = LEFT_OUT
        self.dropped: dict[int, tuple[str, str]] = {}
        reasons = Counter(self.table["reason"].drop_null().to_pylist())
        self.repeats: dict[str, int | None] = {
            "exact": 0,
            "near": None,
            "overlap_with_held_out": 0,
            "contaminated": reasons[CONTAMINATED] if data.clean.contamination else None,
        }
        encoded = self.table["label"].combine_chunks().dictionary_encode()
        self.classes = tuple(str(name) for name in encoded.dictionary.to_pylist())
        self.labels = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)
        if data.head is not None:
            names = class_names(self.classes, data)
            numbers = np.array([*(names.index(name) for name in self.classes), -1], dtype=np.int32)
            self.classes, self.labels = names, numbers[self.labels]

    def run(self) -> Decisions:
        self._duplicates()
        self._split()
        self._overlap()
        self._near_duplicates()
        training = self.sets == Set.TRAIN
        class_rows = np.bincount(self.labels[training & (self.labels >= 0)], minlength=len(self.classes))
        weights_of_sources = np.array([source.weight for source in self.data.sources])
        copies = np.ones(len(self.sets), dtype=np.int32)
        copies[training] = source_copies(weights_of_sources[self.source[training]], self.digests[training])
        self._leave_out(training & (copies == 0), UNDERWEIGHTED, "left out by this source's weight")
        before = np.where(self.sets == Set.TRAIN, copies, 0).astype(np.int32)
        balanced, _ = balance(self.data.balance, self.labels, before, self.digests)
        self._leave_out((before > 0) & (balanced == 0), UNDERSAMPLED, "its class has more rows than the smallest")
        copies = np.where(self.sets == Set.TRAIN, balanced, 1).astype(np.int32)
        self._replay(int(balanced.sum()))
        return Decisions(
            starts=self.starts,
            sets=self.sets,
            copies=copies,
            dropped=self.dropped,
            repeats=self.repeats,
            classes=self.classes,
            labels=self.labels,
            class_rows=class_rows,
        )

    def _duplicates(self) -> None:
        rows = np.flatnonzero(self._learned)
        earlier = _first_of_equals(self._digests("learned")[rows])
        again = earlier != np.arange(len(rows))
        self.repeats["exact"] = int(again.sum())
        if self.data.clean.duplicates == "drop":
            for place in np.flatnonzero(again).tolist():
                self._drop(int(rows[place]), DUPLICATE, f"the words of {self._where(int(rows[earlier[place]]))}")

    def _split(self) -> None:
        rows = np.flatnonzero(self.sets == Set.TRAIN)
        groups = None
        if self.data.group is not None:
            names = self.table["group"].take(pa.array(rows)).to_pylist()
            groups = group_digests(names, self.digests[rows])
        self.sets[rows] = split(
            self.digests[rows],
            self.data.eval,
            self.data.test,
            groups=groups,
            labels=self.labels[rows] if self.classes else None,
            stratify=self.data.stratify,
        )

    def _overlap(self) -> None:
        asked = self._digests("asked")
        held_out, rows = np.flatnonzero(self._held_out), np.flatnonzero(self._learned)
        # One list, held-out rows first: a training row overlaps where the first of its equals is one of them.
        order = np.concatenate([held_out, rows])
        first = _first_of_equals(asked[order])[len(held_out) :]
        found = np.flatnonzero(first < len(held_out)).tolist()
        self.repeats["overlap_with_held_out"] = len(found)
        if found and self.data.clean.overlap == "stop":
            one, other = self._where(int(rows[found[0]])), self._where(int(order[first[found[0]]]))
            raise DataError(
                f"{one}: asks what the held-out row {other} asks, and {len(found) - 1:,} more rows do so",
                hint="leave such rows out with data.clean.overlap: drop",
            )
        if self.data.clean.overlap == "drop":
            for place in found:
                self._drop(int(rows[place]), OVERLAP, f"as {self._where(int(order[first[place]]))}")

    def _near_duplicates(self) -> None:
        threshold = self.data.clean.near_duplicates
        if threshold is None:
            return
        signatures = np.concatenate([_fixed(chunk, np.dtype("<u4")) for chunk in self.table["near"].chunks])
        earlier = first_wins(signatures, threshold, alive=self.sets >= 0, held_out=self._held_out)
        found = np.flatnonzero((earlier >= 0) & self._learned).tolist()
        self.repeats["near"] = len(found)
        for row in found:
            self._drop(row, NEAR_DUPLICATE, f"nearly the words of {self._where(int(earlier[row]))}")

    def _replay(self, num_training: int) -> None:
        """Leave out what is far from being drawn, without a word on each."""
        if self.data.replay is not None:
            rows = np.flatnonzero(self.sets == Set.REPLAY)
            drawn = candidates(independent_draws(self.digests[rows]), num_training, self.data.replay.share)
            self.sets[rows[~drawn]] = LEFT_OUT

    @property
    def _learned(self) -> NDArray[np.bool_]:
        return (self.sets == Set.TRAIN) | (self.sets == Set.REPLAY)

    @property
    def _held_out(self) -> NDArray[np.bool_]:
        return (self.sets >= 0) & ~self._learned

    def _leave_out(self, rows: NDArray[np.bool_], reason: str, detail: str) -> None:
        for row in np.flatnonzero(rows).tolist():
            self._drop(row, reason, detail)

    def _drop(self, row: int, reason: str, detail: str) -> None:
        self.sets[row] = LEFT_OUT
        self.dropped[row] = reason, detail

    def _where(self, row: int) -> str:
        return str(self.table["where"][row].as_py())

    def _digests(self, name: str) -> Digests:
        return as_digests([_bytes(chunk) for chunk in self.table[name].chunks])


def _bytes(column: pa.FixedSizeBinaryArray) -> bytes:
    width = column.type.byte_width
    values: bytes = column.buffers()[1].to_pybytes()[column.offset * width : (column.offset + len(column)) * width]
    return values


def _fixed(column: pa.FixedSizeBinaryArray, dtype: np.dtype) -> NDArray[np.uint32]:
    return np.frombuffer(_bytes(column), dtype=dtype).reshape(len(column), -1)


def _first_of_equals(digests: Digests) -> NDArray[np.int64]:
    """[rows] the first row with the same digest, which is the row itself where there is none before it."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal digests stay in the order of the rows
    is_new = np.ones(len(order), dtype=bool)
    is_new[1:] = (np.diff(digests[order], axis=0) != 0).any(axis=1)
    first = np.empty(len(order), dtype=np.int64)
    first[order] = order[is_new][np.cumsum(is_new) - 1]
    return first
