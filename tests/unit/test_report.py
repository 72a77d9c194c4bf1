"""The run's page: what it says is what metrics.jsonl says, nothing in it is obeyed, and a million steps fit."""

from __future__ import annotations

import json
import math
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.cli.app import main
from launcher.errors import Interrupted, RunFailed, Superseded
from launcher.report.curves import MOST_POINTS, Curve, smoothed, spread, thinned
from launcher.report.ending import ending
from launcher.report.history import History
from launcher.report.outcome import figures, training_loss
from launcher.report.run_page import page, write_at_end
from launcher.report.settings import settings
from launcher.report.timeline import EVALUATING, LOST, SAVING, STARTING, TRAINING, Timeline
from launcher.store.location import open_store
from launcher.train.metrics import read
from tests.reports import BEGIN, EVIL, made_plan, write_run

STEPS = 100
FINISHED = {"kind": "finished", "step": STEPS, "message": f"finished {STEPS} steps"}


class Elements(HTMLParser):
    """What a page is made of: its elements with their attributes, and what stands in them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs] or [(tag, "", None)]
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    @property
    def text(self) -> str:
        return " ".join(data for tag, data in self.texts if tag not in ("style", "script"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("report") / "run"
    write_run(run_dir, STEPS, verdict=FINISHED)
    return run_dir


@pytest.fixture(scope="module")
def text(run: Path) -> str:
    plan = made_plan(run, steps=STEPS)
    history = History(run)
    return page(plan, history, ending(plan, history))


def numbers_of(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="numbers">(.*?)</script>', text)
    assert found is not None
    value: dict[str, Any] = json.loads(found[1])
    return value


def test_every_curve_is_what_metrics_jsonl_says(run: Path, text: str) -> None:
    drawn = {plot["id"]: plot for plot in numbers_of(text)["plots"]}
    steps = {record["step"]: record for record in read(run) if record["kind"] == "step"}
    raw = drawn["loss"]["lines"][0]
    assert dict(zip(raw["x"], raw["y"], strict=True)) == {
        step: pytest.approx(record["loss"], rel=1e-5) for step, record in steps.items()
    }
    held_out = next(line for line in drawn["loss"]["lines"] if line["name"] == "held-out loss")
    evals = {record["step"]: record["loss"] for record in read(run) if record["kind"] == "eval"}
    assert dict(zip(held_out["x"], held_out["y"], strict=True)) == pytest.approx(evals, rel=1e-5)
    rate = drawn["tokens_per_s"]["lines"][0]["y"]
    assert rate == pytest.approx([r["tokens"] / r["seconds"]["total"] for r in steps.values()], rel=1e-5)
    wanted = {"loss", "accuracy", "answers", "scores", "perplexity", "lr", "grad_norm", "tokens_per_s", "computing"}
    wanted |= {"memory", "cpu", "host_memory", "gpu", "gpu_memory", "power", "gpu_energy", "cpu_energy"}
    assert set(drawn) == wanted
    restarted = next(record["time"] for record in read(run) if record["kind"] == "hang")
    measured = [record["time"] for record in read(run) if record["kind"] == "system"]
    joules = 640 * (max(time for time in measured if time < restarted) - BEGIN + measured[-1] - restarted)
    assert drawn["gpu_energy"]["lines"][0]["y"][-1] == pytest.approx(joules, rel=1e-3), "of both attempts"


def test_the_page_says_how_it_went_in_words(run: Path, text: str) -> None:
    said = Elements(text).text
    assert "finished 100 steps" in said
    assert "10.0% at 0" in " ".join(said.split()), "exact match before training"
    assert "80.0% at 100" in " ".join(said.split())
    for words in (
        "loss 9, 1.2 before it on average; the step was left out",
        "hang: rank 1 on b waits for nothing",
        "went on from the checkpoint of step 45 on 1 worker",
        "1 worker instead of 2: b is gone",
        "it forgets: ",
        "tiny.yaml:7",
        "two ranks have something to spread",
        "command line",
        "2.13.0",
        "Question 1? ",
        "best - worst",
    ):
        assert words in said, words
    marks = [event["step"] for event in numbers_of(text)["events"]]
    assert marks == [33, 50, 45, 45, 100]


def test_nothing_in_a_page_is_obeyed_or_loaded(text: str) -> None:
    found = Elements(text)
    assert EVIL[:-1] in found.text, "rows say it, and are shown saying it"
    scripts = [(name, value) for tag, name, value in found.attributes if tag == "script"]
    assert scripts == [("type", "application/json"), ("id", "numbers"), ("", None)]
    assert not {tag for tag, _, _ in found.attributes} & {"link", "img", "iframe", "object", "base", "form"}
    assert not {name for _, name, _ in found.attributes} & {"src", "srcset", "action", "onerror", "onload"}
    targets = [value for _, name, value in found.attributes if name == "href"]
    assert all(value and value.startswith("#") for value in targets)
    assert ("meta", "http-equiv", "Content-Security-Policy") in found.attributes
    assert "default-src 'none'" in text
    assert "url(" not in text
    assert "@import" not in text
    assert "\u202e" not in text


def test_where_the_time_went_adds_up_to_the_clock(run: Path) -> None:
    """Made up: 4 s of answers, 100 steps of which five came twice, 20 s until a hang was seen, 10 s to the restart."""
    history = History(run)
    spent = history.timeline.seconds()
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    first_time = [line for line in lines if line["kind"] == "step" and line["attempt"] == "1.1" and line["step"] > 45]
    repeated = sum(line["seconds"]["total"] for line in first_time)
    assert len(first_time) == 5
    assert spent[LOST] == pytest.approx(repeated + 30, abs=1e-3)
    assert spent[EVALUATING] == pytest.approx(4, abs=1e-3)
    assert sum(spent.values()) == pytest.approx(history.end - BEGIN, abs=0.01)
    assert spent[TRAINING] > 100
    assert history.timeline.attempts == 2
    assert history.timeline.launches == 1


def test_start_up_compiling_saving_and_the_pause_between_two_launches_are_told_apart() -> None:
    timeline = Timeline()
    lines: list[dict[str, Any]] = [
        {"kind": "start", "time": 100.0, "attempt": "1.1", "step": 0},
        {"kind": "step", "time": 115.0, "step": 1, "seconds": {"total": 15.0}},  # of which 10 compile
        {
            "kind": "startup",
            "time": 115.0,
            "seconds": 45.0,
            "parts": {"ray.init": 8.0, "model": 22.0, "first step": 15.0},
        },
        {"kind": "step", "time": 120.0, "step": 2, "seconds": {"total": 5.0}},
        {"kind": "step", "time": 130.0, "step": 3, "seconds": {"total": 10.0, "checkpoint": 2.0, "evaluate": 3.0}},
        {"kind": "step", "time": 135.0, "step": 4, "seconds": {"total": 5.0}},
        {"kind": "eval", "time": 139.0, "step": 4},
        {"kind": "checkpoint", "time": 140.0, "step": 4},
        {"kind": "start", "time": 9000.0, "attempt": "2.1", "step": 4},
        {"kind": "step", "time": 9006.0, "step": 5, "seconds": {"total": 5.0}},
    ]
    for line in lines:
        timeline.hear(line)
    spent = timeline.seconds()
    assert spent == pytest.approx({TRAINING: 25.0, STARTING: 30 + 10 + 1, SAVING: 3.0, EVALUATING: 7.0, LOST: 0.0})
    assert timeline.launches == 2


def test_a_rollback_loses_what_it_undoes_once() -> None:
    timeline = Timeline()
    timeline.hear({"kind": "start", "time": 0.0, "attempt": "1.1", "step": 0})
    for step in range(1, 11):
        timeline.hear({"kind": "step", "time": step, "step": step, "seconds": {"total": 1.0}})
    timeline.hear({"kind": "rollback", "time": 10.0, "step": 10, "to_step": 6})
    timeline.hear({"kind": "step", "time": 11.0, "step": 11, "seconds": {"total": 1.0}})
    spent = timeline.seconds()
    assert spent[LOST] == 4
    assert spent[TRAINING] == 7


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5000), st.integers(0, 10**6))
def test_thinning_loses_no_spike(values: list[float], seed: int) -> None:
    many = np.array(values * (1 + 4000 // len(values)))
    at = seed % len(many)
    many[at] = 1e9
    x, y = thinned(np.arange(len(many), dtype=float), many)
    assert len(x) == len(y) <= MOST_POINTS + 2
    assert x == sorted(set(x))
    assert (at, 1e9) in zip(x, y, strict=True)
    assert min(y) == pytest.approx(float(many.min()), rel=1e-5)
    assert (x[0], x[-1]) == (0, len(many) - 1)


def test_a_smoothed_curve_leans_to_neither_side() -> None:
    line = np.arange(1000.0)
    found = smoothed(line)
    assert found is not None
    assert found == pytest.approx(line)
    assert smoothed(np.ones(5)) is None


def test_a_step_that_is_done_again_replaces_what_came_after_it() -> None:
    curve = Curve()
    for step in (1, 2, 3, 4):
        curve.add(step, step)
    curve.add(3, 30.0)
    assert (list(curve.places), list(curve.values)) == ([1, 2, 3], [1, 2, 30])
    curve.add(2, None)
    assert list(curve.places) == [1]


def test_many_gpus_are_shown_by_their_mean_and_both_ends() -> None:
    curves = {f"GPU {i}": Curve() for i in range(64)}
    for i, curve in enumerate(curves.values()):
        for at in range(50):
            curve.add(10 * at + i / 100, float(i))
    found = spread(curves, 8)
    assert list(found) == ["mean of 64", "lowest", "highest"]
    assert [found[name].values[20] for name in found] == pytest.approx([31.5, 0, 63])
    assert 45 <= len(found["lowest"]) <= 50
    assert spread(dict(list(curves.items())[:8]), 8) == dict(list(curves.items())[:8])


def test_a_loss_that_is_no_number_leaves_a_page_that_can_be_read(tmp_path: Path) -> None:
    plan = write_run(tmp_path / "run", 20)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        line = {
            "kind": "step",
            "time": BEGIN + 99,
            "attempt": "1.2",
            "step": 21,
            "loss": math.nan,
            "accuracy": math.inf,
        }
        file.write(json.dumps(line | {"lr": 0.1, "tokens": 1, "seconds": {"total": 0.0}, "memory_bytes": 1}) + "\n")
    history = History(tmp_path / "run")
    found = numbers_of(page(plan, history, ending(plan, history)))
    assert max(found["plots"][0]["lines"][0]["x"]) == 20
    assert training_loss(history) is not None


def test_a_run_without_a_step_and_one_of_an_earlier_version_have_a_page(tmp_path: Path) -> None:
    plan = write_run(tmp_path / "run", 20)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "answers-00000000.jsonl").unlink()
    (tmp_path / "run" / "environment.json").unlink()
    history = History(tmp_path / "run")
    assert "No step has been done yet." in page(plan, history, ending(plan, history))
    old = [
        {"kind": "start", "time": BEGIN, "step": 0, "attempt": 1, "world_size": 1, "micro_steps": 1},
        {"kind": "exact_match", "time": BEGIN + 1, "step": 0, "score": 0.0, "rows": 8},
        {"kind": "exact_match", "time": BEGIN + 2, "step": 9, "score": 0.75, "rows": 8},
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    (only,) = figures(History(tmp_path / "run"))
    assert (only.name, only.first, only.last, only.last_step) == ("exact_match", 0.0, 0.75, 9)


def test_the_end_of_a_run_writes_its_page_with_the_root_cause_first(tmp_path: Path) -> None:
    plan = write_run(tmp_path / "run", 20)
    file = tmp_path / "run" / "report.html"
    cause = "rank 1 on b failed: ValueError: boom\nlast lines of worker-1.log:\n  Traceback"
    write_at_end(plan, RunFailed(cause, hint="mend the cause"))
    text = file.read_text(encoding="utf-8")
    said = Elements(text).text
    assert said.index("rank 1 on b failed: ValueError: boom") < said.index("Duration")
    assert "last lines of worker-1.log" in said
    assert "mend the cause" in said
    assert [record["message"] for record in read(tmp_path / "run") if record["kind"] == "run_failed"] == [cause]

    write_at_end(plan, Superseded("another launcher"))
    assert file.read_text(encoding="utf-8") == text, "it is another's by now"
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "rank 1 on b failed: ValueError: boom" in file.read_text(encoding="utf-8"), "told again, from its files"

    write_at_end(plan, Interrupted("stopped and saved at step 20", hint="slipway resume"))
    assert "stopped and saved at step 20" in Elements(file.read_text(encoding="utf-8")).text
    file.unlink()
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    write_at_end(plan, None)  # which cannot be, and ends no run


def test_report_writes_anywhere_but_over_nothing_of_others(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(run), "--out", "mine.html"]) == 0
    assert capsys.readouterr().out == "mine.html\n"
    assert "finished 100 steps" in (tmp_path / "mine.html").read_text(encoding="utf-8")
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["report", str(run), "--out", "notes.txt"]) == 2
    assert "is no page of ours" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


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


def test_two_hundred_thousand_steps_take_seconds_and_less_than_three_megabytes(tmp_path: Path) -> None:
    plan = write_run(tmp_path / "run", 20)
    steps = 200_000
    line = next(record for record in read(tmp_path / "run") if record["kind"] == "step")
    text = json.dumps(line | {"step": "STEP", "loss": "LOSS", "time": "TIME"}) + "\n"
    text = text.replace('"STEP"', "%d").replace('"LOSS"', "%r").replace('"TIME"', "%r")
    draws = np.random.default_rng(1).normal(2, 0.1, steps).tolist()
    draws[steps // 3] = 9.0
    with (tmp_path / "run" / "metrics.jsonl").open("w") as file:
        file.writelines(text % (BEGIN + step, step, loss) for step, loss in enumerate(draws, start=1))
    start = time.process_time()
    history = History(tmp_path / "run")
    written = page(plan, history, ending(plan, history))
    took = time.process_time() - start
    assert history.step == steps
    assert len(written.encode()) < 600_000
    assert took < 20, f"{took:.1f} s of CPU; 5 s on an idle core"
    spikes = [line for line in numbers_of(written)["plots"][0]["lines"] if 9.0 in line["y"]]
    assert [line["look"] for line in spikes] == ["faint"], "the one step out of 200,000 is drawn"


def test_a_run_in_an_object_store_has_its_page_there_and_is_compared_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "a", 20, verdict={"kind": "finished", "step": 20, "message": "finished 20 steps"})
    (tmp_path / "a" / "logs" / "system-b.jsonl").write_text(
        json.dumps({"kind": "system", "time": BEGIN + 9, "attempt": "1.1", "host": "b", "cpu_percent": 7.0}) + "\n"
    )
    monkeypatch.setenv("SLIPWAY_SPOOL", str(tmp_path / "spool"))
    url = "memory://bucket/runs/a"
    store = open_store(url)
    for file in (path for path in (tmp_path / "a").rglob("*") if path.is_file()):
        store.write(file.relative_to(tmp_path / "a").as_posix(), file.read_bytes())
    assert main(["report", url]) == 0
    text = store.read("report.html").decode()
    assert Path(capsys.readouterr().out.strip()).read_text(encoding="utf-8") == text
    assert "Question 1?" in text, "with the answers"
    cpu = next(plot for plot in numbers_of(text)["plots"] if plot["id"] == "cpu")
    assert [line["name"] for line in cpu["lines"]] == ["a", "b"], "and what another host wrote"
    assert "finished 20 steps" in text
    assert main(["diff", url, str(tmp_path / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["result"] == []


def test_predicted_classes_stand_where_answers_would_and_each_class_has_its_scores(tmp_path: Path) -> None:
    plan = write_run(tmp_path / "run", 20)
    for file in (tmp_path / "run").glob("answers-*"):
        file.unlink()
    for step, predicted in ((0, "bad"), (20, "good")):
        line = {"where": "/d/a.csv:1", "text": "loved it", "label": "good", "predicted": predicted, "probabilities": {}}
        (tmp_path / "run" / f"predictions-{step:08d}.jsonl").write_text(json.dumps(line) + "\n{torn")
    of_class = {"precision": 0.5, "recall": 0.25, "f1": 0.3333, "rows": 12}
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        line = {"kind": "eval", "time": BEGIN + 99, "attempt": "1.2", "step": 20, "loss": 0.4, "f1_macro": 0.7}
        file.write(json.dumps(line | {"classes": {"good": of_class, EVIL: of_class}}) + "\n")
    history = History(tmp_path / "run")
    text = page(plan, history, ending(plan, history))
    said = Elements(text).text
    assert "loved it" in said
    assert (
        text.index("before training")
        < text.index(">bad<")
        < text.index("after step 20")
        < text.index(">good<", text.index(">bad<"))
    )
    assert "0.3333" in said
    assert "held-out f1_macro" in said
    assert "classes.good" not in said, "a table and no figures of their own"


def test_after_a_stop_the_figures_of_the_best_step_keep_those_of_later_ones(tmp_path: Path) -> None:
    plan = write_run(tmp_path / "run", 20)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        line = {"kind": "answers", "time": BEGIN + 99, "attempt": "1.2", "step": 10, "rows": 50, "exact_match": 0.99}
        file.write(json.dumps(line) + "\n")
    history = History(tmp_path / "run")
    found = {figure.name: figure for figure in figures(history)}["exact_match"]
    assert (found.best, found.best_step, found.last_step) == (0.99, 10, 20)
    assert history.last_answers["step"] == 10
    assert plan.lifecycle.total_steps == 20
