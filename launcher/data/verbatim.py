"""Tokenizing a rendered conversation so that control tokens come from the chat template alone.

A special token that is spelled out in a message, such as `<|endoftext|>` in a web page, is text: the model must not see
the end of a turn there, nor learn to write one. Before rendering it is hidden behind a placeholder that no template
touches, and in the token ids the placeholder becomes the tokens of the spelled-out text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# U+FDD0 and U+FDD1 are noncharacters: no text that is exchanged holds them.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_PLACEHOLDER = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_ANCHOR = "\n"


@dataclass(frozen=True)
class _Asked:
    """A text in the tokenizer's batch, behind an anchor whose own tokens are then taken off again."""

    index: int
    anchor: str


class Verbatim:
    """Hides, tokenizes and shows text for one tokenizer. Not for use in several threads at once."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = tokenizer.backend_tokenizer
        # tokenizer.json may carry both; a cut or filled document would go unnoticed.
        self._backend.no_truncation()
        self._backend.no_padding()
        found = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        # The longest first, as the tokenizer itself matches them.
        self._texts = sorted(found, key=lambda text: (-len(text), text))
        self.controls = re.compile("|".join(map(re.escape, self._texts)) or "(?!)")
        """Finds control tokens in rendered text."""
        self._placeholder = {text: f"{_OPEN}{i}{_CLOSE}" for i, text in enumerate(self._texts)}
        self._ids_of: dict[tuple[str, bool], list[int]] = {}
        # SentencePiece-like tokenizers put a space before whatever begins; in the middle of a document that is wrong.
        joined, *apart = self._ids([_ANCHOR + "a", _ANCHOR, "a"])
        self._adds_space = joined != apart[0] + apart[1]

    def hide(self, content: str) -> str:
        """A message with placeholders for the control tokens spelled out in it. Raises DataError if it has its own."""
        if _OPEN in content:
            raise DataError(
                "U+FDD0, which is no character, stands in a message",
                hint="the file was written with a wrong encoding; leave the row out or mend it",
            )
        return self.controls.sub(lambda match: self._placeholder[match[0]], content)

    def show(self, text: str) -> str:
        """`text` with control tokens spelled out again."""
        return _PLACEHOLDER.sub(lambda match: self._texts[int(match[1])], text)

    def token_ids(self, documents: Sequence[Sequence[str]]) -> list[list[list[int]] | None]:
        """Token ids of each span of each document, every span tokenized apart from the one before.

        None for a document whose spans this tokenizer would merge. One call of the tokenizer for all documents.
        """
        batch: list[str] = []
        asked = [self._ask(spans, batch) for spans in documents]
        ids = self._ids(batch)
        return [self._answer(parts_of_span, ids) for parts_of_span in asked]

    def _ask(self, spans: Sequence[str], batch: list[str]) -> list[list[list[int] | _Asked]]:
        """What each span is made of: ids already known, or texts that are added to `batch`."""
        asked: list[list[list[int] | _Asked]] = []
        before = ""
        for span in spans:
            asked.append([])
            for i, part in enumerate(_PLACEHOLDER.split(span)):
                if i % 2:
                    asked[-1].append(self._spelled_out(self._texts[int(part)]))
                    before = _ANCHOR
                elif part:
                    anchor = self._anchor(before, part)
                    asked[-1].append(_Asked(len(batch), anchor))
                    batch.append(anchor + part)
                    before = part
        return asked

    def _answer(self, asked: list[list[list[int] | _Asked]], ids: list[list[int]]) -> list[list[int]] | None:
        spans: list[list[int]] = []
        for parts in asked:
            spans.append([])
            for part in parts:
                if isinstance(part, _Asked):
                    anchor = self._known(part.anchor, as_text=False) if part.anchor else []
                    if ids[part.index][: len(anchor)] != anchor:
                        return None
                    part = ids[part.index][len(anchor) :]
                spans[-1] += part
        return spans

    def _anchor(self, before: str, text: str) -> str:
        """What to tokenize `text` behind, so that it gets the tokens it has after `before`; mostly nothing."""
        if not self._adds_space or not before or self.controls.match(text):
            return ""
        return next((control for control in self._texts if before.endswith(control)), _ANCHOR)

    def _spelled_out(self, control: str) -> list[int]:
        """The tokens of a control token's text, none of them a control token."""
        if not self._adds_space:
            return self._known(control, as_text=True)
        return self._known(_ANCHOR + control, as_text=True)[len(self._known(_ANCHOR, as_text=True)) :]

    def _known(self, text: str, as_text: bool) -> list[int]:
        key = (text, as_text)
        if key not in self._ids_of:
            self._ids_of[key] = self._ids([text], as_text)[0]
        return self._ids_of[key]

    def _ids(self, texts: list[str], as_text: bool = False) -> list[list[int]]:
        """One call of the tokenizer; `as_text` takes control tokens for the text they are written as."""
        self._backend.encode_special_tokens = as_text
        try:
            return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        finally:
            self._backend.encode_special_tokens = False
