"""Data prepared with Ray Data over a cluster: the same files as on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from launcher.data.prepare import prepare
from launcher.driver.prepare import cluster_for
from launcher.errors import DataError
from tests.plans import clean_plan, data_plan, held_out, source_plan
from tests.unit.test_data_build import content, rows, scratch_model, write

pytestmark = pytest.mark.cluster


def test_the_cluster_makes_the_same_files(tmp_path: Path) -> None:
    for i in range(5):
        write(tmp_path / "rows" / f"{i}.jsonl", rows(40, seed=i))
    data = data_plan(
        source_plan(tmp_path / "rows"), eval=held_out(0.1), test=held_out(rows=5), clean=clean_plan(near_duplicates=0.8)
    )
    here = prepare(scratch_model(), data, seed=1, cache_dir=tmp_path / "here")
    with cluster_for("cluster", data, None) as spread:
        assert spread is not None
        there = prepare(scratch_model(), data, seed=1, cache_dir=tmp_path / "there", spread=spread)
        assert there == here.model_copy(update={"folder": there.folder})
        assert content(there) == content(here)
        assert len(list((Path(there.folder) / "documents").iterdir())) == 5

        # A row that stops the preparation does so from another process too, in its own words.
        write(tmp_path / "rows" / "3.jsonl", [*rows(5), {"prompt": "Nothing?", "completion": ""}])
        with pytest.raises(DataError, match=r"3\.jsonl:6: 'completion' is empty") as error:
            prepare(scratch_model(), data, seed=1, cache_dir=tmp_path / "there", spread=spread)
        assert error.value.hint


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
    with (tmp_path / "rows.jsonl").open("wb") as stream:
        stream.truncate(num_bytes)  # a hole: it takes no space
    with cluster_for(where, data_plan(source_plan(tmp_path / "rows.jsonl")), address) as spread:
        assert (spread is not None) == spreads
