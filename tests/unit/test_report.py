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

from launcher.checkpoint.lease import acquire
from launcher.cli.app import main
from launcher.errors import Interrupted, RunFailed, Superseded
from launcher.report.ending import ending
from launcher.report.history import History
from launcher.report.outcome import figures, training_loss
from launcher.report.run_page import page, write_at_end
from launcher.report.settings import settings
from launcher.report.timeline import EVALUATING, LOST, SAVING, TRAINING
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
    """Made up: 4 s of answers, 100 steps of which five came twice and one was left out, 20 s until a hang was seen, 10
    s to the restart, whose audit came before its line `start`."""
    history = History(run)
    spent = history.timeline.seconds()
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    first_time = [line for line in lines if line["kind"] == "step" and line["attempt"] == "1.1"]
    in_vain = [line["seconds"]["total"] for line in first_time if line["step"] > 45 or line["step"] == 33]
    assert len(in_vain) == 6
    assert spent[LOST] == pytest.approx(sum(in_vain) + 30, abs=1e-3)
    assert spent[SAVING] == 0
    assert spent[EVALUATING] == pytest.approx(4, abs=1e-3)
    assert sum(spent.values()) == pytest.approx(history.end - BEGIN, abs=0.01)
    assert spent[TRAINING] > 100
    assert history.timeline.attempts == 2
    assert history.timeline.launches == 1


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


def test_a_launch_that_fails_before_its_start_is_one_of_its_own(tmp_path: Path) -> None:
    plan = write_run(tmp_path / "run", 20)
    before = History(tmp_path / "run").timeline.seconds()
    store = open_store(plan.location)
    acquire(store).release()
    with acquire(store):
        write_at_end(plan, RunFailed("no GPU is free"))
    assert [record["attempt"] for record in read(tmp_path / "run") if record["kind"] == "run_failed"] == ["2.0"]
    history = History(tmp_path / "run")
    assert ending(plan, history).words == "no GPU is free"
    assert history.timeline.seconds() == before, "the weeks between two launches are nobody's"
    with acquire(store):
        assert ending(plan, history).state == "running", "it is being gone on with"


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
    assert main(["report", str(run), "--out", "."]) == 2
    assert "cannot write .: Is a directory\nhint: give --out a file" in capsys.readouterr().err


def test_a_folder_that_takes_no_page_or_gives_no_metrics_is_named_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", 20)
    (tmp_path / "run" / "report.html").mkdir()
    assert main(["report", str(tmp_path / "run")]) == 2
    assert "report.html: Is a directory\nhint: give --out a file in a folder that is there" in capsys.readouterr().err
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    for verb in (["report"], ["diff", str(tmp_path / "run")]):
        assert main([*verb, str(tmp_path / "run")]) == 2
        assert f"cannot read {tmp_path}/run/metrics.jsonl: Is a directory" in capsys.readouterr().err


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


def test_an_answer_stands_under_the_step_that_gave_it(tmp_path: Path) -> None:
    """A question of the end alone, as a resume has raised evaluate.generate.rows; a model that is the best step's."""
    plan = write_run(tmp_path / "run", 20, export_best=True)
    line = {"where": "/d/new.jsonl:7", "prompt": "Another?", "reference": "right", "correct": True}
    for step in (10, 20):
        file = tmp_path / "run" / f"answers-{step:08d}.jsonl"
        file.write_text(json.dumps(line | {"answer": f"of step {step}"}) + "\n")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "best", "time": BEGIN + 99, "attempt": "1.2", "step": 10}) + "\n")
    history = History(tmp_path / "run")
    said = " ".join(Elements(page(plan, history, ending(plan, history))).text.split())
    assert "Another? expected right after step 10 of step 10" in said


def test_a_megabyte_of_text_and_thousands_of_groups_leave_a_page_that_opens(tmp_path: Path) -> None:
    plan = write_run(tmp_path / "run", 20)
    long = "x" * 1_000_000
    groups = {f"{number:05d} {EVIL}": {"rows": number, "loss": 1.5} for number in range(20_000)}
    lines = [
        {"kind": "eval", "step": 20, "loss": 1.0, "slices": {"kind": groups | {"gap": {"loss": 0.5}}}},
        {"kind": "spike", "step": 20, "message": long},
    ]
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line | {"time": BEGIN + 99, "attempt": "1.2"}) + "\n" for line in lines)
    answer = {"where": long, "prompt": long, "reference": long, "answer": long}
    (tmp_path / "run" / "answers-00000020.jsonl").write_text(json.dumps(answer) + "\n")
    (tmp_path / "run" / "environment.json").write_text(json.dumps({"command": [long]}))
    history = History(tmp_path / "run")
    text = page(plan, history, ending(plan, history, RunFailed(f"{long}\n{long}")))
    assert len(text.encode()) < 500_000
    assert "19,800 groups of fewer rows are not shown" in text
    assert "19999" in text
    assert "best - worst" in text


def test_a_password_in_an_address_is_not_in_the_page(tmp_path: Path) -> None:
    plan = write_run(tmp_path / "run", 20)
    address = "https://user:s3cr3t@host/rows.jsonl?part=1&X-Amz-Signature=s3cr3t"
    source = plan.trajectory.data.train[0].model_copy(update={"path": address})
    data = plan.trajectory.data.model_copy(update={"train": (source,)})
    plan = plan.model_copy(update={"trajectory": plan.trajectory.model_copy(update={"data": data})})
    (tmp_path / "run" / "recipe.yaml").write_text(f"data: {{train: [{{path: {address}}}]}}\n")
    (tmp_path / "run" / "environment.json").write_text(json.dumps({"command": ["run", f"data.train.0.path={address}"]}))
    history = History(tmp_path / "run")
    text = page(plan, history, ending(plan, history))
    assert "s3cr3t" not in text
    assert text.count("https://***@host/rows.jsonl?part=1&amp;X-Amz-Signature=***") == 3
    assert settings(plan)["data.train.0.path"].value == "https://***@host/rows.jsonl?part=1&X-Amz-Signature=***"


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
        file.write(json.dumps(line | {"classes": {"good": of_class, EVIL: of_class, "gap": of_class}}) + "\n")
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
    assert said.count("0.3333") == 3
    assert "best - worst" not in said, "a class may be called as the gap of slices is"
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
