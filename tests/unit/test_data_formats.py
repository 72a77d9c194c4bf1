"""Rows: every format, what of each message is read, and every way they can be wrong, with the place and a hint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.data.conversation import Conversation, Message, ToolCall
from launcher.data.formats import check_source, detect, renamed, to_conversations
from launcher.data.sources import read_all
from launcher.errors import DataError
from tests.plans import source_plan

SHARED = Path(__file__).parents[3] / "shared/data"
WHERE = "rows.jsonl:3"
CALL = {"name": "add", "arguments": {"a": 2, "b": 2}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def conversations(row: dict[str, Any], label: str | None = None, **source: Any) -> list[Conversation]:
    plan = source_plan("rows.jsonl", **source)
    format = detect(renamed(row, plan.columns, WHERE), WHERE) if plan.format == "auto" else plan.format
    return to_conversations(row, format, plan, WHERE, label)


def conversation(row: dict[str, Any], label: str | None = None, **source: Any) -> Conversation:
    (only,) = conversations(row, label, **source)
    return only


def said(row: dict[str, Any], **source: Any) -> list[tuple[str, str]]:
    return [message[:2] for message in conversation(row, **source).messages]


def pair(question: str, answer: str) -> list[tuple[str, str]]:
    return [("user", question), ("assistant", answer)]


def chat(*messages: dict[str, Any] | None, **columns: Any) -> dict[str, Any]:
    return {"messages": list(messages), **columns}


def user(content: Any = "2+2?", **keys: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **keys}


def assistant(content: Any = "4", **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def refusal(row: dict[str, Any], label: str | None = None, **source: Any) -> DataError:
    """The error of a row that cannot be used: it begins with the row's place and says what to do."""
    with pytest.raises(DataError) as error:
        conversations(row, label, **source)
    assert error.value.message.startswith(f"{WHERE}: ")
    assert error.value.hint
    return error.value


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"question": "2+2?", "answer": "4", "id": 7}, pair("2+2?", "4")),
        ({"prompt": "2+2?\n", "completion": " 4"}, pair("2+2?\n", " 4")),
        ({"prompt": "2+2?", "response": "4"}, pair("2+2?", "4")),
        ({"instruction": "Add", "input": "2 2", "output": "4"}, pair("Add\n\n2 2", "4")),
        ({"instruction": "Add", "input": "", "output": "4"}, pair("Add", "4")),
        ({"instruction": "Add", "input": None, "output": "4", "text": "Add ### 4"}, pair("Add", "4")),
        ({"instruction": "Add", "output": "4", "history": []}, pair("Add", "4")),
        (
            {"instruction": "And 3", "output": "7", "history": [["2+2?", "4"]]},
            [*pair("2+2?", "4"), *pair("And 3", "7")],
        ),
        ({"prompt": "2+2?", "completion": "4", "system": "Count."}, [("system", "Count."), *pair("2+2?", "4")]),
        ({"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}, pair("2+2?", "4")),
        ({"conversation": [user(), assistant()], "prompt": "2+2?", "completion": "5"}, pair("2+2?", "4")),
        ({"prompt": [user()], "completion": [assistant()]}, pair("2+2?", "4")),
    ],
)
def test_rows_become_turns(row: dict[str, Any], messages: list[tuple[str, str]]) -> None:
    assert said(row) == messages
    assert conversation(row).where == WHERE


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"from": "human"}]}, "sharegpt"),
        ({"conversations": [{"role": "user", "from": None}]}, "messages"),
        ({"conversations": []}, "sharegpt"),
        (["messages"], "messages"),
        (["conversations"], "sharegpt"),
        (["instruction", "instances", "id"], "self_instruct"),
        (["text", "label"], "classification"),
        (["text", "id", "url"], "text"),
    ],
)
def test_formats_are_told_by_columns_and_keys(row: Any, format: str) -> None:
    assert detect(row) == format


