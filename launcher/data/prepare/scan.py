"""The first reading of a piece: is each row usable by itself, and what must be known of it to decide on all rows.

digest binary(16)     of all words; rows of equal words are held out together
learned binary(16)    of all words and of what is learned of them; equal ones are duplicates
asked binary(16)      of what comes before the last answer
label, group string   null where the recipe names no such column
near binary(512)      MinHash signature; only where near duplicates are looked for
where string          `file:line`
reason, detail, text  of a row that is left out; null otherwise
mended bool           its encoding was mended
untold bool           kept only because it is too short to tell its language
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pyarrow as pa

from launcher.data.clean.contamination import Contamination
from launcher.data.clean.filters import Dropped, Filters
from launcher.data.clean.near import NUM_VALUES, signatures
from launcher.data.clean.words import exchange, question
from launcher.data.conversation import Conversation
from launcher.data.prepare.roles import roles
from launcher.data.prepare.rows import Rows
from launcher.data.sources import Piece
from launcher.plan.plan import CleanPlan

BAD_ROW, CONTAMINATED = "bad row", "contamination"
SHOWN_CHARACTERS = 200
"""How much of a dropped row is kept in dropped.jsonl, so that it can be recognized."""
_NOTHING = bytes(16)


class Scan:
    """Reads pieces. Picklable: it goes to other processes and machines."""

    def __init__(self, rows: Rows, contamination: Contamination | None) -> None:
        clean = rows.data.clean
        self._rows, self._contamination = rows, contamination
        self._of_training, self._of_held_out = Filters(clean), mending(clean)
        self._near = clean.near_duplicates is not None
        self._schema = _schema(self._near)

    def __call__(self, piece: Piece) -> pa.Table:
        """A line for every conversation and every bad row of `piece`, in order.

        Raises DataError for the first bad row where the recipe says `stop`.
        """
        training = roles(self._rows.data)[piece.source] in ("train", "replay")
        lines: list[_Line] = []
        words: list[str] = []
        for where, item in self._rows(piece):
            if isinstance(item, Conversation):
                lines.append(self._line(item, training))
            elif self._rows.data.on_bad_row == "stop":
                raise item
            else:
                lines.append(_left_out(where, BAD_ROW, item.message.removeprefix(f"{where}: "), ""))
            if self._near:
                words.append(exchange(item) if isinstance(item, Conversation) and lines[-1].reason is None else "")
        columns: dict[str, Any] = dict(zip(_Line._fields, zip(*lines, strict=True), strict=True))
        if self._near:
            columns["near"] = [signature.tobytes() for signature in signatures(words)]
        return pa.table(columns, schema=self._schema) if lines else self._schema.empty_table()

    def _line(self, row: Conversation, training: bool) -> _Line:
        filters = self._of_training if training else self._of_held_out
        found = filters(row)
        if training and self._contamination is not None and isinstance(found, Conversation):
            # A question of a benchmark is one with any answer; a short one is found only where all of it is the same.
            shared = self._contamination.shared(exchange(found)) or self._contamination.shared(question(found))
            found = Dropped(CONTAMINATED, f"shares with a benchmark: {shared}") if shared else found
        if isinstance(found, Dropped):
            return _left_out(row.where, found.reason, found.detail, row.words[:SHOWN_CHARACTERS])
        system = self._rows.data.system_turns != "drop"
        return _Line(
            digest=found.digest(system=system),
            learned=found.digest(marks=True, system=system),
            asked=found.asked(),
            label=found.label,
            group=found.group,
            where=row.where,
            mended=found is not row,
            untold=filters.keeps_untold(found),
        )


class _Line(NamedTuple):
    """What is known of one row, in the order of the schema."""

    digest: bytes
    learned: bytes
    asked: bytes
    label: str | None
    group: str | None
    where: str
    reason: str | None = None
    detail: str | None = None
    text: str | None = None
    mended: bool = False
    untold: bool = False


def _left_out(where: str, reason: str, detail: str, text: str) -> _Line:
    # What is wrong with a row may be that its text cannot be written down.
    readable = detail.encode("utf-8", "backslashreplace").decode()
    return _Line(_NOTHING, _NOTHING, _NOTHING, None, None, where, reason, readable, text)


def mending(clean: CleanPlan) -> Filters:
    """For held-out rows, which are what the user measures by: mends their encoding and leaves none out."""
    return Filters(clean.model_copy(update={"include": None, "exclude": (), "languages": (), "max_chars": None}))


def _schema(near: bool) -> pa.Schema:
    """The columns of a scan, with MinHash signatures or without."""
    fields = [
        ("digest", pa.binary(16)),
        ("learned", pa.binary(16)),
        ("asked", pa.binary(16)),
        ("label", pa.string()),
        ("group", pa.string()),
        ("where", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("text", pa.string()),
        ("mended", pa.bool_()),
        ("untold", pa.bool_()),
    ]
    return pa.schema(fields + [("near", pa.binary(4 * NUM_VALUES))] * near)
