"""Runs with our kernels have the losses of runs without, also where ZeRO-3 has partitioned what the kernels read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launcher.plan.plan import Plan
from tests.distributed.group import run_group
from tests.distributed.runs import LORA, QLORA, curve, tiny_run, train_all, variant, worst

pytestmark = pytest.mark.distributed

FP32 = 1e-5
STEPS = 5
FEW: dict[str, Any] = dict.fromkeys(("max_steps", "total_steps", "eval_every_steps", "checkpoint_every_steps"), STEPS)
TWO: dict[str, Any] = FEW | {"workers": 2, "micro_batch_size": 3}
QWEN3 = {"model_type": "qwen3", "head_dim": 16}
"""Its rotation reads the weights of two other modules."""


def train_interpreted(plans: Sequence[Plan]) -> Counter[str]:
    """Launches of kernels in a run on CPU, where they are run by Triton's interpreter."""
    from launcher_kernels import dispatch
    from tests import interpreter

    interpreter.mend()
    with dispatch.interpreted() as launches:
        train_all(plans)
    return launches


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return tiny_run(tmp_path_factory.mktemp("fused"))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return tiny_run(tmp_path_factory.mktemp("fused_qwen3"), **QWEN3)


def assert_equal(fused: Plan, eager: Plan) -> None:
    assert curve(fused, "accuracy") == curve(eager, "accuracy")
    for figure in ("loss", "grad_norm"):
        found, expected = curve(fused, figure), curve(eager, figure)
        assert len(found) == fused.lifecycle.total_steps
        assert worst(found, expected) <= FP32, (fused.run_dir, figure, found, expected)


def test_fused_is_eager_at_stage_0_and_3(base: Plan, qwen3: Plan) -> None:
    pairs = []
    for plan, name, changes in (
        (base, "full-0", {}),
        (base, "full-3", {"zero": 3}),
        (base, "full-3-checkpointed", {"zero": 3, "gradient_checkpointing": True}),
        (base, "lora-3", {"zero": 3, "method": LORA}),
        (base, "qlora-3", {"zero": 3, "method": QLORA}),
        (qwen3, "qwen3-3", {"zero": 3}),
    ):
        pairs.append([variant(plan, f"{name}-{k}", kernels=k, **TWO, **changes) for k in ("fused", "eager")])
    run_group(2, train_all, [plan for pair in pairs for plan in pair], timeout_s=600)
    for fused, eager in pairs:
        assert_equal(fused, eager)


@pytest.mark.long
@pytest.mark.parametrize("zero", [0, 3])
def test_kernels_in_a_run(zero: int, tmp_path: Path) -> None:
    """The kernels themselves under the engine: they keep weights for the backward pass that ZeRO-3 has freed since."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    plan = tiny_run(tmp_path, **(QWEN3 | small))
    settings = TWO | dict.fromkeys(FEW, 2) | {"zero": zero, "global_batch_size": 2, "micro_batch_size": 1}
    fused, eager = (variant(plan, kernels, kernels=kernels, **settings) for kernels in ("fused", "eager"))
    [launches, _] = run_group(2, train_interpreted, [fused], timeout_s=900)
    run_group(2, train_all, [eager], timeout_s=600)
    assert_equal(fused, eager)
    assert {"norm_backward", "glu_backward", "qk_norm_rope_backward", "cross_entropy"} <= launches.keys()
