"""Rows of prepared data as the model will see them, token by token, for a terminal or a page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launcher.recipe.origin import shown

if TYPE_CHECKING:
    from launcher.data.prepare.work import Progress
    from launcher.data.store import Documents

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
    label: str | None = None
    """Of a sequence classification its class, which is all that is learned."""

    @property
    def figures(self) -> str:
        """How long it is, and what of it is learned."""
        learned = f"{self.num_learned:,} learned" if self.label is None else f"of class {self.label}"
        spelled_out = f", spelled out in it: {' '.join(self.spelled_out)}" if self.spelled_out else ""
        return f"{self.num_tokens:,} tokens, {learned}{spelled_out}"

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
    label: str | None = None


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
        return ShownDocument(place(document.where), pieces, spelled_out, document.answer, document.label)

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
    # Not through launcher.data.loader, which makes tensors of them: importing torch takes longer than a whole page.
    import numpy as np

    from launcher.data.order import epoch_order
    from launcher.data.store import Documents, read_lists

    if which == "test":
        with (folder / "test.jsonl").open(encoding="utf-8") as lines:
            tests = [json.loads(line) for line in islice(lines, limit)]
        for number, row in enumerate(tests):
            ids = row["prompt_ids"]
            yield number, len(tests), [Tokens(row["where"], ids, [False] * len(ids), row["answer"])]
        return
    documents, packs = Documents(folder), read_lists(folder / ("eval.arrow" if which == "eval" else "packs.arrow"))
    numbers: Iterable[Any]
    if which == "eval":
        held_out = packs[0][:limit] if len(packs) else np.empty(0, np.int32)
        by_length = held_out[np.argsort(documents.lengths[held_out], kind="stable")]
        total, numbers = len(held_out), ([number] for number in by_length)
    else:
        total, numbers = len(packs), (packs[row] for row in epoch_order(len(packs), seed, 0))
    for number, pack in enumerate(numbers):
        yield number, total, [_stored(documents, int(document)) for document in pack]


def _stored(documents: Documents, number: int) -> Tokens:
    learned = documents.supervised(number).astype(bool).tolist()
    learned[0] = False  # nothing of its own document comes before a document's first token
    label = documents.classes[documents.labels[number]] if documents.classes else None
    return Tokens(documents.where(number), documents.input_ids(number).tolist(), learned, label=label)


def _holds(document: Tokens, wanted: str, words: Words) -> bool:
    text = words.text(document.ids) + (document.answer or "")
    return wanted in text.casefold() or wanted in document.where.casefold()
