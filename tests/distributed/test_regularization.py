"""Dropout, noise, smoothed labels, frozen patterns and rates by layer in whole runs: E2, E4, and what is measured and
exported knows nothing of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.checkpoint.deep import check, expected_of
from launcher.checkpoint.load import load_weights
from launcher.checkpoint.manifest import verify
from launcher.data.loader import EvalData
from launcher.export.merge import trained_model
from launcher.plan.plan import Plan
from launcher.train.loss import SupervisedLoss
from launcher.train.metrics import last_of_each_step
from tests.checkpoints import checkpoint_at, copy_checkpoint
from tests.distributed.group import run_group
from tests.distributed.runs import LORA, curve, tiny_run, train_all, variant, worst
from tests.plans import method_plan, optimizer_plan

pytestmark = pytest.mark.distributed

STEPS, HALF = 6, 3
FULL: dict[str, Any] = {
    "method": method_plan("full", frozen=("embed_tokens", r"layers\.0\..*norm")),
    "optimizer": optimizer_plan(name="lion", lr=3e-4, betas=(0.9, 0.99), weight_decay=0.1, layer_decay=0.7),
}
ADAPTERS: dict[str, Any] = {
    "method": LORA.model_copy(update={"frozen": (r"layers\.0\.mlp",)}),
    "optimizer": optimizer_plan(lr=2e-3, lora_plus_ratio=16.0, layer_decay=0.7),
}


def plans_of(base: Plan) -> dict[str, Plan]:
    dropping = base.trajectory.model.model_copy(update={"dropout": 0.2})
    steps = {"max_steps": STEPS, "total_steps": STEPS, "eval_every_steps": STEPS}
    steps |= {"checkpoint_every_steps": HALF, "keep_last": 9}
    regular = {"model": dropping, "neftune_alpha": 5.0, "label_smoothing": 0.1}
    two = {"workers": 2, "micro_batch_size": 2}
    alone = {
        key: variant(base, key, **steps | {"total_steps": 1}, **two, **FULL, **{key: regular[key]}) for key in regular
    }
    return alone | {
        "plain": variant(base, "plain", **steps, **two, **FULL),
        "full": variant(base, "full", **steps, **two, **FULL, **regular),
        "full zero 3": variant(base, "full-3", **steps, **two, **FULL, **regular, zero=3),
        "lora zero 2": variant(base, "lora-2", **steps, **two, **ADAPTERS, **regular, zero=2),
        "lora zero 3": variant(base, "lora-3", **steps, **two, **ADAPTERS, **regular, zero=3),
    }


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Plan]:
    plans = plans_of(tiny_run(tmp_path_factory.mktemp("regularization")))
    run_group(2, train_all, list(plans.values()), timeout_s=600)
    return plans


def test_every_stage_drops_and_moves_the_same(plans: dict[str, Plan]) -> None:
    """On as many ranks: what is drawn follows from seed, step and rank."""
    for method, zero in (("full", ""), ("lora", " zero 2")):
        found, expected = curve(plans[f"{method} zero 3"]), curve(plans[f"{method}{zero}"])
        print(f"{method}: {worst(found, expected):.1e}")
        assert len(found) == STEPS
        assert worst(found, expected) <= 1e-5
    for name in ("full", "lora zero 3"):
        assert max(curve(plans[name], "lr")) == plans[name].trajectory.optimizer.lr, "the rate that is told is no share"


def test_each_acts_alone(plans: dict[str, Plan]) -> None:
    first = {name: curve(plan)[0] for name, plan in plans.items() if not name.startswith("lora")}
    print(first)
    assert first.pop("full zero 3") == pytest.approx(first["full"], rel=1e-5)
    assert first.keys() == {"plain", "model", "neftune_alpha", "label_smoothing", "full"}
    plain = first.pop("plain")
    assert all(abs(loss - plain) / plain > 2e-5 for loss in first.values())


def test_resumed_is_uninterrupted_to_the_last_bit(plans: dict[str, Plan]) -> None:
    resumed = {}
    for name in ("full zero 3", "lora zero 2"):
        resumed[name] = variant(plans[name], f"{Path(plans[name].run_dir).name}-resumed")
        copy_checkpoint(Path(plans[name].run_dir), HALF, Path(resumed[name].run_dir))
    run_group(2, train_all, list(resumed.values()), timeout_s=600)
    for name, plan in resumed.items():
        assert curve(plan) == curve(plans[name])[HALF:], name


def test_what_is_frozen_is_not_in_a_checkpoint_and_learns_nothing(plans: dict[str, Plan]) -> None:
    for name in ("full zero 3", "lora zero 3"):
        plan = plans[name]
        checkpoint = checkpoint_at(Path(plan.run_dir), STEPS)
        weights, expected = load_weights(checkpoint), expected_of(plan, [])
        assert expected.source == "the model of the run's plan.json"
        check(checkpoint, verify(checkpoint), expected)
        assert weights.keys() == expected.shapes.keys()
        if name.startswith("lora"):
            assert not any("layers.0.mlp" in key for key in weights)
            assert any("layers.0.self_attn" in key for key in weights)
        else:
            assert not any("embed_tokens" in key or "layers.0.input_layernorm" in key for key in weights)
            assert "model.layers.1.input_layernorm.weight" in weights


def test_what_is_measured_and_exported_knows_nothing_of_it(plans: dict[str, Plan]) -> None:
    plan = plans["full"]
    model = trained_model(plan, checkpoint_at(Path(plan.run_dir), STEPS))
    assert model.config.attention_dropout == 0.0
    loss, total, count = SupervisedLoss(model, model, False, torch.device("cpu")), 0.0, 0
    for batch in EvalData(plan.data.folder).micro_batches(10_000, 1, 0):
        with torch.no_grad():
            total, count = total + loss(batch)[0].item(), count + len(batch.targets)
    measured = last_of_each_step(Path(plan.run_dir), "eval")[STEPS]
    assert measured["loss"] == pytest.approx(total / count, rel=1e-5)
