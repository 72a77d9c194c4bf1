"""A conversation as tokens, with a mask of what the assistant says.

The chat template is the model's own Jinja text, so the mask is found by rendering prefixes: what the template writes for
the messages before an answer, with its generation prompt, must be the beginning of what it writes for all of them. From
there to the end-of-turn token is what the model has to say by itself when it is asked, and that is what is learned.
Where a template does not keep to this there is no exact mask, and the row is refused.

Prompts and answers are tokenized apart, as they are at inference: the answer's first token never merges into the prompt.
Control tokens come from the template alone. One that is spelled out in a message stays text: it is swapped for a
placeholder before rendering, and the placeholder becomes the tokens of the spelled-out text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from launcher.data.formats import Conversation, Message
from launcher.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Supervise = Literal["all", "last"]

END_MARKER = "<|endoftext|>"
"""Files made for GPT-3's fine-tuning end every completion with it, whatever the tokenizer at hand calls its own."""
# U+FDD0 and U+FDD1 are noncharacters: no text that is exchanged holds them.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_PLACEHOLDER = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_ANCHOR = "\n"
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
    """One conversation as tokens and mask. Raises DataError, beginning with its place, where it cannot be masked exactly.

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


_Known = list[int]


@dataclass(frozen=True)
class _Todo:
    """A text to be tokenized behind `anchor`, whose own tokens are then taken off again."""

    index: int
    anchor: str


class Encoder:
    """Tokenizes conversations with one tokenizer and its chat template. Not for use in several threads at once."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, supervise: Supervise) -> None:
        self._tokenizer = tokenizer
        self._supervise = supervise
        self._backend = tokenizer.backend_tokenizer
        # tokenizer.json may carry both; a cut or filled document would go unnoticed.
        self._backend.no_truncation()
        self._backend.no_padding()
        # The longest first, as the tokenizer itself matches them.
        added = tokenizer.added_tokens_decoder.values()
        self._controls = sorted(
            {token.content for token in added if token.special}, key=lambda text: (-len(text), text)
        )
        self._control = re.compile("|".join(map(re.escape, self._controls)) or "(?!)")
        self._placeholder = {text: f"{_OPEN}{i}{_CLOSE}" for i, text in enumerate(self._controls)}
        self._ids_of: dict[tuple[str, bool], list[int]] = {}
        # SentencePiece-like tokenizers put a space before whatever begins; in the middle of a document that is wrong.
        self._anchored = self._ids([_ANCHOR + "a"])[0] != [i for ids in self._ids([_ANCHOR, "a"]) for i in ids]

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
        tokenized = iter(self._tokenize([spans for _, spans, _ in plans]))
        todo = iter(plans)
        return [result or _document(*next(todo), next(tokenized)) for result in results]

    def prompt(self, conversation: Conversation) -> tuple[str, list[int]]:
        """What the model is shown to give the last answer: the text, and its token ids.

        Raises DataError where the template refuses the conversation.
        """
        text = self._render(self._swapped(conversation), len(conversation.messages) - 1, conversation.where)
        spelled_out = _PLACEHOLDER.sub(lambda match: self._controls[int(match[1])], text)
        return spelled_out, [i for ids in self._tokenize([[_Span(text, "none")]])[0] or () for i in ids]

    def _spans(self, conversation: Conversation) -> list[_Span]:
        """The rendered conversation, cut where an answer begins and where its end-of-turn token begins."""
        messages = self._swapped(conversation)
        where = conversation.where
        full = self._render(messages, None, where)
        turns = [i for i, (role, _) in enumerate(messages) if role == "assistant"]
        spans: list[_Span] = []
        done = 0
        for turn in turns if self._supervise == "all" else turns[-1:]:
            prompt = self._render(messages, turn, where)
            if not full.startswith(prompt) or len(prompt) < done:
                raise DataError(
                    f"{where}: the chat template writes the beginning of this conversation otherwise once message "
                    f"{turn + 1} is answered, so its words cannot be told from the prompt",
                    hint="set data.supervise: last, or give a template that only ever appends as model.chat_template",
                )
            end = self._end_of_turn(full, len(prompt), messages[turn][1], turn, where)
            spans += [
                _Span(full[done : len(prompt)], "first" if spans else "none"),
                _Span(full[len(prompt) : end], "all"),
            ]
            done = end
        return [*spans, _Span(full[done:], "first")]

    def _end_of_turn(self, full: str, start: int, words: str, turn: int, where: str) -> int:
        """Where the control token begins that ends the answer `words`, whose turn begins at `start`."""
        words = words.strip()
        if not words:
            raise DataError(f"{where}: the assistant says nothing in message {turn + 1}", hint="leave the row out")
        for control in self._control.finditer(full, start):
            if full[start : control.start()].rstrip().endswith(words):
                return control.start()
        if words not in full[start:]:
            raise DataError(
                f"{where}: the chat template changes the assistant's words in message {turn + 1}",
                hint="give a template that writes them as they are as model.chat_template",
            )
        raise DataError(
            f"{where}: the chat template ends the assistant's message {turn + 1} without a special token, so that the "
            "model would never learn to stop",
            hint="end assistant turns with {{ eos_token }} in model.chat_template",
        )

    def _render(self, messages: Sequence[Message], until: int | None, where: str) -> str:
        """The template's text for all messages, or for those before `until` with the generation prompt."""
        shown = [{"role": role, "content": content} for role, content in messages[:until]]
        try:
            text = self._tokenizer.apply_chat_template(
                shown, tokenize=False, add_generation_prompt=until is not None, date_string=_DATE
            )
        except Exception as error:  # templates raise by raise_exception(), and fail as any program does
            raise DataError(
                f"{where}: the chat template refuses this conversation: {error}",
                hint="mend the row, or give another template as model.chat_template",
            ) from error
        return str(text)

    def _swapped(self, conversation: Conversation) -> list[Message]:
        """The messages with placeholders for spelled-out control tokens."""
        if any(_OPEN in content for _, content in conversation.messages):
            raise DataError(
                f"{conversation.where}: U+FDD0, which is no character, stands in a message",
                hint="the file was written with a wrong encoding; leave the row out or mend it",
            )
        swap = self._placeholder
        return [(role, self._control.sub(lambda m: swap[m[0]], content)) for role, content in conversation.messages]

    def _tokenize(self, plans: Sequence[Sequence[_Span]]) -> list[list[list[int]] | None]:
        """Token ids of every span of every plan; None for a plan whose spans the tokenizer would merge."""
        texts: list[str] = []
        parts_of: list[list[list[_Known | _Todo]]] = []
        for plan in plans:
            before = ""
            parts_of.append([])
            for span in plan:
                parts: list[_Known | _Todo] = []
                for i, part in enumerate(_PLACEHOLDER.split(span.text)):
                    if i % 2:
                        part = self._controls[int(part)]
                        parts.append(self._spelled_out(part))
                    elif part:
                        anchor = self._anchor(before, part)
                        parts.append(_Todo(len(texts), anchor))
                        texts.append(anchor + part)
                    before = part or before
                parts_of[-1].append(parts)
        ids = self._ids(texts)
        return [self._joined(plan, ids) for plan in parts_of]

    def _joined(self, plan: list[list[_Known | _Todo]], ids: list[list[int]]) -> list[list[int]] | None:
        spans: list[list[int]] = []
        for parts in plan:
            spans.append([])
            for part in parts:
                if isinstance(part, _Todo):
                    found = ids[part.index]
                    anchor = self._known(part.anchor, as_text=False) if part.anchor else []
                    if found[: len(anchor)] != anchor:
                        return None
                    part = found[len(anchor) :]
                spans[-1] += part
        return spans

    def _anchor(self, before: str, text: str) -> str:
        """What to tokenize `text` behind, so that it gets the tokens it has after `before`; most tokenizers need nothing."""
        if not self._anchored or not before or self._control.match(text):
            return ""
        return next((control for control in self._controls if before.endswith(control)), _ANCHOR)

    def _spelled_out(self, control: str) -> list[int]:
        """The tokens of a control token's text, none of them a control token."""
        if self._anchored:
            return self._known(_ANCHOR + control, as_text=True)[len(self._known(_ANCHOR, as_text=True)) :]
        return self._known(control, as_text=True)

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
