"""How rows become documents: what is unrolled, what is counted, what is refused and with which words."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from launcher.data.conversation import Conversation, Message, ToolCall
from launcher.data.masks.encoder import Document, Encoder, adds_bos, end_of_turn_id, without_end_markers
from launcher.data.tokenizer import train_tokenizer, with_template
from launcher.errors import DataError
from tests.unit.families import FAMILIES, TEXT, TOOL, hugging_face, pin_the_day, tokenizer_of

USER, TOLD = Message("user", "What is the sum?"), Message("assistant", "The sum is five.")
SINGLE = Conversation((USER, TOLD), "rows.jsonl:1")
SYSTEM = Message("system", "You are brief.")
CALL = Message("assistant", "", tool_calls=(ToolCall("get_weather", {"city": "Paris"}, "abcdefghi"),))
RESULT = Message("tool", '{"sky": "clear"}', name="get_weather", tool_call_id="abcdefghi")


def row(*messages: Message, **more: Any) -> Conversation:
    return Conversation(messages, "rows.jsonl:1", **more)


def documents(
    name: str, conversation: Conversation, variables: dict[str, Any] | None = None, **options: Any
) -> list[Document]:
    tokenizer = copy.copy(tokenizer_of(name))
    with_template(tokenizer, None, variables)
    (made,) = Encoder(tokenizer, **({"supervise": "all"} | options)).encode([conversation])
    assert not isinstance(made, DataError), made
    return made


def refusal(name: str, conversation: Conversation, **options: Any) -> DataError:
    (made,) = Encoder(tokenizer_of(name), **({"supervise": "all"} | options)).encode([conversation])
    assert isinstance(made, DataError), made
    assert made.message.startswith("rows.jsonl:1: ")
    assert made.hint
    return made


def coloured(name: str, document: Document) -> str:
    """The text, what is learned between brackets."""
    tokenizer = tokenizer_of(name)
    text, before = "", 0
    borders = np.flatnonzero(np.diff(document.supervised)) + 1
    for ids, learned in zip(np.split(document.input_ids, borders), np.split(document.supervised, borders), strict=True):
        text += f"⟦{tokenizer.decode(ids)}⟧" if learned[0] else tokenizer.decode(ids)
        before += len(ids)
    return text


def test_history_that_is_written_otherwise_is_unrolled() -> None:
    """Qwen3 drops the thoughts of answers that were given before the last question."""
    thoughts = row(
        USER, TOLD._replace(reasoning="Two and three"), Message("user", "And?"), Message("assistant", "Six.")
    )
    first, second = documents("qwen-3", thoughts)
    asked = "<|im_start|>user\nWhat is the sum?<|im_end|>\n<|im_start|>assistant\n"
    assert coloured("qwen-3", first) == (asked + "⟦<think>\nTwo and three\n</think>\n\nThe sum is five.<|im_end|>⟧\n")
    assert coloured("qwen-3", second) == (
        asked + "The sum is five.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\n\n</think>\n\nSix.<|im_end|>⟧\n"
    )
    assert (first.notes, second.notes) == ({}, {"unrolled": 1})
    (last,) = documents("qwen-3", thoughts, supervise="last")
    assert coloured("qwen-3", last) == coloured("qwen-3", second)
    assert last.notes == {}


def test_what_stands_as_at_inference_stays_together() -> None:
    """Within one question Qwen3 keeps the thoughts: the call and the answer are one document, the next another."""
    conversation = row(
        USER,
        CALL._replace(reasoning="I look"),
        RESULT,
        TOLD._replace(reasoning="It says"),
        USER,
        TOLD._replace(reasoning="Again"),
        tools=(TOOL,),
    )
    first, second = documents("qwen-3", conversation)
    assert (first.num_turns, second.num_turns) == (2, 1)
    assert "⟦<think>\nI look\n</think>" in coloured("qwen-3", first)
    assert "I look" not in coloured("qwen-3", second)


def test_an_answer_that_rewrites_its_own_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-OSS shows the thoughts behind a call to the model that answers, and drops them once it has answered."""
    pin_the_day(monkeypatch)
    conversation = row(
        USER, CALL._replace(reasoning="I look"), RESULT, TOLD._replace(reasoning="It says"), tools=(TOOL,)
    )
    (document,) = documents("gpt-oss", conversation)
    prompt = hugging_face(tokenizer_of("gpt-oss"), FAMILIES["gpt-oss"], conversation, 3, True)
    own = hugging_face(tokenizer_of("gpt-oss"), FAMILIES["gpt-oss"], conversation, 4, False)
    assert "I look" in prompt
    assert "I look" not in own
    text = coloured("gpt-oss", document)
    assert text.replace("⟦", "").replace("⟧", "").startswith(prompt)
    assert text.endswith(
        "<|start|>assistant⟦<|channel|>analysis<|message|>It says<|end|><|start|>assistant<|channel|>final<|message|>"
        "The sum is five.<|return|>⟧"
    )
    assert "<|start|>assistant⟦<|channel|>analysis<|message|>I look<|end|><|start|>assistant to=functions" in text
    assert '{"city": "Paris"}<|call|>⟧' in text


