"""Held-out rows keep the values of the columns that scores are told apart by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.data.loader import EvalData, TestRows
from launcher.data.prepare import prepare
from launcher.data.slices import NO_VALUE, slices_of
from launcher.data.store import read_slices
from launcher.errors import DataError
from launcher.plan.plan import DataFacts
from tests.plans import data_plan, held_out, model_plan, source_plan, trajectory

MODEL = model_plan("/nowhere/base", source="scratch", scratch={"model_type": "llama", "vocab_size": 300})


def asking(number: int, **columns: Any) -> dict[str, Any]:
    return {"question": f"What is {number} plus one?", "answer": f"It is {number + 1}.", **columns}


def made(tmp_path: Path, rows: list[dict[str, Any]], *slices: str) -> DataFacts:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = data_plan(
        source_plan(file, columns={"question": "asked"} if "asked" in rows[0] else {}),
        eval=held_out(rows=12),
        test=held_out(rows=9),
        max_length=64,
        slices=slices,
    )
    return prepare(MODEL, data, seed=0, cache_dir=tmp_path / "prepared")


def test_values_stay_with_their_rows(tmp_path: Path) -> None:
    rows = [asking(i, language="de" if i % 3 else "en", level=i % 2) for i in range(60)]
    del rows[5]["level"]
    facts = made(tmp_path, rows, "language", "level")

    def meant(where: str) -> dict[str, str]:
        row = rows[int(where.rpartition(":")[2]) - 1]
        return {"language": row["language"], "level": str(row.get("level", NO_VALUE))}

    tests = TestRows(facts.folder)
    assert [row.slices for row in tests] == [meant(row.where) for row in tests]
    whole = EvalData(facts.folder, slices=("level", "language"))
    assert sum(whole.rows_of) == facts.eval_documents == 12
    seen = []
    for rank in (0, 1):
        for batch in whole.micro_batches(48, 2, rank):
            assert all(whole.combinations[batch.combination] == meant(where) for where in batch.where)
            seen += list(batch.where)
    assert len(set(seen)) == len(seen) == 12
    kept = read_slices(Path(facts.folder), ["language"])["language"]
    assert sorted(kept) == sorted(meant(where)["language"] for where in seen)
    few = EvalData(facts.folder, max_rows=4, slices=("language",))
    assert sum(few.rows_of) == 4
    assert EvalData(facts.folder).combinations == [{}]


def test_a_column_goes_by_the_files_name_or_the_formats() -> None:
    source = source_plan("x.jsonl", columns={"question": "asked"})
    row = {"asked": "Why?", "answer": "So.", "n": 2.0, "ok": True, "none": None, "blank": " "}
    row["gap"] = float("nan")  # as a Parquet file of numbers has it
    found = slices_of(row, ["asked", "question", "n", "ok", "none", "blank", "gap", "gone"], source, "x:1")
    assert dict(found) == {
        **dict.fromkeys(("asked", "question"), "Why?"),
        **{"n": "2", "ok": "true"},
        **dict.fromkeys(("none", "blank", "gap", "gone"), NO_VALUE),
    }
    with pytest.raises(DataError, match="x:1: 'n'"):
        slices_of({"n": [1]}, ["n"], source, "x:1")


@pytest.mark.parametrize(
    ("column", "message", "hint"),
    [
        ("langauge", "evaluate.slices: no held-out row has a column 'langauge'", "name a column of the rows"),
        ("id", "different values in 'id', such as ", "at most 3 values"),
    ],
)
def test_a_column_that_tells_nothing_apart_or_too_much(
    column: str, message: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.data.slices.MOST_VALUES", 3)
    with pytest.raises(DataError) as caught:
        made(tmp_path, [asking(i, id=f"row-{i}") for i in range(60)], column)
    assert message in caught.value.message
    assert hint in str(caught.value.hint)


def test_slices_change_no_run(tmp_path: Path) -> None:
    """Neither its hash nor its data's: it is only looked at otherwise."""
    rows = [asking(i, language="de" if i % 3 else "en") for i in range(60)]
    without, facts = made(tmp_path, rows), made(tmp_path, rows, "language")
    assert facts.folder != without.folder
    assert facts.content_hash == without.content_hash
    plans = [data_plan(source_plan("rows.jsonl"), slices=slices) for slices in ((), ("language",))]
    assert len({trajectory(MODEL, plan).hash() for plan in plans}) == 1
    with pytest.raises(FileNotFoundError):
        read_slices(Path(without.folder), ["language"])
