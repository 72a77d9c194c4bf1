"""What a save costs beside the disk: memory above the training state, and the wait before the next update.

ZeRO-3 on two ranks. Peaks are the kernel's own (VmHWM), reset before each save.
"""

from __future__ import annotations

import ctypes
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from launcher.checkpoint.manifest import read
from launcher.checkpoint.save import own_shards, save
from launcher.checkpoint.saver import Saver
from launcher.plan.batch import batch_layout
from launcher.train.engine import build_engine
from tests.checkpoints import FIRST, checkpoint_at
from tests.distributed.group import run_group
from tests.distributed.tiny import begun, quiet, tiny_engine, tiny_plan, train

pytestmark = pytest.mark.distributed

MIB = 1 << 20
SOME = 8 * MIB
"""What Python and gloo allocate on the way, and the grain of malloc's arenas."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    parameters: int
    """How many the whole model has."""
    shards: int
    """Masters and moments of this rank."""
    bucket: int
    """Its largest tensor."""
    peaks: dict[str, int]
    """By what was done: the most that it held above what it held before."""


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def peak(action: Callable[[], object]) -> int:
    """How far `action` raises this process's resident memory at most. Every rank calls it at once."""
    dist.barrier()
    ctypes.CDLL(None).malloc_trim(0)  # or what was freed before would be taken again unseen
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM is VmRSS from now on
    before = resident("VmRSS")
    action()
    return resident("VmHWM") - before


def measured(root: Path, hidden_size: int, layers: int) -> Memory:
    """Peaks of saves of every kind. Collective."""
    quiet()
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=8,
        vocab_size=8000,
        max_position_embeddings=64,
        use_cache=False,
    )
    plan = tiny_plan(root, 3, "bf16")
    store, deepspeeds = begun(root), root / "deepspeed"
    engine = build_engine(LlamaForCausalLM(config).to(torch.bfloat16), plan, batch_layout(6, 6, 2))
    train(engine, plan, 0, 1)
    peaks: dict[str, int] = {}
    sizes = [shard.held.nbytes for shard in own_shards(engine).values()]

    def forget() -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            store.remove("checkpoints")
            shutil.rmtree(deepspeeds, ignore_errors=True)
        dist.barrier()

    peaks["at once"] = peak(lambda: save(store, 1, FIRST, engine, {}, plan))
    forget()
    savers: list[Saver] = []

    def first_in_background() -> None:
        savers.append(Saver(store, FIRST, plan, engine, torch.device("cpu")))
        savers[0].begin(2, {})
        savers[0].join()

    def again(step: int) -> None:
        savers[0].begin(step, {})
        savers[0].join()

    peaks["first in background"] = peak(first_in_background)
    forget()
    peaks["second in background"] = peak(lambda: again(3))
    forget()
    train(engine, plan, 1, 1)
    peaks["third in background"] = peak(lambda: again(4))
    assert savers[0].background, savers[0].without_room
    assert [(saved.step, saved.error) for saved in savers[0].finished()] == [(2, None), (3, None), (4, None)]
    forget()
    peaks["DeepSpeed's"] = peak(lambda: engine.save_checkpoint(str(deepspeeds)))
    forget()
    engine.destroy()
    num_parameters = sum(parameter.ds_numel for parameter in engine.module.parameters())
    return Memory(num_parameters, sum(sizes), max(sizes), peaks)


def unguarded(root: Path) -> tuple[bool, bool]:
    """Whether the loop is held up while the copy is made, and whether the checkpoint is right if it were not.

    The copying waits until an optimizer step has been taken. Collective.
    """
    quiet()
    at_once, beside = begun(root / "at-once"), begun(root)
    plan = tiny_plan(root, 3)
    with tiny_engine(plan) as engine:
        saver = Saver(beside, FIRST, plan, engine, torch.device("cpu"))
        train(engine, plan, 0, 1)
        saver.join()
        assert saver._copies is not None
        copy, stepped = saver._copies.of, threading.Event()

        def copy_late(shards: Any) -> Any:
            assert stepped.wait(60)
            return copy(shards)

        with mock.patch.object(saver._copies, "of", copy_late):
            save(at_once, 1, FIRST, engine, {}, plan)
            saver.begin(1, {})
            loop = threading.Thread(target=saver.before_update)
            loop.start()
            train(engine, plan, 1, 1)  # as a loop would that does not ask
            held_up = loop.is_alive()
            stepped.set()
            loop.join()
            saver.join()
        assert [saved.error for saved in saver.finished()] == [None]
    files = [read(checkpoint_at(store.root, 1)).files for store in (at_once, beside)]
    return held_up, files[0] == files[1]


def both(root: Path, hidden_size: int, layers: int) -> tuple[Memory, tuple[bool, bool]]:
    """In one group: most of its time goes into imports."""
    return measured(root / "memory", hidden_size, layers), unguarded(root / "unguarded")


def check(ranks: list[Memory]) -> None:
    for rank, memory in enumerate(ranks):
        print(
            f"\nrank {rank} of a model of {memory.parameters / 1e6:.1f}M parameters, its peaks above training in MiB:"
        )
        print(f"  (shards {memory.shards / MIB:.1f}, the largest {memory.bucket / MIB:.1f})")
        for name, bytes_above in memory.peaks.items():
            print(f"  {name:>20}: {bytes_above / MIB:6.1f}")
    for memory in ranks:
        for name in ("at once", "second in background", "third in background"):
            assert memory.peaks[name] <= memory.bucket + SOME, name
        assert memory.peaks["first in background"] <= memory.shards + memory.bucket + SOME
        assert memory.peaks["first in background"] >= 0.95 * memory.shards  # the copy is there, so the scale is right


def test_a_save_needs_a_bucket_and_the_first_in_background_one_copy_more(tmp_path: Path) -> None:
    results = run_group(2, both, tmp_path, 256, 6, timeout_s=600)
    check([memory for memory, _ in results])
    # A missing `before_update` would show in test_matrix, which compares the bytes of both kinds of save.
    assert [seen for _, seen in results] == [(True, False), (True, False)]


@pytest.mark.long
def test_a_save_of_forty_million_parameters(tmp_path: Path) -> None:
    check(run_group(2, measured, tmp_path, 512, 8, timeout_s=900))
