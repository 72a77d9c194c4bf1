"""Chat templates of the model families, each with what its models have to write by themselves.

The templates follow the control flow of the real ones; where a real one is longer, what is left out does not bear on
how turns are written. `says` is written down by hand from the families' formats: it is what the masks are held to.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from launcher.data.conversation import Conversation, Message
from launcher.data.masks.chat_template import DATE
from launcher.data.tokenizer import with_template

if TYPE_CHECKING:
    import pytest
    from transformers import PreTrainedTokenizerFast

TEXT = [
    "What is the sum of two and three? The sum of two and three is five.",
    "You are a helpful assistant. Answer briefly.",
    "Once upon a time there was a fox, and the fox ran over the hills and far away.",
    "user assistant system model Instruction Response INST 0123456789 .,:;!?\n\n### \n",
]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@dataclass(frozen=True)
class Family:
    """A chat template and its tokens."""

    template: str | None
    specials: tuple[str, ...]
    """Control tokens, the end of text first."""
    says: Callable[[Message], str]
    """What the model writes behind the generation prompt, end of turn included."""
    bos: str | None = None
    marks: tuple[str, ...] = ()
    """Added tokens that the tokenizer does not call special."""
    system: bool = True
    tools: bool = False
    """The template writes the tools."""
    calls: bool = False
    words_with_calls: bool = False
    """An answer may have words beside its calls."""
    thinks: bool = False
    opening: str = ""
    """What the generation prompt ends with and answers lack."""
    arguments_as_text: bool = False


def plain(end: str, before: str = "", after: str = "", trim: bool = False) -> Callable[[Message], str]:
    """For families that write the words alone."""
    return lambda m: before + (m.content.strip() if trim else m.content) + after + end


def json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def chatml_calls(message: Message) -> str:
    """Qwen's way to call."""
    written = message.content
    for i, call in enumerate(message.tool_calls):
        written += "\n" * (i > 0 or bool(message.content)) + "<tool_call>\n"
        written += '{"name": "' + call.name + '", "arguments": ' + json_text(call.arguments) + "}\n</tool_call>"
    return written


def qwen_3(message: Message) -> str:
    bare = chatml_calls(message._replace(content=message.content.lstrip("\n")))
    return "<think>\n" + message.reasoning.strip("\n") + "\n</think>\n\n" + bare + "<|im_end|>"


def gpt_oss(message: Message) -> str:
    if message.tool_calls:
        (call,) = message.tool_calls
        thought = message.content or message.reasoning
        to = f" to=functions.{call.name}<|channel|>commentary json<|message|>{json_text(call.arguments)}<|call|>"
    else:
        thought, to = message.reasoning, "<|channel|>final<|message|>" + message.content + "<|return|>"
    if not thought:
        return to
    return f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant{to}"


def llama_3_1(message: Message) -> str:
    if not message.tool_calls:
        return message.content.strip() + "<|eot_id|>"
    (call,) = message.tool_calls
    return '{"name": "' + call.name + '", "parameters": ' + json_text(call.arguments) + "}<|eot_id|>"


def mistral_v3(message: Message) -> str:
    if not message.tool_calls:
        return " " + message.content + "</s>"
    calls = [{"name": call.name, "arguments": call.arguments, "id": call.id} for call in message.tool_calls]
    return "[TOOL_CALLS] " + json_text(calls) + "</s>"


def deepseek_v3(message: Message) -> str:
    written = message.content
    for i, call in enumerate(message.tool_calls):
        written += "\n" if i else "<｜tool▁calls▁begin｜>"
        written += f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{call.name}\n```json\n{json_text(call.arguments)}\n```"
        written += "<｜tool▁call▁end｜>"
    return written + "<｜tool▁calls▁end｜>" * bool(message.tool_calls) + "<｜end▁of▁sentence｜>"


def one_turn_calls(message: Message) -> str:
    if not message.tool_calls:
        return message.content.strip() + "<turn|>"
    (call,) = message.tool_calls
    return f"<|tool_call>call:{call.name}{json_text(call.arguments)}<tool_call|><|tool_response>"