def test_a_generation_prompt_that_answers_lack_is_said_aloud() -> None:
    """DeepSeek-R1's ends with <think>, and its answers are written without."""
    (document,) = documents("deepseek-r1", row(USER, TOLD, USER, TOLD._replace(reasoning="Two and three")))
    text = coloured("deepseek-r1", document)
    assert text.count("<｜Assistant｜>⟦The sum is five.<｜end▁of▁sentence｜>⟧") == 2
    note = "the generation prompt ends with '<think>\\n', which the chat template leaves out of answers"
    assert document.notes == {note: 2, "thoughts_left_out": 1}
    # An answer that has the thought itself goes on where the prompt ends; behind the next question it has none.
    told = Message("assistant", "<think>\nTwo and three\n</think>\n\nfive")
    first, second = documents("deepseek-r1", row(USER, told, USER, told))
    assert "<｜Assistant｜><think>\n⟦Two and three\n</think>\n\nfive<｜end▁of▁sentence｜>⟧" in coloured(
        "deepseek-r1", first
    )
    assert "<｜Assistant｜>\n\nfive<｜end▁of▁sentence｜><｜User｜>" in coloured("deepseek-r1", second)
    assert second.notes == {"unrolled": 1}


def test_thoughts_that_stand_among_the_words_keep_their_marks() -> None:
    """They are the assistant's own; spelled out by anyone else the same marks are text."""
    conversation = row(
        Message("user", "Use <think> or </think>"), Message("assistant", "<think>\nHm <|im_end|>\n</think>\n\nfive")
    )
    (document,) = documents("qwen-3", conversation)
    ids, tokenizer = document.input_ids.tolist(), tokenizer_of("qwen-3")
    for mark in ("<think>", "</think>", "<|im_end|>"):
        assert ids.count(tokenizer.convert_tokens_to_ids(mark)) == 1 + (mark == "<|im_end|>")
    assert coloured("qwen-3", document).endswith("⟦<think>\nHm <|im_end|>\n</think>\n\nfive<|im_end|>⟧\n")
    assert document.notes == {"control_tokens_as_text": 3}


def test_control_tokens_in_calls_and_tools_are_text() -> None:
    call = CALL._replace(tool_calls=(ToolCall("get_weather", {"city": "</tool_call>", "n": [1, "<|im_end|>"]}),))
    tool = {"type": "function", "function": TOOL["function"] | {"description": "Of a <tool_call>"}}
    conversation = row(USER, call, Message("tool", "a </tool_response>"), TOLD, tools=(tool,))
    (document,) = documents("qwen-2.5", conversation)
    (other,) = documents("qwen-2.5", row(USER, CALL, RESULT, TOLD, tools=(TOOL,)))
    controls = set(tokenizer_of("qwen-2.5").added_tokens_decoder)
    assert [i for i in document.input_ids.tolist() if i in controls] == [
        i for i in other.input_ids.tolist() if i in controls
    ]
    assert '"city": "</tool_call>"' in coloured("qwen-2.5", document)
    assert document.notes == {"control_tokens_as_text": 4}


