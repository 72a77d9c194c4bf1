"""How a stop reaches a worker, how a run's end is written down, and that every rank leaves an evaluation together."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from launcher.store.folder import FolderStore
from launcher.train.stop import StopSignal, watch_store
from launcher.train.verdict import FILE, STOP_FILE, Verdict, forget, request_stop, stop_requested
from tests.distributed.group import run_group
from tests.prepared import write_prepared

WAIT_S = 30.0
SIGNALLED = """
import signal, sys
from launcher.train.stop import StopSignal
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]  # a shell may have them ignored
with StopSignal(told_twice_s=float(sys.argv[1])) as stop:
    for line in sys.stdin:
        if line == "end\\n":
            break
        print(stop.received, flush=True)
print([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before, flush=True)
"""


class Signalled:
    """A process that takes signals as a worker under torchrun does, and answers what it received."""

    def __init__(self, told_twice_s: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SIGNALLED, str(told_twice_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def received(self) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("what?\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


@contextlib.contextmanager
def signalled(told_twice_s: float) -> Iterator[Signalled]:
    one = Signalled(told_twice_s)
    try:
        assert one.received() == "None"
        yield one
    finally:
        one.process.kill()
        one.process.communicate()


def test_the_first_signal_is_kept_and_told_twice_is_one_notice() -> None:
    with signalled(told_twice_s=60.0) as one:
        one.process.send_signal(signal.SIGTERM)
        assert one.received() == str(int(signal.SIGTERM))
        for number in (signal.SIGTERM, signal.SIGINT):
            one.process.send_signal(number)
            assert one.received() == str(int(signal.SIGTERM))
        out, _ = one.process.communicate("end\n", timeout=WAIT_S)
        assert out == "True\n", "the handlers are the old ones again"
        assert one.process.returncode == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_at_once(second: signal.Signals) -> None:
    with signalled(told_twice_s=0.0) as one:
        one.process.send_signal(signal.SIGINT)
        assert one.received() == str(int(signal.SIGINT))
        one.process.send_signal(second)
        assert one.process.wait(WAIT_S) == -second


def test_only_the_main_thread_takes_signals_and_only_in_the_block() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    found: list[Any] = []

    def elsewhere() -> None:
        with StopSignal() as stop:
            found.extend([stop.received, *(signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT))])

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(WAIT_S)
    assert found == [None, *before]
    assert StopSignal().received is None
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def watching() -> threading.Thread:
    [thread] = [thread for thread in threading.enumerate() if thread.name == "stop-request"]
    return thread


def test_a_stop_request_in_the_store_becomes_the_local_file(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "run").mkdir()
    store = FolderStore(tmp_path / "store")
    with watch_store(store, tmp_path / "run", every_s=0.01):
        thread = watching()
        assert not stop_requested(tmp_path / "run")
        store.write(STOP_FILE, b"SIGTERM\n")
        thread.join(WAIT_S)
        assert stop_requested(tmp_path / "run")
        assert (tmp_path / "run" / STOP_FILE).read_text() == "SIGTERM\n"


def test_nothing_is_watched_after_the_block(tmp_path: Path) -> None:
    with watch_store(FolderStore(tmp_path), tmp_path, every_s=0.01):
        thread = watching()
    assert not thread.is_alive()
    assert list(tmp_path.iterdir()) == []


class Heard(logging.Handler):
    """Sets an event at the first message, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.event = 0, threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1
        self.event.set()


def test_a_store_that_does_not_answer_for_a_while_is_asked_again(tmp_path: Path) -> None:
    """Where the root is a file, reading below it is an error of another kind than a missing file."""
    heard = Heard()
    logger = logging.getLogger("launcher.train.stop")
    logger.addHandler(heard)
    (tmp_path / "store").write_text("")
    (tmp_path / "run").mkdir()
    try:
        with watch_store(FolderStore(tmp_path / "store"), tmp_path / "run", every_s=0.01):
            thread = watching()
            assert heard.event.wait(WAIT_S)
            (tmp_path / "store").unlink()
            (tmp_path / "store").mkdir()
            (tmp_path / "store" / STOP_FILE).write_text("asked")
            thread.join(WAIT_S)
            assert stop_requested(tmp_path / "run")
    finally:
        logger.removeHandler(heard)
    assert heard.count == 1, "an outage is said once"


def test_a_verdict_is_of_its_launch(tmp_path: Path) -> None:
    assert Verdict.load(tmp_path) is None
    verdict = Verdict("unsaved", 7, "m", "h", 1, launch=3)
    verdict.save(tmp_path)
    assert Verdict.load(tmp_path) == Verdict.load(tmp_path, 3) == verdict
    assert Verdict.load(tmp_path, 2) is None
    assert Verdict.load(tmp_path, 4) is None
    assert Verdict.load(tmp_path, 0) is None
    assert [path.name for path in tmp_path.iterdir()] == [FILE], "no draft is left"


def test_a_damaged_verdict_is_none(tmp_path: Path) -> None:
    verdict = Verdict("finished", 7, "finished 7 steps", launch=1)
    whole = verdict.content()
    for cut in range(len(whole) - 2):
        (tmp_path / FILE).write_bytes(whole[:cut])
        assert Verdict.load(tmp_path) is None
    (tmp_path / FILE).write_bytes(whole)
    assert Verdict.load(tmp_path) == verdict
    for good, bad in ((b"finished", b"finishee"), (b"7", b"null"), (b'"step"', b'"stop"'), (b"{", b"[{")):
        (tmp_path / FILE).write_bytes(whole.replace(good, bad, 1))
        assert Verdict.load(tmp_path) is None, bad
    for junk in (b"null", b"[]", b"\xff\xfe", b"\0" * 40):
        (tmp_path / FILE).write_bytes(junk)
        assert Verdict.load(tmp_path) is None


def test_a_verdict_of_before_launches_were_written_is_of_none(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"kind": "finished", "step": 3, "message": "m", "hint": null, "exit_code": 0}')
    assert Verdict.load(tmp_path) == Verdict("finished", 3, "m")
    assert Verdict.load(tmp_path, 1) is None


def test_stop_requests_on_a_disk_that_is_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    for gone in (tmp_path / "gone", tmp_path / "file" / "below"):
        assert not request_stop(gone, "SIGTERM")
        assert not stop_requested(gone)
        forget(gone)
    assert not (tmp_path / "gone").exists()
    assert len([r for r in caplog.records if r.message.startswith("no stop can be asked for")]) == 2


def test_a_stop_can_be_asked_for_on_a_full_disk(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        with (tmp_path / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(b"0" * 4096)
        assert os.statvfs(tmp_path).f_bavail == 0
        assert request_stop(tmp_path, "SIGTERM")
        assert stop_requested(tmp_path)
        forget(tmp_path)
        assert not stop_requested(tmp_path)
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


NUM_EVAL, NUM_TEST = 41, 9
"""On two ranks 21 rounds of the loss, the second rank's last one empty; and five of answers, its last one a repeat."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from launcher.data.masks import Document

    folder = tmp_path_factory.mktemp("evaluated")
    documents = [
        Document(np.arange(i % 5 + 3, dtype=np.int32), np.ones(i % 5 + 3, dtype=np.uint8)) for i in range(NUM_EVAL)
    ]
    write_prepared(folder, documents, documents, [[0]])
    rows = [{"where": f"t:{i}", "prompt_text": "p", "prompt_ids": [i + 1], "answer": "a"} for i in range(NUM_TEST)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def evaluate_and_stop(prepared: Path, run_dir: Path) -> dict[str, Any]:
    """Both evaluations on this rank of two: to the end, and with a stop that one rank asks for on the way."""
    import torch
    import torch.distributed as dist
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from launcher.data.loader import EvalData, TestRows
    from launcher.evaluate.generate import generate_answers
    from launcher.train.agreement import agreed
    from launcher.train.evaluate import evaluate_loss
    from launcher.train.loss import SupervisedLoss
    from launcher.train.probe import read_probe, write_probe
    from tests.plans import generate_plan

    class Counted(SupervisedLoss):
        calls = 0

        def __call__(self, batch: Any) -> Any:
            self.calls += 1
            return super().__call__(batch)

    class Asked:
        """Says stop from the question `after` on, on one rank only."""

        def __init__(self, rank: int, after: int) -> None:
            self.mine, self.left = dist.get_rank() == rank, after

        def __call__(self) -> bool:
            self.left -= 1
            return self.mine and self.left < 0

    torch.manual_seed(0)
    device = torch.device("cpu")
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    model = LlamaForCausalLM(config)
    engine = torch.nn.parallel.DistributedDataParallel(model)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(32)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    data, rows = EvalData(prepared), TestRows(prepared)
    settings = generate_plan(rows=NUM_TEST, max_new_tokens=3, batch_size=1)

    def loss(asked: Asked) -> tuple[Any, int, bool]:
        counted = Counted(engine, model, False, device)
        return evaluate_loss(engine, counted, data, 1, device, asked), counted.calls, engine.training

    def answers(asked: Asked) -> int | None:
        prompts = [row.prompt_ids for row in rows]
        ends = mock.patch("launcher.evaluate.generate.end_tokens", return_value=[31])
        with ends:
            found = generate_answers(
                model, prompts, tokenizer, settings, 0, device, interrupted=lambda: agreed(asked(), device)
            )
        return len(found) if found is not None else None

    def probe(folder: Path) -> int | None:
        whole = SupervisedLoss(engine, model, False, device)
        write_probe(whole, next(data.micro_batches(1, 1, 0)), folder, 4, dist.get_rank())
        dist.barrier()
        found = read_probe(folder, 4)
        return found[1].numel() if found is not None else None

    return {
        "whole": loss(Asked(0, 10**6)),
        "rank 0, second question": loss(Asked(0, 1)),
        "rank 1, third question": loss(Asked(1, 2)),
        "at once": loss(Asked(0, 0)),
        "after the last question": loss(Asked(1, 3)),
        "answered": answers(Asked(0, 10**6)),
        "answers stopped": answers(Asked(1, 2)),
        "answers stopped after the last": answers(Asked(1, 5)),
        "probe": probe(run_dir),
        "no disk for the probe": probe(run_dir / "gone"),
    }


@pytest.mark.distributed
def test_ranks_leave_an_evaluation_at_the_same_batch_and_report_no_part_of_it(prepared: Path, tmp_path: Path) -> None:
    found = run_group(2, evaluate_and_stop, prepared, tmp_path)
    assert found[0] == found[1]
    (loss, accuracy), batches, training = found[0]["whole"]
    assert 0.9 * np.log(32) < loss < 1.1 * np.log(32), "of a model that knows nothing"
    assert 0 <= accuracy <= 1
    assert (batches, training) == (21, True)
    assert found[0]["rank 0, second question"] == (None, 8, True)
    assert found[0]["rank 1, third question"] == (None, 16, True)
    assert found[0]["at once"] == (None, 0, True)
    assert found[0]["after the last question"] == found[0]["whole"]
    assert found[0]["answered"] == NUM_TEST
    assert found[0]["answers stopped"] is None
    assert found[0]["answers stopped after the last"] == NUM_TEST
    assert (found[0]["probe"], found[0]["no disk for the probe"]) == (3 * 32, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["probe-00000004.safetensors"]
