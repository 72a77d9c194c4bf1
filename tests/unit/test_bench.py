"""What the benchmarks beside TRL and DeepSpeed hand over, and how it is written down."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.bench.against_trl import KINDS, RECIPE, by_setting, page, rates, table
from launcher.bench.checkpoint import file_system, scratch_llama
from launcher.bench.checkpoint_page import page as checkpoint_page
from launcher.bench.checkpoint_page import pauses, percentile, ratios
from launcher.bench.contenders import labelled_documents
from launcher.data.loader import TrainData
from launcher.driver.start import decide, planned
from launcher.errors import UserError
from launcher.plan.batch import batch_layout
from launcher.plan.facts import ClusterFacts, NodeFacts
from launcher.plan.plan import Plan
from launcher.plan.size import parameter_count
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


MACHINE = {
    "date": "2026-01-01",
    "cpu": "A CPU",
    "cpus": 2,
    "memory": "8 GiB",
    "python": "3.12.0",
    "packages": {"torch": "2.13.0", "trl": "1.16.0"},
    "load_before": 0.1,
}


def test_the_page_names_machine_versions_and_command() -> None:
    found = {"machine": MACHINE, "command": "python -m x", "warmup": 2, "rounds": 3, "results": RESULTS * 2}
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


def taken(*seconds: float, inside: float) -> list[dict[str, float]]:
    """Steps of a save: all that is inside its calls is in the first."""
    return [
        {"seconds": each, "inside": 0.0 if i else inside, "cpu": each, "loss": 9.0} for i, each in enumerate(seconds)
    ]


def saved(*seconds: float, inside: float) -> dict[str, Any]:
    steps = taken(*seconds, inside=inside)
    return {"ordinary": taken(1.0, inside=0.0), "taken": steps, "committed_after": 1.5, "bytes": 1_180_000_000}


def loads(*names: str) -> dict[str, Any]:
    return {name: {"cold": [2.0, 3.0], "warm": [1.0, 1.0], "peak": [5e6, 4e6], "loss": [7.5, 7.5]} for name in names}


def round_of(ordinary: float, slower: float = 1.0) -> dict[str, Any]:
    saves = {
        "deepspeed": saved(ordinary + 0.4 * slower, inside=0.35),
        "slipway": saved(ordinary + 0.1 * slower, ordinary + 0.02 * slower, inside=0.01),
    }
    return {"ordinary": ordinary, "ordinary_cpu": ordinary, "saves": saves}


CHECKPOINTS: dict[str, Any] = {
    "machine": MACHINE | {"file_system": "ext4"},
    "command": "python -m launcher.bench.checkpoint --rounds 2",
    "settings": {"dtype": "bf16", "tokens": 128, "rounds": 2, "steps": 1, "stretch": 20, "every": 10},
    "layout": {"workers": 2, "zero": 3, "device": "cpu", "cpus_per_worker": 1},
    "saves": {
        "device": "CPU",
        "parameters": 98_300_000,
        "shard_bytes": 590e6,
        "rounds": [round_of(5.0, slower=9.0), round_of(1.0), round_of(2.0, slower=2.0)],
        "stretches": [{"none": 20.0, "deepspeed": 21.0, "slipway": 20.4}],
        "memory": {
            "deepspeed": {"host": 6e6, "device": 0.0, "kept": 0.0},
            "slipway": {"host": 3e6, "device": 0.0, "kept": 589e6},
        },
        "loads": loads("slipway", "deepspeed"),
    },
    "elsewhere": [
        {"failed": "DeepSpeed's universal conversion failed: so it said"},
        {"ranks": 1, "zero": 3, "conversions": [9.0, 10.0, 11.0], "loads": loads("slipway", "universal")},
    ],
}


def test_a_pause_is_what_lies_above_the_ordinary_steps_of_its_round() -> None:
    """The first round warms up; in the third everything takes twice as long."""
    ours, theirs = pauses(CHECKPOINTS, "slipway"), pauses(CHECKPOINTS, "deepspeed")
    assert ours["first"] == pytest.approx([0.1, 0.2])
    assert ours["whole"] == pytest.approx([0.12, 0.24])
    assert ours["inside"] == [0.01, 0.01]
    assert theirs["whole"] == pytest.approx([0.4, 0.8])
    assert ratios(ours["whole"], theirs["whole"]) == pytest.approx([0.3, 0.3])
    assert percentile([0.1], 90) == 0.1
    assert percentile([0.0, 1.0, 2.0, 3.0, 4.0], 90) == pytest.approx(3.6)


def test_the_page_on_checkpoints() -> None:
    lines = checkpoint_page(json.loads(json.dumps(CHECKPOINTS))).splitlines()
    rows = {line for line in lines if line.startswith("| ")}
    assert any("Slipway, beside training | 0.150 (0.100 to 0.200) | 0.190 | 25% (25% to 25%)" in row for row in rows)
    assert any("| DeepSpeed `save_checkpoint` | 21.00 (21.00 to 21.00) | 5.0%" in row for row in rows)
    assert any("| 0.20 (0.20 to 0.20) |" in row for row in rows), "two saves cost 0.4 s"
    assert any("1,180.0 MB | 592 MB |" in row for row in rows), "the copies that are kept count"
    assert any(row.startswith("| 1, ZeRO-3 | DeepSpeed, universal | 10.00 (9.00 to 11.00)") for row in rows)
    assert any("| 12.50 | 5 MB | 7.50000 |" in row for row in rows), "conversion and load, medians"
    assert "- DeepSpeed's universal conversion failed: so it said" in lines
    for words in ("2026-01-01", "A CPU", "ext4", "98.3M parameters", "563 MiB", "--rounds 2"):
        assert any(words in line for line in lines), words


@pytest.mark.parametrize("asked", [4_000_000, 98_000_000, 1_000_000_000])
def test_the_scratch_model_is_as_large_as_asked_for(asked: int) -> None:
    assert asked <= parameter_count(scratch_llama(asked, 128)) < 1.1 * asked


def test_memory_is_no_disk() -> None:
    memory = Path("/dev/shm")
    if memory.is_dir():
        with pytest.raises(UserError, match="no disk"):
            file_system(memory)
    assert file_system(Path("/proc")) == "proc"
