"""The conversations of a piece, each bad row in its place: what scanning and encoding both walk through, in step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from launcher.data.classified import classified
from launcher.data.clean.words import exchange, question
from launcher.data.conversation import Conversation
from launcher.data.formats import Format, check_source, detect, renamed, to_conversations
from launcher.data.slices import slices_of
from launcher.data.sources import Piece, read, read_all
from launcher.errors import DataError
from launcher.plan.plan import DataPlan, SourcePlan


@dataclass(frozen=True)
class Rows:
    """The sources of `data` with the format of each; read a piece at a time, in any process."""

    data: DataPlan
    formats: tuple[Format, ...]

    def __call__(self, piece: Piece) -> Iterator[tuple[str, Conversation | DataError]]:
        """`file:line` and what stands there; a row of several conversations gives several."""
        source = self.data.sources[piece.source]
        # Held-out files need neither: they are not split, balanced or left out.
        keys = (self.data.label, self.data.group) if piece.source < len(self.data.train) else (None, None)
        classifies = self.data.head is not None
        if classifies:  # every row has a class
            keys = self.data.label, keys[1]
        for where, row in read(source, piece):
            if isinstance(row, DataError):
                yield where, row
                continue
            try:
                found = to_conversations(row, self.formats[piece.source], source, where, *keys)
                found = [classified(one) for one in found] if classifies else found
                if self.data.slices:
                    slices = slices_of(row, self.data.slices, source, where)
                    found = [replace(one, slices=slices) for one in found]
            except DataError as error:
                yield where, error
                continue
            for conversation in found:
                yield where, conversation


def format_of(source: SourcePlan, data: DataPlan) -> Format:
    """The format that the recipe names, or the one that the first good row tells.

    Raises DataError where no row tells one, where one before it is bad and may not be, and where the recipe says of the
    source what has no meaning for its format.
    """
    found = _told(source, data.on_bad_row == "stop") if source.format == "auto" else source.format
    check_source(source, found, data.label, data.group)
    return found


def _told(source: SourcePlan, stop: bool) -> Format:
    first: DataError | None = None
    for where, row in read_all(source):
        try:
            if isinstance(row, DataError):
                raise row
            return detect(renamed(row, source.columns, where), where)
        except DataError as error:
            if stop:
                raise
            first = first or error
    raise first or DataError(f"{source.path}: no rows in it", hint="write one JSON object a line")


def benchmark_texts(sources: Iterable[SourcePlan], data: DataPlan, passed_over: Counter[str]) -> Iterator[str]:
    """What is said in every row of benchmarks, then what is asked in it.

    A row that is no conversation, such as a question whose answer is kept secret, gives every text that it has. One
    without any is counted in `passed_over`, or raises DataError, as the recipe says of bad rows.
    """
    for source in sources:
        format = format_of(source, data)
        for where, row in read_all(source):
            try:
                if isinstance(row, DataError):
                    raise row
                found = to_conversations(row, format, source, where)
            except DataError:
                texts = list(_texts(row)) if isinstance(row, dict) else []
                if not texts and data.on_bad_row == "stop":
                    raise
                passed_over["benchmark_rows_passed_over"] += not texts
                yield from texts
                continue
            for conversation in found:
                yield from (exchange(conversation), question(conversation))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
