"""Data prepared with Ray Data over a cluster: the same files as on one machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest

from launcher.driver.prepare import cluster_for
from launcher.plan.plan import DataFacts
from tests.cluster.command import Command
from tests.plans import data_plan, source_plan
from tests.unit.test_data_build import content, rows, write

pytestmark = pytest.mark.cluster


RECIPE = """
model: {scratch: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
                  num_attention_heads: 2, num_key_value_heads: 1, vocab_size: 300}}
data: {train: [{path: rows}], eval: {split: 0.1}, test: {rows: 5}, clean: {near_duplicates: 0.8}}
"""


def prepared(folder: Path, where: str) -> tuple[int, DataFacts | None, str]:
    """What `slipway data` makes of the recipe in `folder`: its exit code, the facts, and what it said."""
    with Command(folder, "data", "mine.yaml", f"data.prepare_on={where}", f"runs={where}", "--json") as command:
        code, out, err = command.end()
    return code, DataFacts(**json.loads(out)["facts"]) if code == 0 else None, err


def test_the_cluster_makes_the_same_files(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(RECIPE)
    for i in range(5):
        write(tmp_path / "rows" / f"{i}.jsonl", rows(40, seed=i))
    _, here, err = prepared(tmp_path, "machine")
    assert here is not None, err
    _, there, err = prepared(tmp_path, "cluster")
    assert there is not None, err
    assert there == here.model_copy(update={"folder": there.folder})
    assert there.folder != here.folder
    assert content(there) == content(here)
    assert len(list((Path(there.folder) / "documents").iterdir())) == 5

    # A row that stops the preparation does so from another process too, in its own words.
    write(tmp_path / "rows" / "3.jsonl", [*rows(5), {"prompt": "Nothing?", "completion": ""}])
    code, _, err = prepared(tmp_path, "cluster")
    assert code == 2
    assert f"{tmp_path}/rows/3.jsonl:6: 'completion' is empty\nhint: " in err


@pytest.mark.parametrize(
    ("where", "address", "num_bytes", "spreads"),
    [
        ("auto", "ray://somewhere:10001", 100, False),
        ("auto", "ray://somewhere:10001", 9 * 2**30, True),
        ("auto", None, 9 * 2**30, False),
        ("machine", "ray://somewhere:10001", 9 * 2**30, False),
        ("cluster", None, 100, True),
    ],
)
def test_only_what_is_large_goes_to_a_cluster_that_is_joined(
    tmp_path: Path, where: Literal["auto", "machine", "cluster"], address: str | None, num_bytes: int, spreads: bool
) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    with (tmp_path / "deep" / "er" / "rows.jsonl").open("wb") as stream:
        stream.truncate(num_bytes)  # a hole: it takes no space
    for path in (tmp_path / "deep", tmp_path / "**" / "*.jsonl"):
        with cluster_for(where, data_plan(source_plan(path)), address) as spread:
            assert (spread is not None) == spreads
