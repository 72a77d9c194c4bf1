"""From the first step on the model trains: with its own dropout, and with gradient checkpointing that recomputes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest

from launcher.checkpoint.layout import committed
from launcher.plan.plan import Plan
from launcher.store.folder import FolderStore
from tests.checkpoints import copy_checkpoint
from tests.distributed.group import run_group
from tests.distributed.runs import curve, tiny_run, train_all, variant

pytestmark = pytest.mark.distributed

STEPS, HALF = 4, 2


def layer_calls(plans: Sequence[Plan]) -> list[int]:
    """How often a part of a decoder layer computed in each run."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls = []
    for plan in plans:
        with mock.patch.object(LlamaMLP, "forward", autospec=True, side_effect=LlamaMLP.forward) as f:
            train_all([plan])
        calls.append(f.call_count)
    return calls


def test_resumed_with_the_models_own_dropout(tmp_path: Path) -> None:
    """Before the first evaluation as after it: a resumed run has had none yet."""
    base = tiny_run(tmp_path, attention_dropout=0.3)
    settings = dict.fromkeys(("max_steps", "total_steps", "eval_every_steps"), STEPS) | {"checkpoint_every_steps": HALF}
    whole = variant(base, "whole", **settings | {"eval_every_steps": 1})
    rare = variant(base, "rare", **settings)
    run_group(1, train_all, [whole, rare])
    resumed = variant(base, "resumed", **settings)
    copy_checkpoint(Path(whole.run_dir), HALF, Path(resumed.run_dir))
    run_group(1, train_all, [resumed])
    assert curve(rare) == curve(whole), "an evaluation changed what comes after it"
    assert curve(resumed) == curve(whole)[HALF:]


def test_a_checkpoint_is_due_by_the_clock_too(tmp_path: Path) -> None:
    base = tiny_run(tmp_path)
    settings = dict.fromkeys(("max_steps", "total_steps", "eval_every_steps", "checkpoint_every_steps"), STEPS)
    plans = [
        variant(base, f"within-{seconds}", **settings, checkpoint_within_s=seconds, keep_last=9)
        for seconds in (0.0, 1e6)
    ]
    run_group(2, train_all, plans)
    # The first step is asked for before anything is known of it, so each of them is saved.
    assert [len(committed(FolderStore(Path(plan.run_dir)))) for plan in plans] == [STEPS, 1]


def test_gradient_checkpointing_recomputes_from_the_first_step(tmp_path: Path) -> None:
    base = tiny_run(tmp_path)
    settings = dict.fromkeys(("max_steps", "total_steps", "eval_every_steps", "checkpoint_every_steps"), STEPS)
    plans = [
        variant(base, f"checkpointing-{on}", gradient_checkpointing=on, **settings, eval_max_rows=1)
        for on in (False, True)
    ]
    without, with_ = run_group(1, layer_calls, plans)[0]
    assert with_ - without == STEPS * 2, "each of two layers twice a step"