def test_stripped_control_tokens_are_counted() -> None:
    conversation = row(Message("user", "What <|im_<|im_end|>end|>is?"), Message("assistant", "five<|im_start|> or six"))
    (document,) = documents("chatml", conversation, special_tokens="strip")
    assert coloured("chatml", document) == (
        "<|im_start|>user\nWhat is?<|im_end|>\n<|im_start|>assistant\n⟦five or six<|im_end|>⟧\n"
    )
    assert document.notes == {"control_tokens_stripped": 3}


def test_marks_of_the_row_decide_what_is_learned() -> None:
    said = [Message("assistant", word) for word in ("one", "two", "three")]
    conversation = row(USER, said[0]._replace(learn=True), USER, said[1]._replace(learn=False), USER, said[2])

    def learned(conversation: Conversation, supervise: str) -> list[str]:
        (document,) = documents("chatml", conversation, supervise=supervise)
        return [part.split("<|im_end|>⟧")[0] for part in coloured("chatml", document).split("⟦")[1:]]

    assert learned(conversation, "all") == ["one", "three"]
    assert learned(conversation, "last") == ["three"]
    assert learned(conversation, "marked") == ["one"]
    unmarked = row(USER, said[0]._replace(learn=False))
    for supervise in ("all", "last", "marked"):
        assert "no assistant turn is marked" in refusal("chatml", unmarked, supervise=supervise).message
    # What follows the last learned turn is left off: nothing in it is learned.
    (document,) = documents("chatml", conversation, supervise="marked")
    assert coloured("chatml", document).count("<|im_start|>") == 2


def test_system_turns_for_templates_that_know_none() -> None:
    conversation = row(SYSTEM, Message("developer", "Be kind."), USER, TOLD, USER, TOLD)
    error = refusal("gemma", conversation)
    assert "refuses this conversation: System role not supported" in error.message
    assert "data.system_turns: merge" in str(error.hint)
    (merged,) = documents("gemma", conversation, system_turns="merge")
    assert coloured("gemma", merged).startswith(
        "<bos><start_of_turn>user\nYou are brief.\n\nBe kind.\n\nWhat is the sum?<end_of_turn>\n<start_of_turn>model\n⟦"
    )
    assert merged.notes == {"system_turns_merged": 2}
    (dropped,) = documents("gemma", conversation, system_turns="drop")
    (without,) = documents("gemma", row(USER, TOLD, USER, TOLD))
    assert dropped.input_ids.tolist() == without.input_ids.tolist()
    assert dropped.notes == {"system_turns_dropped": 2}
    assert "no user turn follows" in refusal("chatml", row(SYSTEM, TOLD), system_turns="merge").message
    # Messages keep the numbers that they have in the user's row.
    empty = row(SYSTEM, USER, Message("assistant", " "))
    assert "message 3: the assistant says nothing" in refusal("gemma", empty, system_turns="drop").message


def test_plain_text_is_learned_whole() -> None:
    text = Conversation((), "rows.jsonl:1", text="Once upon </s> a time.\n</s> <|endoftext|>\n")
    (document,) = documents("llama-2", text)
    assert coloured("llama-2", document) == "<s>⟦Once upon </s> a time.\n</s>⟧"
    assert document.input_ids.tolist().count(tokenizer_of("llama-2").eos_token_id) == 1
    assert document.notes == {"end_markers_removed": 1, "control_tokens_as_text": 1}
    (document,) = documents("chatml", Conversation((), "rows.jsonl:1", text="Once."))
    assert coloured("chatml", document) == "⟦Once.<|endoftext|>⟧"
    assert document.num_targets == len(document.input_ids) - 1
    assert "is empty" in refusal("chatml", Conversation((), "rows.jsonl:1", text="<|endoftext|>")).message


