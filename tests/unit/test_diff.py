"""`slipway diff`: what two runs do not share, and nothing that they do; settings under the keys that users write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.cli import render
from launcher.cli.app import main
from launcher.report.settings import settings
from tests.reports import made_plan, write_run


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
    model = plan.trajectory.model.model_copy(update={"fingerprint": "f00d"})
    trajectory = plan.trajectory.model_copy(update={"model": model})
    changed = plan.model_copy(update={"data": data, "version": "0.2", "trajectory": trajectory})
    changed.save(tmp_path / "b" / "plan.json")
    environment = json.loads((tmp_path / "b" / "environment.json").read_text())
    environment["packages"]["torch"] = "2.14.0"
    environment["git"]["commit"] = "def"
    (tmp_path / "b" / "environment.json").write_text(json.dumps(environment))
    different = found(capsys, "a", "b")
    lr = {"key": "optimizer.lr", "values": [2e-4, 1e-3], "origins": ["tiny.yaml:7", "tiny.yaml:7"]}
    assert different["settings"].pop("optimizer.lr") == lr
    assert different["settings"].pop("(model) fingerprint")["values"] == [None, "f00d"], "other weights, the same name"
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


def test_a_value_of_many_lines_takes_one_and_a_password_shows_in_neither_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "a", 40)
    plan = write_run(tmp_path / "b", 40)
    model = plan.trajectory.model.model_copy(update={"chat_template": "{% if a %}\n  b\n{% endif %}"})
    source = plan.trajectory.data.train[0].model_copy(update={"path": "sftp://user:s3cr3t@host/rows.jsonl"})
    data = plan.trajectory.data.model_copy(update={"train": (source,)})
    trajectory = plan.trajectory.model_copy(update={"model": model, "data": data})
    plan.model_copy(update={"trajectory": trajectory}).save(tmp_path / "b" / "plan.json")
    assert set(found(capsys, "a", "b")["settings"]) == {"model.chat_template", "data.train.0.path"}
    for options in ([], ["--json"]):
        assert main(["diff", "a", "b", *options]) == 0
        said = capsys.readouterr().out
        assert "s3cr3t" not in said
        assert options or "model.chat_template  -                 {% if a %} b {% endif %}" in said


def test_a_run_that_is_none_is_the_users_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a", 40)
    assert main(["diff", "a", "b"]) == 2
    assert "b holds no run" in capsys.readouterr().err


def test_every_setting_has_the_key_that_a_user_writes(tmp_path: Path) -> None:
    from launcher.recipe.schema import Recipe

    found = settings(made_plan(tmp_path))
    assert found["optimizer.lr"].value == 2e-4
    assert found["optimizer.lr"].origin == "tiny.yaml:7"
    assert found["parallel.zero"].origin == "planner: two ranks have something to spread"
    assert found["data.packing"].origin == "default"
    assert found["evaluate.generate.rows"].value == 200
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    for key in found:
        head, _, rest = key.partition(".")
        if not key.startswith("("):
            assert head in sections, key
            fields = getattr(sections[head], "model_fields", None)
            known = {"fingerprint", "source", "function_file", "function_name", "content_hash"}
            assert fields is None or rest.split(".")[0] in fields or rest.split(".")[0] in known, key
