"""What surrounds training in a worker: its output, its verdict and its failure record, on disks that fail and in runs
that another launch has taken over."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.checkpoint.lease import acquire
from launcher.driver.failures import recorded_failures
from launcher.driver.remote import bring_metrics, found_verdict
from launcher.driver.worker import (
    bring_files,
    keep_verdict,
    record_failure,
    recording,
    stop_requests,
)
from launcher.errors import ModelError, Superseded
from launcher.plan.plan import Plan
from launcher.store.folder import FolderStore
from launcher.store.location import open_store
from launcher.store.store import Store
from launcher.train.verdict import FILE, Verdict
from tests.disks import fill, mounted
from tests.distributed.tiny import tiny_plan

FINISHED = Verdict("finished", 8, "finished 8 steps", launch=1)
NOISY = """
import logging, os, subprocess, sys, warnings
from pathlib import Path
from launcher.driver.worker import redirect_output
redirect_output(Path(sys.argv[1]))
print("first")
sys.stdin.readline()
for i in range(2000):
    print("out", i)
    sys.stderr.write("err %d\\n" % i)
    logging.getLogger("library").warning("log %d", i)
print("é \\udcff", file=sys.stderr, flush=True)
sys.stdout.writelines(["a", "b\\n"])
sys.stdout.flush()
warnings.warn("a warning")
subprocess.run(["sh", "-c", "echo from C"], stderr=subprocess.DEVNULL)
os.write(int(sys.argv[2]), b"alive")
sys.stdin.readline()
print("again")
"""


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    (tmp_path / "run" / "logs").mkdir(parents=True)
    return tiny_plan(tmp_path / "run", zero=0)


@pytest.fixture
def held(plan: Plan) -> Iterator[Plan]:
    """The plan of a run that launch 1 holds."""
    with acquire(FolderStore(Path(plan.run_dir))):
        yield plan


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB with a run's folder in it."""
    with mounted(tmp_path / "small", "1m") as disk:
        (disk / "run" / "logs").mkdir(parents=True)
        yield disk


