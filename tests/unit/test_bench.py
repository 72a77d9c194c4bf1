"""What the benchmark beside TRL hands over, and how it is written down."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.bench.against_trl import KINDS, RECIPE, by_setting, page, rates, table
from launcher.bench.contenders import labelled_documents
from launcher.data.loader import TrainData
from launcher.driver.start import decide, planned
from launcher.plan.batch import batch_layout
from launcher.plan.facts import ClusterFacts, NodeFacts
from launcher.plan.plan import Plan
from launcher.recipe.load import load


def step(seconds: float) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "cpu_s": seconds,
        "tokens": 4000,
        "supervised_tokens": 2000,
        "loss": 9.0,
        "memory_bytes": 2**30,
    }


def result(kind: str, *seconds: float) -> dict[str, Any]:
    facts = {"parameters": 7_900_000}
    steps = [step(each) for each in seconds]
    return {"kind": kind, "dtype": "fp32", "gradient_checkpointing": True, "facts": facts, "steps": steps}


RESULTS = [
    result("slipway", 1.0, 2.0, 1.0),
    result("trl-isolated", 4.0, 4.0, 2.0),
    result("trl-leaking", 2.0, 2.0, 1.0),
]


def test_a_ratio_is_taken_within_a_round() -> None:
    """In the second round the machine was busy; of medians alone ours would be 4 and 2 times as fast, too."""
    assert rates(RESULTS[0]) == [4000, 2000, 4000]
    rows = table(RESULTS).splitlines()
    assert "| 4,000 (2,000 to 4,000) | 1.00 |  |" in rows[2]
    assert "| 1,000 (1,000 to 2,000) | 4.00 | 2.00 (2.00 to 4.00) |" in rows[3]
    assert "| 2,000 (2,000 to 4,000) | 2.00 | 1.00 (1.00 to 2.00) |" in rows[4]
    assert all("2,000 of 4,000 | 1 GiB" in row or "2,000 of 4,000 | 1.0 GiB" in row for row in rows[2:])


def test_the_page_names_machine_versions_and_command() -> None:
    machine = {
        "date": "2026-01-01",
        "cpu": "A CPU",
        "cpus": 2,
        "memory": "8 GiB",
        "python": "3.12.0",
        "packages": {"torch": "2.13.0", "trl": "1.16.0"},
        "load_before": 0.1,
    }
    found = {"machine": machine, "command": "python -m x", "warmup": 2, "rounds": 3, "results": RESULTS * 2}
    text = page(json.loads(json.dumps(found)))
    for words in ("2026-01-01", "A CPU", "trl 1.16.0", "python -m x", "7.9M", "3 rounds"):
        assert words in text
    assert len(by_setting(RESULTS * 2)) == 2
    assert text.count("| fp32 | on |") == 2 * len(KINDS)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    rows = [
        {"question": f"What is {a} plus {b}?", "answer": f"{a} plus {b} is {a + b}."}
        for a, b in itertools.product(range(12), repeat=2)
    ]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"data": RECIPE["data"] | {"train": [{"path": str(data)}]}}))
    decided = decide(load(str(recipe), ["model.scratch.vocab_size=300"]), tmp_path / "run", None)
    return planned(decided, ClusterFacts((NodeFacts("here", 2, 0),)))


def test_trl_learns_the_same_tokens(plan: Plan) -> None:
    theirs = sorted(token for row in labelled_documents(plan) for token in row["labels"][1:] if token != -100)
    train_data, layout = TrainData(plan.data.folder, 4, plan.trajectory.seed), batch_layout(4, 4, 1)
    ours = sorted(
        int(token)
        for index in range(train_data.steps_per_epoch)
        for batch in train_data.micro_batches(index, layout, 0)
        for token in batch.targets
    )
    assert ours == theirs
    assert len(ours) == plan.data.train_supervised_tokens > 1000
