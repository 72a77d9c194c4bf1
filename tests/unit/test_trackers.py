"""TensorBoard, W&B and MLflow, each really written and read back: the numbers of metrics.jsonl, each step once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from launcher.errors import UserError
from launcher.plan.plan import Plan
from launcher.train.metrics import MetricsLog, last_of_each_step
from launcher.train.trackers.follow import Follower
from launcher.train.trackers.following import Following
from launcher.train.trackers.kept import File, missed
from launcher.train.trackers.lines import as_line
from launcher.train.trackers.needed import require
from tests.plans import data_facts, data_plan, lifecycle, model_plan, source_plan, trajectory, whole_plan

Curves = dict[str, list[tuple[int, float]]]
"""{name: [(step, value)]}, as a tracker's own reader gives them."""
GROUPS = ("long", "<50", ">50", "", "..", "C++ / C#", "\u00fc", "x" * 300)
"""Of a column: whatever users write there is part of a name."""
SIGNED = "https://user:s3cr3t@host/rows.jsonl?version=2&X-Amz-Signature=s3cr3t"


def a_plan(run_dir: Path, *trackers: str) -> Plan:
    run_dir.mkdir(exist_ok=True)
    return whole_plan(
        run_dir,
        name="tracked",
        trajectory=trajectory(model_plan(run_dir), data_plan(source_plan(SIGNED))),
        lifecycle=lifecycle(9, trackers=trackers, project="tests"),
        data=data_facts(),
    )


def life(plan: Plan, attempt: str, steps: range, well: bool = True, messages: Sequence[str] = ()) -> None:
    """One start of a run: its lines, while its trackers are told."""
    following = Following(plan, tells=True)
    log = MetricsLog(Path(plan.run_dir), attempt, writes=True)
    log.write("start", step=steps[0] - 1, world_size=1)
    for step in steps:
        log.write("step", step=step, loss=step / 3, rows=[4, 7], seconds={"total": step * 0.1, "data": 1e-6})
    groups = {name: {"loss": number / 8} for number, name in enumerate(GROUPS)}
    log.write("eval", step=steps[-1], loss=1 / 7, slices={"kind": groups})
    for message in messages:
        log.write("audit_finding", step=steps[-1], message=message)
    log.close()
    following.finish(well)


def expected(run_dir: Path) -> Curves:
    """What must have arrived, from metrics.jsonl itself."""
    steps, evals = last_of_each_step(run_dir), last_of_each_step(run_dir, "eval")
    return {
        "step/loss": [(step, line["loss"]) for step, line in steps.items()],
        "step/seconds/total": [(step, line["seconds"]["total"]) for step, line in steps.items()],
    } | {f"eval/slices/kind/{name}/loss": [(step, number / 8) for step in evals] for number, name in enumerate(GROUPS)}


def of_tensorboard(plan: Plan, kept: dict[str, Any]) -> tuple[Curves, str]:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = event_accumulator.EventAccumulator(str(Path(plan.run_dir) / "tensorboard"))
    reader.Reload()
    tags = reader.Tags()
    curves = {tag: [(point.step, point.value) for point in reader.Scalars(tag)] for tag in tags["scalars"]}
    texts = [point.tensor_proto.string_val[0].decode() for tag in tags["tensors"] for point in reader.Tensors(tag)]
    return curves, "\n".join(texts)


def wandb_records(file: Path) -> Iterator[bytes]:
    """The records of a W&B file: LevelDB's log format (blocks of 32 KiB; checksum, length, type) behind 7 bytes. The
    package itself reads it in Go only."""
    content, place, record = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, part = struct.unpack_from("<IHB", content, place)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if part in (1, 4):  # whole, or the last of several
            yield record
            record = b""


