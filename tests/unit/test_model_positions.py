"""Texts that are longer than a model's table of positions are refused before they end a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from launcher.data.loader import TestRow
from launcher.data.prepare import prepare
from launcher.errors import DataError
from launcher.model.positions import most_tokens, refuse_long_answers, refuse_too_long
from launcher.model.scratch import create_scratch
from launcher.plan.plan import Plan
from tests.distributed.tiny import tiny_plan
from tests.model_families import FAMILIES
from tests.plans import data_plan, generate_plan, held_out, model_plan, source_plan

ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "vocab_size": 61,
    "pad_token_id": 1,
}
LIMITS = {"gpt2": 16, "opt": 16, "gptj": 16, "bert": 16, "roberta": 14, "llama": None, "falcon": None}


def made(family: str) -> Any:
    """A model with a table of 16 positions, where it has one; RoBERTa's count begins behind its padding's number."""
    settings, kind = ENCODER, AutoModelForSequenceClassification
    if family in FAMILIES:
        sizes = {name: 16 for name in ("n_positions", "max_position_embeddings") if name in FAMILIES[family]}
        settings, kind = FAMILIES[family] | sizes, AutoModelForCausalLM
    return kind.from_config(AutoConfig.for_model(family, **settings)).eval()


@pytest.mark.parametrize("family", LIMITS)
def test_a_text_of_so_many_tokens_fits_and_no_longer_one(family: str) -> None:
    model, limit = made(family), LIMITS[family]
    assert most_tokens(model) == limit
    with torch.no_grad():
        model(torch.full((1, limit or 40), 5))
        if limit is not None:
            with pytest.raises((IndexError, RuntimeError)):
                model(torch.full((1, limit + 1), 5))


def question(number: int, tokens: int) -> TestRow:
    return TestRow(f"t.jsonl:{number}", "ask", [5] * tokens, "so")


def test_a_question_and_its_answer_need_a_place_each() -> None:
    """But for the answer's last token, which nobody reads any more."""
    rows = [question(1, 4), question(2, 10)]
    refuse_long_answers(16, rows, 7)
    refuse_long_answers(None, rows, 999)
    refuse_long_answers(16, [], 999)
    with pytest.raises(DataError) as caught:
        refuse_long_answers(16, rows, 8)
    assert caught.value.message == (
        "t.jsonl:2: a question of 10 tokens and an answer of up to 8, and the model has positions for 16"
    )
    assert caught.value.hint == "set evaluate.generate.max_new_tokens, or --max-new-tokens, to 7"
    with pytest.raises(DataError) as caught:
        refuse_long_answers(16, [question(3, 17)], 1)
    assert caught.value.hint == "leave the row out"


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Of a GPT-2 with 64 positions, and rows of up to 60 tokens."""
    root = tmp_path_factory.mktemp("positions")
    rows = [{"prompt": f"Say {i}", "completion": "river " * (1 + i % 3)} for i in range(20)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 300}
    model = model_plan(root / "base", source="scratch", scratch={"model_type": "gpt2"} | sizes)
    data = data_plan(source_plan(root / "rows.jsonl"), test=held_out(rows=4), max_length=200)
    facts = prepare(model, data, seed=0, cache_dir=root / "prepared")
    create_scratch(model, Path(facts.folder) / "tokenizer", 0, root / "base")
    plan = tiny_plan(root, zero=0)
    trajectory = plan.trajectory.model_copy(update={"model": model, "data": data})
    return plan.model_copy(update={"trajectory": trajectory, "data": facts})


def test_a_run_is_told_before_its_model_is_loaded(plan: Plan) -> None:
    def answering(most: int) -> Plan:
        life = plan.lifecycle.model_copy(update={"generate": generate_plan(max_new_tokens=most)})
        return plan.model_copy(update={"lifecycle": life})

    refuse_too_long(plan, ())
    refuse_too_long(answering(5), [question(1, 60)])
    with pytest.raises(DataError, match="a question of 60 tokens and an answer of up to 6, and the model has"):
        refuse_too_long(answering(6), [question(1, 60)])


def test_a_row_that_is_too_long_is_named(plan: Plan, tmp_path: Path) -> None:
    rows = [{"prompt": "Say it", "completion": "river " * (60 if i == 2 else 2)} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = data_plan(source_plan(tmp_path / "rows.jsonl"), max_length=400)
    model = plan.trajectory.model.model_copy(update={"tokenizer": f"{plan.data.folder}/tokenizer"})
    facts = prepare(model, data, seed=0, cache_dir=tmp_path / "prepared")
    with pytest.raises(DataError, match=r"rows.jsonl:3: \d+ tokens, and the model has positions for 64") as caught:
        refuse_too_long(plan.model_copy(update={"data": facts}), ())
    assert str(caught.value.hint).startswith("set data.max_length to 64;")
