"""Every real file, prepared as a user would: the right format, every row accounted for, markers handled and counted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from launcher.data.prepare import prepare
from launcher.data.prepare.findings import findings
from launcher.data.prepare.report import Report
from launcher.data.store import Documents
from tests.plans import data_plan, held_out, source_plan
from tests.unit.test_data_build import dropped, scratch_model

DATA = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.exists(), reason="real data is not here: ../shared/data")
END = "<|endoftext|>"


@pytest.mark.parametrize(
    ("name", "format", "num_rows"),
    [
        ("gsm8k/test.jsonl", "question_answer", 1319),
        ("seed-tasks/seed_tasks.jsonl", "self_instruct", 175),
        ("sentiment/amazon_polarity.jsonl", "prompt_completion", 200),
        ("sentiment/imdb.jsonl", "prompt_completion", 200),
        ("sentiment/rotten_tomatoes.jsonl", "prompt_completion", 200),
        ("summarization/cnn_dailymail.jsonl", "prompt_completion", 200),
        ("summarization/gigaword.jsonl", "prompt_completion", 200),
        ("summarization/samsum.jsonl", "prompt_completion", 200),
    ],
)
def test_real_files(tmp_path: Path, name: str, format: str, num_rows: int) -> None:
    data = data_plan(source_plan(DATA / name), eval=held_out(0.05), max_length=4096)
    facts = prepare(scratch_model(2000), data, seed=1, cache_dir=tmp_path)
    assert facts.formats == {str(DATA / name): format}
    report = Report.load(Path(facts.folder) / "report.json")
    assert report is not None
    (source,) = report.sources
    assert (source.rows, source.used + sum(source.dropped.values())) == (num_rows, num_rows)
    assert len(dropped(facts)) == sum(facts.dropped.values()) == sum(source.dropped.values())
    rows = [json.loads(line) for line in (DATA / name).read_text().splitlines()]
    unfit = {int(where.rsplit(":", 1)[1]) for where, _ in dropped(facts)}
    ends = sum(row.get("completion", "").endswith(END) for i, row in enumerate(rows, 1) if i not in unfit)
    assert report.notes.get("end_markers_removed", 0) == ends
    assert (ends > 0) == (format == "prompt_completion")
    documents = Documents(facts.folder)
    # The one end of text is the template's, and it is learned; none that was spelled out is left.
    for number in range(len(documents)):
        ids, mask = documents.input_ids(number), documents.supervised(number)
        assert np.flatnonzero(ids == 0).tolist() == [len(ids) - 1]
        assert mask[-1] == 1
    assert report.sets.train.supervised_share == pytest.approx(
        facts.train_supervised_tokens / facts.train_tokens, rel=1e-9
    )
    assert all(isinstance(finding, str) and finding for finding in findings(report))


def test_repeated_questions_are_found(tmp_path: Path) -> None:
    data = data_plan(source_plan(DATA / "summarization" / "gigaword.jsonl"), eval=held_out(0.3), max_length=4096)
    facts = prepare(scratch_model(2000), data, seed=1, cache_dir=tmp_path)
    report = Report.load(Path(facts.folder) / "report.json")
    assert report is not None
    # 15 of its prompts stand there twice; some with another answer, of which one may be held out.
    assert report.duplicates.exact is not None
    assert report.duplicates.overlap_with_held_out is not None
    assert 0 < report.duplicates.exact + report.duplicates.overlap_with_held_out <= 15
