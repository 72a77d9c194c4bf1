"""`slipway diff`: what two runs do not share, and nothing that they do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.cli import render
from launcher.cli.app import main
from tests.reports import write_run


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    render.out.cache_clear()


def found(capsys: pytest.CaptureFixture[str], *runs: str) -> dict[str, dict[str, Any]]:
    """{section: {key: what differs}}."""
    capsys.readouterr()
    assert main(["diff", *runs, "--json"]) == 0
    sections = json.loads(capsys.readouterr().out)
    return {name: {one["key"]: one for one in part} for name, part in sections.items()}


def test_equal_runs_have_nothing_to_tell_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, 40)
    assert found(capsys, "a", "b") == {"settings": {}, "data": {}, "environment": {}, "result": {}}
    assert main(["diff", "a", "b"]) == 0
    assert capsys.readouterr().out == "nothing differs\n"


def test_what_differs_is_told_with_both_values_and_their_origins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "a", 40, verdict={"kind": "finished", "step": 40, "message": "finished 40 steps"})
    plan = write_run(tmp_path / "b", 50, lr=1e-3)
    data = plan.data.model_copy(update={"content_hash": "5678", "train_rows": 399, "dropped": {"duplicate": 4}})
    plan.model_copy(update={"data": data, "version": "0.2"}).save(tmp_path / "b" / "plan.json")
    environment = json.loads((tmp_path / "b" / "environment.json").read_text())
    environment["packages"]["torch"] = "2.14.0"
    environment["git"]["commit"] = "def"
    (tmp_path / "b" / "environment.json").write_text(json.dumps(environment))
    different = found(capsys, "a", "b")
    lr = {"key": "optimizer.lr", "values": [2e-4, 1e-3], "origins": ["tiny.yaml:7", "tiny.yaml:7"]}
    assert different["settings"].pop("optimizer.lr") == lr
    assert all(key.startswith(("train.", "evaluate.", "checkpoint.")) for key in different["settings"])
    assert {key: one["values"] for key, one in different["data"].items()} == {
        "content_hash": ["1234", "5678"],
        "train_rows": [400, 399],
        "left out: duplicate": [3, 4],
    }
    assert {key: one["values"] for key, one in different["environment"].items()} == {
        "slipway": ["0.1", "0.2"],
        "torch": ["2.13.0", "2.14.0"],
        "git.commit": ["abc", "def"],
    }
    result = different["result"]
    assert result["end"]["values"][0] == "finished 40 steps"
    assert result["steps"]["values"] == [40, 50]
    assert {"training loss", "tokens per second", "duration, s"} <= set(result)
    assert "exact_match, last" not in result, "it is equal"

    assert main(["diff", "a", "b"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["settings", "a", "b", "from"] in lines
    assert ["optimizer.lr", "0.0002", "0.001", "tiny.yaml:7"] in lines
    assert ["torch", "2.13.0", "2.14.0"] in lines


def test_a_run_that_is_none_is_the_users_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a", 40)
    assert main(["diff", "a", "b"]) == 2
    assert "b holds no run" in capsys.readouterr().err