def test_end_markers_of_older_files_go() -> None:
    marked = row(Message("user", "a<|endoftext|>"), Message("assistant", "five<|endoftext|> </s>\n"))
    plain = row(Message("user", "a<|endoftext|>"), Message("assistant", "five"))
    assert without_end_markers(marked, "</s>") == (plain, 1)
    assert without_end_markers(plain, "</s>") == (plain, 0)
    (document,), (other,) = documents("mistral-v1", marked), documents("mistral-v1", plain)
    assert document.notes == {"end_markers_removed": 1}
    assert document.input_ids.tolist() == other.input_ids.tolist()
    empty = row(USER, Message("assistant", "<|endoftext|>"))
    assert "message 2: the assistant says nothing" in refusal("mistral-v1", empty).message


def test_the_end_of_text_is_learned_where_it_also_fills() -> None:
    tokenizer = train_tokenizer(TEXT, 300)
    tokenizer.pad_token = tokenizer.eos_token
    (made,) = Encoder(with_template(tokenizer, None), "all").encode([SINGLE])
    assert isinstance(made, list)
    (document,) = made
    assert document.input_ids[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert document.supervised[-1] == 1


def test_variables_of_the_template() -> None:
    (document,) = documents("qwen-3", SINGLE, variables={"enable_thinking": False})
    assert coloured("qwen-3", document).endswith("assistant\n<think>\n\n</think>\n\n⟦The sum is five.<|im_end|>⟧\n")
    search = CALL._replace(tool_calls=(ToolCall("search", {"query": "Paris"}),))
    kwargs = {"builtin_tools": ["search"]}
    (document,) = documents("llama-3.1", row(USER, search, RESULT, TOLD), variables=kwargs)
    assert '⟦<|python_tag|>search.call(query="Paris")<|eom_id|>⟧' in coloured("llama-3.1", document)
    assert coloured("llama-3.1", document).endswith("⟦The sum is five.<|eot_id|>⟧")


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("phi-3", "<|end|>"),
        ("gpt-oss", "<|return|>"),
        ("two ends", "<|END|>"),
        ("zephyr", "</s>"),
        ("qwen-3", "<|im_end|>"),
    ],
)
def test_where_generation_stops(name: str, end: str) -> None:
    tokenizer = tokenizer_of(name)
    assert end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids(end)
    assert Encoder(tokenizer, "marked").end_of_turn_id == tokenizer.convert_tokens_to_ids(end)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "message 2: the chat template ends the assistant's"),
        ("{% for m in messages %}{{ m['content'] | upper + eos_token }}{% endfor %}", "changes the assistant's words"),
        (
            "{% for m in messages %}{{ m['content'] | length ~ m['content'] + eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'Now you: ' }}{% endif %}",
            "writes what comes before an answer otherwise",
        ),
        ("{% for m in messages %}{{ m['content'] }} .{{ eos_token }}{% endfor %}", "without a special token"),
        ("{{ raise_exception('no, please') }}", "refuses this conversation: no, please"),
        ("{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}", "refuses this conversation"),
        (
            "{{ bos_token }}{% if not add_generation_prompt %}"
            "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}{% endif %}",
            "message 1: the chat template leaves out or changes the words of the user",
        ),
        (
            "{{ messages[-1]['content'] + eos_token }}",
            "message 1: the chat template leaves out or changes the words of the user",
        ),
        (
            "{% for m in messages %}{{ m['content'].replace('What', 'Who') + eos_token }}{% endfor %}",
            "message 1: the chat template leaves out or changes the words of the user",
        ),
    ],
)
def test_templates_that_cannot_be_masked_exactly_are_refused(template: str, said: str) -> None:
    tokenizer = with_template(train_tokenizer(TEXT, 300), template)
    (error,) = Encoder(tokenizer, "all").encode([SINGLE])
    assert isinstance(error, DataError)
    assert error.message.startswith("rows.jsonl:1: ")
    assert said in error.message
    assert error.hint