@contextlib.contextmanager
def noisy(log_file: Path, **environment: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process whose output goes to `log_file`: it prints a line, waits for one, makes much noise and says "alive"
    through the pipe, waits for another line and prints `again`."""
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", NOISY, str(log_file), str(writer)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=[writer],
        env=os.environ | environment,
    )
    os.close(writer)
    try:
        yield process, reader
    finally:
        process.kill()
        process.communicate()
        os.close(reader)


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_printing_onto_a_full_disk_ends_nothing_and_what_is_missing_is_counted(small: Path) -> None:
    log_file = small / "run" / "logs" / "worker-0.log"
    with noisy(log_file) as (process, reader):
        filler = fill(small)
        go_on(process)
        assert os.read(reader, 5) == b"alive"
        filler.unlink()
        _, err = process.communicate("\n", timeout=60)
    assert (process.returncode, err) == (0, "")
    text = log_file.read_text()
    assert text.endswith("bytes could not be written here]\nagain\n")
    [missing] = re.findall(r"\[([0-9]+) bytes could not be written here\]", text)
    noise = sum(len(f"out {i}\nerr {i}\n") for i in range(2000))
    assert int(missing) > noise / 2, "of each of the two streams its own part"
    assert "out 1999" not in text


def test_output_of_all_kinds_is_in_the_log(tmp_path: Path) -> None:
    log_file = tmp_path / "logs" / "worker-0.log"
    with noisy(log_file) as (process, _):
        _, err = process.communicate("\n\n", timeout=60)
    assert (process.returncode, err) == (0, "")
    lines = log_file.read_text().splitlines()
    assert lines[0] == "first"
    assert lines[-1] == "again"
    for line in ("out 1999", "err 1999", "é \\udcff", "ab", "from C"):
        assert line in lines
    assert any("log 1999" in line for line in lines)
    assert any("a warning" in line for line in lines)


def test_without_the_runs_folder_the_output_goes_to_a_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    log_file = tmp_path / "gone" / "logs" / "worker-3.log"
    with noisy(log_file, TMPDIR=str(tmp_path / "tmp")) as (process, _):
        _, err = process.communicate("\n\n", timeout=60)
    assert process.returncode == 0
    [elsewhere] = (tmp_path / "tmp").iterdir()
    assert elsewhere.name.startswith("slipway-worker-3-")
    warning = f"{log_file} cannot be opened (No such file or directory), the output goes to {elsewhere}"
    assert err == f"warning: {warning}\n"
    assert warning in elsewhere.read_text().splitlines()[0]
    assert elsewhere.read_text().endswith("again\n")
    assert not (tmp_path / "gone").exists()


def test_a_verdict_is_written_while_its_launch_holds_the_run(held: Plan) -> None:
    keep_verdict(held, FINISHED)
    assert found_verdict(held, 1) == FINISHED
    assert found_verdict(held, 2) is None


def test_a_superseded_launch_writes_nothing(plan: Plan) -> None:
    run_dir = Path(plan.run_dir)
    with acquire(FolderStore(run_dir)) as first:
        assert first.launch == 1
    with acquire(FolderStore(run_dir)) as second:
        assert second.launch == 2
        keep_verdict(plan, Verdict("finished", 9, "of the second", launch=2))
        before = sorted(path for path in run_dir.rglob("*") if "lease" not in path.parts)
        keep_verdict(plan, FINISHED)
        record_failure(plan, 1, 0, ValueError("late"))
        with pytest.raises(ModelError), recording(plan, 1, 0):
            raise ModelError("late", hint="h")
        with pytest.raises(KeyError), recording(plan, 1, 0):
            raise KeyError("late")
        assert sorted(path for path in run_dir.rglob("*") if "lease" not in path.parts) == before
        assert Verdict.load(run_dir) == Verdict("finished", 9, "of the second", launch=2)


def test_being_superseded_is_no_verdict_and_no_failure(held: Plan) -> None:
    with pytest.raises(Superseded, match="taken over"), recording(held, 1, 0):
        raise Superseded("taken over", hint="h")
    assert found_verdict(held, 1) is None
    assert recorded_failures(Path(held.run_dir) / "logs" / "failures.jsonl") == []


def test_what_a_restart_cannot_mend_becomes_a_verdict(held: Plan) -> None:
    with pytest.raises(ModelError, match="no such model"), recording(held, 1, 2):
        raise ModelError("no such model", hint="name another")
    assert found_verdict(held, 1) == Verdict("error", 0, "no such model", "name another", 2, launch=1)


def test_any_other_error_is_recorded_by_rank(held: Plan) -> None:
    for rank in (1, 0):
        with pytest.raises(ValueError, match="boom"), recording(held, 1, rank):
            raise ValueError(f"boom {rank}\nsecond line")
    assert found_verdict(held, 1) is None
    found = recorded_failures(Path(held.run_dir) / "logs" / "failures.jsonl")
    assert [(line["rank"], line["type"], line["message"]) for line in found] == [
        (1, "ValueError", "boom 1\nsecond line"),
        (0, "ValueError", "boom 0\nsecond line"),
    ]


@pytest.mark.parametrize("error", [ModelError("the model's own fault"), ValueError("the worker's own fault")])
def test_a_full_disk_does_not_hide_what_went_wrong(
    small: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    plan = tiny_plan(small / "run", zero=0)
    with acquire(FolderStore(small / "run")):
        fill(small)
        with pytest.raises(type(error), match="own fault"), recording(plan, 1, 0):
            raise error
    assert any("No space left on device" in record.getMessage() for record in caplog.records)
    assert not (small / "run" / FILE).exists()


@pytest.mark.parametrize("error", [ModelError("the model's own fault"), ValueError("the worker's own fault")])
def test_nor_does_a_folder_that_is_gone_and_it_is_not_made_again(held: Plan, error: Exception) -> None:
    shutil.rmtree(held.run_dir)
    with pytest.raises(type(error), match="own fault"), recording(held, 1, 0):
        raise error
    keep_verdict(held, FINISHED)
    assert not Path(held.run_dir).exists()


def test_a_torn_record_costs_itself_only(held: Plan) -> None:
    """As a kill or a full disk in the middle of a line leaves it."""
    record_failure(held, 1, 0, ValueError("whole"))
    file = Path(held.run_dir) / "logs" / "failures.jsonl"
    file.write_text(file.read_text() + json.dumps({"rank": 1})[:-3])
    assert [line["message"] for line in recorded_failures(file)] == ["whole"]
    record_failure(held, 1, 1, ValueError("after it"))
    assert [line["message"] for line in recorded_failures(file)] == ["whole", "after it"]


FILES = {"base/config.json": b"{}", "base/model.safetensors": b"weights", "data/documents/00000.arrow": b"rows"}


@pytest.fixture
def remote(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Plan, Store]:
    """A run in an object store, whose scratch model and data lie in its spool; on this node there is none yet."""
    url, run_dir = f"memory://bucket/{request.node.name}", tmp_path / "spools" / "run"
    store = open_store(url)
    for name, content in FILES.items():
        store.write(name, content)
    return with_files(tiny_plan(run_dir, zero=0).model_copy(update={"location": url})), store


def with_files(plan: Plan, model: str | None = None, seed: int = 0) -> Plan:
    trajectory = plan.trajectory
    path = str(Path(plan.run_dir) / "base") if model is None else model
    changed = trajectory.model_copy(update={"model": trajectory.model.model_copy(update={"path": path}), "seed": seed})
    return plan.model_copy(update={"trajectory": changed})


def files_below(folder: Path) -> dict[str, bytes]:
    """What bringing brings, without its own marks."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if name.split("/")[0] in ("base", "data")}


def test_a_node_without_the_spool_gets_what_the_run_needs_of_it(remote: tuple[Plan, Store]) -> None:
    plan, store = remote
    bring_into_new_folder(plan)
    run_dir = Path(plan.run_dir)
    assert files_below(run_dir) == FILES
    assert Plan.load(run_dir / "plan.json") == plan
    for name in FILES:
        store.remove(name)
    bring_files(plan)
    assert files_below(run_dir) == FILES, "and nothing is fetched where it is"


def bring_into_new_folder(plan: Plan) -> None:
    Path(plan.run_dir).mkdir(parents=True)
    bring_files(plan)


def test_all_ranks_of_a_node_may_ask_at_once(remote: tuple[Plan, Store]) -> None:
    plan, _ = remote
    Path(plan.run_dir).mkdir(parents=True)
    threads = [threading.Thread(target=bring_files, args=(plan,)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert files_below(Path(plan.run_dir)) == FILES


@pytest.mark.parametrize("left", ["another run's", "half of them"])
def test_what_an_earlier_run_or_a_kill_has_left_there_is_not_used(
    remote: tuple[Plan, Store], left: str, tmp_path: Path
) -> None:
    plan, _ = remote
    run_dir = Path(plan.run_dir)
    (run_dir / "base").mkdir(parents=True)
    (run_dir / "base" / "model.safetensors").write_bytes(b"other w")
    (run_dir / "base" / "model-00002.safetensors").write_bytes(b"more")
    (tmp_path / "prepared").mkdir()
    (run_dir / "data").symlink_to(tmp_path / "prepared", target_is_directory=True)  # as the driver's node has it
    if left == "another run's":
        with_files(plan, seed=1).save(run_dir / "plan.json")
    bring_files(plan)
    assert files_below(run_dir) == FILES
    assert list((tmp_path / "prepared").iterdir()) == []


def test_the_drivers_own_node_keeps_what_it_made(remote: tuple[Plan, Store]) -> None:
    plan, store = remote
    run_dir = Path(plan.run_dir)
    for name in FILES:
        store.remove(name)
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_bytes(b"made here")
    longer = plan.lifecycle.model_copy(update={"max_steps": 99})
    plan.save(run_dir / "plan.json")
    bring_files(plan.model_copy(update={"lifecycle": longer}))  # as a resume may change it
    assert files_below(run_dir) == dict.fromkeys(FILES, b"made here")


def test_a_model_of_the_hub_and_data_elsewhere_are_not_looked_for(remote: tuple[Plan, Store], tmp_path: Path) -> None:
    plan, _ = remote
    elsewhere = plan.data.model_copy(update={"folder": str(tmp_path / "prepared")})
    plan = with_files(plan, model="someone/base").model_copy(update={"data": elsewhere})
    bring_into_new_folder(plan)
    assert files_below(Path(plan.run_dir)) == {}


def test_a_run_in_a_folder_brings_nothing(plan: Plan) -> None:
    shutil.rmtree(plan.run_dir)
    bring_files(plan)
    assert not Path(plan.run_dir).exists()


def test_a_verdict_travels_through_the_store(remote: tuple[Plan, Store]) -> None:
    plan, store = remote
    bring_into_new_folder(plan)
    assert found_verdict(plan, 1) is None
    with acquire(store):
        keep_verdict(plan, FINISHED)
        assert Verdict.load(Path(plan.run_dir), 1) == FINISHED
        assert Verdict.parse(store.read(FILE), 1) == FINISHED
        shutil.rmtree(plan.run_dir)  # the restarted rank 0 is on another node
        assert found_verdict(plan, 1) == FINISHED
        assert found_verdict(plan, 2) is None
    with acquire(store):
        keep_verdict(plan, Verdict("finished", 9, "late", launch=1))
        assert Verdict.parse(store.read(FILE)) == FINISHED


def test_only_a_run_in_an_object_store_is_watched_for_stop_requests(plan: Plan, remote: tuple[Plan, Store]) -> None:
    for watched, expected in ((plan, 0), (remote[0], 1)):
        with stop_requests(watched):
            assert [thread.name for thread in threading.enumerate()].count("stop-request") == expected


def test_metrics_go_on_from_the_store_where_it_knows_more(remote: tuple[Plan, Store]) -> None:
    """The first rank may start again on another node, whose spool has an older file or none."""
    plan, store = remote
    local = Path(plan.run_dir) / "metrics.jsonl"
    local.parent.mkdir(parents=True)
    line = '{"kind": "step", "attempt": "%s", "step": %d}\n'
    store.write("metrics.jsonl", (line % ("1.1", 1) + line % ("1.1", 2)).encode())
    bring_metrics(plan)
    assert local.read_bytes() == store.read("metrics.jsonl")
    further = local.read_text() + line % ("1.2", 3)
    local.write_text(further)
    bring_metrics(plan)
    assert local.read_text() == further, "what this node knows more is kept"
