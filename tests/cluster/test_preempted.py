"""SIGTERM and Ctrl-C at every moment of a run, and the same command line run again: `--resume auto`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from launcher.checkpoint.layout import newest_committed
from launcher.store.folder import FolderStore
from tests.cluster.command import Command, losses, workers

pytestmark = [pytest.mark.cluster, pytest.mark.long]
PHASES = ("launcher.model.ready", "gcs_server", "raylet", "ray::RayTrainWorker")
"""Of what is below the launcher, in the order in which it appears."""


def test_told_to_end_saves_and_the_same_command_goes_on(uninterrupted: tuple[Path, str, str], folder: Path) -> None:
    run_dir = folder / "preempted"
    run = ["run", "tiny.yaml", "--run-dir", run_dir, "--resume", "auto"]
    with Command(folder, *run, "checkpoint.every_steps=1000") as command:
        command.wait_for("step 3:")
        command.process.terminate()
        code, _, err = command.end()
    assert code == 143, err
    assert "SIGTERM: stopping after this step, then saving within 25 s" in err
    assert f"hint: slipway resume {run_dir}" in err
    saved = newest_committed(FolderStore(run_dir))
    assert saved is not None
    assert 3 <= saved.step < 24
    with Command(folder, *run) as command:
        code, out, err = command.end()
    assert code == 0, err
    assert "note: going on with preempted" in err
    assert f"going on from the checkpoint of step {saved.step}" in err
    assert losses(run_dir) == losses(uninterrupted[0])
    with Command(folder, *run) as command:
        code, again, err = command.end()
    assert (code, again) == (0, "model: preempted/model\n"), err
    assert err == "note: preempted has finished\n"
    assert again in out


def test_when_the_grace_time_is_over_it_ends_and_says_what_is_lost(folder: Path) -> None:
    """Workers that hang, as on a disk that does not answer."""
    run_dir = folder / "hangs"
    settings = ["checkpoint.grace=2s", "checkpoint.every_steps=2", "train.max_steps=1000"]
    with Command(folder, "run", "tiny.yaml", *settings, "--run-dir", run_dir) as command:
        command.wait_for("step 5:")
        stopped = workers(run_dir)
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        told = time.monotonic()
        command.process.terminate()
        command.wait_for(
            "the grace time of 2 s is over before the workers had saved; steps since the checkpoint of step"
        )
        assert time.monotonic() - told >= 2
        code, _, err = command.end()
    assert code == 143, err
    assert not [pid for pid in stopped if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
    saved = newest_committed(FolderStore(run_dir))
    assert saved is not None
    assert f"since the checkpoint of step {saved.step} are lost\nhint: slipway resume {run_dir}\n" in err


def starts(word: str) -> Callable[[psutil.Process], bool]:
    """Whether a process is below another one with this word in its command line."""

    def there(launcher: psutil.Process) -> bool:
        for child in launcher.children(recursive=True):
            try:
                if word in " ".join(child.cmdline()):
                    return True
            except psutil.Error:
                continue
        return False

    return there


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("phase", PHASES)
def test_before_the_first_step_it_ends_at_once(folder: Path, phase: str, number: signal.Signals) -> None:
    # No name of a phase in it: a fork has the launcher's command line until it is another program.
    run_dir = folder / f"early-{PHASES.index(phase)}-{int(number)}"
    with Command(folder, "run", "tiny.yaml", "--run-dir", run_dir) as command:
        launcher, begun = psutil.Process(command.process.pid), starts(phase)
        while not begun(launcher):
            assert command.process.poll() is None, command.end()
            time.sleep(0.02)
        family = launcher.children(recursive=True)
        if number == signal.SIGINT:
            os.killpg(command.process.pid, number)  # a terminal sends it to the whole group
        else:
            command.process.terminate()
        code, out, err = command.end()
    assert code == 128 + number, err
    assert out == ""
    said = err[err.rindex("stopped before") :]
    if "ray::" in phase:
        assert said == f"stopped before the first step\nhint: slipway resume {run_dir}\n"
    else:
        assert said == "stopped before training began\n"
        assert not run_dir.exists()
    assert "Traceback" not in err
    assert "***" not in err
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
