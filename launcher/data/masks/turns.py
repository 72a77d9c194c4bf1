"""Where an assistant's turn stands in the text that a chat template writes.

The template is the model's own Jinja text, so what the model has to write by itself is found by rendering prefixes:
what the template writes for the messages before a turn, with its generation prompt, must be the beginning of what it
writes with the turn as the last one. From there to the end-of-turn token is what is learned.

Two kinds of template do not keep to this, and both are taken as far as it can be proven where the words stand:
- Some write the history otherwise once the answer is there (GPT-OSS drops the thoughts before a tool call). What
  follows the last message is then put behind the prompt as the model gets it.
- Some end the generation prompt with words that they leave out of the answers (DeepSeek-R1's `<think>`). The answer is
  then learned where the template writes it, which is found by rendering other words in its place.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from launcher.data.conversation import SYSTEM_ROLES
from launcher.data.masks.chat_template import ChatTemplate, Shown
from launcher.data.masks.verbatim import SENTINELS
from launcher.errors import DataError

_WORDS = re.compile(r"[A-Za-z0-9]+")
_HINT_TEMPLATE = "give a template that writes them as they are as model.chat_template"


@dataclass(frozen=True)
class Row:
    """A conversation as the template is given it."""

    messages: list[Shown]
    numbers: Sequence[int]
    """Of each message in the user's own row, from 1."""
    tools: list[dict[str, Any]] | None
    where: str

    def place(self, index: int) -> str:
        """How a message is named to the user."""
        return f"{self.where}: message {self.numbers[index]}"


@dataclass(frozen=True)
class Turn:
    """An assistant's turn in the text whose last one it is."""

    index: int
    """Of its message."""
    text: str
    start: int
    """Where the model begins to write."""
    end: int
    """Where the end-of-turn token begins."""
    after: int
    """Where it ends."""
    num_marks: int
    """Control tokens from `start` to `end`: thoughts and calls have marks of their own."""
    notes: dict[str, int] = field(default_factory=dict)

    def stands_in(self, text: str) -> bool:
        """True where `text` has the turn as it is, behind what it is the answer to."""
        return text.startswith(self.text[: self.after])


