"""Tokenizing rendered conversations so that control tokens come from the chat template alone.

Control tokens are those that the tokenizer calls special, and the other added ones that the chat template writes by
itself, such as `<think>` or `<tool_call>`. One that is spelled out in a message, such as `<|endoftext|>` in a web page,
is text: the model must not see the end of a turn there, nor learn to write one. Before rendering it is hidden behind a
placeholder that no template touches, and in the token ids the placeholder becomes the tokens of the spelled-out text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from launcher.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# U+FDD0 and U+FDD1 are noncharacters: no text that is exchanged holds them.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_PLACEHOLDER = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
SENTINELS = (f"{_OPEN}words{_CLOSE}", f"{_OPEN}thoughts{_CLOSE}")
"""Texts that stand in no message: what becomes of a message's words can be seen by rendering these in their place."""
_ANCHORS = ("\n", "a", ".")


@dataclass
class Tokens:
    """The token ids of several documents, each of several strings."""

    ids: NDArray[np.int32]
    """[T] of all of them, end to end."""
    starts: NDArray[np.int64]
    """[S + 1] where each string begins, and the end of the last."""
    refused: dict[int, DataError] = field(default_factory=dict)
    """Documents that have no tokens."""


@dataclass
class _Batch:
    """What the tokenizer is asked, and how its answers make strings."""

    texts: list[str] = field(default_factory=list)
    anchors: dict[int, str] = field(default_factory=dict)
    """What a text stands behind, so that it gets the tokens that it has in the middle of a document."""
    pieces: list[int | list[int]] = field(default_factory=list)
    """Of each string in turn: the index of a text, or token ids that are known already."""
    ends: list[int] = field(default_factory=lambda: [0])
    """Where each string's pieces end."""
    refused: dict[int, DataError] = field(default_factory=dict)