ALTERNATE = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
)
FIRST_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
)
CHATML_TOOLS = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}"
    "{{- '# Tools\n\n<tools>' }}{%- for tool in tools %}{{- '\n' + tool | tojson }}{%- endfor %}"
    "{{- '\n</tools>\n\nCall them within <tool_call></tool_call>.<|im_end|>\n' }}"
    "{%- elif messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}"
)
CHATML_CALLS = (
    "{%- for call in message.tool_calls or [] %}{%- if (loop.first and content) or not loop.first %}{{- '\n' }}"
    "{%- endif %}{%- set call = call.function %}"
    '{{- \'<tool_call>\n{"name": "\' + call.name + \'", "arguments": \' }}'
    "{%- if call.arguments is string %}{{- call.arguments }}{%- else %}{{- call.arguments | tojson }}{%- endif %}"
    "{{- '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}"
)
CHATML_RESULTS = (
    "{%- elif message.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}"
)
LLAMA_3_HEADER = "'<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
LLAMA_3_TOKENS = ("<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CALL_MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
DEEPSEEK_TOKENS = (
    *("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>"),
    *(
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁outputs▁begin｜>",
    ),
    *("<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
)
DEEPSEEK = (
    "{% set ns = namespace(is_tool=false, is_first=true, system='') %}"
    "{%- for m in messages %}{%- if m['role'] == 'system' %}{% set ns.system = m['content'] %}{%- endif %}{%- endfor %}"
    "{{ bos_token }}{{ ns.system }}{%- for m in messages %}"
    "{%- if m['role'] == 'user' %}{%- set ns.is_tool = false -%}{{ '<｜User｜>' + m['content'] }}"
    "{%- elif m['role'] == 'assistant' and m['tool_calls'] %}{%- set ns.is_tool = false -%}"
    "{{ '<｜Assistant｜>' + m['content'] + '<｜tool▁calls▁begin｜>' }}{%- for call in m['tool_calls'] %}"
    "{{ ('' if loop.first else '\n') + '<｜tool▁call▁begin｜>' + call['type'] + '<｜tool▁sep｜>' "
    "+ call['function']['name'] + '\n```json\n' + call['function']['arguments'] + '\n```<｜tool▁call▁end｜>' }}"
    "{%- endfor %}{{ '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}"
    "{%- elif m['role'] == 'assistant' %}{% set content = m['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ ('<｜tool▁outputs▁end｜>' if ns.is_tool else '<｜Assistant｜>') + content + '<｜end▁of▁sentence｜>' }}"
    "{%- set ns.is_tool = false -%}"
    "{%- elif m['role'] == 'tool' %}{%- set ns.is_tool = true -%}"
    "{{ '<｜tool▁outputs▁begin｜>' if ns.is_first else '\n' }}{%- set ns.is_first = false -%}"
    "{{ '<｜tool▁output▁begin｜>' + m['content'] + '<｜tool▁output▁end｜>' }}{%- endif %}"
    "{%- endfor -%}{% if ns.is_tool %}{{ '<｜tool▁outputs▁end｜>' }}{% endif %}"
    "{% if add_generation_prompt and not ns.is_tool %}{{ '<｜Assistant｜>' }}"
)

FAMILIES = {
    "default": Family(None, ("<|endoftext|>",), plain("<|endoftext|>")),
    "chatml": Family(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        CHATML_TOKENS,
        plain("<|im_end|>"),
    ),
    "llama-2": Family(
        FIRST_SYSTEM + "{% for m in rest %}" + ALTERNATE + "{% set content = m['content'] %}"
        "{% if loop.first and system %}"
        "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + content %}{% endif %}"
        "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        ("</s>", "<s>"),
        plain("</s>", before=" ", after=" ", trim=True),
        bos="<s>",
    ),
    "llama-3": Family(
        "{% for m in messages %}{% set content = " + LLAMA_3_HEADER + " + m['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        LLAMA_3_TOKENS,
        plain("<|eot_id|>", trim=True),
        bos="<|begin_of_text|>",
    ),
    "llama-3.1": Family(
        "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
        "{%- if not tools is defined %}{%- set tools = none %}{%- endif %}"
        "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] | trim %}"
        "{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}"
        "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
        "{%- if builtin_tools is defined or tools is not none %}{{- 'Environment: ipython\n' }}{%- endif %}"
        "{{- 'Cutting Knowledge Date: December 2023\nToday Date: ' + date_string + '\n\n' }}"
        "{{- system_message + '<|eot_id|>' }}"
        "{%- if tools is not none %}{%- set first = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}"
        "{{- '<|start_header_id|>user<|end_header_id|>\n\nGiven the following functions, respond with JSON.\n\n' -}}"
        "{%- for t in tools %}{{- t | tojson(indent=4) }}{{- '\n\n' }}{%- endfor %}{{- first + '<|eot_id|>' }}"
        "{%- endif %}"
        "{%- for m in messages %}{%- if not (m.role == 'tool' or 'tool_calls' in m) %}"
        "{{- " + LLAMA_3_HEADER + " + m['content'] | trim + '<|eot_id|>' }}"
        "{%- elif 'tool_calls' in m %}{%- if not m.tool_calls | length == 1 %}"
        "{{- raise_exception('This model only supports single tool-calls at once!') }}{%- endif %}"
        "{%- set call = m.tool_calls[0].function %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}"
        "{%- if builtin_tools is defined and call.name in builtin_tools %}"
        "{{- '<|python_tag|>' + call.name + '.call(' }}"
        "{%- for name, value in call.arguments | items %}{{- name + '=\"' + value + '\"' }}{%- endfor %}{{- ')' }}"
        "{%- else %}{{- '{\"name\": \"' + call.name + '\", \"parameters\": ' }}{{- call.arguments | tojson }}{{- '}' }}"
        "{%- endif %}{{- '<|eom_id|>' if builtin_tools is defined else '<|eot_id|>' }}"
        "{%- else %}{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}"
        "{%- if m.content is mapping or m.content is iterable %}{{- m.content | tojson }}"
        "{%- else %}{{- m.content }}{%- endif %}{{- '<|eot_id|>' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}",
        (*LLAMA_3_TOKENS, "<|eom_id|>", "<|python_tag|>"),
        llama_3_1,
        bos="<|begin_of_text|>",
        tools=True,
        calls=True,
    ),
    "mistral-v1": Family(
        "{{ bos_token }}{% for m in messages %}" + ALTERNATE + "{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}"
        "{% endfor %}",
        ("</s>", "<s>"),
        plain("</s>", before=" "),
        bos="<s>",
        system=False,
    ),
    "mistral-v3": Family(  # a system prompt goes into the last user turn, so earlier turns are written otherwise later
        "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
        "{%- set rest = messages[1:] %}{%- else %}{%- set rest = messages %}{%- endif %}"
        "{%- if not tools is defined %}{%- set tools = none %}{%- endif %}"
        "{%- set users = rest | selectattr('role', 'equalto', 'user') | list %}"
        "{%- for m in rest | rejectattr('role', 'equalto', 'tool') | selectattr('tool_calls', 'undefined') %}"
        + ALTERNATE
        + "{%- endfor %}{{- bos_token }}{%- for m in rest %}{%- if m['role'] == 'user' %}"
        "{%- if tools is not none and m == users[-1] %}{{- '[AVAILABLE_TOOLS] [' }}"
        "{%- for tool in tools %}{{- tool | tojson }}{{- ', ' if not loop.last }}{%- endfor %}"
        "{{- '][/AVAILABLE_TOOLS]' }}{%- endif %}"
        "{%- if loop.last and system_message is defined %}"
        "{{- '[INST] ' + system_message + '\n\n' + m['content'] + '[/INST]' }}"
        "{%- else %}{{- '[INST] ' + m['content'] + '[/INST]' }}{%- endif %}"
        "{%- elif m.tool_calls is defined %}{{- '[TOOL_CALLS] [' }}{%- for call in m.tool_calls %}"
        "{%- set out = call.function | tojson %}{{- out[:-1] }}"
        "{%- if not call.id is defined or call.id | length != 9 %}{{- raise_exception('ids have nine letters') }}"
        "{%- endif %}{{- ', \"id\": \"' + call.id + '\"}' }}"
        "{{- ', ' if not loop.last else ']' + eos_token }}{%- endfor %}"
        "{%- elif m['role'] == 'assistant' %}{{- ' ' + m['content'] + eos_token }}"
        "{%- elif m['role'] == 'tool' %}{{- '[TOOL_RESULTS] {\"content\": ' + m['content'] + ', \"call_id\": \"' "
        "+ m['tool_call_id'] + '\"}[/TOOL_RESULTS]' }}{%- endif %}{%- endfor %}",
        (
            *("</s>", "<s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]"),
            *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ),
        mistral_v3,
        bos="<s>",
        tools=True,
        calls=True,
    ),
    "gemma": Family(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for m in messages %}" + ALTERNATE + "{% set role = 'model' if m['role'] == 'assistant' "
        "else m['role'] %}{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        plain("<end_of_turn>", trim=True),
        bos="<bos>",
        marks=("\n\n", "<b>"),
        system=False,
    ),
    "gemma-3": Family(
        "{{ bos_token }}" + FIRST_SYSTEM + "{% for m in rest %}" + ALTERNATE + "{% set role = 'model' "
        "if m['role'] == 'assistant' else m['role'] %}{{ '<start_of_turn>' + role + '\n' "
        "+ ((system + '\n\n') if loop.first and system else '') + m['content'] | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        plain("<end_of_turn>", trim=True),
        bos="<bos>",
    ),
    "phi-3": Family(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        plain("<|end|>"),
    ),
    "phi-4": Family(
        "{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ '<|im_start|>system<|im_sep|>' + m['content'] + '<|im_end|>' }}{% elif m['role'] == 'user' %}"
        "{{ '<|im_start|>user<|im_sep|>' + m['content'] + '<|im_end|>' }}{% elif m['role'] == 'assistant' %}"
        "{{ '<|im_start|>assistant<|im_sep|>' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
        (*CHATML_TOKENS, "<|im_sep|>"),
        plain("<|im_end|>"),
    ),
    "zephyr": Family(
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>\n' + m['content'] + eos_token }}"
        "{% elif m['role'] == 'system' %}{{ '<|system|>\n' + m['content'] + eos_token }}"
        "{% elif m['role'] == 'assistant' %}{{ '<|assistant|>\n' + m['content'] + eos_token }}{% endif %}"
        "{% if loop.last and add_generation_prompt %}{{ '\n<|assistant|>\n' }}"
        "{% elif not loop.last %}{{ '\n' }}{% endif %}{% endfor %}",
        ("</s>",),
        plain("</s>"),
    ),
    "command-r": Family(
        "{{ bos_token }}" + FIRST_SYSTEM + "{% if system %}"
        "{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + system + '<|END_OF_TURN_TOKEN|>' }}{% endif %}"
        "{% for m in rest %}" + ALTERNATE + "{% set content = m['content'] %}{% if m['role'] == 'user' %}"
        "{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}"
        "{% elif m['role'] == 'assistant' %}"
        "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
        (
            *("<EOS_TOKEN>", "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>"),
            *("<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        ),
        plain("<|END_OF_TURN_TOKEN|>", trim=True),
        bos="<BOS_TOKEN>",
    ),
    "deepseek-v2": Family(
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\n\n' }}"
        "{% elif m['role'] == 'assistant' %}{{ 'Assistant: ' + m['content'] + eos_token }}"
        "{% elif m['role'] == 'system' %}{{ m['content'] + '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
        DEEPSEEK_TOKENS[:2],
        plain("<｜end▁of▁sentence｜>", before=" "),
        bos="<｜begin▁of▁sentence｜>",
    ),
    "deepseek-v3": Family(
        DEEPSEEK + "{% endif %}",
        DEEPSEEK_TOKENS,
        deepseek_v3,
        bos="<｜begin▁of▁sentence｜>",
        marks=("</think>",),
        calls=True,
        words_with_calls=True,
        arguments_as_text=True,
    ),
    "deepseek-r1": Family(
        DEEPSEEK + "{{ '<think>\n' }}{% endif %}",
        DEEPSEEK_TOKENS,
        deepseek_v3,
        bos="<｜begin▁of▁sentence｜>",
        marks=("<think>", "</think>"),
        opening="<think>\n",
        arguments_as_text=True,
    ),
    "qwen-2.5": Family(
        CHATML_TOOLS + "{%- if not tools and messages[0].role != 'system' %}"
        "{{- '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{%- endif %}"
        "{%- for message in messages %}{%- set content = message.content %}"
        "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) "
        "or (message.role == 'assistant' and not message.tool_calls) %}"
        "{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}"
        "{%- elif message.role == 'assistant' %}{{- '<|im_start|>assistant' + ('' if content else '\n') }}"
        "{%- if content %}{{- '\n' + content }}{%- endif %}"
        + CHATML_CALLS
        + CHATML_RESULTS
        + "{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}",
        CHATML_TOKENS,
        lambda m: chatml_calls(m) + "<|im_end|>",
        marks=CALL_MARKS,
        tools=True,
        calls=True,
        words_with_calls=True,
    ),
    "qwen-3": Family(
        CHATML_TOOLS + "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages | length - 1) %}"
        "{%- for message in messages[::-1] %}{%- set index = (messages | length - 1) - loop.index0 %}"
        "{%- if ns.multi_step_tool and message.role == 'user' and message.content is string and not "
        "(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}"
        "{%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}{%- endif %}{%- endfor %}"
        "{%- for message in messages %}"
        "{%- set content = message.content if message.content is string else '' %}"
        "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
        "{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}"
        "{%- elif message.role == 'assistant' %}{%- set reasoning_content = '' %}"
        "{%- if message.reasoning_content is string %}{%- set reasoning_content = message.reasoning_content %}"
        "{%- elif '</think>' in content %}"
        "{%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
        "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
        "{%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}"
        "{{- '<|im_start|>assistant\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' "
        "+ content.lstrip('\n') }}"
        "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}"
        + CHATML_CALLS
        + CHATML_RESULTS
        + "{%- endif %}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
        "{%- endif %}",
        CHATML_TOKENS,
        qwen_3,
        marks=(*CALL_MARKS, "<think>", "</think>"),
        tools=True,
        calls=True,
        words_with_calls=True,
        thinks=True,
    ),
    "gpt-oss": Family(
        "{%- macro system_message() -%}{{- 'You are ChatGPT.\nCurrent date: ' + strftime_now('%Y-%m-%d') + '\n\n' }}"
        "{%- if reasoning_effort is not defined %}{%- set reasoning_effort = 'medium' %}{%- endif %}"
        "{{- 'Reasoning: ' + reasoning_effort + '\n\n# Valid channels: analysis, commentary, final.' }}{%- endmacro -%}"
        "{{- '<|start|>system<|message|>' }}{{- system_message() }}{{- '<|end|>' }}"
        "{%- if messages[0].role == 'developer' or messages[0].role == 'system' %}"
        "{%- set developer_message = messages[0].content %}{%- set loop_messages = messages[1:] %}"
        "{%- else %}{%- set developer_message = '' %}{%- set loop_messages = messages %}{%- endif %}"
        "{%- if developer_message or tools %}{{- '<|start|>developer<|message|>' }}"
        "{%- if developer_message %}{{- '# Instructions\n\n' + developer_message + '\n\n' }}{%- endif %}"
        "{%- if tools %}{{- '# Tools\n\n## functions\n\n' }}{%- for tool in tools %}{%- set tool = tool.function %}"
        "{{- '// ' + tool.description + '\ntype ' + tool.name + ' = (_: ' + tool.parameters | tojson + ') => any;\n' }}"
        "{%- endfor %}{%- endif %}{{- '<|end|>' }}{%- endif %}"
        "{%- set last_tool_call = namespace(name=none) %}{%- for message in loop_messages -%}"
        "{%- if message.role == 'assistant' -%}{%- if 'tool_calls' in message %}"
        "{%- set future = namespace(found=false) %}{%- for later in loop_messages[loop.index:] %}"
        "{%- if later.role == 'assistant' and 'tool_calls' not in later %}{%- set future.found = true %}{%- endif %}"
        "{%- endfor %}{%- set tool_call = message.tool_calls[0].function %}"
        "{%- if message.content and message.thinking %}{{- raise_exception('Cannot pass both content and thinking') }}"
        "{%- elif message.content and not future.found %}"
        "{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.content + '<|end|>' }}"
        "{%- elif message.thinking and not future.found %}"
        "{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}{%- endif %}"
        "{{- '<|start|>assistant to=functions.' + tool_call.name + '<|channel|>commentary json<|message|>' }}"
        "{{- tool_call.arguments | tojson }}{{- '<|call|>' }}{%- set last_tool_call.name = tool_call.name %}"
        "{%- elif loop.last and not add_generation_prompt %}{%- if 'thinking' in message %}"
        "{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}{%- endif %}"
        "{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|return|>' }}"
        "{%- else %}{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}"
        "{%- set last_tool_call.name = none %}{%- endif %}"
        "{%- elif message.role == 'tool' -%}{%- if last_tool_call.name is none %}"
        "{{- raise_exception('Message has tool role, but there was no call!') }}{%- endif %}"
        "{{- '<|start|>functions.' + last_tool_call.name + ' to=assistant<|channel|>commentary<|message|>' "
        "+ message.content | tojson + '<|end|>' }}"
        "{%- elif message.role == 'user' -%}{{- '<|start|>user<|message|>' + message.content + '<|end|>' }}"
        "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}",
        (
            *("<|return|>", "<|startoftext|>", "<|endoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>"),
            *("<|call|>", "<|constrain|>"),
        ),
        gpt_oss,
        tools=True,
        calls=True,
        thinks=True,
    ),
    "vicuna": Family(
        FIRST_SYSTEM + "{% for m in rest %}" + ALTERNATE + "{% if loop.index0 == 0 %}"
        "{{ bos_token + (system.strip() + '\n\n' if system else '') }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'].strip() + '\n' }}"
        "{% elif m['role'] == 'assistant' %}{{ 'ASSISTANT: ' + m['content'].strip() + eos_token + '\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        ("</s>", "<s>"),
        plain("</s>", before=" ", trim=True),
        bos="<s>",
    ),
    "falcon": Family(
        "{% for m in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}{% if m['role'] == 'system' %}"
        "{{ m['content'] }}{% elif m['role'] == 'user' %}{{ 'User: ' + m['content'] }}"
        "{% elif m['role'] == 'assistant' %}{{ 'Falcon: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\nFalcon:' }}{% endif %}",
        ("<|endoftext|>",),
        plain("<|endoftext|>", before=" "),
    ),
    # The rest are no family's: what a template of tomorrow may do.
    "marked for transformers": Family(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        CHATML_TOKENS,
        plain("<|im_end|>"),
    ),
    "macros": Family(
        "{%- macro turn(role, words='') %}{{- '[' ~ role | upper ~ '] ' ~ words | trim }}{%- endmacro %}"
        "{%- set ns = namespace(turns=0, text=bos_token) %}{%- for m in messages %}"
        "{%- set ns.text = ns.text ~ turn(m.role, m.content) ~ eos_token %}{%- set ns.turns = ns.turns + 1 %}"
        "{%- if ns.turns > 99 %}{%- break %}{%- endif %}{%- endfor %}{{- ns.text }}"
        "{%- if add_generation_prompt %}{{- turn('assistant') }}{%- endif %}",
        ("</s>", "<s>"),
        plain("</s>", trim=True),
        bos="<s>",
    ),
    "no generation prompt": Family(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}",
        CHATML_TOKENS,
        plain("<|im_end|>", before="<|im_start|>assistant\n"),
    ),
    "thinking prompt": Family(  # the prompt opens the thought, and answers keep it
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
        CHATML_TOKENS,
        lambda m: m.reasoning + "\n</think>\n\n" + m.content + "<|im_end|>",
        marks=("<think>", "</think>"),
        thinks=True,
    ),
    "one turn with its tools": Family(  # Gemma 4: what a tool answers stands inside the assistant's turn
        "{{- bos_token }}{%- for t in tools or [] %}{{- '<|tool>' + t | tojson + '<tool|>' }}{%- endfor %}"
        "{%- for m in messages %}{%- if m.role == 'tool' %}{{- 'response:' + m.content + '<tool_response|>' }}"
        "{%- else %}{%- if not (m.role == 'assistant' and loop.previtem and loop.previtem.role == 'tool') %}"
        "{{- '<|turn>' + m.role + '\n' }}{%- endif %}"
        "{%- if m.tool_calls %}{%- set call = m.tool_calls[0].function %}"
        "{{- '<|tool_call>call:' + call.name + call.arguments | tojson + '<tool_call|><|tool_response>' }}"
        "{%- else %}{{- m.content | trim + '<turn|>\n' }}{%- endif %}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt and messages[-1].role != 'tool' %}{{- '<|turn>assistant\n' }}{%- endif %}",
        (
            *("<eos>", "<bos>", "<|turn>", "<turn|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>"),
            *("<|tool_response>", "<tool_response|>"),
        ),
        one_turn_calls,
        bos="<bos>",
        tools=True,
        calls=True,
    ),
    "two ends": Family(
        "{{ bos_token }}{% for m in messages %}{{ '<|START|><|' + m.role | upper + '|>' + m.content }}"
        "{{ '<|END_RESPONSE|>' if m.role == 'assistant' }}{{ '<|END|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|START|><|ASSISTANT|>' }}{% endif %}",
        (
            *("<eos>", "<bos>", "<|START|>", "<|END|>", "<|END_RESPONSE|>", "<|SYSTEM|>", "<|USER|>"),
            "<|ASSISTANT|>",
        ),
        plain("<|END_RESPONSE|><|END|>"),
        bos="<bos>",
    ),
}


def pin_the_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """For transformers too, which writes today's date into GPT-OSS's system prompt."""

    class Today(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Today:
            return cls(DATE.year, DATE.month, DATE.day)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Today)


def shown(message: Message, family: Family) -> dict[str, Any]:
    """`message` as transformers is given it."""
    made: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        made["reasoning_content"] = made["thinking"] = message.reasoning
    if message.tool_calls:
        made["tool_calls"] = []
        for call in message.tool_calls:
            arguments = json_text(call.arguments) if family.arguments_as_text else call.arguments
            function = {"name": call.name, "arguments": arguments}
            made["tool_calls"].append({"type": "function", "id": call.id, "function": function})
    return made | {key: value for key in ("name", "tool_call_id") if (value := getattr(message, key)) is not None}


def hugging_face(
    tokenizer: PreTrainedTokenizerFast,
    family: Family,
    conversation: Conversation,
    count: int,
    generation_prompt: bool,
    **variables: Any,
) -> str:
    """What transformers writes for the first `count` messages."""
    messages = [shown(message, family) for message in conversation.messages[:count]]
    return str(
        tokenizer.apply_chat_template(
            messages,
            tools=list(conversation.tools) or None,
            add_generation_prompt=generation_prompt,
            tokenize=False,
            date_string="26 Jul 2024",
            **variables,
        )
    )


@cache
def tokenizer_of(name: str, kind: str = "bytes") -> PreTrainedTokenizerFast:
    """A tokenizer for a family: `bytes` as GPT-2's and Llama 3's, `pieces` as Llama 2's, which puts a space before
    whatever begins."""
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[name]
    backend = Tokenizer.from_str(_base(kind))
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in family.specials])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in family.marks])
    if family.bos:  # Llama's tokenizer adds it by itself, so it would stand there twice with the template's own
        backend.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, backend.token_to_id(family.bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=family.specials[0],
        bos_token=family.bos,
        clean_up_tokenization_spaces=False,
    )
    return with_template(tokenizer, family.template)


@cache
def _base(kind: str) -> str:
    """A small vocabulary without control tokens."""
    if kind == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet, texts = sorted(pre_tokenizers.ByteLevel.alphabet()), TEXT * 8
    else:
        backend = Tokenizer(models.BPE(byte_fallback=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence(steps)
        alphabet = sorted(set("".join(TEXT) + "<|_>[]/{}\"'"))
        # Without a pre-tokenizer the training text is cut into words here, or whole sentences would become tokens.
        texts = [word for text in TEXT for word in text.replace("\n", " \n ").split(" ")] * 8
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)] if kind == "pieces" else []
    trainer = trainers.BpeTrainer(
        vocab_size=600 + len(bytes_), special_tokens=bytes_, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    made = json.loads(backend.to_str())
    made["added_tokens"] = []  # bytes are pieces like any other
    return json.dumps(made)
