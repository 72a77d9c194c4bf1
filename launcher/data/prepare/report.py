"""What preparing the data found, in numbers: `report.json` in the prepared folder, which `slipway data` shows.

Everything is counted, nothing estimated. Percentiles are values that occur: p90 is the smallest that at least 90% of
all do not exceed. The edges of a histogram follow from `data.max_length` alone, so that two reports compare bin by bin.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from launcher.data.prepare.roles import Role
from launcher.errors import DataError
from launcher.plan.plan import DataPlan, Part

VERSION = 2
"""Raised with every change of the models below; a report of another version is not read."""

_AT_ONCE = 1_000_000
"""Values sorted in one go, so that counting 10 million takes the memory of one."""
_BINS_A_DOUBLING = 4
_DOUBLINGS_BEYOND = 4
"""Longer conversations are told apart up to 16 times `data.max_length`."""
_MOST_TURNS = 20
_FILL_EDGES = tuple(range(0, 101, 5))


class Histogram(Part):
    """How many values lie where."""

    edges: tuple[int, ...]
    """B + 1 of them, ascending."""
    counts: tuple[int, ...]
    """B of them: values above `edges[i]` and at most `edges[i + 1]`; the first and the last bin also hold everything
    before and after."""

    def coarser(self) -> Histogram:
        """Each two bins in one, counted from the last, so that the last edge and its halves remain."""
        edges = self.edges[::-2][::-1]
        edges = edges if edges[0] == self.edges[0] else (self.edges[0], *edges)
        starts = [self.edges.index(edge) for edge in edges[:-1]]
        return Histogram(edges=edges, counts=tuple(np.add.reduceat(np.array(self.counts), starts).tolist()))


class Distribution(Part):
    """How a count of tokens is spread over documents."""

    min: int
    p10: int
    p50: int
    p90: int
    p99: int
    max: int
    mean: float
    histogram: Histogram


class SetReport(Part):
    """Documents of one use: what training, the held-out loss or the test rows go through."""

    documents: int
    """In training those of an epoch: one that comes three times is counted three times, in all that follows."""
    tokens: int
    supervised_tokens: int
    """Tokens that are learned; 0 for test rows, which are answered in words."""
    turns: dict[int, int]
    """{learned assistant turns: documents}; the largest key, 20, stands for more as well."""
    lengths: Distribution | None
    """Tokens a document, those of the prompt for test rows; None without documents."""
    supervised: Distribution | None
    """Learned tokens a document; None without documents, and for test rows."""

    @property
    def supervised_share(self) -> float:
        """Learned tokens of all tokens, 0 to 1."""
        return self.supervised_tokens / max(self.tokens, 1)


class Sets(Part):
    """All documents, by use."""

    train: SetReport
    eval: SetReport
    test: SetReport
    replay: SetReport | None = None
    """What is trained on beside `train`, where the recipe has `data.replay`."""
    retain: SetReport | None = None
    """What shows forgetting, where the recipe has `evaluate.retain`."""


class LongReport(Part):
    """Training conversations before `data.max_length` was applied to them."""

    conversations: int
    over: int
    """Longer than `data.max_length`: cut, split or left out."""
    longest: int
    """Tokens; 0 where none is over."""
    histogram: Histogram
    """Of those that are over, from `data.max_length` up to 16 times as much."""

    def share_within(self, num_tokens: int) -> float:
        """Share of all conversations of at most `num_tokens`, which must be an edge of the histogram, not the last."""
        beyond = self.histogram.counts[self.histogram.edges.index(num_tokens) :]
        return 1 - sum(beyond) / max(self.conversations, 1)


class SourceReport(Part):
    """What became of the rows of one source."""

    path: str
    role: Role
    format: str
    rows: int
    """Conversations and bad rows read from it."""
    used: int
    """Those of which there are documents or test rows."""
    dropped: dict[str, int]
    """{reason: how many}; each is listed in dropped.jsonl."""


class Duplicates(Part):
    """Training rows that repeat what is elsewhere, whether the recipe drops or keeps them. None: not looked for."""

    exact: int | None = None
    """The words of an earlier row."""
    near: int | None = None
    """Nearly those of an earlier row."""
    overlap_with_held_out: int | None = None
    """Asks what a held-out row asks."""
    contaminated: int | None = None
    """Shares 13 words in a row with a benchmark."""


class LabelReport(Part):
    """One class of the training rows."""

    rows: int
    copies: int
    """Documents of it in an epoch, after `data.balance` and the sources' weights."""
    weight: float
    """What a token of it counts in the loss, 1 where nothing is weighted."""


