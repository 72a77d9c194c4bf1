"""Lists of messages, as OpenAI and as ShareGPT write them: who speaks, calls, thinks, and what is marked to be learned.

Each message says by its keys how it is written: `role` and `content` (OpenAI), or `from` and `value` (ShareGPT).

Kept as they are, since only the model's chat template knows whether it has a place for them: two system turns, an
assistant who speaks first, two turns of one role in a row, a tool that answers nothing. Left out: a system turn without
words, and whatever follows the last assistant turn, since nothing in it can be learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.data.conversation import SYSTEM_ROLES, Message, ToolCall
from launcher.data.formats.values import (
    bad_row,
    flaw,
    from_json,
    is_blank,
    kind,
    refuse_media,
    require_json,
    short,
    text,
)

ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")} | {"function": "tool"}
SPEAKERS = {
    **{"system": "system", "developer": "developer"},
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "assistant", "model", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_CALL = '{"name": "...", "arguments": {...}}'


def read_conversation(value: Any, name: str, where: str) -> tuple[Message, ...]:
    """The messages up to the last assistant's. `name` is what messages to the user call the list.

    Raises DataError, beginning with `where`, for anything that cannot be learned as it is meant.
    """
    return up_to_last_answer(read_messages(value, name, where), where)


def up_to_last_answer(messages: list[Message], where: str) -> tuple[Message, ...]:
    """A conversation's messages without what follows its last answer. Raises DataError where nothing can be learned."""
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise bad_row(
            where,
            "no assistant turn, so there is nothing to learn",
            "a conversation needs a message whose role is assistant; data.on_bad_row=drop leaves such rows out",
        )
    end = len(roles) - roles[::-1].index("assistant")
    if set(roles[:end]) == {"assistant"}:
        raise bad_row(where, "nobody but the assistant speaks", "say what it answers, or use plain text: format: text")
    return tuple(messages[:end])


def read_messages(value: Any, name: str, where: str) -> list[Message]:
    """Every message that says something, whoever speaks last. Raises DataError as `read_conversation` does."""
    if not isinstance(value, list):
        raise bad_row(where, f"{name!r} is {kind(value)}, not a list", "[{role: ..., content: ...}, ...]")
    messages: list[Message] = []
    for number, item in enumerate(value):
        message = _message(item, f"{name}[{number}]", where)
        if message is not None:
            messages.append(message)
    return _with_tool_names(messages) if any(message.tool_call_id for message in messages) else messages


def written_as_sharegpt(value: Any) -> bool | None:
    """Whether the first message has ShareGPT's keys (True) or OpenAI's (False); None where it has neither."""
    first = value[0] if isinstance(value, list) and value else None
    if not isinstance(first, Mapping):
        return None
    return True if first.get("from") is not None else False if first.get("role") is not None else None


