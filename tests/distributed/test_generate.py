"""Answers in words: the same token by token on any ranks, at any ZeRO stage, and from the exported folder; and what an
evaluation writes down of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList, PreTrainedTokenizerBase

from launcher.data.loader import EvalData, TestRows
from launcher.errors import DataError
from launcher.evaluate.generate import DrawnTokens
from launcher.evaluate.metrics import score
from launcher.export.folder import write_folder
from launcher.export.merge import merged_model, trained_model
from launcher.plan.plan import Plan
from launcher.train.metrics import read
from tests.checkpoints import checkpoint_at
from tests.distributed.group import run_group
from tests.distributed.runs import LORA, QLORA, tiny_run, train_all, variant
from tests.plans import generate_plan, held_out, optimizer_plan

pytestmark = pytest.mark.distributed

STEPS, ROWS, MOST = 4, 9, 8
"""Batches of 4 prompts: on two ranks two rounds, in the last one prompt for one of them and none for the other."""
ENDS = [0, *range(200, 240)]
"""Tokens that end an answer: so many that a model which knows nothing meets one now and then, and one rank is done
while the other is not."""
LONGER = 24
"""After so many steps the answers have words of the references."""
GREEDY = generate_plan(rows=ROWS, max_new_tokens=MOST, batch_size=4)
DRAWN = GREEDY.model_copy(update={"temperature": 0.8, "top_p": 0.9})
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"generate": GREEDY},
    "drawn": {"generate": DRAWN, "method": LORA, "kernels": "fused", "gradient_checkpointing": True},
    "qlora": {"generate": GREEDY, "method": QLORA},
}


def as_numbers(self: Any, ids: Any, **_: Any) -> str:
    """Instead of `decode`: so that answers are compared token by token."""
    return " ".join(map(str, ids))


def train_in_numbers(plans: list[Plan], in_words: Sequence[Plan] = ()) -> None:
    early = mock.patch("launcher.evaluate.generate.end_tokens", return_value=ENDS)
    with mock.patch.object(PreTrainedTokenizerBase, "decode", as_numbers), early:
        train_all(plans)
    train_all(in_words)


def answers(plan: Plan, step: int) -> list[dict[str, Any]]:
    lines = (Path(plan.run_dir) / f"answers-{step:08d}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    data = {"test": held_out(rows=ROWS), "slices": ("kind",)}
    plan = tiny_run(tmp_path_factory.mktemp("generate"), of_data=data)
    life = {"total_steps": STEPS, "max_steps": STEPS, "eval_every_steps": 2, "checkpoint_every_steps": STEPS}
    fast = optimizer_plan(lr=1e-2, betas=(0.9, 0.99))  # so that some answers end
    return variant(plan, "base-run", optimizer=fast, slices=("kind",), **life)


@pytest.fixture(scope="module")
def told(base: Plan) -> Plan:
    """One whose figures are looked at."""
    generate = GREEDY.model_copy(update={"during": True, "metrics": ("exact_match", "rouge")})
    return variant(base, "told", generate=generate, total_steps=LONGER, max_steps=LONGER, eval_every_steps=LONGER // 2)


@pytest.fixture(scope="module")
def alone(base: Plan, told: Plan) -> dict[str, Plan]:
    """One process."""
    plans = {name: variant(base, f"alone-{name}", **case) for name, case in CASES.items()}
    run_group(1, train_in_numbers, list(plans.values()), [told], timeout_s=400)
    return plans


@pytest.fixture(scope="module")
def together(base: Plan) -> dict[str, Plan]:
    """Two ranks at ZeRO-3."""
    plans = {
        name: variant(base, f"together-{name}", zero=3, micro_batch_size=3, **case) for name, case in CASES.items()
    }
    run_group(2, train_in_numbers, list(plans.values()), timeout_s=400)
    return plans


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_at_zero_3_answer_as_one_process(
    name: str, alone: dict[str, Plan], together: dict[str, Plan]
) -> None:
    said = []
    for step in (0, STEPS):
        ours = answers(together[name], step)
        assert ours == answers(alone[name], step)
        assert [row["where"] for row in ours] == [row.where for row in TestRows(alone[name].data.folder)]
        assert all(len(row["answer"].split()) == MOST for row in ours if row["cut"])
        said.append([row["answer"] for row in ours])
    assert said[0] != said[1], "training has changed nothing"
    assert len(set(said[0])) > 2


def test_some_answers_end_and_some_are_cut(alone: dict[str, Plan]) -> None:
    found = [row for plan in alone.values() for row in answers(plan, STEPS)]
    assert {row["cut"] for row in found} == {True, False}
    assert {len(row["answer"].split()) < MOST for row in found if not row["cut"]} == {True}


def test_drawn_answers_depend_on_nothing_but_seed_and_row(base: Plan, alone: dict[str, Plan]) -> None:
    """Not on how many are drawn at once, nor on the rows beside."""
    assert answers(alone["drawn"], 0) != answers(alone["greedy"], 0)
    once = {"total_steps": 1, "max_steps": 1, "eval_every_steps": 1}
    single = variant(
        base, "single", **(CASES["drawn"] | once | {"generate": DRAWN.model_copy(update={"batch_size": 1, "rows": 5})})
    )
    other = variant(base, "other", seed=25, **CASES["drawn"], **once)
    run_group(1, train_in_numbers, [single, other], timeout_s=400)
    assert answers(single, 0) == answers(alone["drawn"], 0)[:5]
    same = [a == b for a, b in zip(answers(other, 0), answers(alone["drawn"], 0), strict=True)]
    assert sum(same) < ROWS / 2


@pytest.mark.parametrize("name", ["greedy", "drawn"])
def test_the_exported_folder_answers_the_same_by_plain_transformers(
    name: str, alone: dict[str, Plan], tmp_path: Path
) -> None:
    """One prompt at a time, by transformers' own generate and what the folder says of generation."""
    plan = alone[name]
    model: Any = trained_model(plan, checkpoint_at(Path(plan.run_dir), STEPS))
    model = merged_model(plan, model) if name == "drawn" else model
    write_folder(plan, model, AutoTokenizer.from_pretrained(f"{plan.data.folder}/tokenizer"), tmp_path / "model", True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").eval()
    assert plain.generation_config.eos_token_id == ENDS[0]
    for number, (row, ours) in enumerate(zip(TestRows(plan.data.folder), answers(plan, STEPS), strict=True)):
        drawn = [DrawnTokens([number], len(row.prompt_ids), DRAWN, plan.trajectory.seed)] if name == "drawn" else []
        said = plain.generate(
            input_ids=torch.tensor([row.prompt_ids]),
            attention_mask=torch.ones(1, len(row.prompt_ids), dtype=torch.long),
            logits_processor=LogitsProcessorList(drawn),
            max_new_tokens=MOST,
            do_sample=False,
            eos_token_id=ENDS,
        )[0, len(row.prompt_ids) :].tolist()
        assert [token for token in said if token not in ENDS] == list(map(int, ours["answer"].split()))
        assert (said[-1] not in ENDS) == ours["cut"]


def test_what_is_written_down(told: Plan, alone: dict[str, Plan]) -> None:
    records = list(read(Path(told.run_dir)))
    evaluated = {record["step"]: record for record in records if record["kind"] == "eval"}
    answered = [record for record in records if record["kind"] == "answers"]
    assert list(evaluated) == [LONGER // 2, LONGER]
    assert [record["step"] for record in answered] == [0, LONGER // 2, LONGER], "the last evaluation is the end's too"
    for record in answered:
        lines = answers(told, record["step"])
        said, meant = [line["answer"] for line in lines], [line["reference"] for line in lines]
        assert {name: record[name] for name in ("exact_match", "rouge")} == score(["exact_match", "rouge"], said, meant)
        assert (record["rows"], record["cut"]) == (ROWS, sum(line["cut"] for line in lines))
        assert sum(line["correct"] for line in lines) == record["exact_match"] * ROWS
        by_kind = record["slices"]["kind"]
        for kind in ("long", "short"):
            mine = [i for i, line in enumerate(lines) if line["slices"]["kind"] == kind]
            mean = score(["rouge"], [said[i] for i in mine], [meant[i] for i in mine])["rouge"]
            assert by_kind[kind] == {"rows": len(mine), "exact_match": by_kind[kind]["exact_match"], "rouge": mean}
        assert by_kind["gap"] == {"least_rows": 20}
    assert 0 < answered[-1]["rouge"]["rouge_l"] < 1


def test_the_loss_by_slices_adds_up_to_the_whole(told: Plan, alone: dict[str, Plan]) -> None:
    data = EvalData(told.data.folder, slices=("kind",))
    assert data.combinations == [{"kind": "long"}, {"kind": "short"}]
    assert sum(data.rows_of) == data.num_documents == told.data.eval_documents
    batches = list(data.micro_batches(10**6, 1, 0))
    assert [batch.combination for batch in batches] == [0, 1]
    tokens = [len(batch.targets) for batch in batches]
    for record in read(Path(told.run_dir)):
        if record["kind"] == "eval":
            of_kind = [record["slices"]["kind"][kind] for kind in ("long", "short")]
            assert [each["rows"] for each in of_kind] == data.rows_of
            for figure in ("loss", "accuracy"):
                mean = sum(n * each[figure] for n, each in zip(tokens, of_kind, strict=True)) / sum(tokens)
                assert record[figure] == pytest.approx(mean, rel=1e-9)
            assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))
            assert of_kind[0]["loss"] != of_kind[1]["loss"]


def test_a_metric_that_fails_is_said_before_the_model_is_loaded(base: Plan, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def share(answers, references):\n    return answers[0] / 2\n")
    generate = GREEDY.model_copy(update={"metrics": (f"{tmp_path}/own.py:share",)})
    wrong = variant(base, "wrong", generate=generate)
    with pytest.raises(DataError, match=r"share of .*own.py:2 raised TypeError") as caught:
        run_group(2, train_all, [wrong], timeout_s=400)
    assert "mend the function" in str(caught.value.hint)
    assert not [record for record in read(Path(wrong.run_dir)) if record["kind"] == "start"]
