"""The quickstart's instruction set: it can be made again, and its test cannot be passed by memory or by luck."""

import json
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart"
FILES = ("train.jsonl", "test.jsonl")


@pytest.fixture(params=FILES)
def file(request: pytest.FixtureRequest) -> str:
    return request.param


def read(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (QUICKSTART / file).read_text(encoding="utf-8").splitlines()]


def prompts(file: str) -> list[str]:
    return [row["messages"][0]["content"] for row in read(file)]


def test_generating_again_writes_the_same_bytes(tmp_path: Path) -> None:
    runpy.run_path(str(QUICKSTART / "generate.py"))["main"](tmp_path)
    for file in FILES:
        assert (tmp_path / file).read_bytes() == (QUICKSTART / file).read_bytes()


def test_no_prompt_is_asked_twice(file: str) -> None:
    assert len(set(prompts(file))) == len(prompts(file))


def test_train_and_test_share_no_prompt() -> None:
    assert not set(prompts("train.jsonl")) & set(prompts("test.jsonl"))


def test_a_constant_answer_scores_below_one_in_twenty() -> None:
    answers = Counter(row["messages"][1]["content"] for row in read("test.jsonl"))
    assert max(answers.values()) < 0.05 * answers.total()


def test_there_is_enough_to_learn_from() -> None:
    assert len(read("train.jsonl")) >= 1000
    assert len(read("test.jsonl")) >= 200


def test_every_task_is_taught_and_tested() -> None:
    taught, tested = ({row["task"] for row in read(file)} for file in FILES)
    assert taught == tested
    assert len(taught) >= 8


def test_a_row_is_one_question_and_one_answer(file: str) -> None:
    for row in read(file):
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert all(message["content"].strip() == message["content"] != "" for message in row["messages"])