class PackReport(Part):
    """Rows of several documents."""

    rows: int
    capacity: int
    """Tokens that fit a row: `data.max_length`."""
    tokens: int
    padding_share: float
    """Room that stays empty, of all rows' room, 0 to 1."""
    lower_bound_rows: int
    """No packing needs fewer."""
    mean_documents: float
    max_documents: int
    fill: Histogram
    """Rows by per cent of the capacity that is filled, rounded up."""


class Settings(Part):
    """Keys of the recipe's `data` that say what the numbers mean."""

    max_length: int
    packing: bool
    too_long: str
    duplicates: str
    overlap: str
    balance: str
    special_tokens: str
    classifies: bool = False
    """Whether the one target of a document is its class."""

    @classmethod
    def of(cls, data: DataPlan) -> Settings:
        """Those of a Plan."""
        own = {name: getattr(data, name) for name in ("max_length", "packing", "too_long", "balance", "special_tokens")}
        own |= {"duplicates": data.clean.duplicates, "overlap": data.clean.overlap}
        return cls(**own, classifies=data.head is not None)


class Report(Part):
    """Everything that preparation counted."""

    version: int = VERSION
    key: str
    """Of the prepared folder: its name."""
    settings: Settings
    sources: tuple[SourceReport, ...]
    sets: Sets
    long: LongReport
    dropped: dict[str, int]
    """{reason: how many} over all sources."""
    duplicates: Duplicates
    labels: dict[str, LabelReport]
    """{class: what there is of it}; empty without classes."""
    packs: PackReport | None
    """None where every row is one document."""
    notes: dict[str, int]
    """{what was changed or seen without leaving a row out: how often}."""
    seconds: dict[str, float]
    """Wall clock of each phase of the preparation, in their order."""
    tokens_per_s: float
    """Tokens of all sets over the seconds of all phases."""
    workers: int
    """Processes that prepared the data."""

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Report | None:
        """What `save` wrote; None where nothing or another version's is there. Raises DataError for a damaged file."""
        try:
            content = json.loads(path.read_bytes())
            return cls.model_validate(content) if content["version"] == VERSION else None
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, ValidationError) as error:
            raise DataError(
                f"{path} is damaged", hint=f"delete {path.parent}: the data is prepared again at the next start"
            ) from error


def build(
    *,
    key: str,
    data: DataPlan,
    sources: Sequence[SourceReport],
    train: SetReport,
    held_out: SetReport,
    test: SetReport,
    replay: SetReport | None = None,
    retain: SetReport | None = None,
    long: LongReport,
    packs: PackReport | None,
    duplicates: Duplicates,
    labels: Mapping[str, LabelReport],
    notes: Mapping[str, int],
    seconds: Mapping[str, float],
    workers: int,
) -> Report:
    """A report from its parts, which the functions below make."""
    dropped: Counter[str] = Counter()
    for source in sources:
        dropped.update(source.dropped)
    num_tokens = sum(part.tokens for part in (train, held_out, test, replay, retain) if part is not None)
    return Report(
        key=key,
        settings=Settings.of(data),
        sources=tuple(sources),
        sets=Sets(train=train, eval=held_out, test=test, replay=replay, retain=retain),
        long=long,
        dropped={reason: count for reason, count in dropped.most_common() if count},
        duplicates=duplicates,
        labels=dict(labels),
        packs=packs,
        notes={note: count for note, count in sorted(notes.items()) if count},
        seconds={phase: round(value, 3) for phase, value in seconds.items()},
        tokens_per_s=round(num_tokens / max(sum(seconds.values()), 1e-3), 1),
        workers=workers,
    )


def describe_set(
    lengths: NDArray[np.integer],
    num_targets: NDArray[np.integer] | None,
    num_turns: NDArray[np.integer] | None,
    max_length: int,
) -> SetReport:
    """The report of a set from [D] tokens, learned tokens and learned assistant turns of its documents.

    Test rows have neither targets nor turns.
    """
    edges = length_edges(max_length)
    return SetReport(
        documents=len(lengths),
        tokens=int(lengths.sum()),
        supervised_tokens=0 if num_targets is None else int(num_targets.sum()),
        turns={} if num_turns is None else _turns(num_turns),
        lengths=_distribution(lengths, edges),
        supervised=None if num_targets is None else _distribution(num_targets, edges),
    )


