"""Signals to a launcher that does not train: each test is a process of its own, which is signalled for real."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

PREFACE = """
import ctypes, os, signal, sys, threading, time
from launcher.driver import signals
from launcher.errors import Interrupted

def report(error):
    print(error.message, error.hint, flush=True)
    return error.exit_code

def tell(number=signal.SIGTERM):
    os.kill(os.getpid(), number)
"""


def run(body: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a script whose `main` is wrapped as `slipway run` is."""
    script = f"{PREFACE}\ndef main():\n" + "".join(f"    {line}\n" for line in body.strip().splitlines())
    script += "\ntry:\n    main()\nexcept Interrupted as error:\n    sys.exit(report(error))\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_either_ends_the_block_with_its_message_and_number(number: signal.Signals) -> None:
    body = f"""
with signals.ends_on_signals("outer"):
    with signals.ends_on_signals("stopped in here", hint="go on"):
        try:
            tell({int(number)})
            time.sleep(60)
        except Exception as error:
            print("taken for a fault of its own", error)
        finally:
            print("cleaned up")
"""
    assert run(body) == (128 + number, "cleaned up\nstopped in here go on\n", "")


def test_what_ray_does_with_sigterm_while_it_connects_is_the_same() -> None:
    body = """
with signals.ends_on_signals("stopped"):
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
    tell()
    time.sleep(60)
"""
    assert run(body) == (143, "stopped None\n", "")
    assert run("with signals.ends_on_signals('stopped'):\n    sys.exit(3)")[0] == 3


def test_one_that_comes_in_a_finalizer_is_not_lost() -> None:
    body = """
class Dying:
    def __del__(self):
        tell()
        time.sleep(0)
with signals.ends_on_signals("stopped"):
    Dying()
    print("went on", flush=True)
    time.sleep(60)
"""
    assert run(body) == (143, "went on\nstopped None\n", "")


def test_a_cleanup_that_hangs_is_given_up() -> None:
    body = """
signals.UNWIND_S = 0.3
with signals.ends_on_signals("outer"):
    try:
        with signals.ends_on_signals("stopped"):
            tell()
            time.sleep(60)
    finally:
        threading.Event().wait()
"""
    assert run(body) == (143, "", "stopped\n")


def test_a_second_one_ends_at_once() -> None:
    body = """
with signals.ends_on_signals("stopped"):
    try:
        tell()
        time.sleep(60)
    finally:
        tell()
        time.sleep(60)
"""
    assert run(body) == (-signal.SIGTERM, "", "")


def test_the_handlers_from_before_are_back_afterwards() -> None:
    body = """
before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
with signals.ends_on_signals("stopped"):
    assert signal.getsignal(signal.SIGTERM) != before[1]
assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
print("back")
"""
    assert run(body) == (0, "back\n", "")


def test_processes_that_prepare_data_end_with_it_and_say_nothing() -> None:
    body = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
with signals.ends_on_signals("stopped"):
    pool = ProcessPoolExecutor(2, multiprocessing.get_context("fork"))
    try:
        tasks = [pool.submit(time.sleep, 60) for _ in range(2)]
        while not all(task.running() for task in tasks):
            time.sleep(0.01)
        children = multiprocessing.active_children()
        os.setpgid(0, 0)
        for child in children:
            os.kill(child.pid, signal.SIGINT)
        tell(signal.SIGINT)
        time.sleep(60)
    finally:
        pool.shutdown(cancel_futures=True)
        print(len(children), any(child.is_alive() for child in children))
"""
    assert run(body) == (130, "2 False\nstopped None\n", "")


def test_a_handler_that_c_code_replaces_is_put_back() -> None:
    body = """
libc = ctypes.CDLL(None)
libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
with signals.ends_on_signals("stopped"), signals.kept():
    ours = libc.signal(signal.SIGTERM, 1)  # SIG_IGN
    while libc.signal(signal.SIGTERM, 1) == 1:
        time.sleep(0.001)
    libc.signal(signal.SIGTERM, ours)
    tell()
    time.sleep(60)
"""
    assert run(body) == (143, "stopped None\n", "")
