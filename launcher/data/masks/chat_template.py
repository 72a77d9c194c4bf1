"""A tokenizer's chat template, compiled once: the text that `apply_chat_template` gives, several times as fast.

Templates come from the hub and are programs, so they run in Jinja's sandbox, as transformers runs them. What the day of
the run could change is pinned: Llama 3.2 and GPT-OSS write the date into the system prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from launcher.data.masks.verbatim import SENTINELS
from launcher.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Shown = dict[str, Any]
"""A message as templates know it: role, content, and where they are set reasoning_content, tool_calls, name, ..."""

DATE = datetime(2024, 7, 26)
"""Today, whatever the day: Llama 3.1's own default."""
_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks words up",
        "parameters": {"type": "object", "properties": {"words": {"type": "string", "description": "Which"}}},
    },
}


class ChatTemplate:
    """The chat template in effect for a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Raises ModelError where there is no template, or it is no Jinja."""
        named = tokenizer.chat_template
        if isinstance(named, list):  # as tokenizer_config.json has it
            named = {item["name"]: item["template"] for item in named}
        if not isinstance(named, dict):
            named = {"default": named}
        if named.get("default") is None:
            raise ModelError(
                f"{tokenizer.name_or_path}: no default chat template; there is {', '.join(sorted(named)) or 'none'}",
                hint="give one as model.chat_template",
            )
        sources = (named["default"], named.get("tool_use", named["default"]))
        try:
            self._plain, self._with_tools = map(_compiled, sources)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                f"{tokenizer.name_or_path}: line {error.lineno} of the chat template: {error.message}",
                hint="mend it, or give another as model.chat_template",
            ) from error
        self._constants = {
            **_ENVIRONMENT.globals,
            "documents": None,
            **tokenizer.special_tokens_map,
        }
        self._content_as_parts = self._wants_parts()
        self.arguments_as_text = self._wants_text()
        """True where the template takes the arguments of a call as JSON text (DeepSeek's do). They are given as an
        object, as transformers documents it, unless the template fails on an object and not on its text."""
        self.written = "\0".join([*map(_literals, dict.fromkeys(sources)), *self._samples()])
        """Every constant text in the template and a few renderings, to look for what it writes by itself."""

    def render(
        self, messages: Sequence[Shown], generation_prompt: bool = False, tools: list[dict[str, Any]] | None = None
    ) -> str:
        """The text for `messages`. Whatever the template raises passes through."""
        if self._content_as_parts:
            messages = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]
        template = self._plain if tools is None else self._with_tools
        variables = {
            **self._constants,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": generation_prompt,
        }
        return "".join(template.root_render_func(template.new_context(variables, shared=True)))

    def says(
        self, messages: Sequence[Shown], tools: list[dict[str, Any]] | None = None, generation_prompt: bool = True
    ) -> str:
        """The text for `messages`, or nothing where the template raises."""
        try:
            return self.render(messages, generation_prompt, tools)
        except Exception:
            return ""

    def _wants_parts(self) -> bool:
        """Some templates of models that see (SmolVLM, LLaVA) write a list of parts only, not a text."""
        self._content_as_parts = False
        message: Shown = {"role": "user", "content": SENTINELS[0]}
        if SENTINELS[0] in self.says([message]):
            return False
        return SENTINELS[0] in self.says([message | {"content": [{"type": "text", "text": SENTINELS[0]}]}])

    def _wants_text(self) -> bool:
        return not self.says(_sample(False)) and bool(self.says(_sample(True)))

    def _samples(self) -> Iterator[str]:
        """Some templates put control tokens together: `'<|' + message['role'] + '|>'`."""
        messages = [{"role": "system", "content": "a"}, *_sample(self.arguments_as_text)]
        for sample in (messages[:2], messages[:3], messages, messages[1:2], messages[1:3], messages[1:]):
            for tools in (None, [_TOOL]):
                yield self.says(sample, tools)
                yield self.says(sample, tools, generation_prompt=False)


def _sample(arguments_as_text: bool) -> list[Shown]:
    """A conversation with a tool."""
    arguments = {"words": "a"}
    function = {"name": "look_up", "arguments": json.dumps(arguments) if arguments_as_text else arguments}
    call = {"type": "function", "id": "abcdef123", "function": function}  # Mistral wants ids of nine letters
    return [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "a", "name": "look_up", "tool_call_id": "abcdef123"},
    ]


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant says for transformers; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Namespace(Namespace):
    """Refuses names that reach into Python."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *mappings = args
        given = dict(*mappings, **values)
        Namespace.__init__(self, {_public(name): value for name, value in given.items()})

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(_public(name), value)


class _Dict:
    """`dict` for templates, without the class behind it."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with two short ways: half of a rendering's time went into asking the same questions again."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._safe: dict[tuple[type, str], bool] = {}

    def getattr(self, obj: Any, attribute: str) -> Any:
        # A message's value: the long way raises and catches an exception.
        if type(obj) is dict and attribute in obj and attribute not in _DICT_METHODS:
            return obj[attribute]
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        # Jinja decides by the type and the name alone.
        key = (type(obj), attr)
        if key not in self._safe:
            if len(self._safe) > 1000:  # a template may make up names
                self._safe.clear()
            self._safe[key] = super().is_safe_attribute(obj, attr, value)
        return self._safe[key]


_DICT_METHODS = frozenset(dir(dict))


def _public(name: str) -> str:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"{name!r} cannot be set on a namespace")
    return name


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(format: str) -> str:
    return DATE.strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Not Jinja's own, which escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "namespace": _Namespace,
        "dict": _Dict(),
    }
    return environment


_ENVIRONMENT = _environment()


@cache
def _compiled(source: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(source)


@cache
def _literals(source: str) -> str:
    tree = _ENVIRONMENT.parse(source)
    written = [node.data for node in tree.find_all(nodes.TemplateData)]
    written += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return "\0".join(written)
