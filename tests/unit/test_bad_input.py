"""What a user can get wrong in `slipway run`: each has a message, a hint and exit code 2, and leaves no folder behind.

Mistakes in the recipe itself are in test_recipe_errors.py, too many workers in tests/cluster.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pytest

from launcher.checkpoint.lease import acquire
from launcher.cli.app import main
from launcher.model.fingerprint import STAMPS, fingerprint
from launcher.store.folder import FolderStore
from tests.distributed.tiny import tiny_plan
from tests.plans import model_plan

SCRATCH = (
    "{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2, "
    "vocab_size: 300}"
)
GOOD = {"instruction": "say yes", "output": "yes"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "x.yaml").write_text(f"model: {{scratch: {SCRATCH}}}\ndata:\n  train: [{{path: rows.jsonl}}]\n")
    write_rows(tmp_path, GOOD)
    return tmp_path


def write_rows(folder: Path, *rows: object) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "rows.jsonl").write_text("".join(line + "\n" for line in lines))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The lines on stderr of a command that must exit 2 without a traceback, with a hint, and with nothing on
    stdout."""
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert "hint: " in err
    return err.splitlines()


def test_a_data_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    lines = refused(capsys, "run", "x.yaml", "data.train.0.path=nowhere.jsonl")
    assert lines[0] == "error: command line: data.train.0.path: nowhere.jsonl does not exist"
    lines = refused(capsys, "run", "x.yaml", "data.train.0.path=null", "data.train=[{path: gone.jsonl}]")
    assert lines[0] == "error: command line: data.train.0.path: gone.jsonl does not exist"
    assert not Path("runs").exists()


def test_empty_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(folder)
    assert "rows.jsonl" in refused(capsys, "run", "x.yaml")[0]


def test_a_row_that_is_no_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(folder, GOOD, "{not json", GOOD)
    assert f"{folder}/rows.jsonl:2: " in refused(capsys, "run", "x.yaml")[0]


def test_a_row_with_no_assistant_turn(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(folder, {"messages": [{"role": "user", "content": "hello?"}]})
    line = refused(capsys, "run", "x.yaml")[0]
    assert f"{folder}/rows.jsonl:1: " in line
    assert "assistant" in line


def test_all_rows_too_long(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "run", "x.yaml", "data.max_length=3")[0]
    assert "too long" in line or "max_length" in line


def test_a_model_folder_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    lines = refused(capsys, "run", "x.yaml", "model.scratch=null", "model.path=./no/such/model")
    assert lines[0] == "error: command line: model.path: model folder ./no/such/model does not exist"
    assert "no such model" in refused(capsys, "run", "x.yaml", "model={path: no-such-model}")[0].replace("-", " ")


def test_a_model_folder_without_a_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "empty").mkdir()
    assert "has no config.json" in refused(capsys, "run", "x.yaml", "model={path: ./empty}")[0]


def test_a_second_launcher_on_the_same_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = folder / "taken"
    run_dir.mkdir()
    with acquire(FolderStore(run_dir)):
        lines = refused(capsys, "run", "x.yaml", "--run-dir", str(run_dir))
    assert "pid" in lines[0]
    assert run_dir.exists(), "the folder belongs to the first"


def test_a_folder_that_holds_a_run_already(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "old").mkdir()
    (folder / "old" / "plan.json").write_text("{}")
    assert "already holds a run" in refused(capsys, "run", "x.yaml", "--run-dir", "old")[0]


def test_resume_without_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no run" in refused(capsys, "resume", "nothing-here")[0]


def run_over(base: Path, run_dir: Path) -> None:
    """A run as its launcher leaves it, over weights in a folder."""
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"weights")
    run_dir.mkdir()
    plan = tiny_plan(run_dir, zero=0)
    model = model_plan(base, fingerprint=fingerprint(base, run_dir / STAMPS))
    plan.model_copy(update={"trajectory": plan.trajectory.model_copy(update={"model": model})}).save(
        run_dir / "plan.json"
    )


@pytest.mark.parametrize("verb", ["resume", "export"])
def test_a_base_that_is_another_one_by_now(folder: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    run_over(folder / "base", folder / "run")
    (folder / "base" / "model.safetensors").write_bytes(b"WEIGHTS!")
    line = refused(capsys, verb, "run")[0]
    assert line.endswith("base is not the one that this run began with: model.safetensors has changed")
    shutil.rmtree(folder / "base")
    assert refused(capsys, verb, "run")[0] == f"error: the base model {folder}/base is gone"


def test_prepared_data_that_is_gone_with_its_sources(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_over(folder / "base", folder / "run")
    assert f"the run's prepared data {folder}/run/data is gone" in refused(capsys, "resume", "run")[0]


def test_a_run_of_another_version(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "old").mkdir()
    (folder / "old" / "plan.json").write_text('{"name": "x"}')
    for arguments in (["resume", "old"], ["export", "old"], ["run", "x.yaml", "--run-dir", "old", "--resume", "auto"]):
        assert "cannot be understood" in refused(capsys, *arguments)[0]


@pytest.mark.parametrize("url", ["nosuch://bucket/run", "s3://"])
def test_a_store_that_cannot_be(capsys: pytest.CaptureFixture[str], url: str) -> None:
    for arguments in (
        ["run", "x.yaml", "--run-dir", url],
        ["resume", url],
        ["export", url],
        ["chat", url],
        ["runs", url],
    ):
        assert url in refused(capsys, *arguments)[0]
    assert not Path(url.partition("/")[0]).exists()


def test_no_space_in_the_runs_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real file system of 1 MiB that is full, not a pretended one."""
    small = folder / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a file system")
    try:
        with (small / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(b"0" * 4096)
        lines = refused(capsys, "run", "x.yaml", "--run-dir", str(small / "run"))
        assert "o space left" in lines[0] or "cannot write" in lines[0] or "cannot be written" in lines[0]
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_ray_that_does_not_start(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its sockets have no room in a path as long as this one."""
    with mock.patch.dict(os.environ, {"RAY_TMPDIR": str(folder / ("long" * 30))}):
        lines = refused(capsys, "run", "x.yaml", "--run-dir", str(folder / "run"))
    assert lines[0].startswith("error: Ray does not start on this machine: ")
    assert "path length cannot exceed 107 bytes" in lines[0]
    assert lines[1].startswith("hint: its logs are in ")