def describe_long(over: NDArray[np.integer] | Sequence[int], conversations: int, max_length: int) -> LongReport:
    """The report of what did not fit: `over` has the tokens of each training conversation beyond `max_length`.

    `conversations`: all that were tokenized for training, those among them.
    """
    values = np.asarray(over, dtype=np.int64)
    edges = _edges(max_length, 0, _BINS_A_DOUBLING * _DOUBLINGS_BEYOND)
    return LongReport(
        conversations=conversations,
        over=len(values),
        longest=int(values.max(initial=0)),
        histogram=_histogram(_tally(values), edges),
    )


def describe_packs(
    row_tokens: NDArray[np.integer], row_documents: NDArray[np.integer], capacity: int
) -> PackReport | None:
    """The report of packs from [R] tokens and documents of each row; None without rows."""
    num_rows, num_tokens = len(row_tokens), int(row_tokens.sum())
    if not num_rows:
        return None
    return PackReport(
        rows=num_rows,
        capacity=capacity,
        tokens=num_tokens,
        padding_share=1 - num_tokens / (num_rows * capacity),
        lower_bound_rows=-(-num_tokens // capacity),
        mean_documents=float(row_documents.mean()),
        max_documents=int(row_documents.max()),
        fill=_histogram(_tally(-(-row_tokens.astype(np.int64) * 100 // capacity)), _FILL_EDGES),
    )


def length_edges(max_length: int) -> tuple[int, ...]:
    """Edges of every histogram of tokens: 0, then four a doubling up to `max_length`."""
    return 0, *_edges(max_length, -math.ceil(_BINS_A_DOUBLING * math.log2(max(max_length, 2))), 0)


def _edges(max_length: int, first: int, last: int) -> tuple[int, ...]:
    """`max_length` times each power of two from `first` to `last` bins away, as whole numbers from 1."""
    exact = (max_length * 2 ** (step / _BINS_A_DOUBLING) for step in range(first, last + 1))
    return tuple(sorted({max(round(edge), 1) for edge in exact}))


Tally = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Values that occur, ascending, and how often each does."""


def _tally(values: NDArray[np.integer]) -> Tally:
    """Count values, a part at a time: there are far fewer different ones than documents."""
    parts = [
        np.unique(values[start : start + _AT_ONCE], return_counts=True) for start in range(0, len(values), _AT_ONCE)
    ]
    if not parts:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    found, inverse = np.unique(np.concatenate([values for values, _ in parts]), return_inverse=True)
    return found.astype(np.int64), _sums(inverse, np.concatenate([counts for _, counts in parts]), len(found))


def _sums(bins: NDArray[np.integer], counts: NDArray[np.integer], num_bins: int) -> NDArray[np.int64]:
    # bincount adds in doubles: exact up to 2**53.
    return np.bincount(bins, counts, num_bins).astype(np.int64)


def _turns(num_turns: NDArray[np.integer]) -> dict[int, int]:
    values, counts = _tally(num_turns)
    documents = _sums(np.minimum(values, _MOST_TURNS), counts, _MOST_TURNS + 1)
    return {turns: count for turns, count in enumerate(documents.tolist()) if count}


def _distribution(lengths: NDArray[np.integer], edges: Sequence[int]) -> Distribution | None:
    values, counts = _tally(lengths)
    if not len(values):
        return None
    below = np.cumsum(counts)
    total = int(below[-1])
    at = {f"p{percent}": int(values[np.searchsorted(below * 100, total * percent)]) for percent in (10, 50, 90, 99)}
    return Distribution(
        min=int(values[0]),
        max=int(values[-1]),
        mean=int(values @ counts) / total,
        histogram=_histogram((values, counts), edges),
        **at,
    )


def _histogram(tally: Tally, edges: Sequence[int]) -> Histogram:
    values, counts = tally
    num_bins = len(edges) - 1
    bins = np.clip(np.searchsorted(edges, values, side="left") - 1, 0, num_bins - 1)
    return Histogram(edges=tuple(edges), counts=tuple(_sums(bins, counts, num_bins).tolist()))