def of_wandb(plan: Plan, kept: dict[str, Any]) -> tuple[Curves, str]:
    from wandb.proto import wandb_internal_pb2

    curves: Curves = {}
    words = []
    folder = Path(plan.run_dir) / "wandb"
    files = sorted(folder.glob(f"offline-run-*/run-{kept['id']}.wandb"))
    assert len(list(folder.glob("offline-run-*"))) == len(files) == 2, "two starts of one run"
    for file in files:
        for content in wandb_records(file):
            record = wandb_internal_pb2.Record.FromString(content)
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for name, value in row.items():
                if isinstance(value, str):
                    words.append(value)
                else:
                    curves.setdefault(name, []).append((row["at_step"], value))
    return curves, "\n".join(words)


def of_mlflow(plan: Plan, kept: dict[str, Any]) -> tuple[Curves, str]:
    from mlflow import MlflowClient

    from launcher.train.trackers.mlflow import as_name

    client = MlflowClient()
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    assert [run.info.run_id for run in client.search_runs([experiment.experiment_id])] == [kept["id"]]
    run = client.get_run(kept["id"])
    assert run.data.params["trajectory.seed"] == "0"
    assert run.info.status == "FINISHED"
    curves = {
        name: [(point.step, point.value) for point in client.get_metric_history(kept["id"], name)]
        for name in run.data.metrics
    }
    names = {as_name(name): name for name in expected(Path(plan.run_dir))}
    return {names.get(name, name): points for name, points in curves.items()}, "\n".join(run.data.tags.values())


READERS: dict[str, Callable[[Plan, dict[str, Any]], tuple[Curves, str]]] = {
    "tensorboard": of_tensorboard,
    "wandb": of_wandb,
    "mlflow": of_mlflow,
}


@pytest.fixture
def services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database needs more packages


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", pytest.param("mlflow", marks=pytest.mark.long)])
def test_killed_and_resumed_it_has_each_step_once_and_the_same_numbers(
    tmp_path: Path, services: None, tracker: str
) -> None:
    pytest.importorskip(tracker)
    plan = a_plan(tmp_path / "run", tracker)
    life(plan, "1.1", range(1, 6), well=False, messages=("the masks leak", "the packs too"))
    life(plan, "2.1", range(4, 9))  # from the checkpoint of step 3
    kept = json.loads((tmp_path / "run" / "trackers.json").read_text())[tracker]
    curves, words = READERS[tracker](plan, kept)
    for name, points in expected(tmp_path / "run").items():
        found = sorted(curves[name])
        assert [step for step, _ in found] == [step for step, _ in points], name
        kind: Any = np.float32 if tracker == "tensorboard" else np.float64
        assert [kind(value) for _, value in found] == [kind(value) for _, value in points]
    assert "audit_finding: the masks leak" in words
    assert "audit_finding: the packs too" in words, "of the same step"
    assert "step/rows" not in "".join(curves)
    assert missed(tmp_path / "run") == []
    files = [file for file in tmp_path.rglob("*") if file.is_file() and not file.is_symlink()]
    assert not [file for file in files if b"s3cr3t" in file.read_bytes()]


