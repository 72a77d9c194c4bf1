"""The script of `ray submit`: what it makes of its arguments. That Ray runs it is shown in tests/cluster."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import launcher.job
from launcher.job import damaged, main
from launcher.recipe.load import load

GOOD = "model: {path: gpt2}\ndata: {train: [{path: a.jsonl}]}\n"


@pytest.fixture(autouse=True)
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    (tmp_path / "x.yaml").write_text(GOOD)
    return tmp_path / "x.yaml"


def arrives(*words: str) -> list[str]:
    """What is left of arguments once `ray submit` has joined them into a line and bash has read it."""
    line = f"{sys.executable} -c 'import sys; print(*sys.argv[1:], sep=chr(0), end=\"\")' {' '.join(words)}"
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout.split("\0")


@pytest.mark.parametrize(
    ("words", "broken"),
    [
        (["x.yaml", "optimizer.lr=1e-4", "train.max_steps=3"], None),
        (["x.yaml", "--run-dir", "/runs/a b".replace(" ", "-"), "train.seed=1", "--expect", "0123"], None),
        (["x.yaml", "method.targets=[q_proj,v_proj]"], None),
        (["x.yaml", '"method={kind: lora, rank: 8}"'], None),
        (["x.yaml", "method={kind: lora, rank: 8}"], "method={kind:"),
        (["x.yaml", "data.train=[{path: a}]"], "data.train=[{path:"),
        (["x.yaml", "name=my run"], "run"),
        (["x.yaml", "method.targets={q_proj,v_proj}"], "method.targets=v_proj"),
    ],
)
def test_words_that_a_shell_has_split_are_found(words: list[str], broken: str | None) -> None:
    assert damaged(arrives(*words)) == broken


def test_a_damaged_line_is_refused_with_another_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arrives("x.yaml", "method={kind: lora}")) == 2
    err = capsys.readouterr().err
    assert "error: 'method={kind:' did not arrive as it was typed" in err
    assert "hint: send it with `slipway submit RECIPE ...`" in err


def test_a_stale_recipe_is_refused_before_anything_else(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    wanted = load("x.yaml", ["train.seed=3"]).hash
    recipe.write_text(GOOD.replace("gpt2", "gpt2-xl"))
    there = load("x.yaml", ["train.seed=3"]).hash
    assert main(["x.yaml", "train.seed=3", "--expect", wanted]) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[0] == f"recipe x.yaml, hash {there}"
    assert f"error: x.yaml has the hash {there} on this machine, not {wanted}" in err
    assert "ray rsync-up" in err


def test_the_hash_is_of_what_is_written_wherever_it_lies(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "y.yaml").write_text(f"# moved\n{GOOD}")
    (tmp_path / "elsewhere" / "a.jsonl").touch()
    assert load("elsewhere/y.yaml").hash == load("x.yaml").hash
    assert load("x.yaml", ["train.seed=3"]).hash != load("x.yaml").hash


def test_a_copy_in_a_folder_of_the_users_takes_no_module_from_it(recipe: Path) -> None:
    """As `ray submit` leaves it in the home folder, beside whatever the user has there."""
    copy = recipe.with_name("job.py")
    copy.write_bytes(Path(launcher.job.__file__).read_bytes())
    recipe.with_name("yaml.py").write_text("raise SystemExit('a module of the user')")
    for command in ([str(copy)], ["-P", "-m", "launcher.job"]):
        run = [sys.executable, *command, "x.yaml", "--expect", "0"]
        done = subprocess.run(run, capture_output=True, text=True)
        assert done.returncode == 2
        assert f"hash {load('x.yaml').hash}" in done.stderr.splitlines()[0]
