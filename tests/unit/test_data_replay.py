"""Rows of what was learned earlier: replayed in the share that is asked for, or held out to show what is forgotten."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.data.loader import EvalData
from launcher.data.prepare import prepare
from launcher.data.prepare.report import Report
from launcher.data.store import Documents, Set, read_lists
from launcher.errors import DataError
from launcher.plan.plan import DataFacts, ReplayPlan, SourcePlan
from tests.plans import data_plan, held_out, source_plan
from tests.unit.test_data_build import report_of, rows, scratch_model, write


@pytest.fixture
def files(tmp_path: Path) -> dict[str, SourcePlan]:
    """60 training rows; 100 rows and 3 rows of something earlier, 20 of which are held out in a file of their own."""
    earlier = rows(120, seed=1)
    contents = {"train": rows(60), "earlier": earlier[:100], "few": earlier[:3], "retain": earlier[100:]}
    return {name: source_plan(write(tmp_path / f"{name}.jsonl", content)) for name, content in contents.items()}


def prepared(tmp_path: Path, *train: SourcePlan, seed: int = 1, **changes: Any) -> DataFacts:
    plan = data_plan(*train, **changes)
    return prepare(scratch_model(), plan, seed=seed, cache_dir=tmp_path / "cache")


def replay(source: SourcePlan, share: float) -> ReplayPlan:
    return ReplayPlan(sources=(source,), share=share)


def an_epoch(facts: DataFacts) -> Counter[str]:
    """{file:line: how often it comes in an epoch}."""
    documents, packs = Documents(facts.folder), read_lists(Path(facts.folder) / "packs.arrow")
    return Counter(documents.where(int(number)) for row in range(len(packs)) for number in packs[row])


def of(epoch: Counter[str], source: SourcePlan) -> Counter[str]:
    return Counter({where: times for where, times in epoch.items() if where.startswith(source.path)})


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("share", [0.03, 0.1, 0.5])
def test_the_share_is_of_all_documents_of_an_epoch(
    tmp_path: Path, files: dict[str, SourcePlan], share: float, packing: bool
) -> None:
    facts = prepared(tmp_path, files["train"], replay=replay(files["earlier"], share), packing=packing)
    epoch = an_epoch(facts)
    replayed = of(epoch, files["earlier"])
    assert abs(replayed.total() - share * epoch.total()) <= 1
    assert of(epoch, files["train"]).total() == 60
    assert set(replayed.values()) == {1}
    assert facts.train_documents == epoch.total()


def test_too_few_come_equally_often(tmp_path: Path, files: dict[str, SourcePlan]) -> None:
    epoch = an_epoch(prepared(tmp_path, files["train"], replay=replay(files["few"], 0.25)))
    assert sorted(of(epoch, files["few"]).values()) == [6, 7, 7]  # 20 of 80


def test_the_choice_is_drawn_from_the_rows_alone(tmp_path: Path, files: dict[str, SourcePlan]) -> None:
    def chosen(share: float, seed: int) -> set[str]:
        facts = prepared(tmp_path, files["train"], replay=replay(files["earlier"], share), seed=seed)
        return set(of(an_epoch(facts), files["earlier"]))

    assert chosen(0.2, seed=1) == chosen(0.2, seed=2)


def test_what_was_held_out_earlier_is_not_what_is_replayed(tmp_path: Path, files: dict[str, SourcePlan]) -> None:
    """The held-out rows are those of the lowest draws: the same draws would replay them before all others."""
    earlier = source_plan(write(tmp_path / "all.jsonl", rows(400, seed=1)))
    documents = Documents(prepared(tmp_path, earlier, eval=held_out(split=0.25)).folder)
    held = {documents.where(int(number)) for number in np.flatnonzero(documents.sets == Set.EVAL)}
    replayed = of(an_epoch(prepared(tmp_path, files["train"], replay=replay(earlier, 0.2))), earlier)
    assert len(replayed) == 15
    assert len(held & set(replayed)) < 8  # a quarter of them, give or take


def test_what_is_cut_away_does_not_change_the_share(tmp_path: Path, files: dict[str, SourcePlan]) -> None:
    facts = prepared(tmp_path, files["train"], replay=replay(files["earlier"], 0.3), max_length=100)
    epoch = an_epoch(facts)
    kept = of(epoch, files["train"]).total()
    assert 5 < kept < 55  # many are too long
    assert abs(of(epoch, files["earlier"]).total() - 0.3 * epoch.total()) <= 1


def test_replayed_rows_are_cleaned_and_neither_balanced_nor_held_out(
    tmp_path: Path, files: dict[str, SourcePlan]
) -> None:
    content = rows(60)
    labelled = source_plan(
        write(tmp_path / "labelled.jsonl", [row | {"topic": "ab"[i % 3 > 0]} for i, row in enumerate(content)])
    )
    again = source_plan(write(tmp_path / "again.jsonl", content[:10] + rows(30, seed=5)))
    facts = prepared(
        tmp_path, labelled, replay=replay(again, 0.2), label="topic", balance="oversample", eval=held_out(0.2)
    )
    epoch = an_epoch(facts)
    assert facts.dropped["duplicate"] + facts.dropped.get("asks what a held-out row asks", 0) == 10
    assert not {f"{again.path}:{line}" for line in range(1, 11)} & set(epoch)
    assert abs(of(epoch, again).total() - 0.2 * epoch.total()) <= 1
    documents = Documents(facts.folder)
    held = np.flatnonzero(documents.sets == Set.EVAL)
    assert all(documents.where(int(number)).startswith(labelled.path) for number in held)
    labels = report_of(facts).labels
    assert labels["a"].copies == labels["b"].copies


def test_the_report_counts_them_apart(tmp_path: Path, files: dict[str, SourcePlan]) -> None:
    facts = prepared(
        tmp_path, files["train"], replay=replay(files["few"], 0.25), retain=(files["retain"],), eval=held_out(rows=5)
    )
    report: Report = report_of(facts)
    assert report.sets.replay is not None
    assert report.sets.retain is not None
    assert (report.sets.train.documents, report.sets.eval.documents) == (55, 5)
    assert (report.sets.replay.documents, report.sets.retain.documents) == (18, 20)
    assert {source.path: (source.role, source.rows, source.used) for source in report.sources} == {
        files["train"].path: ("train", 60, 60),
        files["few"].path: ("replay", 3, 3),
        files["retain"].path: ("retain", 20, 20),
    }
    drawn = prepared(tmp_path, files["train"], replay=replay(files["earlier"], 0.1))
    (_, source) = report_of(drawn).sources
    assert (source.rows, source.used, source.dropped) == (100, 7, {})


def test_retained_rows_are_held_out_and_change_nothing_else(tmp_path: Path, files: dict[str, SourcePlan]) -> None:
    plain = prepared(tmp_path, files["train"], eval=held_out(rows=5))
    facts = prepared(tmp_path, files["train"], eval=held_out(rows=5), retain=(files["retain"],))
    assert (plain.retain_documents, facts.retain_documents) == (0, 20)
    assert plain.content_hash == facts.content_hash
    assert an_epoch(plain) == an_epoch(facts)
    retained, first = EvalData(facts.folder, file="retain.arrow"), EvalData(facts.folder, 7, file="retain.arrow")
    assert (retained.num_documents, first.num_documents) == (20, 7)
    where = [place for batch in retained.micro_batches(1000, 1, 0) for place in batch.where]
    assert sorted(where) == sorted(f"{files['retain'].path}:{line}" for line in range(1, 21))
    assert EvalData(plain.folder, file="retain.arrow").num_documents == 0
    (Path(plain.folder) / "retain.arrow").unlink()  # as what an earlier version prepared
    assert EvalData(plain.folder, file="retain.arrow").num_documents == 0


def test_what_a_retained_row_asks_is_not_trained_on(tmp_path: Path, files: dict[str, SourcePlan]) -> None:
    same = [row | {"completion": "Something else."} for row in rows(60)[:4]]
    retained = source_plan(write(tmp_path / "asked.jsonl", same))
    facts = prepared(tmp_path, files["train"], retain=(retained,))
    assert facts.dropped == {"asks what a held-out row asks": 4}
    assert facts.train_documents == 56
    with pytest.raises(DataError, match="no replay row is left; dropped: 100 asks what a held-out row asks"):
        prepared(tmp_path, files["train"], retain=(files["earlier"],), replay=replay(files["earlier"], 0.1))
