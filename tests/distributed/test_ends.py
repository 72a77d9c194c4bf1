"""How a run may end besides reaching its last step, and that gradient checkpointing is no other run."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.checkpoint.layout import committed
from launcher.plan.plan import Plan
from launcher.store.folder import FolderStore
from launcher.train.metrics import read
from launcher.train.verdict import Verdict, request_stop
from tests.distributed.group import run_group
from tests.distributed.runs import curve, tiny_run, train_all, variant, worst

pytestmark = pytest.mark.distributed
STEPS = 6


def with_nan(plan: Plan) -> Plan:
    """The plan over a base one of whose numbers is not a number, as a broken download or a diverged run leaves it."""
    broken = Path(plan.trajectory.model.path).with_name("broken")
    shutil.copytree(plan.trajectory.model.path, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    model = plan.trajectory.model.model_copy(update={"path": str(broken)})
    return variant(plan, "nan", model=model, zero=2)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Plan, Verdict]]:
    """{name: (plan, verdict)} of runs on two ranks, all in one process group."""
    base = tiny_run(tmp_path_factory.mktemp("ends"))
    base = variant(base, "plain", total_steps=STEPS, max_steps=STEPS, micro_batch_size=2, eval_every_steps=STEPS)
    plans = {
        "plain": base,
        "checkpointing": variant(base, "checkpointing", gradient_checkpointing=True),
        "checkpointing, ZeRO 3": variant(base, "checkpointing-3", gradient_checkpointing=True, zero=3),
        "stopped": variant(base, "stopped"),
        "out of time": variant(base, "out-of-time", max_time_s=0.0),
        "nan": with_nan(base),
    }
    stopped = Path(plans["stopped"].run_dir)
    stopped.mkdir()
    request_stop(stopped, "SIGINT")
    verdicts = run_group(2, train_all, list(plans.values()))
    assert verdicts[0] == verdicts[1], "the ranks agree on how it ended"
    return dict(zip(plans, zip(plans.values(), verdicts[0], strict=True), strict=True))


Ended = dict[str, tuple[Plan, Verdict]]


def saved_steps(plan: Plan) -> list[int]:
    return [checkpoint.step for checkpoint in committed(FolderStore(Path(plan.run_dir)))]


def test_a_run_to_the_end_is_finished_and_saved(ended: Ended) -> None:
    plan, verdict = ended["plain"]
    assert (verdict.kind, verdict.step, verdict.exit_code) == ("finished", STEPS, 0)
    assert saved_steps(plan) == [STEPS]


@pytest.mark.parametrize("name", ["checkpointing", "checkpointing, ZeRO 3"])
def test_computing_activations_again_changes_nothing(ended: Ended, name: str) -> None:
    assert worst(curve(ended[name][0]), curve(ended["plain"][0])) <= 1e-5
    assert worst(curve(ended[name][0], "grad_norm"), curve(ended["plain"][0], "grad_norm")) <= 1e-5


def test_a_stop_request_saves_the_step_it_interrupts(ended: Ended) -> None:
    plan, verdict = ended["stopped"]
    assert (verdict.kind, verdict.step) == ("stopped", 1)
    assert saved_steps(plan) == [1]


def test_a_time_limit_evaluates_saves_and_ends(ended: Ended) -> None:
    plan, verdict = ended["out of time"]
    assert (verdict.kind, verdict.step, verdict.exit_code) == ("out_of_time", 1, 0)
    assert saved_steps(plan) == [1]
    assert [record["step"] for record in read(Path(plan.run_dir)) if record["kind"] == "eval"] == [1]


def test_a_loss_that_is_not_finite_names_its_rows_and_saves_nothing(ended: Ended) -> None:
    plan, verdict = ended["nan"]
    assert (verdict.kind, verdict.step, verdict.exit_code) == ("not_finite", 0, 1)
    assert verdict.message.startswith("the loss of step 1 is nan; rows: ")
    assert verdict.message.count("rows.jsonl:") == plan.trajectory.global_batch_size
    assert verdict.hint is not None
    assert saved_steps(plan) == []
    assert [record for record in read(Path(plan.run_dir)) if record["kind"] == "step"] == []
    assert torch.isnan(load_file(Path(plan.trajectory.model.path) / "model.safetensors")["model.norm.weight"]).any()
