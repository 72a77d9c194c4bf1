"""A conversation as tokens, with a mask of what the assistant says.

The chat template is the model's own Jinja text, so the mask is found by rendering prefixes: what the template writes
for the messages before an answer, with its generation prompt, must be the beginning of what it writes for all of them.
From there to the end-of-turn token is what the model has to say by itself when it is asked, and that is what is
learned. Where a template does not keep to this there is no exact mask, and the row is refused.

Prompts and answers are tokenized apart, as they are at inference: an answer's first token never merges into the prompt.
Control tokens come from the template alone: see verbatim.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from launcher.data.formats import Conversation, Message
from launcher.data.verbatim import Verbatim
from launcher.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Supervise = Literal["all", "last"]

END_MARKER = "<|endoftext|>"
"""Files made for GPT-3's fine-tuning end every completion with it, whatever the tokenizer at hand calls its own."""
# Llama 3.2 writes today's date into the system prompt; tokens must not depend on the day. The date is Llama 3.1's own.
_DATE = "26 Jul 2024"


@dataclass(frozen=True)
class Document:
    """A tokenized conversation."""

    input_ids: NDArray[np.int32]
    """[T] token ids."""
    supervised: NDArray[np.uint8]
    """[T] 1 where the token is a target: an assistant's word or the end of its turn."""
    num_markers: int = 0
    """Answers from whose end a spelled-out end-of-text token was taken off."""

    @property
    def num_targets(self) -> int:
        """Targets that can be predicted: nothing comes before the first token."""
        return int(self.supervised[1:].sum())


def encode(conversation: Conversation, tokenizer: PreTrainedTokenizerFast, supervise: Supervise) -> Document:
    """One conversation as tokens and mask. Raises DataError, naming its place, where it cannot be masked exactly.

    `supervise`: every assistant turn, or only the last. For many rows use one `Encoder`.
    """
    document = Encoder(tokenizer, supervise).encode([conversation])[0]
    if isinstance(document, DataError):
        raise document
    return document


@dataclass(frozen=True)
class _Span:
    """A stretch of rendered text; `learn` says which of its tokens are targets."""

    text: str
    learn: Literal["none", "first", "all"]


