"""bitsandbytes' 8-bit moments under ZeRO: resumed to the last bit at the same cut, refused at another."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from launcher.checkpoint.layout import Checkpoint
from launcher.checkpoint.lease import Attempt, begin
from launcher.checkpoint.load import load, load_weights
from launcher.checkpoint.manifest import read
from launcher.checkpoint.save import save
from launcher.checkpoint.shards import training_state
from launcher.errors import ClusterError
from launcher.plan.plan import Plan
from launcher.store.folder import FolderStore
from tests.distributed.group import run_group
from tests.distributed.tiny import quiet, tiny_engine, tiny_plan, train

pytestmark = pytest.mark.distributed

RANKS = 3
"""ZeRO pads what does not divide, and padding shares the scales of 8-bit blocks."""
LAYOUTS = [(zero, dtype) for dtype in ("fp32", "bf16") for zero in range(4)]


def plan_at(root: Path, zero: int, dtype: str, optimizer: str = "adamw_8bit") -> Plan:
    plan = tiny_plan(root / f"{dtype}-zero{zero}-{optimizer}", zero, dtype)
    hyper = plan.trajectory.optimizer.model_copy(update={"name": optimizer})
    return plan.model_copy(update={"trajectory": plan.trajectory.model_copy(update={"optimizer": hyper})})


@contextlib.contextmanager
def engine_of(plan: Plan) -> Iterator[Any]:
    """Matrices this small would keep 32 bits: at ZeRO 0, where each is a master of its own, nothing would be tested."""
    import bitsandbytes.optim

    smaller = functools.partial(bitsandbytes.optim.AdamW8bit, min_8bit_size=1000)
    with mock.patch("bitsandbytes.optim.AdamW8bit", smaller), tiny_engine(plan) as engine:
        yield engine


def checkpoint_of(plan: Plan) -> Checkpoint:
    return Checkpoint(FolderStore(Path(plan.run_dir)), 4)


def saved(root: Path) -> dict[str, Any]:
    """Save after four steps and go on, in the same engine and in a fresh one; the losses of both, and the bytes."""
    quiet()
    found: dict[str, Any] = {}
    for zero, dtype in LAYOUTS:
        plan = plan_at(root, zero, dtype)
        attempt, store = started(plan)
        with engine_of(plan) as engine:
            before = train(engine, plan, 0, 4)
            save(store, 4, attempt, engine, {}, plan)
            kinds = {name.partition(".")[0] for name in training_state(engine)}
            expected = before, train(engine, plan, 4, 4)
        # Nothing is trained before: the state must be there, padding included, without a step.
        with engine_of(plan) as engine:
            load(checkpoint_of(plan), engine, plan)
            found[f"{dtype}-zero{zero}"] = (expected, train(engine, plan, 4, 4), kinds)
    plan = plan_at(root, 3, "fp32", "adamw")
    attempt, store = started(plan)
    with engine_of(plan) as engine:
        found["32 bits"] = train(engine, plan, 0, 8)
        save(store, 4, attempt, engine, {}, plan)
    return found


def started(plan: Plan) -> tuple[Attempt, FolderStore]:
    store = FolderStore(Path(plan.run_dir))
    if dist.get_rank() == 0:
        store.root.mkdir()
        begin(store, 0)
    dist.barrier()
    return Attempt(0, 1), store


def elsewhere(root: Path) -> dict[str, Any]:
    """What loading says on one rank, from the checkpoints of RANKS."""
    quiet()
    said: dict[str, Any] = {}
    for zero in range(4):
        plan = plan_at(root, zero, "fp32")
        with engine_of(plan) as engine:
            try:
                load(checkpoint_of(plan), engine, plan)
                said[f"zero{zero}"] = train(engine, plan, 4, 4)
            except ClusterError as error:
                said[f"zero{zero}"] = (error.message, error.hint)
    return said


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("runs")
    return root, run_group(RANKS, saved, root)[0]


def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(runs: tuple[Path, dict[str, Any]]) -> None:
    for zero, dtype in LAYOUTS:
        (_, expected), found, kinds = runs[1][f"{dtype}-zero{zero}"]
        assert found == expected, (zero, dtype)
        assert {"master", "exp_avg_8bit", "exp_avg_sq_8bit", "exp_avg_absmax"} <= kinds


def test_eight_bits_train_nearly_as_thirty_two_and_take_less(runs: tuple[Path, dict[str, Any]]) -> None:
    root, found = runs
    before, after = found["fp32-zero3"][0]
    assert max(abs(a - b) / b for a, b in zip(before + after, found["32 bits"], strict=True)) < 2e-2
    small, large = (
        sum(file.bytes for file in read(checkpoint_of(plan_at(root, 3, "fp32", name))).files.values())
        for name in ("adamw_8bit", "adamw")
    )
    assert small < 0.6 * large


def test_another_cut_is_refused_with_the_reason_and_zero_0_has_none(runs: tuple[Path, dict[str, Any]]) -> None:
    root, found = runs
    said = run_group(1, elsewhere, root)[0]
    _, expected = found["fp32-zero0"][0]
    assert max(abs(a - b) / b for a, b in zip(said["zero0"], expected, strict=True)) < 1e-5
    for zero in (1, 2, 3):
        message, hint = said[f"zero{zero}"]
        assert f"saved at ZeRO {zero} on 3 ranks cannot go on at ZeRO {zero} on 1 rank" in message
        assert "block of 256 shares a scale" in message
        assert f"resume at ZeRO {zero} on 3 ranks" in hint
    weights = load_weights(checkpoint_of(plan_at(root, 3, "fp32")))
    assert weights["model.embed_tokens.weight"].shape == (127, 32)
