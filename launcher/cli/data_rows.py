"""Rows of prepared data as the model will see them, token by token, for a terminal or a page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from launcher.recipe.origin import shown

if TYPE_CHECKING:
    from launcher.data.loader import MicroBatch, TestRow
    from launcher.data.prepare.work import Progress

SetName = Literal["train", "eval", "test"]

_MOST_TOKENS_A_CHARACTER = 4
"""UTF-8 has at most 4 bytes a character, and a token at least one."""


@dataclass(frozen=True)
class Piece:
    """The smallest stretch of tokens that is text: mostly one, several where they share a character."""

    text: str
    ids: tuple[int, ...]
    learned: bool
    control: bool
    """A control token of the tokenizer; the same text spelled out in a message is none."""


@dataclass(frozen=True)
class ShownDocument:
    """A document, or a test row's prompt with the answer that is expected."""

    where: str
    """`file:line`."""
    pieces: tuple[Piece, ...]
    spelled_out: tuple[str, ...] = ()
    """Texts of control tokens that stand in its messages, as text."""
    answer: str | None = None

    @property
    def num_tokens(self) -> int:
        return sum(len(piece.ids) for piece in self.pieces)

    @property
    def num_learned(self) -> int:
        return sum(len(piece.ids) for piece in self.pieces if piece.learned)


Row = tuple[ShownDocument, ...]
"""What one forward pass takes: the documents of a pack, or a single one."""


@dataclass(frozen=True)
class DroppedRow:
    """A line of dropped.jsonl."""

    where: str
    reason: str
    detail: str
    text: str = ""
    """The row's first characters; nothing where it could not be read."""


@dataclass(frozen=True)
class Tokens:
    """A document as it is stored: [T] token ids, and which of them are learned."""

    where: str
    ids: list[int]
    learned: list[bool]
    answer: str | None = None


class Words:
    """Text of token ids, by the tokenizer of a prepared folder."""

    def __init__(self, folder: Path) -> None:
        # The library alone: importing transformers takes longer than everything else here.
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
        added = self._tokenizer.get_added_tokens_decoder()
        self.controls: dict[int, str] = {token: text.content for token, text in added.items() if text.special}
        """Text of each control token."""
        # Some decoders take the space off whatever comes first, so nothing ever does.
        self._first: list[int] = self._tokenizer.encode("a", add_special_tokens=False).ids[-1:]
        self._first_text = self.text(self._first)
        self._text_within = lru_cache(maxsize=None)(self._decode_within)

    def text(self, ids: Sequence[int]) -> str:
        """All of it, control tokens spelled out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def pieces(self, ids: Sequence[int], learned: Sequence[bool]) -> tuple[Piece, ...]:
        """Every token with its text; `learned` [T] says which the model learns."""
        found: list[Piece] = []
        waiting: list[int] = []
        for position, (token, is_learned) in enumerate(zip(ids, learned, strict=True)):
            if token in self.controls:
                found.append(Piece(self.controls[token], (token,), is_learned, True))
                continue
            waiting.append(token)
            text = self._text_within(tuple(waiting))
            ends = position + 1 == len(ids) or ids[position + 1] in self.controls or learned[position + 1] != is_learned
            # The mark of a character that is not complete yet, or never will be.
            if ends or not text.endswith("\ufffd") or len(waiting) == _MOST_TOKENS_A_CHARACTER:
                found.append(Piece(text, tuple(waiting), is_learned, False))
                waiting = []
        return tuple(found)

    def show(self, document: Tokens) -> ShownDocument:
        """A document with its text."""
        pieces = self.pieces(document.ids, document.learned)
        # A break where a control token stands, so that no text is put together across it.
        said = "".join("\n" if piece.control else piece.text for piece in pieces)
        spelled_out = tuple(text for text in sorted(self.controls.values(), key=len, reverse=True) if text in said)
        return ShownDocument(place(document.where), pieces, spelled_out, document.answer)

    def _decode_within(self, ids: tuple[int, ...]) -> str:
        return self.text([*self._first, *ids]).removeprefix(self._first_text)


def rows(
    folder: Path, which: SetName, seed: int, limit: int, find: str | None = None, progress: Progress | None = None
) -> Iterator[Row]:
    """The first `limit` rows of a set: training in the order of its first epoch, the others as they come.

    With `find`, rows of only those documents that hold this text, in upper or lower case, or have it in their place.
    """
    if limit < 1:
        return
    words = Words(folder)
    wanted = find.casefold() if find is not None else None
    num_found = 0
    for number, total, documents in _documents(folder, which, seed, None if find else limit):
        kept = [document for document in documents if wanted is None or _holds(document, wanted, words)]
        if progress is not None and find is not None:
            progress("search", number + 1, total)
        if kept:
            yield tuple(words.show(document) for document in kept)
            num_found += 1
        if num_found == limit:
            return


def dropped_rows(folder: Path) -> Iterator[DroppedRow]:
    """Every row that was left out, in order."""
    with (folder / "dropped.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            fields = json.loads(line)
            row = {name: str(fields.get(name) or "") for name in ("reason", "detail", "text")}
            yield DroppedRow(place(str(fields["where"])), **row)


def place(where: str) -> str:
    """`file:line` as a person would type it; what is no absolute path stays."""
    return shown(Path(where)) if where.startswith("/") else where


def _documents(folder: Path, which: SetName, seed: int, limit: int | None) -> Iterator[tuple[int, int, list[Tokens]]]:
    """Number of the row, how many there are, and its documents."""
    from launcher.data.loader import EvalData, TestRows, TrainData
    from launcher.plan.batch import BatchLayout

    if which == "test":
        tests = TestRows(folder, limit)
        for number, row in enumerate(tests):
            yield number, len(tests), [_prompt(row)]
    elif which == "eval":
        held_out = EvalData(folder, limit)
        for number, batch in enumerate(held_out.micro_batches(1, 1, 0)):
            yield number, held_out.num_documents, _of_batch(batch)
    else:
        train = TrainData(folder, 1, seed)
        for step in range(train.num_rows):
            (batch,) = train.micro_batches(step, BatchLayout(1, 1, 1), 0)
            yield step, train.num_rows, _of_batch(batch)


def _prompt(row: TestRow) -> Tokens:
    return Tokens(row.where, row.prompt_ids, [False] * len(row.prompt_ids), row.answer)


def _of_batch(batch: MicroBatch) -> list[Tokens]:
    ids, bounds = batch.input_ids[0].tolist(), batch.cu_seqlens.tolist()
    learned = [False] * len(ids)
    for position in batch.supervised_index.tolist():
        learned[position + 1] = True
    return [
        Tokens(where, ids[start:stop], learned[start:stop])
        for where, start, stop in zip(batch.where, bounds, bounds[1:], strict=False)
    ]


def _holds(document: Tokens, wanted: str, words: Words) -> bool:
    text = words.text(document.ids) + (document.answer or "")
    return wanted in text.casefold() or wanted in document.where.casefold()