@pytest.mark.parametrize(
    ("columns", "said", "hint"),
    [
        (["question", "reply"], "the format cannot be told from the columns: question, reply", "answer: ..."),
        (["text", "summary"], "from the columns: summary, text", "classification needs"),
        ([], "from the columns: none", "question_answer (question, answer)"),
        (["\ud83d", "\x1b[2J"], "'\\ud83d'", "known formats"),
        (["instruction", "output", "prompt", "completion"], "alpaca (instruction, output) and prompt_comp", "format"),
        (["messages", "conversations"], "there are messages and conversations", "format"),
        (["prompt", "completion", "response"], "prompt_completion (prompt, response)", "format"),
    ],
)
def test_unknown_and_ambiguous_columns_are_named(columns: list[str], said: str, hint: str) -> None:
    with pytest.raises(DataError) as error:
        detect(columns, WHERE)
    assert error.value.message.startswith(f"{WHERE}: the format cannot be told")
    assert said in error.value.message
    assert hint in str(error.value.hint)


def test_the_recipe_s_format_settles_what_columns_leave_open() -> None:
    row = {"instruction": "Add", "output": "4", "prompt": "2+2?", "completion": "four"}
    assert said(row, format="alpaca") == pair("Add", "4")
    assert said(row, format="prompt_completion") == pair("2+2?", "four")
    assert said({"text": "2+2?", "summary": "4"}, columns={"prompt": "text", "completion": "summary"}) == pair(
        "2+2?", "4"
    )


def test_a_rejected_completion_is_not_learned() -> None:
    assert said({"prompt": "2+2?", "completion": "4", "label": True}) == pair("2+2?", "4")
    with pytest.raises(DataError, match="its label says that the completion was rejected"):
        said({"prompt": "2+2?", "completion": "5", "label": False})


def test_messages_end_with_the_last_answer_and_drop_what_says_nothing() -> None:
    row = chat(
        {"role": "system", "content": None},
        user([{"type": "text", "text": "2"}, {"type": "text", "text": "+2?"}]),
        assistant("4", tool_calls=None),
        {"role": "tool", "content": "calculator: 4"},
        assistant("Still 4"),
        user("Thanks"),
    )
    assert said(row) == [("user", "2+2?"), ("assistant", "4"), ("tool", "calculator: 4"), ("assistant", "Still 4")]
    assert conversation(row).answer == "Still 4"
    # Whether these have a place is the chat template's to say.
    for kept in (
        [{"role": "system", "content": "a"}, {"role": "system", "content": "b"}, user(), assistant()],
        [assistant("Hello!"), user(), assistant()],
        [user("a"), user("b"), assistant("c"), assistant("d")],
        [{"role": "developer", "content": "a"}, user(), assistant()],
    ):
        assert said(chat(*kept)) == [(message["role"], message["content"]) for message in kept]


@pytest.mark.parametrize(
    "calls",
    [
        {"tool_calls": [{"id": "c1", "type": "function", "function": CALL}]},
        {"tool_calls": [{"id": "c1", "function": CALL | {"arguments": json.dumps(CALL["arguments"])}}]},
        {"tool_calls": [{"id": "c1", **CALL}], "function_call": None},
    ],
)
def test_tool_calls_and_reasoning(calls: dict[str, Any]) -> None:
    answer = {"role": "tool", "tool_call_id": "c1", "content": "4"}
    row = chat(user(), assistant(None, reasoning_content="Two and two.", **calls), answer, assistant(), tools=[TOOL])
    found = conversation(row)
    assert found.tools == (TOOL,)
    assert found.messages[1] == Message("assistant", "", "Two and two.", (ToolCall("add", {"a": 2, "b": 2}, "c1"),))
    assert found.messages[2] == Message("tool", "4", name="add", tool_call_id="c1")


