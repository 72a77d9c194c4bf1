"""Prepared data by index: which rows a step takes, and the flat micro batches they become.

All rows of a micro batch are laid end to end in one flat row of T tokens, so there is no padding anywhere; documents
are kept apart by their positions and by `cu_seqlens`, the offsets that variable-length attention kernels take.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from launcher.data.order import epoch_order
from launcher.data.store import Documents, read_lists, read_slices
from launcher.plan.batch import BatchLayout


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward of one rank: D documents, T tokens, S targets."""

    input_ids: Tensor
    """[1, T] int64."""
    position_ids: Tensor
    """[1, T] int64, from 0 in each document."""
    cu_seqlens: Tensor
    """[D + 1] int32: where each document begins, and T."""
    max_seqlen: int
    """Tokens of the longest document."""
    supervised_index: Tensor
    """[S] int64: positions in the flat row whose next token, of the same document, is a target; in a sequence
    classification the last of each document."""
    targets: Tensor
    """[S] int64: those next tokens; in a sequence classification the class of each document."""
    weights: Tensor | None
    """[S] fp32: what each target counts in the loss; None: 1 each."""
    where: tuple[str, ...]
    """`file:line` of each document."""
    num_tokens: int
    """T, or 0 in an empty slot, whose document is there only so that the rank joins every collective."""
    combination: int = 0
    """Of the slices' values, which all its documents share: a place in `EvalData.combinations`."""


@dataclass(frozen=True)
class GlobalBatch:
    """What one optimizer step learns from, whatever the ranks."""

    rows: tuple[int, ...]
    """Row indices, the ones that cost most attention first."""
    supervised_tokens: int
    """Targets in all of them."""
    weight: float
    """Sum of the targets' weights, `supervised_tokens` where each weighs 1: the loss is the mean by weight."""
    tokens: int
    epoch: int


@dataclass(frozen=True)
class TestRow:
    """A question to be answered in words."""

    __test__ = False  # pytest would collect it by its name

    where: str
    prompt_text: str
    prompt_ids: list[int]
    answer: str
    slices: dict[str, str] = field(default_factory=dict)
    """{column: value} of the columns that were asked for when the data was prepared."""