class Encoder:
    """Tokenizes conversations with one tokenizer and its chat template. Not for use in several threads at once."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, supervise: Supervise) -> None:
        self._tokenizer = tokenizer
        self._supervise = supervise
        self._verbatim = Verbatim(tokenizer)

    def encode(self, conversations: Sequence[Conversation]) -> list[Document | DataError]:
        """A document for each conversation, or why there is none. One call of the tokenizer for all of them."""
        results: list[Document | DataError | None] = []
        plans: list[tuple[Conversation, list[_Span], int]] = []
        for conversation in conversations:
            tidy, num_markers = without_end_markers(conversation, self._tokenizer.eos_token)
            try:
                plans.append((tidy, self._spans(tidy), num_markers))
                results.append(None)
            except DataError as error:
                results.append(error)
        tokenized = iter(self._verbatim.token_ids([[span.text for span in spans] for _, spans, _ in plans]))
        todo = iter(plans)
        return [result or _document(*next(todo), next(tokenized)) for result in results]

    def prompt(self, conversation: Conversation) -> tuple[str, list[int]]:
        """What the model is shown to give the last answer: the text, and its token ids.

        Raises DataError where the template refuses the conversation.
        """
        tidy, _ = without_end_markers(conversation, self._tokenizer.eos_token)
        text = self._render(self._hidden(tidy)[:-1], True, conversation.where)
        (spans,) = self._verbatim.token_ids([[text]])
        assert spans is not None, "a single span begins a document and cannot merge into another"
        return self._verbatim.show(text), spans[0]

    def _spans(self, conversation: Conversation) -> list[_Span]:
        """The rendered conversation, cut where an answer begins and where its end-of-turn token begins."""
        messages = self._hidden(conversation)
        where = conversation.where
        full = self._render(messages, False, where)
        turns = [i for i, (role, _) in enumerate(messages) if role == "assistant"]
        spans: list[_Span] = []
        done = 0
        for turn in turns if self._supervise == "all" else turns[-1:]:
            prompt = self._render(messages[:turn], True, where)
            answered = full if turn == turns[-1] else self._render(messages[: turn + 1], False, where)
            start = len(prompt)
            place = f"{where}: message {turn + 1}"
            if start < done or not answered.startswith(prompt):
                raise _not_a_prefix(place)
            end, after = self._end_of_turn(answered, start, messages[turn][1], place)
            if full[:after] != answered[:after]:
                raise _not_a_prefix(place)
            spans += [_Span(full[done:start], "first" if spans else "none"), _Span(full[start:end], "all")]
            done = end
        return [*spans, _Span(full[done:], "first")]

    def _hidden(self, conversation: Conversation) -> list[Message]:
        """The messages with placeholders for the control tokens spelled out in them."""
        try:
            return [(role, self._verbatim.hide(content)) for role, content in conversation.messages]
        except DataError as error:
            raise DataError(f"{conversation.where}: {error.message}", error.hint) from error

    def _end_of_turn(self, text: str, start: int, words: str, where: str) -> tuple[int, int]:
        """Where in `text` the control token begins and ends that ends the answer `words`, begun at `start`."""
        words = words.strip()
        if not words:
            raise DataError(f"{where}: the assistant says nothing", hint="leave the row out")
        for control in self._verbatim.controls.finditer(text, start):
            if text[start : control.start()].rstrip().endswith(words):
                return control.span()
        if words not in text[start:]:
            raise DataError(
                f"{where}: the chat template changes the assistant's words",
                hint="give a template that writes them as they are as model.chat_template",
            )
        raise DataError(
            f"{where}: the chat template ends the assistant's turn without a special token, so that the model would "
            "never learn to stop",
            hint="end assistant turns with {{ eos_token }} in model.chat_template",
        )

    def _render(self, messages: Sequence[Message], generation_prompt: bool, where: str) -> str:
        shown = [{"role": role, "content": content} for role, content in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                shown, tokenize=False, add_generation_prompt=generation_prompt, date_string=_DATE
            )
        except Exception as error:  # templates raise by raise_exception(), and fail as any program does
            raise DataError(
                f"{where}: the chat template refuses this conversation: {error}",
                hint="mend the row, or give another template as model.chat_template",
            ) from error
        return str(text)


def _not_a_prefix(place: str) -> DataError:
    return DataError(
        f"{place}: the chat template writes what comes before an answer otherwise once it is given, so the words to "
        "learn cannot be told from the prompt",
        hint="set data.supervise: last, or give a template that only ever appends as model.chat_template",
    )


def without_end_markers(conversation: Conversation, eos_token: str) -> tuple[Conversation, int]:
    """`conversation` without the end-of-text tokens spelled out at the end of answers, and from how many they went.

    The template writes the real one. The `<|endoftext|>` of older files goes too, whatever the tokenizer uses.
    """
    messages: list[Message] = []
    num_markers = 0
    for role, content in conversation.messages:
        kept = content
        while role == "assistant" and (marker := _end_marker(kept, eos_token)):
            kept = kept.rstrip().removesuffix(marker)
        num_markers += kept != content
        messages.append((role, kept))
    return (Conversation(tuple(messages), conversation.where) if num_markers else conversation), num_markers


def _end_marker(answer: str, eos_token: str) -> str | None:
    return next((marker for marker in (eos_token, END_MARKER) if answer.rstrip().endswith(marker)), None)


def _document(
    conversation: Conversation, spans: Sequence[_Span], num_markers: int, ids_of_span: Sequence[Sequence[int]] | None
) -> Document | DataError:
    if ids_of_span is None:
        return DataError(
            f"{conversation.where}: this tokenizer merges the answer's beginning into the prompt",
            hint="leave out white space at the beginning of answers, or give another tokenizer as model.tokenizer",
        )
    input_ids = np.array([i for ids in ids_of_span for i in ids], dtype=np.int32)
    supervised = np.zeros(len(input_ids), dtype=np.uint8)
    start = 0
    for span, ids in zip(spans, ids_of_span, strict=True):
        learned = {"none": 0, "first": 1, "all": len(ids)}[span.learn]
        supervised[start : start + learned] = 1
        start += len(ids)
    return Document(input_ids, supervised, num_markers)


def end_of_turn_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The token that ends an assistant's turn in the tokenizer's chat template: where generation has to stop."""
    document = encode(Conversation((("user", "Hello"), ("assistant", "Hi")), "the chat template"), tokenizer, "last")
    return int(document.input_ids[np.flatnonzero(document.supervised)[-1]])