def test_older_and_other_ways_to_write_calls() -> None:
    called = Message("assistant", "", tool_calls=(ToolCall("add", {"a": 2, "b": 2}),))
    older = chat(user(), assistant(None, function_call=CALL), {"role": "function", "name": "add", "content": ""})
    older["messages"].append(assistant())
    older["functions"] = json.dumps([TOOL["function"]])
    assert conversation(older).messages[1:3] == (called, Message("tool", "", name="add"))
    assert conversation(older).tools == (TOOL,)
    turns = [("human", "2+2?"), ("function_call", json.dumps(CALL)), ("observation", "4"), ("gpt", "4")]
    sharegpt = {"conversations": [{"from": role, "value": value} for role, value in turns], "tools": "", "system": "S"}
    messages = conversation(sharegpt).messages
    assert [message.role for message in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[2] == called
    assert conversation(sharegpt).tools == ()
    nothing = chat(user(), assistant(None, tool_calls=[{"name": "now", "arguments": None}]))
    assert conversation(nothing).messages[-1].tool_calls == (ToolCall("now", {}),)


def test_marks_say_what_is_learned() -> None:
    marks: list[dict[str, Any]] = [
        {"train": False},
        {"train": True},
        {"weight": 0},
        {"weight": 1.0},
        {},
        {"train": None},
    ]
    turns = [turn for mark in marks for turn in (user(train=False), assistant(**mark))]
    learned = [message.learn for message in conversation(chat(*turns)).messages if message.role == "assistant"]
    assert learned == [False, True, False, True, None, None]
    # A conversational prompt is not learned, its completion is.
    row = {"prompt": [user(), assistant("5"), user("Sure?")], "completion": [assistant(), user("Thanks")]}
    assert [message.learn for message in conversation(row).messages] == [None, False, None, None]


def test_classes_are_words() -> None:
    asked = {"labels": ("negative", "positive"), "instruction": "Positive or negative?"}
    for label in ("positive", 1, 1.0, True, "1"):
        found = conversation({"text": "Lovely.", "label": label}, **asked)
        assert [message[:2] for message in found.messages] == pair("Positive or negative?\n\nLovely.", "positive")
        assert found.label == "positive"
        assert found.parts == (("instruction", "Positive or negative?"), ("input", "Lovely."))
    assert conversation({"text": "Lovely.", "label": True}).answer == "true"
    assert conversation({"text": "Lovely.", "label": "good"}).parts == (("input", "Lovely."),)
    for label, labels, words in [
        (2, asked["labels"], "'label' is 2, which is none of the 2 labels"),
        (-1, asked["labels"], "'label' is -1"),
        (float("nan"), asked["labels"], "'label' is nan"),
        ("Positive", asked["labels"], "'label' is 'Positive'"),
        ("9" * 5000, asked["labels"], "'label' is '999"),
        (None, asked["labels"], "'label' is null"),
        (1, (), "'label' is the number 1"),
        (None, (), "'label' is empty"),
        ([1], (), "'label' is a list, not text"),
    ]:
        assert words in refusal({"text": "Lovely.", "label": label}, labels=labels).message


def test_each_instance_of_a_task_is_a_conversation() -> None:
    row = {"instruction": "Add", "instances": [{"input": "2 2", "output": "4"}, {"input": "", "output": "none"}]}
    first, second = conversations(row, system="Count.")
    assert [message[:2] for message in first.messages] == [("system", "Count."), *pair("Add\n\n2 2", "4")]
    assert [message[:2] for message in second.messages] == [("system", "Count."), *pair("Add", "none")]
    assert (first.parts, second.parts) == ((("instruction", "Add"), ("input", "2 2")), (("instruction", "Add"),))
    for instances, words in [
        ([], "'instances' is an empty list"),
        ({}, "'instances' is an object"),
        ([{"input": "2 2", "output": "4"}, {"input": "2 2"}], "instances[1] is no object with an output"),
        ([{"input": 2, "output": "4"}], "instances[0].input is a number, not text"),
        ([{"output": " "}], "instances[0].output is empty"),
    ]:
        assert words in refusal({"instruction": "Add", "instances": instances}).message


def test_plain_text_has_no_turns() -> None:
    found = conversation({"text": "2+2=4"})
    assert (found.messages, found.text, found.answer) == ((), "2+2=4", "2+2=4")
    assert "'text' is empty" in refusal({"text": " "}).message
    late = {"text": "2+2=4", "label": 1}
    with pytest.raises(DataError, match="rows.jsonl:3: plain text, as the first row is, but with label"):
        to_conversations(late, "text", source_plan("rows.jsonl"), WHERE)
    assert conversation(late, "label", format="text").label == "1"


def test_system_prompts() -> None:
    row = chat({"role": "system", "content": "own"}, user(), assistant())
    assert said(row, system="recipe's")[0] == ("system", "own")
    assert said(row | {"system": "own"})[0] == ("system", "own")
    assert said(chat(user(), assistant(), system="row's"), system="recipe's")[0] == ("system", "row's")
    assert said(chat(user(), assistant(), system=""), system="recipe's")[0] == ("system", "recipe's")
    assert "a system turn and another text in 'system'" in refusal(row | {"system": "another"}).message


def test_columns_are_named_by_the_recipe() -> None:
    columns = {"question": "problem", "answer": "solution"}
    assert said({"problem": "2+2?", "solution": "4", "answer": "D"}, columns=columns) == pair("2+2?", "4")
    assert (
        "no column 'solution', which the recipe's columns name" in refusal({"problem": "2+2?"}, columns=columns).message
    )
    for format, mapped, words, hint in [
        (None, {"prompts": "p"}, "columns.prompts: no format has a column 'prompts'", "did you mean prompt?"),
        (
            "alpaca",
            {"outputs": "p"},
            "columns.outputs: the format alpaca has no column 'outputs'",
            "did you mean output?",
        ),
        ("text", {"zzz": "p"}, "columns.zzz: the format text has no column 'zzz'", "known: text, topic"),
    ]:
        with pytest.raises(DataError, match=words) as error:
            check_source(source_plan("rows.jsonl", columns=mapped), format, "topic", None)
        assert error.value.hint == hint
    with pytest.raises(DataError, match="columns.outputs"):
        conversations({"instruction": "a", "p": "b"}, format="alpaca", columns={"outputs": "p"})
    check_source(source_plan("rows.jsonl", columns={"topic": "subject"}), "text", "topic")
    for key, value in [("labels", ("a",)), ("instruction", "b")]:
        with pytest.raises(DataError, match=f"{key}: a row of format alpaca has no place for it"):
            check_source(source_plan("rows.jsonl", **{key: value}), "alpaca")
    with pytest.raises(DataError, match="system: a row of format text has no place for it"):
        check_source(source_plan("rows.jsonl", system="a"), "text")


def test_a_group_is_the_same_from_files_that_write_numbers_otherwise() -> None:
    found = [
        to_conversations(
            {"question": "a", "answer": "b", "doc": doc}, "question_answer", source_plan("x"), WHERE, None, "doc"
        )
        for doc in (4, 4.0, "4")
    ]
    assert [one.group for (one,) in found] == ["4", "4", "4"]


def test_labels_and_groups_come_from_named_columns() -> None:
    row = {"question": "2+2?", "answer": "4", "level": 3, "topic": "sums", "hard": False}
    plan = source_plan("rows.jsonl", columns={"subject": "topic"})
    (found,) = to_conversations(row, "question_answer", plan, WHERE, "level", "subject")
    assert (found.label, found.group) == ("3", "sums")
    assert conversation(row, "hard").label == "false"
    assert conversation(row).label is None
    review = {"text": "Lovely.", "label": 1, "stars": 5}
    assert conversation(review, "label", labels=("bad", "good")).label == "good"
    assert conversation(review, "stars", labels=("bad", "good")).label == "5"
    for value in (None, "", float("nan")):
        assert "'level' is empty" in refusal(row | {"level": value}, "level").message
    assert "'level' is a list" in refusal(row | {"level": [1]}, "level").message
    assert "no column 'class'" in refusal(row, "class").message


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "2+2?", "answer": 4}, "'answer' is a number, not text"),
        ({"question": "2+2?", "answer": ["4"]}, "'answer' is a list, not text"),
        ({"question": "", "answer": "4"}, "'question' is empty"),
        ({"question": "2+2?", "answer": " \n"}, "'answer' is empty"),
        ({"question": "2+2?", "answer": "\ud83d"}, "'answer' holds half of a surrogate pair"),
        ({"question": "2\0+\0", "answer": "4"}, "'question' holds a NUL"),
        ({"question": "2+2?", "answer": "4", "image": {"bytes": "..."}}, "'image' holds more than text"),
        ({"instruction": "Add", "input": 2, "output": "4"}, "'input' is a number, not text"),
        ({"instruction": "Add", "output": "4", "history": [["2+2?"]]}, "history[0] is no pair of texts"),
        ({"instruction": "Add", "output": "4", "history": [["2+2?", None]]}, "history[0][1] is null, not text"),
        ({"prompt": [user()], "completion": "4"}, "'prompt' is a list and 'completion' is text"),
        ({"prompt": [user(), assistant()], "completion": [user()]}, "'completion' has no message to learn from"),
        ({"prompt": [], "completion": [assistant()]}, "'prompt' has no message to learn from"),
        ({"messages": "hello"}, "'messages' is text, not a list"),
        ({"messages": []}, "no assistant turn"),
        (chat(user()), "no assistant turn"),
        (chat(assistant()), "nobody but the assistant speaks"),
        (chat(assistant(), user()), "nobody but the assistant speaks"),
        (chat({"role": "user"}, assistant()), "the user's messages[0] is empty"),
        (chat(user(" "), assistant()), "the user's messages[0] is empty"),
        (chat(user(), assistant(None)), "the assistant's messages[1] is empty"),
        (chat(user(), assistant("", reasoning="Hm.")), "messages[1] holds reasoning but no answer"),
        (chat(user(), assistant(reasoning="Hm.", thinking="Ah.")), "has 'reasoning' and another 'thinking'"),
        (chat(user(thinking="Hm."), assistant()), "the user's messages[0] reasons"),
        (chat({"role": "human", "content": "2+2?"}), "messages[0] has the unknown role 'human'"),
        (chat({"role": ["user"], "content": "2+2?"}), "messages[0] has the unknown role a list"),
        (chat({"role": None, "content": "2+2?"}), "messages[0] has a null role"),
        (chat({"role": "user", "from": "human", "content": "2+2?"}), "both 'role' and 'from'"),
        (chat({"content": "2+2?"}), "messages[0] is no object with a role"),
        (chat(None), "messages[0] is no object with a role"),
        ({"conversations": [{"from": "human", "text": "2+2?"}]}, "conversations[0] has no 'value'"),
        (chat({"role": "system", "text": "Count."}, user(), assistant()), "the system's messages[0] has no 'content'"),
        (chat(user(), {"role": "tool", "value": "4"}, assistant()), "the tool's messages[1] has no 'content'"),
        ({"conversations": [{"from": "gpt", "value": 4}]}, "conversations[0].value is a number, not text"),
        ({"conversations": [{"from": "narrator", "value": "2+2?"}]}, "the unknown role 'narrator'"),
        (chat(user(), assistant({"a": 1})), "messages[1].content is an object, not text"),
        (chat(user([{"type": "image_url"}]), assistant()), "messages[0].content has a part that is not text"),
        (chat(user(images=["a.png"]), assistant()), "messages[0].images holds more than text"),
        (chat(user(), assistant("\udc80")), "messages[1].content holds half of a surrogate pair"),
        (chat(user(), assistant(None, tool_calls=[{}])), "tool_calls[0] has no 'arguments'"),
        (chat(user(), assistant(None, tool_calls={"name": "add"})), "tool_calls is an object, not a list"),
        (chat(user(), assistant(None, tool_calls=[CALL | {"arguments": "{"}])), "arguments is no JSON"),
        (chat(user(), assistant(None, tool_calls=[CALL | {"arguments": "[]"}])), "arguments is a list, not an object"),
        (chat(user(), assistant(None, tool_calls=[CALL | {"arguments": '{"a": NaN}'}])), "NaN is no JSON number"),
        (chat(user(), assistant(None, tool_calls=[CALL | {"arguments": {"a": "\ud83d"}}])), "half of a surrogate pair"),
        (chat(user(), assistant(None, tool_calls=[CALL | {"name": None}])), "tool_calls[0].name is null"),
        (chat(user(), assistant(None, tool_calls=[CALL | {"type": "custom"}])), "no call of a function"),
        (chat(user(), assistant(None, tool_calls=[CALL], function_call=CALL)), "both 'tool_calls' and 'function_call'"),
        (chat(user(tool_calls=[CALL]), assistant()), "the user's messages[0] calls a tool"),
        ({"conversations": [{"from": "function_call", "value": "add(2)"}]}, "conversations[0].value is no JSON"),
        (chat(user(), assistant(), tools="add"), "'tools' is no JSON"),
        (chat(user(), assistant(), tools={"name": "add"}), "'tools' is an object, not a list"),
        (chat(user(), assistant(), tools=[{"type": "function"}]), "tools[0] is no function with a name"),
        (chat(user(), assistant(), tools=[TOOL], functions=[TOOL]), "both 'tools' and 'functions'"),
        (chat(user(), assistant(), tools=[{"name": "add", "f": float("inf")}]), "'tools' cannot be written as JSON"),
        (chat(user(), assistant(weight=0.5)), "messages[1].weight is 0.5"),
        (chat(user(), assistant(train="yes")), "messages[1].train is 'yes'"),
        (chat(user(), assistant(train=True, weight=0)), "is marked train: true and weight: 0"),
        (chat(user(train=True), assistant()), "the user's messages[0] is marked to be learned"),
        (chat(user(), assistant(), system=7), "'system' is a number, not text"),
    ],
)
def test_bad_rows_name_their_place(row: dict[str, Any], said: str) -> None:
    assert said in refusal(row).message