class Turns:
    """Finds turns in what one template writes."""

    def __init__(self, template: ChatTemplate, controls: re.Pattern[str]) -> None:
        """`controls` finds control tokens in rendered text."""
        self._template = template
        self._controls = controls
        self._endings: dict[tuple[str, bool], int] = {}

    def render(self, row: Row, messages: Sequence[Shown], generation_prompt: bool) -> str:
        """The text for some of a row's messages. Raises DataError where the template refuses them."""
        try:
            return self._template.render(messages, generation_prompt, row.tools)
        except Exception as error:  # templates raise by raise_exception(), and fail as any program does
            hint = "mend the row, or give another template as model.chat_template"
            if messages and messages[0]["role"] in SYSTEM_ROLES:
                hint = "data.system_turns: merge puts system prompts before the first user's words"
            raise DataError(f"{row.where}: the chat template refuses this conversation: {error}", hint=hint) from error

    def find(self, row: Row, index: int) -> Turn:
        """The turn of message `index`. Raises DataError where it cannot be told exactly from what comes before."""
        messages, message = row.messages, row.messages[index]
        said = message["content"].strip() or "tool_calls" in message or message.get("reasoning_content", "").strip()
        if not said:
            raise DataError(f"{row.place(index)}: the assistant says nothing", hint="leave the row out")
        text = self.render(row, messages[: index + 1], False)
        try:
            prompt = self.render(row, messages[:index], True)
        except DataError:
            if index:
                raise
            prompt = None  # a template that cannot do without a message, and nobody asked for this first one
        notes: dict[str, int] = {}
        if prompt is not None and text.startswith(prompt):
            start = len(prompt)
        elif prompt is not None and (whole := self._behind_prompt(row, index, prompt, text)) is not None:
            text, start = whole, len(prompt)
        else:
            text, start = self._by_words(row, index, text)
            if prompt is not None:
                notes[self._opening(prompt, text)] = 1
        controls = list(self._controls.finditer(text, start))
        last = self._end(row, index, text, start, controls)
        end, after = controls[last].span()
        self._check(row, index, text[start:end], notes)
        return Turn(index, text, start, end, after, last, notes)

    def _behind_prompt(self, row: Row, index: int, prompt: str, text: str) -> str | None:
        """`prompt` and the answer, where the two are not the beginning of `text`; None where that is not all.

        Where the history is written otherwise, other words are put into the message before the answer: behind these,
        the prompt's end must be the beginning of the answer's. Where the answer itself has what the prompt ends with
        (`<think>`) and the template cuts it off, other words are put into the answer, to see what stands around it.
        """
        (sentinel, _), messages = SENTINELS, row.messages
        if index:
            before = [*messages[: index - 1], messages[index - 1] | {"content": sentinel}]
            asked = self._template.says(before, row.tools).rpartition(sentinel)
            answered = self._template.says([*before, messages[index]], row.tools, False).rpartition(sentinel)
            behind, written = asked[2], answered[2]
            is_end = prompt.endswith(behind) and text.endswith(written)
            if asked[1] and answered[1] and is_end and written.startswith(behind):
                return prompt + written[len(behind) :]
        content = messages[index]["content"].strip()
        around = self._template.says([*messages[:index], messages[index] | {"content": sentinel}], row.tools, False)
        header, found, end = around.partition(sentinel)
        opening = prompt.removeprefix(header)
        mark, space = opening.rstrip(), opening[len(opening.rstrip()) :]
        if found and mark and opening != prompt and content.startswith(mark):
            return prompt + content.removeprefix(mark).removeprefix(space) + end
        return None

    def _by_words(self, row: Row, index: int, text: str) -> tuple[str, int]:
        """`text`, and where the answer's words begin in it, proven by rendering others in their place."""
        message, (words, thoughts) = row.messages[index], SENTINELS
        markings = [{"content": words}]
        if "reasoning_content" in message:
            markings = [{"reasoning_content": thoughts, "thinking": thoughts}]
            # Some set white space between words and calls only where there are words.
            markings = [markings[0] | {"content": words}] + markings * (not message["content"])
        for marked in markings:
            other = self._template.says([*row.messages[:index], message | marked], row.tools, False)
            places = [other.find(sentinel) for sentinel in SENTINELS if other.count(sentinel) == 1]
            said = product(_trims(message["content"]), _trims(message.get("reasoning_content", "")))
            if places and any(other.replace(words, own).replace(thoughts, thought) == text for own, thought in said):
                return text, min(places)
        self._check(row, index, text, {})
        raise DataError(
            f"{row.place(index)}: the chat template writes what comes before an answer otherwise once it is given, so "
            "the words to learn cannot be told from the prompt",
            hint="give a template that only ever appends as model.chat_template",
        )

    def _opening(self, prompt: str, text: str) -> str:
        """What the prompt ends with and the answers lack, as a note."""
        common = _common(prompt, text)
        whole = [match.end() for match in self._controls.finditer(prompt) if match.end() <= common]
        opening = prompt[whole[-1] if whole else common :]
        if opening not in self._template.written:  # a row's own words; notes are counted
            return "the generation prompt ends otherwise than answers begin"
        return f"the generation prompt ends with {opening!r}, which the chat template leaves out of answers"

    def _end(self, row: Row, index: int, text: str, start: int, controls: Sequence[re.Match[str]]) -> int:
        """Which of the `controls` behind `start` ends the turn.

        It stands right behind the words; behind tool calls, which each template closes in its own way, it comes last.
        """
        message = row.messages[index]
        words, calls = self._parts(message["content"])[-1:], "tool_calls" in message
        found = None
        if calls or not words:
            if controls and not text[controls[-1].end() :].strip():
                found = len(controls) - 1
                while found and not text[controls[found - 1].end() : controls[found].start()].strip():
                    found -= 1
        else:
            for place in reversed(range(len(controls))):
                if text[start : controls[place].start()].rstrip().endswith(words[0]):
                    found = place
                    break
        if found is None:
            self._check(row, index, text[start:], {})
            raise DataError(
                f"{row.place(index)}: the chat template ends the assistant's turn without a special token, so that the "
                "model would never learn to stop",
                hint="end assistant turns with {{ eos_token }} in model.chat_template, or add the token that the "
                "template writes with model.add_tokens",
            )
        run = list(controls[found : found + 1])  # of control tokens with nothing but white space between them
        for control in controls[found + 1 :]:
            if text[run[-1].end() : control.start()].strip():
                break
            run.append(control)
        return found + (self._ending(row, index, text, run, calls) if len(run) > 1 else 0)

    def _ending(self, row: Row, index: int, text: str, run: list[re.Match[str]], calls: bool) -> int:
        """Which control token of several in a row ends the turn: the last that stays there when the next turn comes.

        Phi-3 writes `<|end|>` behind each turn and `<|endoftext|>` behind the last one; DeepSeek closes its calls, then
        the turn.
        """
        key = (text[run[0].start() : run[-1].end()], calls)
        if key not in self._endings:
            following: Shown = {"role": "tool", "content": "a"} if calls else {"role": "user", "content": "a"}
            if calls:
                call = row.messages[index]["tool_calls"][-1]
                following |= {"name": call["function"]["name"]} | ({"tool_call_id": call["id"]} if "id" in call else {})
            longer = self._template.says([*row.messages[: index + 1], following], row.tools, False)
            common = _common(text, longer)
            staying = [i for i, control in enumerate(run) if control.end() <= common]
            self._endings[key] = staying[-1] if staying else len(run) - 1 if calls else 0
        return self._endings[key]

    def _check(self, row: Row, index: int, written: str, notes: dict[str, int]) -> None:
        """Raises DataError unless all that the assistant says and calls is in `written`; thoughts are noted."""
        message, place = row.messages[index], 0
        for part in self._parts(message["content"]):
            place = written.find(part, place)
            if place < 0:
                raise DataError(
                    f"{row.place(index)}: the chat template changes the assistant's words", hint=_HINT_TEMPLATE
                )
            place += len(part)
        if "reasoning_content" in message and message["reasoning_content"].strip() not in written:
            notes["thoughts_left_out"] = 1
        if "tool_calls" not in message:
            return
        functions = [call["function"] for call in message["tool_calls"]]
        names = Counter(function["name"] for function in functions)
        arguments = {word for function in functions for word in _words(function["arguments"])}
        if any(written.count(name) < count for name, count in names.items()) or any(
            word not in written for word in arguments
        ):
            raise DataError(f"{row.place(index)}: the chat template does not write tool calls", hint=_HINT_TEMPLATE)

    def check_context(self, row: Row, turns: Sequence[Turn]) -> None:
        """Raises DataError unless what each turn of a document answers to comes before it: the others' words, and the
        tools."""
        seen = 0  # what comes before a turn comes before those that follow it
        for turn in turns:
            self._check_words(row, turn.text[: turn.start], range(seen, turn.index))
            seen = turn.index
        if row.tools is not None:
            turn = turns[0]
            names = [tool.get("function", tool).get("name", "") for tool in row.tools]
            without = self._template.says(row.messages[: turn.index + 1], None, False)
            if without == turn.text or not all(name in turn.text[: turn.start] for name in names):
                raise DataError(
                    f"{row.where}: the chat template does not write the tools",
                    hint="leave out the column with the tools, or give a template that writes them as "
                    "model.chat_template",
                )

    def _check_words(self, row: Row, prompt: str, messages: range) -> None:
        for i in messages:
            role, content = row.messages[i]["role"], row.messages[i]["content"]
            if role == "assistant" or content.strip() in prompt:
                continue
            if role == "tool":  # mostly written as JSON
                if all(word in prompt for word in _words(content)):
                    continue
                hint = "leave the row out, or give a template that writes what tools answer as model.chat_template"
            elif role == "user":
                hint = _HINT_TEMPLATE
            else:
                hint = "data.system_turns: merge puts system prompts before the first user's words"
            what = f"the words of the {role}"
            raise DataError(f"{row.place(i)}: the chat template leaves out or changes {what}", hint=hint)

    def _parts(self, content: str) -> list[str]:
        """What the assistant says, in the parts between the template's own marks that it holds (`<think>`): around
        those, templates set white space as they like."""
        return [part for text in self._controls.split(content) if (part := text.strip())]


def _trims(text: str) -> Iterator[str]:
    yield from dict.fromkeys([text, text.strip(), text.lstrip(), text.rstrip(), text.strip("\n"), text.lstrip("\n")])


def _words(value: Any) -> Iterator[str]:
    """Plain words and numbers in a JSON value, which every way to write it leaves as they are."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _words(key)
            yield from _words(item)
    elif isinstance(value, list):
        for item in value:
            yield from _words(item)
    elif isinstance(value, str):
        yield from _WORDS.findall(value)


def _common(a: str, b: str) -> int:
    """Characters at the beginning that both have in common."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