def test_nothing_is_left_out_in_silence() -> None:
    assert "does not write the tools" in refusal("chatml", row(USER, TOLD, tools=(TOOL,))).message
    assert "message 2: the chat template does not write tool calls" in refusal("chatml", row(USER, CALL)).message
    # Its calls name the tool, which is not to say that the template writes what it is.
    assert "does not write the tools" in refusal("deepseek-v3", row(USER, CALL, RESULT, TOLD, tools=(TOOL,))).message
    error = refusal("mistral-v3", row(SYSTEM, USER, CALL, RESULT, TOLD, tools=(TOOL,)))
    assert "message 1: the chat template leaves out or changes the words of the system" in error.message
    assert "data.system_turns" in str(error.hint)
    error = refusal("phi-4", row(USER, Message("tool", "clear sky"), TOLD))
    assert "message 2: the chat template leaves out or changes the words of the tool" in error.message
    twice = CALL._replace(tool_calls=CALL.tool_calls * 2)
    assert "does not write tool calls" in refusal("gpt-oss", row(USER, twice, tools=(TOOL,))).message
    assert "changes the assistant's words" in refusal("llama-3.1", row(USER, CALL._replace(content="I look"))).message
    names_only = (
        "{% for m in messages %}{{ m.content }}{{ m.tool_calls[0].function.name if m.tool_calls }}{{ eos_token }}"
        "{% endfor %}"
    )
    (error,) = Encoder(with_template(train_tokenizer(TEXT, 300), names_only), "all").encode([row(USER, CALL)])
    assert isinstance(error, DataError)
    assert "message 2: the chat template does not write tool calls" in error.message
    (document,) = documents("chatml", row(USER, TOLD._replace(reasoning="Two and three")))
    assert document.notes == {"thoughts_left_out": 1}


def test_the_assistant_may_begin_where_the_template_lets_it() -> None:
    (document,) = documents("chatml", row(TOLD, USER, TOLD))
    assert coloured("chatml", document).startswith(
        "<|im_start|>assistant\n⟦The sum is five.<|im_end|>⟧\n<|im_start|>user"
    )
    (document,) = documents("gpt-oss", row(TOLD))  # its template cannot do without a first message
    assert coloured("gpt-oss", document).endswith("<|message|>⟦The sum is five.<|return|>⟧")


def test_one_refused_row_does_not_stop_the_others() -> None:
    encoder = Encoder(tokenizer_of("mistral-v1"), "all")
    wrong = Conversation((USER, USER, TOLD), "rows.jsonl:7")
    hidden = Conversation((Message("user", "\ufdd00\ufdd1"), TOLD), "rows.jsonl:8")
    results = encoder.encode([SINGLE, wrong, hidden, SINGLE] * 300)  # more than one call of the tokenizer
    assert len(results) == 1200
    first = results[0]
    assert isinstance(first, list)
    for i, result in enumerate(results):
        if i % 4 in (0, 3):
            assert isinstance(result, list)
            assert result[0].input_ids.tolist() == first[0].input_ids.tolist()
            assert result[0].supervised.tolist() == first[0].supervised.tolist()
        else:
            assert isinstance(result, DataError)
            assert result.message.startswith(["rows.jsonl:7: the chat", "rows.jsonl:8: U+FDD0"][i % 4 - 1])
    assert encoder.encode([]) == []
    with pytest.raises(DataError, match=r"rows.jsonl:7: the chat template refuses"):
        encoder.prompt(wrong)
    with pytest.raises(DataError, match=r"rows.jsonl:9: plain text asks nothing"):
        encoder.prompt(Conversation((), "rows.jsonl:9", text="Once."))


def test_arguments_that_are_nested_too_deeply() -> None:
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"a": deep}
    call = CALL._replace(tool_calls=(ToolCall("get_weather", deep),))
    assert refusal("qwen-2.5", row(USER, call)).message == "rows.jsonl:1: nested too deeply"


def test_parts_of_a_document() -> None:
    (document,) = documents("chatml", row(USER, TOLD, USER, TOLD, tools=()))
    assert document.num_turns == 2
    assert document.num_targets == int(document.supervised.sum())
    begin = int(document.supervised.argmax()) + 1
    part = document.part(begin, len(document.input_ids))
    assert part.num_turns == 2
    assert part.num_targets == document.num_targets - 2  # one before the cut, one with nothing before it
    assert document.part(0, begin - 1).num_targets == 0


def test_where_a_document_begins() -> None:
    assert adds_bos(tokenizer_of("llama-2"))
    assert not adds_bos(tokenizer_of("chatml"))
    assert not adds_bos(tokenizer_of("zephyr"))