class Verbatim:
    """Hides, tokenizes and shows text for one tokenizer. Not for use in several threads at once."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, written: str = "") -> None:
        """`written`: all that the chat template writes by itself."""
        self._backend = tokenizer.backend_tokenizer
        # tokenizer.json may carry both; a cut or filled document would go unnoticed.
        self._backend.no_truncation()
        self._backend.no_padding()
        added = tokenizer.added_tokens_decoder
        special = {token.content for token in added.values() if token.special}
        marks = {token.content for token in added.values() if token.content in written} - special
        # Gemma has runs of new lines as added tokens, and a word may be one: in a template these are text.
        marks = {text for text in marks if not text.isspace() and not text.isalnum()}
        self.id_of = {token.content: int(i) for i, token in added.items() if token.content in special | marks}
        self.controls = _any_of(self.id_of)
        """Finds control tokens in rendered text."""
        self._special = _any_of(special)
        self._texts = sorted(self.id_of)
        self._placeholder = {text: f"{_OPEN}{i}{_CLOSE}" for i, text in enumerate(self._texts)}
        # What the tokenizer writes for characters that it does not know is no sign of a control token.
        known = [i for i in self.id_of.values() if i != tokenizer.unk_token_id]
        self._is_control = np.zeros(max(known, default=0) + 2, dtype=np.int64)  # the last entry is for all ids above
        self._is_control[known] = 1
        self._ids_of: dict[str, list[int]] = {}
        self._as_text: dict[str, list[int] | None] = {}
        # SentencePiece-like tokenizers put a space before whatever begins; in the middle of a document that is wrong.
        joined, *apart = self._encode(["\na", "\n", "a"])
        self._adds_space = joined != apart[0] + apart[1]

    def hide(self, text: str, own: bool, strip: bool) -> tuple[str, int]:
        """A message's text with placeholders for the control tokens spelled out in it, and how many they are.

        `own`: what the assistant says may hold the template's own marks, as thoughts and calls written as text do.
        `strip`: leave them out instead. Raises DataError if the text holds what is no character: placeholders of its
        own, or half a surrogate pair, at which the tokenizer would stop with all the other rows.
        """
        if not text.isascii():
            _check_characters(text)
        pattern = self._special if own else self.controls
        if pattern.search(text) is None:
            return text, 0
        if not strip:
            return pattern.subn(lambda match: self._placeholder[match[0]], text)
        found, count = 1, 0
        while found:  # what is left may join into another
            text, found = pattern.subn("", text)
            count += found
        return text, count

    def show(self, text: str) -> str:
        """`text` with control tokens spelled out again."""
        return _PLACEHOLDER.sub(lambda match: self._texts[int(match[1])], text) if _OPEN in text else text

    def tokenize(self, documents: Sequence[Sequence[str]]) -> Tokens:
        """Token ids of each string of each document, every string tokenized apart from the one before.

        One call of the tokenizer for all of them. A document is refused where its strings would merge, or where a
        control token came of text that does not spell it.
        """
        batch = _Batch()
        for number, strings in enumerate(documents):
            before = ""
            for text in strings:
                if self._adds_space or _OPEN in text:
                    before = self._ask(batch, number, text, before)
                else:
                    batch.pieces.append(len(batch.texts))
                    batch.texts.append(text)
                batch.ends.append(len(batch.pieces))
        borders = np.array(batch.ends)[[*accumulate(map(len, documents), initial=0)]]

        def refuse(piece: int, why: DataError) -> None:
            batch.refused.setdefault(int(np.searchsorted(borders, piece, "right")) - 1, why)

        answers = self._encode(batch.texts)
        for index, anchor in batch.anchors.items():
            behind = self._behind(anchor, batch.texts[index], answers[index])
            answers[index] = behind or []
            if behind is None:
                refuse(batch.pieces.index(index), _merges())
        lists = [answers[piece] if isinstance(piece, int) else piece for piece in batch.pieces]
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        starts = np.concatenate([[0], np.cumsum(lengths)])
        ids = np.fromiter(chain.from_iterable(lists), np.int32, int(starts[-1]))
        # A tokenizer that normalizes may read a control token where none is spelled.
        spelled = [
            len(self.controls.findall(batch.texts[piece][len(batch.anchors.get(piece, "")) :]))
            if isinstance(piece, int)
            else 0
            for piece in batch.pieces
        ]
        seen = np.concatenate([[0], np.cumsum(self._is_control.take(ids, mode="clip"))])[starts]
        for piece in np.flatnonzero(np.diff(seen) > np.array(spelled, dtype=np.int64)).tolist():
            refuse(piece, _forged())
        return Tokens(ids, starts[batch.ends], batch.refused)

    def positions(self, ids: NDArray[np.int32]) -> NDArray[np.int64]:
        """[C] where control tokens stand in `ids`."""
        return np.flatnonzero(self._is_control.take(ids, mode="clip"))

    def _ask(self, batch: _Batch, document: int, text: str, before: str) -> str:
        """Add a string to the batch piece by piece; returns what the next one stands behind."""
        for number, part in enumerate(_PLACEHOLDER.split(text)):
            if number % 2:
                ids = self._spelled_out(self._texts[int(part)])
                if ids is None:
                    batch.refused[document] = _unwritable(self._texts[int(part)])
                batch.pieces.append(ids or [])
                before = _ANCHORS[0]
            elif part:
                if _OPEN in part:
                    batch.refused[document] = _broken()
                anchor = self._anchor(before, part)
                if anchor:
                    batch.anchors[len(batch.texts)] = anchor
                batch.pieces.append(len(batch.texts))
                batch.texts.append(anchor + part)
                before = part
        return before

    def _anchor(self, before: str, text: str) -> str:
        """What to tokenize `text` behind, so that it gets the tokens it has after `before`; mostly nothing."""
        if not self._adds_space or not before or self.controls.match(text):
            return ""
        return next((control for control in self._texts if before.endswith(control)), _ANCHORS[0])

    def _behind(self, anchor: str, text: str, ids: list[int]) -> list[int] | None:
        """The tokens of what stands behind `anchor` in `text`; None where the two always merge."""
        tried = (anchor, *_ANCHORS) if anchor in _ANCHORS else (anchor,)
        for other in dict.fromkeys(tried):
            found = ids if other == anchor else self._encode([other + text.removeprefix(anchor)])[0]
            before = self._known(other)
            if found[: len(before)] == before:
                return found[len(before) :]
        return None

    def _known(self, text: str) -> list[int]:
        if text not in self._ids_of:
            self._ids_of[text] = self._encode([text])[0]
        return self._ids_of[text]

    def _spelled_out(self, control: str) -> list[int] | None:
        """The tokens of a control token's text, none of them a control token; None where the tokenizer has no other.

        A second tokenizer without added tokens writes them. A vocabulary may still hold the text as a piece of its
        own (Unigram's do): then its halves are written one by one.
        """
        if control not in self._as_text:
            from tokenizers import Tokenizer

            plain = Tokenizer(self._backend.model)
            plain.normalizer, plain.pre_tokenizer = self._backend.normalizer, self._backend.pre_tokenizer
            cuts = [(control,), *((control[:i], control[i:]) for i in range(1, len(control))), tuple(control)]
            written = ([i for part in parts for i in self._middle(plain, part)] for parts in cuts)
            texts = (ids for ids in written if ids and not len(self.positions(np.array(ids, np.int32))))
            self._as_text[control] = next(texts, None)
        return self._as_text[control]

    def _middle(self, plain: Any, text: str) -> list[int]:
        """What `plain` writes for `text` in the middle of a document."""
        for anchor in ("", *_ANCHORS) if not self._adds_space else _ANCHORS:
            before, ids = (plain.encode(part, add_special_tokens=False).ids for part in (anchor, anchor + text))
            if ids[: len(before)] == before:
                return list(ids[len(before) :])
        return []

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """One call of the tokenizer."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Finds the longest of `texts`, as the tokenizer itself matches them.

    Grouped by their first characters: a model with a thousand `[control_1]` would try each of them at every `<`.
    """
    groups = [sorted(group, key=len, reverse=True) for _, group in groupby(sorted(texts), key=lambda text: text[:1])]
    branches = [re.escape(first[0][:1]) + f"(?:{'|'.join(re.escape(t[1:]) for t in first)})" for first in groups]
    return re.compile("|".join(branches) or "(?!)")


def _check_characters(text: str) -> None:
    found = "U+FDD0" if _OPEN in text else None
    try:
        text.encode()
    except UnicodeEncodeError:
        found = "half of a surrogate pair"
    if found:
        raise DataError(
            f"{found}, which is no character, stands in a message",
            hint="the file was written with a wrong encoding; leave the row out or mend it",
        )


def _merges() -> DataError:
    return DataError(
        "this tokenizer merges the answer's beginning into the prompt",
        hint="leave out white space at the beginning of answers, or give another tokenizer as model.tokenizer",
    )


def _forged() -> DataError:
    return DataError(
        "the tokenizer makes a control token of text that does not spell it",
        hint="it normalizes such characters; leave the row out, or write them otherwise",
    )


def _broken() -> DataError:
    return DataError(
        "the chat template cuts through a control token that is spelled out in a message",
        hint="set data.special_tokens: strip, or leave the row out",
    )


def _unwritable(control: str) -> DataError:
    return DataError(
        f"this tokenizer can write {control} as a control token only", hint="set data.special_tokens: strip"
    )