def read_tools(row: Mapping[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    """The functions that may be called, from `tools` or the older `functions`: a list, or the JSON text of one.

    Each becomes {"type": "function", "function": {"name": ..., ...}}, which chat templates expect.
    """
    given = [name for name in ("tools", "functions") if not (is_blank(row.get(name)) or row[name] == [])]
    if not given:
        return ()
    if len(given) == 2:
        raise bad_row(where, "both 'tools' and 'functions'", "keep one of them")
    name, value = given[0], row[given[0]]
    if isinstance(value, str):
        try:
            value = from_json(value)
        except ValueError as error:
            raise bad_row(where, f"{name!r} is no JSON: {error}", "write a list of functions") from error
    if not isinstance(value, list):
        raise bad_row(where, f"{name!r} is {kind(value)}, not a list", "write a list of functions")
    require_json(value, repr(name), where)
    return tuple(_tool(item, f"{name}[{number}]", where) for number, item in enumerate(value))


def _tool(item: Any, name: str, where: str) -> dict[str, Any]:
    function = item.get("function") if isinstance(item, dict) else None
    if isinstance(item, dict) and function is None:  # flat, as `functions` has always been
        function = {key: value for key, value in item.items() if key not in ("type", "function")}
        item = {"type": "function", "function": function}
    if not isinstance(function, dict) or flaw(function.get("name")):
        raise bad_row(
            where,
            f"{name} is no function with a name",
            '{"type": "function", "function": {"name": "...", "description": "...", "parameters": {...}}}',
        )
    return {"type": "function", **item}


def _message(item: Any, name: str, where: str) -> Message | None:
    """One message; None for a system turn that says nothing."""
    if not isinstance(item, dict):
        raise bad_row(where, f"{name} is no object with a role", '{"role": "user", "content": "..."}')
    spoken, role, key = _speaker(item, name, where)
    content: Any = item.get(key)
    if spoken == "function_call":
        item, content = {**item, "tool_calls": _called(content, name, where)}, None
    elif isinstance(content, list):
        content = _joined(content, f"{name}.{key}", where)
    extras: tuple[Any, ...] = ()
    if len(item) > 2 or content is None:  # most messages have nothing but who speaks and what is said
        extras = _extras(item, role, name, where)
    if is_blank(content):
        reasoning, calls = extras[:2] if extras else ("", ())
        if role in (*SYSTEM_ROLES, "tool") and key not in item:
            raise bad_row(where, f"the {role}'s {name} has no {key!r}", "write null where nothing is said")
        if role in SYSTEM_ROLES:
            return None
        if role != "tool" and not calls:
            but = "holds reasoning but no answer" if reasoning else "is empty"
            raise bad_row(where, f"the {role}'s {name} {but}", "fill it in, or leave the row out")
        content = ""
    elif wrong := flaw(content):
        raise bad_row(where, f"{name}.{key} {wrong[0]}", wrong[1])
    return Message(role, content, *extras)


def _extras(item: dict[str, Any], role: str, name: str, where: str) -> tuple[Any, ...]:
    """The fields of Message that follow its content."""
    refuse_media(item, name, where)
    reasoning, calls = _reasoning(item, name, where), _calls(item, name, where)
    if role != "assistant" and (reasoning or calls):
        does = "calls a tool" if calls else "reasons"
        raise bad_row(where, f"the {role}'s {name} {does}", "only the assistant does")
    tool, call_id = (_optional(item, key, name, where) for key in ("name", "tool_call_id"))
    return reasoning, calls, tool, call_id, _mark(item, role, name, where)


def _speaker(item: dict[str, Any], name: str, where: str) -> tuple[str, str, str]:
    """Who speaks in the file's word and in ours, and the key of what is said."""
    role, speaker = item.get("role"), item.get("from")
    if role is None and speaker is None:
        missing = "has a null role" if "role" in item or "from" in item else "is no object with a role"
        raise bad_row(where, f"{name} {missing}", '{"role": "user", "content": "..."}')
    if role is not None and speaker is not None:
        raise bad_row(where, f"{name} has both 'role' and 'from'", "keep role and content, or from and value")
    known, spoken, key = (ROLES, role, "content") if speaker is None else (SPEAKERS, speaker, "value")
    ours = known.get(spoken) if isinstance(spoken, str) else None
    if ours is None:
        raise bad_row(where, f"{name} has the unknown role {short(spoken)}", f"known roles: {', '.join(known)}")
    if key == "value" and key not in item:
        raise bad_row(where, f"{name} has no 'value'", '{"from": "human", "value": "..."}')
    return str(spoken), ours, key


def _joined(parts: list[Any], name: str, where: str) -> str:
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(part, str) for part in texts):
        raise bad_row(where, f"{name} has a part that is not text", "images, sound and video cannot be trained on")
    return "".join(str(part) for part in texts)


def _reasoning(item: dict[str, Any], name: str, where: str) -> str:
    """What the assistant thinks, under any of its names; servers write it under two of them at once."""
    given = [key for key in _REASONING if not is_blank(item.get(key))]
    for key in given:
        text(item[key], f"{name}.{key}", where)
        if item[key] != item[given[0]]:
            raise bad_row(where, f"{name} has {given[0]!r} and another {key!r}", "keep one of them")
    return item[given[0]] if given else ""


def _mark(item: dict[str, Any], role: str, name: str, where: str) -> bool | None:
    """`train: true|false` or OpenAI's `weight: 0|1`; None where the message has no mark."""
    train, weight = item.get("train"), item.get("weight")
    if train is None and weight is None:
        return None
    if train is not None and not isinstance(train, bool):
        raise bad_row(where, f"{name}.train is {short(train)}", "true: learned, false: not learned")
    if weight is not None and not (isinstance(weight, int | float) and weight in (0, 1)):
        raise bad_row(where, f"{name}.weight is {short(weight)}", "1: learned, 0: not learned, and nothing between")
    learn = bool(weight) if train is None else train
    if train is not None and weight is not None and train != bool(weight):
        raise bad_row(where, f"{name} is marked train: {str(train).lower()} and weight: {weight}", "keep one of them")
    if role == "assistant":
        return learn
    if learn:
        raise bad_row(
            where,
            f"the {role}'s {name} is marked to be learned",
            "only what the assistant says is learned; take the mark off",
        )
    return None


def _optional(item: dict[str, Any], key: str, name: str, where: str) -> str | None:
    value = item.get(key)
    return None if value is None or value == "" else text(value, f"{name}.{key}", where)


def _with_tool_names(messages: list[Message]) -> list[Message]:
    """A tool's answer names its tool where the call with its id does: some chat templates write the name."""
    names = {call.id: call.name for message in messages for call in message.tool_calls if call.id}
    return [
        message._replace(name=names[message.tool_call_id])
        if message.role == "tool" and message.name is None and message.tool_call_id in names
        else message
        for message in messages
    ]


def _called(value: Any, name: str, where: str) -> Any:
    """The calls that a ShareGPT `function_call` turn holds as JSON: an object, or a list of them."""
    try:
        calls = from_json(value) if isinstance(value, str) else value
    except ValueError as error:
        raise bad_row(where, f"{name}.value is no JSON: {error}", f"write the call as {_CALL}") from error
    if not calls or not isinstance(calls, dict | list):
        raise bad_row(where, f"{name}.value is no call but {kind(calls)}", f"write the call as {_CALL}")
    return [calls] if isinstance(calls, dict) else calls


def _calls(item: dict[str, Any], name: str, where: str) -> tuple[ToolCall, ...]:
    calls, older = item.get("tool_calls"), item.get("function_call")
    if older is not None:
        if calls:
            raise bad_row(where, f"{name} has both 'tool_calls' and 'function_call'", "keep one of them")
        return (_call(older, f"{name}.function_call", where),)
    if calls is None or calls == []:
        return ()
    if not isinstance(calls, list):
        raise bad_row(where, f"{name}.tool_calls is {kind(calls)}, not a list", f"[{_CALL}, ...]")
    return tuple(_call(call, f"{name}.tool_calls[{number}]", where) for number, call in enumerate(calls))


def _call(value: Any, name: str, where: str) -> ToolCall:
    """{"id": ..., "type": "function", "function": {"name", "arguments"}}, or the function alone."""
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or value.get("type") not in (None, "function"):
        raise bad_row(where, f"{name} is no call of a function", f'{{"type": "function", "function": {_CALL}}}')
    if "arguments" not in function:  # under another name they would be lost without a word
        raise bad_row(where, f"{name} has no 'arguments'", 'write "arguments": {} for a call without any')
    arguments = function["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = from_json(arguments)
        except ValueError as error:
            raise bad_row(where, f"{name}.arguments is no JSON: {error}", "write an object: {...}") from error
    arguments = {} if function["arguments"] is None else arguments
    if not isinstance(arguments, dict):
        raise bad_row(where, f"{name}.arguments is {kind(arguments)}, not an object", "write an object: {...}")
    require_json(arguments, f"{name}.arguments", where)
    called = text(function.get("name"), f"{name}.name", where)
    return ToolCall(called, arguments, _optional(value, "id", name, where))
