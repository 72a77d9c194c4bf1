"""The second reading of a piece: the rows that stay become tokens, masks and documents."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from launcher.data.augment import Augment
from launcher.data.classified import TextEncoder
from launcher.data.conversation import Conversation
from launcher.data.masks import Document, Encoder, without_end_markers
from launcher.data.prepare.rows import Rows
from launcher.data.prepare.scan import BAD_ROW, SHOWN_CHARACTERS, mending
from launcher.data.sources import Piece
from launcher.data.store import DOCUMENT_SCHEMA, Set, as_lists
from launcher.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOO_LONG = "too long"
ROWS_AT_ONCE = 1000
"""Conversations in one call of the tokenizer: enough to keep every core busy, few enough to stay small in memory."""


@dataclass(frozen=True)
class Job:
    """A piece and what was decided on each of its conversations, in order."""

    piece: Piece
    sets: NDArray[np.int8]
    """`store.Set`, or -1 for what is left out."""
    copies: NDArray[np.int32]
    labels: NDArray[np.int32]
    """Class numbers."""


@dataclass
class Part:
    """What a piece became."""

    documents: pa.Table
    dropped: list[dict[str, Any]] = field(default_factory=list)
    """{row, where, reason, detail, text, num_tokens, partly}: `row` counts the piece's conversations; `partly` where
    other documents of the row stay."""
    tests: list[dict[str, Any]] = field(default_factory=list)
    """{where, prompt_text, prompt_ids, answer, slices}."""
    slices: list[dict[str, str]] = field(default_factory=list)
    """{column: value} of each document that is held out for evaluation, where there are such columns."""
    notes: Counter[str] = field(default_factory=Counter)
    over: list[int] = field(default_factory=list)
    """Tokens of each training conversation of more than `max_length`."""
    num_training: int = 0
    """Training conversations, those among them."""


@dataclass(frozen=True)
class _Row:
    number: int
    set: Set
    copies: int
    label: int
    conversation: Conversation


class Encode:
    """Makes parts of pieces. Picklable: it takes the tokenizer's files to other processes and machines."""

    def __init__(self, rows: Rows, tokenizer_folder: Path, seed: int) -> None:
        self._rows = rows
        self._augment = Augment(rows.data.augment, seed)
        self._mend = mending(rows.data.clean)
        self._files = {path.name: path.read_bytes() for path in sorted(tokenizer_folder.iterdir()) if path.is_file()}
        self._tokenizer: Any = None
        self._encoder: Encoder | TextEncoder | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_encoder": None, "_tokenizer": None}

    def vocab_size(self) -> int:
        """Entries of the tokenizer, which is loaded with that: before a fork, it is there in every child."""
        self._ready()
        return len(self._tokenizer)

    def _ready(self) -> Encoder | TextEncoder:
        if self._encoder is None:
            self._tokenizer = _tokenizer(self._files)
            self._encoder = self._made()
        return self._encoder

    def _made(self) -> Encoder | TextEncoder:
        data = self._rows.data
        if data.head is not None:
            return TextEncoder(self._tokenizer)
        return Encoder(
            self._tokenizer,
            data.supervise,
            special_tokens=data.special_tokens,
            system_turns=data.system_turns,
        )

    def __call__(self, job: Job) -> Part:
        """Tokenize a piece. Raises DataError where the recipe says `stop`."""
        part = Part(DOCUMENT_SCHEMA.empty_table())
        batches: list[pa.RecordBatch] = []
        rows = self._kept(job)
        used: set[int] = set()
        while chunk := list(islice(rows, ROWS_AT_ONCE)):
            learned = [row for row in chunk if row.set is not Set.TEST]
            batches += self._documents(learned, part, used)
            for row in chunk:
                if row.set is Set.TEST:
                    self._test(row, part)
        part.documents = pa.Table.from_batches(batches, DOCUMENT_SCHEMA)
        # One line for a row and a reason, however many copies or documents of it went.
        lines = {(line["row"], line["reason"]): line for line in reversed(part.dropped)}
        part.dropped = [line | {"partly": line["row"] in used} for line in reversed(lines.values())]
        return part

    def _kept(self, job: Job) -> Iterator[_Row]:
        for number, (_, item) in enumerate(self._rows(job.piece)):
            if job.sets[number] < 0 or not isinstance(item, Conversation):
                continue
            mended = self._mend(item)
            assert isinstance(mended, Conversation), "only training filters leave rows out, and they have been asked"
            kind = Set(int(job.sets[number]))
            yield _Row(number, kind, int(job.copies[number]), int(job.labels[number]), mended)

    def _documents(self, rows: list[_Row], part: Part, used: set[int]) -> list[pa.RecordBatch]:
        """The documents of `rows`, as one batch; none where none is left. Adds the rows that have some to `used`."""
        varied = list(self._varied(rows, part))
        results = self._ready().encode([row.conversation for row in varied])
        kept: list[tuple[_Row, Document]] = []
        for row, result in zip(varied, results, strict=True):
            if isinstance(result, DataError):
                self._bad(row, result, part)
                continue
            for document in result:
                part.notes.update(document.notes)
                kept += [(row, piece) for piece in self._fitting(row, document, part)]
        if not kept:
            return []
        used.update(row.number for row, _ in kept)
        if self._rows.data.slices:
            part.slices += [dict(row.conversation.slices) for row, _ in kept if row.set is Set.EVAL]
        documents = [document for _, document in kept]
        columns = [
            as_lists([document.input_ids for document in documents]),
            as_lists([document.supervised for document in documents]),
            pa.array([document.num_targets for document in documents], pa.int32()),
            pa.array([document.num_turns for document in documents], pa.int32()),
            pa.array([row.label for row, _ in kept], pa.int32()),
            pa.array([int(row.set) for row, _ in kept], pa.int8()),
            pa.array([row.copies for row, _ in kept], pa.int32()),
            pa.array([row.conversation.where for row, _ in kept], pa.string()),
        ]
        return [pa.record_batch(columns, schema=DOCUMENT_SCHEMA)]

    def _varied(self, rows: list[_Row], part: Part) -> Iterator[_Row]:
        """Each copy of a training row as augmentation makes it; held-out rows as they are."""
        for row in rows:
            if not self._augment.active or row.set is not Set.TRAIN:
                yield row
                continue
            for copy in range(row.copies):
                made = self._augment(row.conversation, copy)
                if made is None:
                    _drop(part, row, "left out by data.augment.function", f"copy {copy + 1}")
                else:
                    part.notes["augmented"] += made is not row.conversation
                    yield _Row(row.number, row.set, 1, row.label, made)

    def _fitting(self, row: _Row, document: Document, part: Part) -> list[Document]:
        """The document as it will be learned: whole, cut, in pieces, or not at all."""
        data, clean = self._rows.data, self._rows.data.clean
        num_tokens, limit = len(document.input_ids), data.max_length
        where = row.conversation.where
        if row.set.learned:
            part.num_training += 1
            part.over += [num_tokens] * (num_tokens > limit)
        if row.set.learned and clean.min_tokens is not None and num_tokens < clean.min_tokens:
            _drop(part, row, "too short", f"{num_tokens} tokens, and data.clean.min_tokens is {clean.min_tokens}")
            return []
        pieces = [document]
        if num_tokens > limit:
            message = f"{num_tokens} tokens, and data.max_length is {limit}"
            match data.too_long:
                case "stop":
                    ways = "drop, truncate_end or truncate_start" + (" or split" if data.head is None else "")
                    hint = f"raise data.max_length, or set data.too_long to {ways}"
                    raise DataError(f"{where}: {message}", hint=hint)
                case "drop":
                    _drop(part, row, TOO_LONG, message, num_tokens)
                    return []
                case "truncate_end":
                    pieces = [document.part(0, limit)]
                case "truncate_start":
                    pieces = [document.part(num_tokens - limit, num_tokens)]
                case "split":
                    pieces = [document.part(start, start + limit) for start in range(0, num_tokens, limit)]
            part.notes["split" if data.too_long == "split" else "truncated"] += 1
        learned = [piece for piece in pieces if piece.num_targets]
        part.notes["pieces_without_answer"] += len(pieces) - len(learned) if learned else 0
        if not learned:
            cut = f" in its first {limit} tokens" if data.too_long == "truncate_end" and num_tokens > limit else ""
            _drop(part, row, "nothing supervised", f"no supervised token{cut}")
        return learned

    def _test(self, row: _Row, part: Part) -> None:
        encoder = self._ready()
        assert isinstance(encoder, Encoder), "a sequence classification has no test rows"
        try:
            text, ids = encoder.prompt(row.conversation)
        except DataError as error:
            self._bad(row, error, part)
            return
        answer = without_end_markers(row.conversation, self._tokenizer.eos_token)[0].answer
        where = row.conversation.where
        if len(ids) > (limit := self._rows.data.max_length):
            message = f"{len(ids)} tokens in the question alone, and data.max_length is {limit}"
            if self._rows.data.too_long == "stop":
                raise DataError(f"{where}: {message}", hint="raise data.max_length, or leave the row out")
            _drop(part, row, TOO_LONG, message, len(ids))
            return
        said = {"where": where, "prompt_text": text, "prompt_ids": ids, "answer": answer}
        part.tests.append(said | {"slices": dict(row.conversation.slices)})

    def _bad(self, row: _Row, error: DataError, part: Part) -> None:
        if self._rows.data.on_bad_row == "stop":
            raise error
        _drop(part, row, BAD_ROW, error.message.removeprefix(f"{row.conversation.where}: "))


def _drop(part: Part, row: _Row, reason: str, detail: str, num_tokens: int | None = None) -> None:
    said = {"row": row.number, "where": row.conversation.where, "reason": reason, "detail": detail}
    part.dropped.append(said | {"text": row.conversation.words[:SHOWN_CHARACTERS], "num_tokens": num_tokens})


def _tokenizer(files: dict[str, bytes]) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        return AutoTokenizer.from_pretrained(folder)
