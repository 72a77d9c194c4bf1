"""Our rendering is transformers' rendering, whatever the day."""

from __future__ import annotations

import copy
from typing import Any

import jinja2
import pytest

from launcher.data.conversation import Conversation, Message, ToolCall
from launcher.data.masks.chat_template import ChatTemplate
from launcher.data.tokenizer import train_tokenizer, with_defaults, with_template
from launcher.errors import ModelError
from tests.unit.families import FAMILIES, TEXT, TOOL, hugging_face, pin_the_day, shown, tokenizer_of

CALL = Message(
    "assistant", "", tool_calls=(ToolCall("get_weather", {"city": "Pa<ris>&é", "n": [1, None]}, "abcdefghi"),)
)
RESULT = Message("tool", '{"sky": "clear"}', name="get_weather", tool_call_id="abcdefghi")


def template(source: Any, variables: dict[str, Any] | None = None) -> ChatTemplate:
    return ChatTemplate(with_template(train_tokenizer(TEXT, 300), source, variables))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_text_is_that_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pin_the_day(monkeypatch)
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    with_values = copy.copy(tokenizer)
    with_values.chat_template = with_defaults(
        str(tokenizer.chat_template), {"enable_thinking": False, "reasoning_effort": "high"}
    )
    ours = ChatTemplate(with_values)
    assert ours.arguments_as_text == family.arguments_as_text
    user, told = Message("user", " What <is>\n'it'?\n"), Message("assistant", " five\n\n", "thoughts" * family.thinks)
    messages = [user, told, user, told]
    if family.system:
        messages = [Message("system", ' Be "brief". '), *messages]
    if family.calls:
        messages += [user, CALL, RESULT, told]
    for tools in ((), (TOOL,)) if family.tools else ((),):
        conversation = Conversation(tuple(messages), tools=tools)
        for count in range(2, len(messages) + 1):
            for generation_prompt in (False, True):
                theirs = hugging_face(
                    *(tokenizer, family, conversation, count, generation_prompt),
                    enable_thinking=False,
                    reasoning_effort="high",
                )
                given = [shown(message, family) for message in messages[:count]]
                assert ours.render(given, generation_prompt, list(tools) or None) == theirs


def test_nothing_depends_on_the_day() -> None:
    dated = template("{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}")
    assert dated.render([{"role": "user", "content": "a"}]) == "26 Jul 2024a"


def test_variables_of_the_recipe_are_defaults_of_the_template_wherever_it_goes() -> None:
    values = {"date_string": "1 Jan 2030", "enable_thinking": False, "depth": 3, "note": "it's so\n", "nothing": None}
    source = "\n{{ date_string }} {{ enable_thinking }} {{ depth }} {{ note }}{{ nothing }}"
    expected = "\n1 Jan 2030 False 3 it's so\nNone"
    said = [{"role": "user", "content": "a"}]
    tokenizer = with_template(train_tokenizer(TEXT, 300), source, values)
    assert ChatTemplate(tokenizer).render([]) == expected
    assert tokenizer.apply_chat_template(said, tokenize=False) == expected
    other = tokenizer.apply_chat_template(said, tokenize=False, enable_thinking=True)
    assert other == expected.replace("False", "True")
    tokenizer.chat_template = {"default": source, "tool_use": source + "!"}
    assert ChatTemplate(with_template(tokenizer, None, values)).render([], tools=[TOOL]) == expected + "!"


def test_the_template_with_tools_is_taken_where_there_are_tools() -> None:
    tokenizer = train_tokenizer(TEXT, 300)
    named = {"default": "plain {{ tools }}", "tool_use": "with {{ tools[0].function.name }}", "rag": "{{ documents }}"}
    for given in (named, [{"name": name, "template": source} for name, source in named.items()]):
        tokenizer.chat_template = given
        ours = ChatTemplate(tokenizer)
        assert ours.render([], tools=None) == "plain None"
        assert ours.render([], tools=[TOOL]) == "with get_weather"
    tokenizer.chat_template = {"rag": "a"}
    with pytest.raises(ModelError, match="no default chat template; there is rag"):
        ChatTemplate(tokenizer)
    with pytest.raises(ModelError, match="line 2 of the chat template: ") as error:
        template("{{ messages }}\n{% for %}")
    assert error.value.hint


def test_words_are_given_as_parts_where_the_template_writes_no_other() -> None:
    """SmolVLM's kind; where it writes both, as Qwen3-VL's does, they are given as text."""
    parts = "{% for line in m['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}{% endif %}{% endfor %}"
    message = [{"role": "user", "content": "five"}]
    assert template("{% for m in messages %}" + parts + "{% endfor %}").render(message) == "five"
    both = (
        "{% for m in messages %}{% if m.content is string %}a {{ m.content }}{% else %}"
        + parts
        + "{% endif %}{% endfor %}"
    )
    assert template(both).render(message) == "a five"


def test_what_the_template_writes_by_itself() -> None:
    made = template("{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}{# <|no|> #}<|yes|>")
    assert "<|assistant|>" in made.written  # put together from parts
    assert "<|yes|>" in made.written
    assert "<|no|>" not in made.written


def test_templates_run_in_a_sandbox() -> None:
    for source in (
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ dict.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.json }}",
    ):
        with pytest.raises(jinja2.exceptions.SecurityError):
            template(source).render([])
    assert template("{{ dict(a=1) }}{{ {'items': 2}['items'] }}{{ {'b': 2}.b }}").render([]) == "{'a': 1}22"
