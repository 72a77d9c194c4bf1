"""Conversations as tokens, with a mask of what the assistant has to write by itself.

chat_template.py renders, turns.py finds the turns in the text, sheet.py and verbatim.py tokenize; here rows are made
ready for them, and documents of what they give back. Prompts and answers are tokenized apart, as they are at inference:
an answer's first token never merges into the prompt.

Some templates write a turn otherwise once a later one follows: Qwen3 and DeepSeek drop its thoughts, GPT-OSS ends it
with another token. Such a conversation is **unrolled** into as few documents as it takes for each learned turn to stand
in the form and the context that it has when the model is asked for it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from launcher.data.conversation import END_MARKER, SYSTEM_ROLES, Conversation, Message, ToolCall
from launcher.data.masks.chat_template import ChatTemplate, Shown
from launcher.data.masks.sheet import Sheet
from launcher.data.masks.turns import Row, Turn, Turns
from launcher.data.masks.verbatim import Verbatim
from launcher.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Supervise = Literal["all", "last", "marked"]

_ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Document:
    """A tokenized conversation, or what one of its turns is the answer to."""

    input_ids: NDArray[np.int32]
    """[T] token ids."""
    supervised: NDArray[np.uint8]
    """[T] 1 where the token is a target: an assistant's word or the end of its turn."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """What was done, counted, to be added up. What is counted by conversation stands on the last of its documents.

    control_tokens_as_text   spelled out in messages and kept as text
    control_tokens_stripped  spelled out in messages and removed
    end_markers_removed      answers from whose end a spelled-out end-of-text token was taken
    system_turns_merged      put before the user's words
    system_turns_dropped
    thoughts_left_out        learned answers whose thoughts the chat template does not write
    unrolled                 1 for a conversation of several documents
    the generation prompt ends with ...   answers that the template writes without that, and so are learned without it
    """

    @property
    def num_targets(self) -> int:
        """Targets that can be predicted: nothing comes before the first token."""
        return int(self.supervised[1:].sum())

    @property
    def num_turns(self) -> int:
        """Stretches of targets: the assistant turns that are learned."""
        return int(self.supervised[:1].sum()) + int(np.count_nonzero(self.supervised[1:] > self.supervised[:-1]))

    def part(self, start: int, stop: int) -> Document:
        """The tokens from `start` to before `stop`, without the notes."""
        return Document(self.input_ids[start:stop], self.supervised[start:stop])


class Encoder:
    """Tokenizes conversations with one tokenizer and its chat template. Not for use in several threads at once."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        supervise: Supervise,
        *,
        special_tokens: Literal["text", "strip"] = "text",
        system_turns: Literal["keep", "merge", "drop"] = "keep",
    ) -> None:
        """The options are those of the recipe's section `data`."""
        self._eos, self._bos = str(tokenizer.eos_token), str(tokenizer.bos_token) if adds_bos(tokenizer) else ""
        self._supervise = supervise
        self._strip = special_tokens == "strip"
        self._system_turns = system_turns
        self._template = ChatTemplate(tokenizer)
        self._verbatim = Verbatim(tokenizer, self._template.written)
        self._turns = Turns(self._template, self._verbatim.controls)

    def encode(self, conversations: Sequence[Conversation]) -> list[list[Document] | DataError]:
        """The documents of each conversation, or why there are none; one for most.

        A call of the tokenizer for every thousand of them.
        """
        results: list[list[Document] | DataError] = []
        for start in range(0, len(conversations), _ROWS_AT_ONCE):
            results += self._encode(conversations[start : start + _ROWS_AT_ONCE])
        return results

    def prompt(self, conversation: Conversation) -> tuple[str, list[int]]:
        """What the model is shown to give the last answer: the text, and its token ids.

        Raises DataError where the template refuses the conversation, or it is plain text.
        """
        if conversation.text is not None:
            raise DataError(
                f"{conversation.where}: plain text asks nothing that could be answered", hint="test on rows that ask"
            )
        row, _, _ = self._row(conversation)
        text = self._turns.render(row, row.messages[:-1], True)
        tokens = self._verbatim.tokenize([[text]])
        if tokens.refused:
            raise _at(conversation.where, tokens.refused[0])
        return self._verbatim.show(text), tokens.ids.tolist()

    @property
    def end_of_turn_id(self) -> int:
        """The token that ends an assistant's turn: where generation has to stop."""
        hello = Conversation((Message("user", "Hello"), Message("assistant", "Hi", learn=True)), "the chat template")
        (documents,) = self._encode([hello])
        if isinstance(documents, DataError):
            raise documents
        return int(documents[-1].input_ids[np.flatnonzero(documents[-1].supervised)[-1]])

    def _encode(self, conversations: Sequence[Conversation]) -> list[list[Document] | DataError]:
        sheet = Sheet(self._verbatim)
        plans: list[tuple[int, Sequence[Mapping[str, int]]] | DataError] = []
        for conversation in conversations:
            start = len(sheet)
            try:
                plans.append((start, self._plan(sheet, conversation)))
            except DataError as error:
                plans.append(error)
        masked = sheet.tokenize()
        results: list[list[Document] | DataError] = []
        for plan, conversation in zip(plans, conversations, strict=True):
            if isinstance(plan, DataError):
                results.append(plan)
                continue
            documents = []
            for made, notes in zip(masked[plan[0] : plan[0] + len(plan[1])], plan[1], strict=True):
                if isinstance(made, DataError):
                    results.append(_at(conversation.where, made))
                    break
                documents.append(Document(*made, notes))
            else:
                results.append(documents)
        return results

    def _plan(self, sheet: Sheet, conversation: Conversation) -> list[Mapping[str, int]]:
        """Put the conversation's documents on the sheet; returns the notes of each. Raises DataError with its place."""
        if conversation.text is not None:
            return self._plan_text(sheet, conversation)
        row, learned, notes = self._row(conversation)
        if not learned:
            raise DataError(
                f"{row.where}: no assistant turn is marked to be learned",
                hint="data.supervise: all learns all that are not marked otherwise",
            )
        documents = _unrolled([self._turns.find(row, index) for index in learned])
        for turns in documents:
            self._turns.check_context(row, turns)
        if len(documents) > 1:
            notes["unrolled"] = 1
        noted: list[Mapping[str, int]] = []
        for turns in documents:
            sheet.add(turns)
            counts = [turn.notes for turn in turns if turn.notes]
            if turns is documents[-1]:
                counts.append(notes)
            noted.append(_sum(counts) if len(counts) > 1 else counts[0] if counts else {})
        return noted

    def _plan_text(self, sheet: Sheet, conversation: Conversation) -> list[Mapping[str, int]]:
        tidy, num_markers = without_end_markers(conversation, self._eos)
        hidden = _Hidden(self._verbatim, self._strip, conversation.where)
        text = hidden.text(tidy.text or "", own=True)
        if not text.strip():
            raise DataError(f"{conversation.where}: the text is empty", hint="leave the row out")
        sheet.add_text(self._bos, text + self._eos)
        return [hidden.notes(num_markers)]

    def _row(self, conversation: Conversation) -> tuple[Row, list[int], dict[str, int]]:
        """What the template is given, which messages are learned, and what was done to the row."""
        where = conversation.where
        tidy, num_markers = without_end_markers(conversation, self._eos)
        messages: Sequence[Message] = tidy.messages
        numbers: Sequence[int] = range(1, len(messages) + 1)
        dropped = 0
        if self._system_turns != "keep":
            messages, numbers = without_system_turns(messages, self._system_turns == "merge", where)
            dropped = len(tidy.messages) - len(messages)
        hidden = _Hidden(self._verbatim, self._strip, where)
        shown = [self._shown(message, hidden) for message in messages]
        tools = [hidden.value(tool) for tool in conversation.tools] or None
        notes = hidden.notes(num_markers)
        if dropped:
            notes["system_turns_merged" if self._system_turns == "merge" else "system_turns_dropped"] = dropped
        assistants = [i for i, message in enumerate(messages) if message.role == "assistant"]
        match self._supervise:
            case "all":
                learned = [i for i in assistants if messages[i].learn is not False]
            case "last":
                learned = [i for i in assistants[-1:] if messages[i].learn is not False]
            case "marked":
                learned = [i for i in assistants if messages[i].learn]
        return Row(shown, numbers, tools, where), learned, notes

    def _shown(self, message: Message, hidden: _Hidden) -> Shown:
        """`message` as templates know it, each key only where it is set."""
        shown: Shown = {"role": message.role, "content": hidden.text(message.content, message.role == "assistant")}
        if message.reasoning:
            # GPT-OSS has a name of its own for it.
            shown["reasoning_content"] = shown["thinking"] = hidden.text(message.reasoning)
        if message.tool_calls:
            shown["tool_calls"] = [self._call(call, hidden) for call in message.tool_calls]
        if message.name is not None:
            shown["name"] = hidden.text(message.name)
        if message.tool_call_id is not None:
            shown["tool_call_id"] = hidden.text(message.tool_call_id)
        return shown

    def _call(self, call: ToolCall, hidden: _Hidden) -> dict[str, Any]:
        arguments = hidden.value(call.arguments)
        if self._template.arguments_as_text:
            arguments = json.dumps(arguments, ensure_ascii=False)
        function = {"name": hidden.text(call.name), "arguments": arguments}
        shown: dict[str, Any] = {"type": "function", "function": function}
        return shown if call.id is None else {"type": "function", "id": hidden.text(call.id), "function": function}