class TrainData:
    """Training rows in an order that is a pure function of (data, seed, global batch size): see E3."""

    def __init__(self, folder: Path | str, global_batch_size: int, seed: int) -> None:
        self._documents = documents = Documents(folder)
        self._packs = read_lists(Path(folder) / "packs.arrow")
        self._costs = self._packs.sums(attention_cost(documents.lengths))
        self._weighted = bool((documents.weights != 1).any())
        self._global_batch_size = global_batch_size
        self._seed = seed
        self.num_rows = len(self._packs)
        self.steps_per_epoch = -(-self.num_rows // global_batch_size)
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def global_batch(self, step: int) -> GlobalBatch:
        """The rows of optimizer step `step`, counted from 0 over all epochs. The last of an epoch may be short."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self._global_batch_size
        rows = self._order(epoch)[start : start + self._global_batch_size]
        # By cost, so that the rows which a layout takes at the same time, one rank each, take equally long.
        rows = rows[np.argsort(-self._costs[rows], kind="stable")]
        documents = np.concatenate([self._packs[row] for row in rows])
        num_targets = self._documents.num_targets[documents]
        weights = self._documents.weights[documents].astype(np.float64)
        return GlobalBatch(
            rows=tuple(rows.tolist()),
            supervised_tokens=int(num_targets.sum()),
            weight=float((num_targets * weights).sum()),
            tokens=int(self._documents.lengths[documents].sum()),
            epoch=epoch,
        )

    def micro_batches(self, step: int, layout: BatchLayout, rank: int) -> Iterator[MicroBatch]:
        """The `layout.num_micro_steps` micro batches of `rank` in step `step`; an empty slot's has no targets."""
        rows = self.global_batch(step).rows
        for micro_step in range(layout.num_micro_steps):
            slot = layout.slot(len(rows), micro_step, rank)
            if slot:
                documents = np.concatenate([self._packs[rows[position]] for position in slot])
                yield _micro_batch(self._documents, documents, self._weighted)
            else:
                first = self._packs[rows[0]]
                yield _empty(self._documents, first[np.argmin(self._documents.lengths[first])])

    def _draw_order(self, epoch: int) -> NDArray[np.int64]:
        return epoch_order(self.num_rows, self._seed, epoch)


class EvalData:
    """Held-out documents, the first `max_rows` of them, in batches of similar length and of the same slices."""

    def __init__(
        self,
        folder: Path | str,
        max_rows: int | None = None,
        file: str = "eval.arrow",
        slices: Sequence[str] = (),
    ) -> None:
        """`file` lists them: eval.arrow, or retain.arrow, which what an earlier version prepared has not.

        `slices` are columns that the data was prepared with.
        """
        self._documents = Documents(folder)
        lists = read_lists(Path(folder) / file) if (Path(folder) / file).exists() else None
        self._numbers = (lists[0] if lists else np.empty(0, np.int32))[:max_rows]
        self.num_documents = len(self._numbers)
        self.supervised_tokens = int(self._documents.num_targets[self._numbers].sum())
        values = read_slices(Path(folder), slices) if slices else {}
        rows = [tuple(values[column][i] for column in slices) for i in range(self.num_documents)]
        known = sorted(set(rows))
        self.combinations = [dict(zip(slices, combination, strict=True)) for combination in known]
        """{column: value} of the slices, each that there is once; one, an empty one, where there are no slices."""
        self.combination_of = np.array([known.index(row) for row in rows], dtype=np.int64)
        """[num_documents] the place of each document's in `combinations`."""
        self.rows_of: list[int] = np.bincount(self.combination_of, minlength=len(known)).tolist()
        """Documents of each of the `combinations`."""

    def micro_batches(self, token_budget: int, world_size: int, rank: int) -> Iterator[MicroBatch]:
        """This rank's share of all documents, in batches of at most `token_budget` tokens or of one document.

        As many on every rank: one that runs out gets batches without targets. Over all ranks each document comes once.
        """
        batches = self._batches(token_budget)
        for start in range(0, len(batches), world_size):
            if start + rank < len(batches):
                combination, documents = batches[start + rank]
                yield replace(_micro_batch(self._documents, documents), combination=combination)
            else:
                yield _empty(self._documents, batches[0][1][0])

    def _batches(self, token_budget: int) -> list[tuple[int, NDArray[np.int64]]]:
        """(combination, numbers of documents that have it) of each batch."""
        lengths = self._documents.lengths[self._numbers]
        batches: list[tuple[int, list[int]]] = []
        room = 0
        for held_out in np.lexsort((lengths, self.combination_of)):
            combination = int(self.combination_of[held_out])
            if batches and self._documents.classes:  # rows are padded to the longest, which comes last
                room = token_budget - len(batches[-1][1]) * lengths[held_out]
            if not batches or batches[-1][0] != combination or lengths[held_out] > room:
                batches.append((combination, []))
                room = token_budget
            batches[-1][1].append(int(self._numbers[held_out]))
            room -= lengths[held_out]
        return [(combination, np.array(batch, dtype=np.int64)) for combination, batch in batches]


class TestRows(Sequence[TestRow]):
    """The first `limit` rows of test.jsonl."""

    __test__ = False

    def __init__(self, folder: Path | str, limit: int | None = None) -> None:
        with (Path(folder) / "test.jsonl").open(encoding="utf-8") as lines:
            self._rows = [TestRow(**json.loads(line)) for line in islice(lines, limit)]

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> TestRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[TestRow]: ...
    def __getitem__(self, index: int | slice) -> TestRow | list[TestRow]:
        return self._rows[index]


def attention_cost(lengths: NDArray[np.integer]) -> NDArray[np.float64]:
    """What documents of `lengths` tokens cost a transformer, in tokens of its linear layers.

    A layer of hidden size H spends 24 H^2 FLOPs a token on its linear maps and, causally, 2 H n on attending over n
    tokens: a document costs n + n^2 / (12 H). H is taken as 4,096; rows of equal tokens rank alike for every H.
    """
    return lengths + lengths.astype(np.float64) ** 2 / (12 * 4096)


def _micro_batch(documents: Documents, indices: NDArray[np.integer], weighted: bool = False) -> MicroBatch:
    lengths = documents.lengths[indices]
    ends = np.cumsum(lengths)
    starts = ends - lengths
    input_ids = np.concatenate([documents.input_ids(int(index)) for index in indices]).astype(np.int64)
    if documents.classes:
        positions, targets = ends - 1, documents.labels[indices].astype(np.int64)
    else:
        supervised = np.concatenate([documents.supervised(int(index)) for index in indices])
        supervised[starts] = 0  # nothing of its own document comes before a document's first token
        positions = np.flatnonzero(supervised) - 1
        targets = input_ids[positions + 1]
    weights = np.repeat(documents.weights[indices], documents.num_targets[indices]) if weighted else None
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids)[None],
        position_ids=torch.from_numpy(np.arange(len(input_ids)) - np.repeat(starts, lengths))[None],
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        max_seqlen=int(lengths.max()),
        supervised_index=torch.from_numpy(positions),
        targets=torch.from_numpy(targets),
        weights=torch.from_numpy(weights) if weights is not None else None,
        where=tuple(documents.where(int(index)) for index in indices),
        num_tokens=len(input_ids),
    )


def _empty(documents: Documents, index: int) -> MicroBatch:
    batch = _micro_batch(documents, np.array([index]))
    nothing = torch.empty(0, dtype=torch.int64)
    return MicroBatch(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        cu_seqlens=batch.cu_seqlens,
        max_seqlen=batch.max_seqlen,
        supervised_index=nothing,
        targets=nothing,
        weights=None,
        where=(),
        num_tokens=0,
    )