def test_one_that_takes_nothing_costs_the_run_nothing_and_is_told_the_rest_later(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    plan, blocking = a_plan(tmp_path / "run", "tensorboard"), tmp_path / "run" / "tensorboard"
    blocking.touch()
    life(plan, "1.1", range(1, 4))
    [said] = missed(tmp_path / "run")
    assert said.startswith("tensorboard has not been told everything: ")
    blocking.unlink()
    told_by_hand(plan)
    curves, _ = of_tensorboard(plan, {})
    assert [step for step, _ in curves["step/loss"]] == [1, 2, 3]
    assert missed(tmp_path / "run") == []


def told_by_hand(plan: Plan) -> None:
    plan.save(Path(plan.run_dir) / "plan.json")
    command = [sys.executable, "-m", "launcher.train.trackers.follow", plan.run_dir]
    subprocess.run(command, stdin=subprocess.DEVNULL, check=True)


@pytest.mark.long
def test_an_mlflow_server_that_comes_late_is_told_all(
    tmp_path: Path, services: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real server on the loopback, which is not there yet when the run starts.

    Its package does not resolve together with ours (pandas): MLFLOW_SERVER names the `mlflow` of another environment.
    """
    pytest.importorskip("mlflow")
    if "MLFLOW_SERVER" not in os.environ:
        pytest.skip("MLFLOW_SERVER names no mlflow that can be a server")
    plan, port = a_plan(tmp_path / "run", "mlflow"), free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    life(plan, "1.1", range(1, 4))
    [said] = missed(tmp_path / "run")
    assert said.startswith("mlflow has not been told everything: ")
    command = [os.environ["MLFLOW_SERVER"], "server", "--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with subprocess.Popen(command, start_new_session=True) as server:
        try:
            answers(f"http://127.0.0.1:{port}/health", server)
            launch = 1
            while missed(tmp_path / "run"):  # on a slow machine a launch may be over before the package is imported
                launch += 1
                life(plan, f"{launch}.1", range(3, 9))
            kept = json.loads((tmp_path / "run" / "trackers.json").read_text())["mlflow"]
            curves, _ = of_mlflow(plan, kept)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
    for name, points in expected(tmp_path / "run").items():
        assert curves[name] == points, name
    assert missed(tmp_path / "run") == []


def free_port() -> int:
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return int(some.getsockname()[1])


def answers(url: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until it does. Fails where the server has ended."""
    while True:
        assert server.poll() is None
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)  # nothing tells when it listens


def test_a_line_becomes_numbers_by_path_and_an_event_words() -> None:
    gpus = [{"index": 1, "percent": 50, "power_w": 300.5}]
    line = as_line({"kind": "system", "time": 5.0, "attempt": "3.2", "host": "a", "cpu_percent": 7, "gpus": gpus}, 12)
    assert line.numbers == {"system/cpu_percent": 7.0, "system/gpus/1/percent": 50.0, "system/gpus/1/power_w": 300.5}
    assert (line.step, line.attempt, line.words) == (12, (3, 2), None)
    event = as_line({"kind": "rollback", "time": 5.0, "step": 9, "to_step": 6, "rows": [1, 2], "sure": True}, 12)
    assert event.numbers == {"rollback/to_step": 6.0}
    assert event.words == "rollback: to_step 6, sure True"


def test_a_servers_refusal_is_kept_without_the_password_in_its_address(tmp_path: Path) -> None:
    follower = Follower("mlflow", a_plan(tmp_path / "run", "mlflow"), File(tmp_path / "run").of("mlflow"), Event())
    follower._complain(ConnectionError("request to http://user:s3cr3t@host/api failed"))
    [said] = missed(tmp_path / "run")
    assert said.endswith("ConnectionError: request to http://***@host/api failed")


def test_every_name_becomes_one_that_mlflow_takes_and_no_other_becomes() -> None:
    validation = pytest.importorskip("mlflow.utils.validation")
    from launcher.train.trackers.mlflow import as_name

    names = [f"eval/slices/{group}/loss" for group in (*GROUPS, ".", "...", "a/b", "y" * 300, "y" * 301, "\u4e2d")]
    for name in names:
        validation._validate_metric(as_name(name), 1.0, 0, 0)
    assert len({as_name(name) for name in names}) == len(names)
    assert as_name("step/seconds/total") == "step/seconds/total"


def test_what_a_tracker_needs_is_asked_for_before_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wandb").mkdir()  # as its runs leave it: no package
    for name in ("WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    there = {"wandb", "mlflow"}
    monkeypatch.setattr("launcher.train.trackers.needed._is_installed", lambda package: package in there)
    with pytest.raises(UserError, match="logging.trackers names tensorboard, and its package is not") as caught:
        require(["tensorboard"])
    assert caught.value.hint == "pip install 'slipway[tensorboard]'"
    with pytest.raises(UserError, match="no key for it"):
        require(["wandb"])
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password 1234\n")
    (tmp_path / ".netrc").chmod(0o600)
    require(["wandb"])
    with pytest.raises(UserError, match="nobody says where it is"):
        require(["mlflow"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    require(["mlflow"])