def _unrolled(turns: list[Turn]) -> list[list[Turn]]:
    """The turns of each document, of which the last one's text has them all: as few documents as it takes."""
    documents: list[list[Turn]] = []
    while turns:
        *before, last = turns
        covered: list[Turn] = []
        turns = []
        for turn in before:
            follows = not covered or covered[-1].after <= turn.start
            (covered if follows and turn.stands_in(last.text) else turns).append(turn)
        documents.append([*covered, last])
    return documents[::-1]


class _Hidden:
    """Passes a row's words through without the control tokens spelled out in them, and counts these."""

    def __init__(self, verbatim: Verbatim, strip: bool, where: str) -> None:
        self._verbatim, self._strip, self._where = verbatim, strip, where
        self._count = 0

    def text(self, text: str, own: bool = False) -> str:
        """`own`: the assistant's words may hold the template's marks."""
        try:
            hidden, count = self._verbatim.hide(text, own, self._strip)
        except DataError as error:
            raise _at(self._where, error) from error
        self._count += count
        return hidden

    def value(self, value: Any) -> Any:
        """A JSON value with all its texts passed through."""
        try:
            return self._value(value)
        except RecursionError as error:
            raise DataError(f"{self._where}: nested too deeply", hint="mend the row, or leave it out") from error

    def _value(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self._value(key): self._value(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._value(item) for item in value]
        return value

    def notes(self, num_markers: int) -> dict[str, int]:
        kind = "control_tokens_stripped" if self._strip else "control_tokens_as_text"
        counts = {kind: self._count, "end_markers_removed": num_markers}
        return {note: count for note, count in counts.items() if count}


def _sum(notes: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for counts in notes:
        total.update(counts)
    return dict(total)


def adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """True where the tokenizer begins whatever it is given with its first token, as pretraining did (Llama, Gemma)."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def end_of_turn_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The token that ends an assistant's turn in the tokenizer's chat template: where generation has to stop."""
    return Encoder(tokenizer, "last").end_of_turn_id


def without_end_markers(conversation: Conversation, eos_token: str) -> tuple[Conversation, int]:
    """`conversation` without the end-of-text tokens spelled out at the end of answers, and from how many they went.

    The template writes the real one. The `<|endoftext|>` of older files goes too, whatever the tokenizer uses.
    """
    markers = (eos_token, END_MARKER)
    if conversation.text is not None:
        text = _without_markers(conversation.text, markers)
        return (conversation, 0) if text is None else (replace(conversation, text=text), 1)
    kept = {
        i: text
        for i, message in enumerate(conversation.messages)
        if message.role == "assistant" and (text := _without_markers(message.content, markers)) is not None
    }
    if not kept:
        return conversation, 0
    messages = tuple(m._replace(content=kept[i]) if i in kept else m for i, m in enumerate(conversation.messages))
    return replace(conversation, messages=messages), len(kept)


def _without_markers(text: str, markers: tuple[str, str]) -> str | None:
    """None where no marker stands at the end."""
    bare = text.rstrip()
    if not bare.endswith(markers):
        return None
    while bare.endswith(markers):
        text = bare.removesuffix(next(marker for marker in markers if bare.endswith(marker)))
        bare = text.rstrip()
    return text


def without_system_turns(messages: Sequence[Message], merge: bool, where: str = "") -> tuple[list[Message], list[int]]:
    """`messages` without system and developer turns, and the number from 1 that each had.

    `merge`: their words come before those of the next user, behind an empty line. Raises DataError where none follows.
    """
    kept: list[Message] = []
    numbers: list[int] = []
    waiting: list[str] = []
    for number, message in enumerate(messages, 1):
        if message.role in SYSTEM_ROLES:
            waiting += [message.content] if merge else []
            continue
        if message.role == "user" and waiting:
            message = message._replace(content="\n\n".join([*waiting, message.content]))
            waiting = []
        kept.append(message)
        numbers.append(number)
    if waiting:
        raise DataError(
            f"{where}: no user turn follows the system turn, so that its words cannot be put before any",
            hint="set data.system_turns: drop, or leave the row out",
        )
    return kept, numbers


def _at(where: str, error: DataError) -> DataError:
    return DataError(f"{where}: {error.message}", error.hint)
