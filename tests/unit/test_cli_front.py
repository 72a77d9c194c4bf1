"""The command's front: how fast it answers, what it loads, and what it says to a mistake."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.cli.app import VERBS, main
from launcher.errors import Interrupted, RunFailed
from launcher.recipe.load import load

GOOD = "model: {path: gpt2}\ndata: {train: [{path: a.jsonl}]}\n"
HEAVY = ["torch", "ray", "transformers", "deepspeed", "datasets", "pyarrow", "numpy"]


@pytest.fixture(autouse=True)
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    (tmp_path / "x.yaml").write_text(GOOD)
    return tmp_path / "x.yaml"


def seconds(*arguments: str) -> float:
    """Wall clock of a Python process, the best of five: the rest is other people's noise."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.parametrize(("arguments", "limit_s"), [(["--help"], 0.3), (["check", "x.yaml"], 0.8)])
def test_it_answers_at_once(arguments: list[str], limit_s: float) -> None:
    assert seconds("-m", "launcher", *arguments) - seconds("-c", "pass") < limit_s


@pytest.mark.parametrize(
    ("arguments", "unwanted"),
    [
        (["--help"], [*HEAVY, "pydantic", "rich", "yaml"]),
        (["check", "x.yaml"], HEAVY),
        (["recipes", "list"], [*HEAVY, "launcher.recipe.schema"]),
    ],
)
def test_it_loads_only_what_it_needs(arguments: list[str], unwanted: list[str]) -> None:
    code = (
        "import json, sys; from launcher.cli.app import main; code = main(sys.argv[1:]); "
        "print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    exit_code, modules = json.loads(done.stderr.splitlines()[-1])
    assert exit_code == 0
    assert not set(unwanted) & set(modules)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chek"], "error: no such command 'chek'\nhint: did you mean 'check'?\n"),
        (["check"], "error: missing argument 'RECIPE'\nhint: `slipway check --help` shows how it is used\n"),
        (
            ["check", "x.yaml", "--foo"],
            "error: no such option: --foo\nhint: `slipway check --help` shows how it is used\n",
        ),
        (["recipes"], "error: missing command\nhint: `slipway recipes --help` shows how it is used\n"),
        (
            ["check", "y.yaml"],
            "error: recipe not found: y.yaml (neither a file nor a packaged recipe)\nhint: did you mean x.yaml?\n",
        ),
        (
            ["check", "x.yaml", "optimizer.lr_rate=1", "train.sed=2"],
            "command line: optimizer.lr_rate: unknown key\nhint: did you mean lr?\n"
            "command line: train.sed: unknown key\nhint: did you mean seed?\n",
        ),
    ],
)
def test_a_mistake_gets_a_message_a_hint_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == message


def test_debug_adds_the_traceback_wherever_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--debug", "check", "y.yaml"], ["check", "y.yaml", "--debug"]):
        assert main(arguments) == 2
        assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            RunFailed("rank 1 on node-2: out of memory", "lower it"),
            1,
            "error: rank 1 on node-2: out of memory\nhint: lower it\n",
        ),
        (Interrupted("saved at step 20", "slipway resume r"), 130, "saved at step 20\nhint: slipway resume r\n"),
        (Interrupted("saved", exit_code=143), 143, "saved\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("launcher.cli.check.load", fail)
    assert main(["check", "x.yaml"]) == code
    assert capsys.readouterr().err == message


def test_a_fault_of_ours_is_one_line_and_a_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.cli.check.load", lambda *_: 1 / 0)
    assert main(["check", "x.yaml"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: unexpected ZeroDivisionError: division by zero\nhint: ")
    log = Path(err.strip().rpartition(" ")[2])
    assert "Traceback (most recent call last)" in log.read_text()
    log.unlink()


def test_help_shows_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listed = capsys.readouterr().out.partition("Commands:")[2]
    for verb, line in VERBS.items():
        assert f"{verb} " in listed
        assert line in listed, "the line is cut off: say it in fewer words"


def test_every_verb_has_its_own_help(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in VERBS:
        assert main([verb, "--help"]) == 0
        assert f"Usage: slipway {verb}" in capsys.readouterr().out


def test_check_shows_values_with_their_places(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "x.yaml", "train.seed=3"]) == 0
    out, err = capsys.readouterr()
    assert out == (
        "model.path         gpt2     x.yaml:1\n"
        "data.train.0.path  a.jsonl  x.yaml:2\n"
        "train.seed         3        command line\n"
        f"ok: x.yaml; every other key has its default; hash {load('x.yaml', ['train.seed=3']).hash}\n"
    )
    assert err == "note: data.train.0.path: a.jsonl is not here yet (looked for a.jsonl)\n"


def test_check_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "x.yaml", "--json", "train.seed=3"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["recipe"]["train"]["seed"] == 3
    assert value["origins"]["train.seed"] == "command line"


def test_recipes_show_and_schema(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", "x.yaml"]) == 0
    assert capsys.readouterr().out == GOOD
    assert main(["recipes", "show", "--merged", "x.yaml"]) == 0
    assert capsys.readouterr().out.startswith("# Merged by Slipway from:\n# x.yaml\nmodel: {path: gpt2}\n")
    assert main(["recipes", "schema"]) == 0
    assert "optimizer" in json.loads(capsys.readouterr().out)["properties"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("slipway ")