def test_a_row_without_the_columns_of_its_file() -> None:
    plan = source_plan("rows.jsonl")
    with pytest.raises(DataError, match="rows.jsonl:3: no 'answer' in a row of format question_answer"):
        to_conversations({"question": "2+2?"}, "question_answer", plan, WHERE)
    with pytest.raises(DataError, match="rows.jsonl:3: no 'conversations' in a row of format sharegpt"):
        to_conversations({"question": "2+2?"}, "sharegpt", plan, WHERE)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the data sets in ../shared/data")
@pytest.mark.parametrize(
    ("name", "format", "num_rows", "num_conversations"),
    [
        ("gsm8k/train", "question_answer", 7473, 7473),
        ("gsm8k/test", "question_answer", 1319, 1319),
        ("seed-tasks/seed_tasks", "self_instruct", 175, 175),
        *(
            (f"sentiment/{name}", "prompt_completion", 200, 200)
            for name in ("imdb", "rotten_tomatoes", "amazon_polarity")
        ),
        *((f"summarization/{name}", "prompt_completion", 200, 200) for name in ("cnn_dailymail", "gigaword", "samsum")),
    ],
)
def test_real_files(name: str, format: str, num_rows: int, num_conversations: int) -> None:
    plan = source_plan(SHARED / f"{name}.jsonl")
    rows = list(read_all(plan))
    assert len(rows) == num_rows
    assert {detect(row) for _, row in rows if not isinstance(row, DataError)} == {format}
    found = [one for where, row in rows for one in to_conversations(row, format, plan, where)]
    assert len(found) == num_conversations
    assert all(one.answer for one in found)
