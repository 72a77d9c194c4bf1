"""The conversations of a piece, each bad row in its place: what scanning and encoding both walk through, in step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from launcher.data.clean.words import exchange, question
from launcher.data.conversation import Conversation
from launcher.data.formats import Format, check_source, detect, renamed, to_conversations
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
        for where, row in read(source, piece):
            if isinstance(row, DataError):
                yield where, row
                continue
            try:
                found = to_conversations(
                    row, self.formats[piece.source], source, where, self.data.label, self.data.group
                )
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


def words_of(sources: Iterable[SourcePlan], data: DataPlan) -> Iterator[str]:
    """What is said in every conversation of other sources, such as benchmarks, then what is asked in it.

    A bad row is passed over, or raises DataError, as the recipe says.
    """
    for source in sources:
        format = format_of(source, data)
        for where, row in read_all(source):
            try:
                if isinstance(row, DataError):
                    raise row
                found = to_conversations(row, format, source, where)
            except DataError:
                if data.on_bad_row == "stop":
                    raise
                continue
            for conversation in found:
                yield from (exchange(conversation), question(conversation))
