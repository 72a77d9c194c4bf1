"""Rows of a sequence classification: a text, and the one class that it is of.

A document is what the tokenizer makes of the text alone, with the control tokens that it puts around every text
(BERT's `[CLS]` and `[SEP]`, Llama's first token) and without any chat template: just what transformers' own pipeline
`text-classification` reads later. It has one target, its class.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from launcher.data.conversation import END_MARKER, Conversation
from launcher.data.masks import Document, without_end_markers
from launcher.errors import DataError, ModelError
from launcher.plan.plan import DataPlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MOST_CLASSES = 1000
"""Beyond so many, what is taken for classes are answers in words."""
_NUMBER = re.compile(r"-?[0-9]{1,18}(\.[0-9]+)?")


def classified(row: Conversation) -> Conversation:
    """`row` with its class as its label, without blanks at its ends: the one that a column or the format gives it,
    otherwise its answer.

    Raises DataError for what is no text of one class.
    """
    tidy, _ = without_end_markers(row, END_MARKER)
    if tidy.text is None and [message.role for message in tidy.messages] != ["user", "assistant"]:
        raise DataError(
            f"{row.where}: a conversation of {len(tidy.messages)} messages, and no text with its class",
            hint="a sequence classification takes rows of a text and a label, or of a prompt and its one-word answer",
        )
    label = tidy.label if tidy.label is not None else "" if tidy.text is not None else tidy.answer
    if not label.strip():
        raise DataError(
            f"{row.where}: a text without a class", hint="name the column with each row's class: data.label"
        )
    return replace(tidy, label=label.strip())


def text_of(row: Conversation) -> str:
    """What the class is of."""
    return row.text if row.text is not None else row.messages[0].content


def class_names(found: Iterable[str], data: DataPlan) -> tuple[str, ...]:
    """All classes, in the order of the head's outputs: as the model's own head has them where it knows them all,
    otherwise those that the sources' `labels` name, in their order, and the others sorted, numbers by their value.

    Raises DataError where there is only one, or so many that they are none.
    """
    named = dict.fromkeys(word.strip() for source in data.sources for word in source.labels)
    others = sorted(set(found) - named.keys(), key=_place)
    names = (*named, *others)
    if data.head and set(names) <= set(data.head):
        return data.head
    if len(names) < 2:
        raise DataError(
            f"every row is of the class {names[0]!r}" if names else "no row has a class",
            hint="a sequence classification needs rows of two classes or more",
        )
    if len(names) > MOST_CLASSES:
        raise DataError(
            f"{len(names):,} classes, such as {names[-1][:40]!r}: these are answers and no classes",
            hint="set task to causal_lm, or name the column with each row's class: data.label",
        )
    return names


def _place(name: str) -> tuple[bool, float, str]:
    """By which classes are sorted. Stars of 1 to 10 as text would otherwise have 10 before 2, and no output its own."""
    number = _NUMBER.fullmatch(name)
    return number is None, float(name) if number else 0.0, name


@dataclass(frozen=True)
class Text(Document):
    """A tokenized text of one class. Nothing in it is supervised but its class."""

    before: int = 0
    """Control tokens that the tokenizer puts before every text."""
    after: int = 0

    @property
    def num_targets(self) -> int:
        return 1

    @property
    def num_turns(self) -> int:
        return 1

    def part(self, start: int, stop: int) -> Text:
        """The control tokens, and as many of the others as there is room for: from the text's beginning where `start`
        is 0, otherwise up to its end."""
        ids, end = self.input_ids, len(self.input_ids) - self.after
        room = max(0, stop - start - self.before - self.after)
        words = ids[self.before : self.before + room] if start == 0 else ids[max(self.before, end - room) : end]
        kept = np.concatenate([ids[: self.before], words, ids[end:]])
        return Text(kept, np.zeros(len(kept), np.uint8), before=self.before, after=self.after)


class TextEncoder:
    """Tokenizes texts. Not for use in several threads at once."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        found = tokenizer("a", return_special_tokens_mask=True)
        ids, mask = found["input_ids"], found["special_tokens_mask"]
        self._before, self._after = mask.index(0), mask[::-1].index(0)
        self.ends: tuple[list[int], list[int]] = ids[: self._before], ids[len(ids) - self._after :]
        """Control tokens that stand before and after every text."""

    def encode(self, rows: Sequence[Conversation]) -> list[list[Document] | DataError]:
        """The document of each row, or why there is none."""
        if not rows:
            return []
        found = self._tokenizer([text_of(row) for row in rows], verbose=False)["input_ids"]
        return [self._document(row, ids) for row, ids in zip(rows, found, strict=True)]

    def _document(self, row: Conversation, ids: list[int]) -> list[Document] | DataError:
        if len(ids) == self._before + self._after:
            return DataError(f"{row.where}: the tokenizer makes nothing of the text", hint="leave the row out")
        no_word = np.zeros(len(ids), np.uint8)
        return [Text(np.array(ids, np.int32), no_word, before=self._before, after=self._after)]


def for_texts(tokenizer: PreTrainedTokenizerFast, data: DataPlan) -> PreTrainedTokenizerFast:
    """`tokenizer` as it is exported beside the model: it cuts where the data was cut, and knows what to pad with.

    Raises ModelError where the model reads fewer tokens than `data.max_length`, or nothing can be padded with.
    """
    if tokenizer.model_max_length < data.max_length:
        raise ModelError(
            f"data.max_length is {data.max_length}, and the model reads at most {tokenizer.model_max_length} tokens",
            hint=f"set data.max_length to {tokenizer.model_max_length}, and data.too_long to truncate_end to keep "
            "longer texts",
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"{tokenizer.name_or_path}: the tokenizer has no pad_token to fill short texts up with",
                hint="name one of its tokens as pad_token in tokenizer_config.json",
            )
        tokenizer.pad_token = tokenizer.eos_token
    settings = {
        "model_max_length": data.max_length,
        "truncation_side": "left" if data.too_long == "truncate_start" else "right",
        "padding_side": "right",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    for name, value in settings.items():
        setattr(tokenizer, name, value)
        tokenizer.init_kwargs[name] = value  # what save_pretrained writes down
    return tokenizer
