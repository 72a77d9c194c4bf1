"""What `slipway submit` sends of a recipe, what it refuses to send, and the line that runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from launcher.cluster.submit import PACKAGE_BYTES, Job, entrypoint, pack, prepare
from launcher.driver import secrets
from launcher.errors import RecipeError, UserError
from launcher.recipe.load import load

RECIPE = "model: {path: gpt2}\ndata: {train: [{path: rows.jsonl}]}\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with mine.yaml and its rows, which is the current one."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "mine.yaml").write_text(RECIPE)
    (folder / "rows.jsonl").write_text("{}\n")
    monkeypatch.chdir(folder)
    return folder


def prepared(recipe: str, *overrides: str, folder: Path | None = None, run_dir: str | None = None) -> Job:
    return prepare(load(recipe, overrides), overrides, folder, run_dir, None)


def refusals(recipe: str, *overrides: str, folder: Path | None = None) -> list[str]:
    with pytest.raises(RecipeError) as refused:
        prepared(recipe, *overrides, folder=folder)
    return [str(problem) for problem in refused.value.problems]


def names(job: Job) -> list[str]:
    assert job.root is not None
    return sorted(file.relative_to(job.root).as_posix() for file in job.files)


AWKWARD = [
    "model={path: gpt2, tokenizer: null}",
    "data.train=[{path: rows.jsonl, labels: ['a', \"b\"]}]",
    "description=it's $HOME `id` $(id) \\ 100% !x ~ * ? ; & | < > #",
    'description="two\nlines"',
    "description=größe 漢字",
    "description=",
]


def test_every_word_arrives_as_it_was_typed(project: Path) -> None:
    python = project / "a python's $HOME"
    python.write_text(
        f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([sys.argv[1:], dict(os.environ)]))\n"
    )
    python.chmod(0o755)
    job = prepared("mine.yaml", *AWKWARD, run_dir="~/runs/it's {first}")
    line = entrypoint(job, str(python), "/dev/shm/slipway-1")
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=True)
    words, environ = json.loads(done.stdout)
    own = ["-m", "launcher", "run", "--address", "auto", "--run-dir", "~/runs/it's {first}", "--expect", job.hash]
    assert words == [*own, "--", "mine.yaml", *AWKWARD]
    assert environ[secrets.FILE] == "/dev/shm/slipway-1"


def test_without_secrets_none_are_named(project: Path) -> None:
    assert secrets.FILE not in entrypoint(prepared("mine.yaml"), "python", None)


def test_what_is_sent_and_what_stays(project: Path) -> None:
    stay = [
        "runs/a/model.bin",
        ".prepared/x",
        ".git/config",
        "__pycache__/m.pyc",
        ".env",
        "venv/pyvenv.cfg",
        "venv/lib",
    ]
    for name in [*stay, "sub/more.jsonl", "augment.py"]:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("x")
    (project / "broken").symlink_to("nowhere")
    assert names(prepared("mine.yaml")) == ["augment.py", "mine.yaml", "rows.jsonl", "sub/more.jsonl"]


def test_the_same_files_make_the_same_package(project: Path, tmp_path: Path) -> None:
    job = prepared("mine.yaml")
    first = pack(job, tmp_path / "first.zip")
    os.utime(project / "rows.jsonl", (1, 1))
    again = pack(prepared("mine.yaml"), tmp_path / "again.zip")
    assert first is not None
    assert again is not None
    assert first.read_bytes() == again.read_bytes()
    with zipfile.ZipFile(first) as package:
        assert package.read("mine.yaml").decode() == RECIPE


def test_too_much_is_refused_with_the_largest_file(project: Path) -> None:
    with (project / "weights.bin").open("wb") as file:
        file.truncate(PACKAGE_BYTES)
    with pytest.raises(
        UserError, match=r"more than the 90 MiB that can be sent, such as weights.bin of 90 MiB"
    ) as error:
        prepared("mine.yaml")
    assert error.value.hint is not None
    assert "storage that every node sees" in error.value.hint


def test_a_home_is_not_sent(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(project))
    with pytest.raises(UserError, match="would be sent as a whole"):
        prepared("mine.yaml")


def test_files_outside_are_all_named_at_once(project: Path) -> None:
    (project.parent / "base.yaml").write_text("train: {seed: 3}\n")
    (project.parent / "eval.jsonl").write_text("{}\n")
    (project.parent / "chat.jinja").write_text("x")
    (project / "link.jsonl").symlink_to("../eval.jsonl")  # what it leads to is sent
    (project / "mine.yaml").write_text(
        "extends: ../base.yaml\n"
        "model: {path: gpt2, chat_template: ../chat.jinja}\n"
        "data:\n"
        "  train: [{path: link.jsonl}, {path: /mnt/on/the/cluster.jsonl}, {path: 's3://bucket/rows.jsonl'}]\n"
        "  eval: {sources: [{path: ../eval.jsonl}, {path: gone.jsonl}, {path: openai/gsm8k}]}\n"
    )
    said = refusals("mine.yaml")
    assert said == [
        "mine.yaml: extends: ../base.yaml is not among the files that are sent",
        "mine.yaml:2: model.chat_template: ../chat.jinja is not among the files that are sent",
        "mine.yaml:5: data.eval.sources.0.path: ../eval.jsonl is not among the files that are sent",
        "mine.yaml:5: data.eval.sources.1.path: gone.jsonl does not exist",
    ]


def test_a_wider_folder_holds_them(project: Path) -> None:
    (project.parent / "base.yaml").write_text("train: {seed: 3}\n")
    (project / "mine.yaml").write_text(f"extends: ../base.yaml\n{RECIPE}")
    job = prepared("mine.yaml", folder=project.parent)
    assert job.recipe == "project/mine.yaml"
    assert names(job) == ["base.yaml", "project/mine.yaml", "project/rows.jsonl"]
    with pytest.raises(UserError, match="is not in"):
        prepared("mine.yaml", folder=project.parent / "elsewhere")


def test_a_path_of_the_command_line_means_the_same_there(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    override = "data.train=[{path: rows.jsonl}]"
    assert prepared("mine.yaml", override).overrides == (override,)
    monkeypatch.chdir(project.parent)
    wider = "data.train=[{path: project/rows.jsonl}]"
    assert prepared("project/mine.yaml", wider, folder=project.parent).overrides == (wider,)
    assert refusals("project/mine.yaml", wider) == [
        "command line: data.train.0.path: project/rows.jsonl is not among the files that are sent"
    ]


def test_a_model_folder_is_not_sent_since_a_resume_needs_it(project: Path) -> None:
    (project / "base").mkdir()
    (project / "base" / "config.json").write_text("{}")
    said = refusals("mine.yaml", "model.path=base")
    assert said == ["command line: model.path: base would be deleted on the cluster after the job"]
    assert prepared("mine.yaml", f"model.path={project}/base").root == project


def test_a_packaged_recipe_is_there_already(project: Path, tmp_path: Path) -> None:
    job = prepared("quickstart")
    assert (job.recipe, job.root, job.files) == ("quickstart.yaml", None, ())
    assert pack(job, tmp_path / "none.zip") is None
    assert refusals("quickstart", "data.train=[{path: rows.jsonl}]") == [
        "command line: data.train.0.path: rows.jsonl is not among the files that are sent"
    ]
    job = prepared("quickstart", "data.train=[{path: rows.jsonl}]", folder=project)
    assert names(job) == ["mine.yaml", "rows.jsonl"]


@pytest.mark.parametrize(
    ("overrides", "run_dir", "place"),
    [
        ([], None, "~/runs/mine-"),
        (["runs=experiments"], None, "~/runs/mine-"),
        (["runs=/mnt/runs/"], None, "/mnt/runs/mine-"),
        (["runs=s3://bucket/runs"], None, "s3://bucket/runs/mine-"),
        (["name=a {b} c"], None, "~/runs/a-b-c-"),
        ([], "first", "~/runs/first"),
        ([], "/mnt/first", "/mnt/first"),
        ([], "s3://bucket/first", "s3://bucket/first"),
    ],
)
def test_a_run_is_never_in_the_copy_that_is_deleted(
    project: Path, overrides: Sequence[str], run_dir: str | None, place: str
) -> None:
    assert prepared("mine.yaml", *overrides, run_dir=run_dir).run_dir.startswith(place)


def test_ray_waits_longer_than_the_grace_time(project: Path) -> None:
    assert prepared("mine.yaml", "checkpoint.grace=2m").stop_wait_s == 140


def test_secrets_are_taken_once_and_only_those(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "secrets"
    file.write_text(json.dumps({"HF_TOKEN": "sesame", "LD_PRELOAD": "evil.so"}))
    monkeypatch.setenv(secrets.FILE, str(file))
    monkeypatch.setenv("HF_TOKEN", "before")
    secrets.receive()
    assert secrets.collect(("HF_TOKEN", "LD_PRELOAD")) == {"HF_TOKEN": "sesame"}
    assert not file.exists()
    assert secrets.FILE not in os.environ
    file.write_text("sesame sesame")
    monkeypatch.setenv(secrets.FILE, str(file))
    secrets.receive()
    assert "cannot be read (JSONDecodeError at" in (said := capsys.readouterr().err)
    assert "sesame" not in said
    assert not file.exists()
