"""LoRA's kin: each is what peft alone makes of it in one process, at every ZeRO stage, after a resume and exported."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from launcher.checkpoint.load import load_weights
from launcher.data.loader import TrainData
from launcher.errors import CheckpointError
from launcher.model import pissa
from launcher.plan.batch import BatchLayout
from launcher.plan.plan import MethodPlan, Plan
from launcher.store.folder import FolderStore
from launcher.train.loss import SupervisedLoss
from launcher.train.metrics import last_of_each_step
from launcher.train.schedule import lr_factor
from tests.checkpoints import checkpoint_at, copy_checkpoint
from tests.distributed.group import run_group
from tests.distributed.runs import LORA, QLORA, curve, tiny_run, train_all, variant, worst
from tests.distributed.tiny import gathered_below

pytestmark = pytest.mark.distributed

FP32 = 1e-5
STEPS, RESUMED_AT = 8, 4
ALL_STEPS = 20
"""Of the long test."""


def kin(method: MethodPlan = LORA, **changes: Any) -> MethodPlan:
    return method.model_copy(update=changes)


KIN: dict[str, MethodPlan] = {
    "rslora": kin(rslora=True, alpha=16.0),
    "dora": kin(dora=True),
    "dora qlora": kin(QLORA, dora=True),
    "pissa": kin(init="pissa"),
    "all": kin(rslora=True, alpha=16.0, dora=True, init="pissa"),
}
IN_CI: dict[str, tuple[int, ...]] = {"dora qlora": (3,), "all": (3,)}
"""Stages on two ranks; the others are `long`."""


def by_peft_alone(plans: dict[str, Plan]) -> dict[str, list[float]]:
    """Losses of each run by transformers, peft and torch: nothing of ours but the batches, the loss and the rate."""
    return {name: losses_by_peft(plan) for name, plan in plans.items()}


def losses_by_peft(plan: Plan) -> list[float]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from launcher.model.load import nf4

    run, method, hyper = plan.trajectory, plan.trajectory.method, plan.trajectory.optimizer
    quantized = {"quantization_config": nf4(torch.float32), "device_map": {"": "cpu"}}
    base = AutoModelForCausalLM.from_pretrained(
        run.model.path, dtype=torch.float32, **(quantized if method.kind == "qlora" else {})
    )
    base.requires_grad_(False)
    torch.manual_seed(run.seed)
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        target_modules="all-linear",
        use_dora=method.dora,
        use_rslora=method.rslora,
        init_lora_weights="pissa" if method.init == "pissa" else True,
    )
    model = get_peft_model(base, config, autocast_adapter_dtype=False).train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in trained if weight.dim() > 1], "weight_decay": hyper.weight_decay},
        {"params": [weight for weight in trained if weight.dim() == 1], "weight_decay": 0.0},
    ]
    assert hyper.betas is not None
    optimizer = torch.optim.AdamW(groups, lr=hyper.lr, betas=hyper.betas, eps=hyper.eps)
    loss = SupervisedLoss(model, base, False, torch.device("cpu"))
    data, rows = TrainData(plan.data.folder, run.global_batch_size, run.seed), run.global_batch_size
    losses = []
    for step in range(plan.lifecycle.total_steps):
        (batch,) = data.micro_batches(step, BatchLayout(1, rows, 1), 0)
        mean = loss(batch)[0] / len(batch.targets)
        optimizer.zero_grad()
        mean.backward()
        torch.nn.utils.clip_grad_norm_(trained, hyper.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = hyper.lr * lr_factor(run.schedule, step, plan.lifecycle.total_steps)
        optimizer.step()
        losses.append(mean.item())
    return losses


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return tiny_run(tmp_path_factory.mktemp("kin"))


def on_ranks(base: Plan, ranks: int, stages: dict[str, tuple[int, ...]], steps: int) -> dict[str, Plan]:
    life: dict[str, Any] = {"max_steps": steps, "total_steps": steps, "checkpoint_every_steps": RESUMED_AT}
    return {
        f"{name} zero {zero}": variant(
            base,
            f"{ranks}-{name}-{zero}-{steps}".replace(" ", "-"),
            method=KIN[name],
            zero=zero,
            workers=ranks,
            micro_batch_size=2,
            keep_last=9,
            **life,
        )
        for name, each in stages.items()
        for zero in each
    }


def train_partitioned(plans: Sequence[Plan]) -> None:
    """`train_all`; ZeRO-3 partitions what it would in a model of real size: all but the smallest lengths."""
    with gathered_below(50):
        train_all(plans)


def resumed(run: Plan, name: str, **changes: Any) -> Plan:
    """A run that is to have what `run` had when it was half done: see `halve`."""
    return variant(run, name.replace(" ", "-"), **changes)


def halve(run: Plan, plan: Plan, start: bool = True) -> None:
    """Give `plan` what `run` had by then, and where PiSSA's adapters began unless it has no `start`."""
    copy_checkpoint(Path(run.run_dir), RESUMED_AT, Path(plan.run_dir))
    if start and run.trajectory.method.init == "pissa":
        shutil.copy(Path(run.run_dir) / pissa.FILE, plan.run_dir)


def on_two(plans: dict[str, Plan], again: Plan) -> list[dict[str, Tensor]]:
    """All runs of two ranks; and what DoRA starts from beside added tokens, at ZeRO 0 and 3."""
    train_partitioned(list(plans.values()))
    if dist.get_rank() == 0:
        halve(plans["all zero 3"], again)
    dist.barrier()
    train_partitioned([again])
    return [beginning(variant(again, "rows", method=KIN["dora"], zero=zero)) for zero in (0, 3)]


def beginning(plan: Plan) -> dict[str, Tensor]:
    """All that is trained, before the first step, with the last rows of the vocabulary for added tokens. Collective."""
    from launcher.model.adapters import apply_method
    from launcher.model.load import load_model
    from launcher.plan.deepspeed import deepspeed_config
    from launcher.train.engine import join_communication

    join_communication()
    written = deepspeed_config(plan.layout, BatchLayout(2, 2, 2), "fp32", 1.0)
    network = apply_method(load_model(plan, written, torch.device("cpu"), ()), plan.trajectory.method, 0, (298, 299))
    return {name: one.detach().clone() for name, one in network.named_parameters() if one.requires_grad}


def on_one(alone: dict[str, Plan], elsewhere: dict[str, Plan], lost: Plan) -> tuple[dict[str, list[float]], str]:
    """All of one rank: peft's losses, the runs that go on at ZeRO 0, and what is said where PiSSA's start is gone."""
    train_all(list(elsewhere.values()))
    with pytest.raises(CheckpointError) as caught:
        train_all([lost])
    return by_peft_alone(alone), f"{caught.value.message}; {caught.value.hint}"


@dataclass(frozen=True)
class Runs:
    plans: dict[str, Plan]
    """By kind and stage, on two ranks."""
    again: Plan
    """The second half of "all zero 3"."""
    beginnings: list[dict[str, Tensor]]
    """Of DoRA with rows of added tokens, at ZeRO 0 and 3."""
    elsewhere: dict[str, Plan]
    """Second halves at ZeRO 0 on one rank."""
    lost: Plan
    """One without `pissa.FILE`."""
    said: str
    """Of that one."""
    alone: dict[str, list[float]]
    """Losses by peft, by kind."""


@pytest.fixture(scope="module")
def runs(base: Plan) -> Runs:
    plans = on_ranks(base, 2, IN_CI, STEPS)
    again = resumed(plans["all zero 3"], "again")
    beginnings = run_group(2, on_two, plans, again, timeout_s=600)[0]
    elsewhere = {name: resumed(plan, f"{name} elsewhere", zero=0) for name, plan in plans.items()}
    for name, plan in elsewhere.items():
        halve(plans[name], plan)
    lost = resumed(plans["all zero 3"], "lost")
    halve(plans["all zero 3"], lost, start=False)
    one = {name: plans[f"{name} zero 3"] for name in IN_CI}
    [(alone, said)] = run_group(1, on_one, one, elsewhere, lost, timeout_s=600)
    return Runs(plans, again, beginnings, elsewhere, lost, said, alone)


def compare(plans: dict[str, Plan], alone: dict[str, list[float]]) -> None:
    for name, plan in plans.items():
        expected = alone[name.partition(" zero")[0]]
        error = worst(curve(plan), expected)
        print(f"{name}: {error:.1e}")
        assert error <= FP32, (name, curve(plan), expected)
    # None is another, nor one that learns nothing.
    for one, other in itertools.combinations(alone.values(), 2):
        assert worst(one, other) > 100 * FP32
    assert all(losses[-1] < 0.97 * losses[0] for losses in alone.values())


def test_each_is_petfs_own(runs: Runs) -> None:
    compare(runs.plans, runs.alone)


def test_e4_resumed_is_uninterrupted(runs: Runs) -> None:
    """Bit for bit: lengths too, and the base that the adapters left when the run began."""
    plan, run = runs.again, runs.plans["all zero 3"]
    found, expected = (last_of_each_step(Path(p.run_dir)) for p in (plan, run))
    assert sorted(found) == list(range(RESUMED_AT + 1, STEPS + 1))
    for step, line in found.items():
        for figure in ("loss", "accuracy", "grad_norm", "lr"):
            assert line[figure] == expected[step][figure], (step, figure)
    ends = [load_weights(checkpoint_at(Path(p.run_dir), STEPS)) for p in (plan, run)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[1])


def test_e5_resumed_elsewhere_is_within_rounding(runs: Runs) -> None:
    """At another stage, on another number of ranks."""
    for name, plan in runs.elsewhere.items():
        error = worst(curve(plan), curve(runs.plans[name])[RESUMED_AT:])
        print(f"{name} on one rank: {error:.1e}")
        assert error <= FP32


def test_lengths_beside_added_tokens_are_the_same_at_every_stage(runs: Runs) -> None:
    found, expected = runs.beginnings[1], runs.beginnings[0]
    assert found.keys() == expected.keys()
    assert {name for name in found if "trainable_tokens" in name}
    torch.testing.assert_close(found, expected)


def saved(plan: Plan, folder: Path) -> dict[str, Tensor]:
    """What an export without merging writes, by the model's own names."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    from launcher.export.folder import write_folder
    from launcher.export.merge import trained_model

    tokenizer = AutoTokenizer.from_pretrained(Path(plan.data.folder) / "tokenizer")
    write_folder(plan, trained_model(plan, checkpoint_at(Path(plan.run_dir), STEPS)), tokenizer, folder, merged=False)
    return load_file(folder / "adapter_model.safetensors")


def test_e6_the_saved_adapter_is_whole(runs: Runs, tmp_path: Path) -> None:
    for name, plan in runs.plans.items():
        masters = load_weights(checkpoint_at(Path(plan.run_dir), STEPS))
        assert len(masters) == 14 * 3, name  # A, B and lengths of seven linear layers in each of two
        starts = pissa.kept(FolderStore(Path(plan.run_dir)), plan) or {}
        assert len(starts) == (28 if plan.trajectory.method.init == "pissa" else 0)
        found = saved(plan, tmp_path / name.replace(" ", "-"))
        assert len(found) == len(masters)
        for key, master in masters.items():
            tensor = found[key.replace(".default", "").replace("vector.weight", "vector")]
            if key not in starts:
                assert torch.equal(tensor, master), (name, key)
                continue
            trained, start = tensor.chunk(2, dim=1 if "lora_B" in key else 0)
            assert torch.equal(trained, master), (name, key)
            assert torch.equal(-start if "lora_B" in key else start, starts[key]), (name, key)
            assert not torch.equal(starts[key], master), (name, key)


def test_without_its_beginning_a_checkpoint_is_true_of_nothing(runs: Runs) -> None:
    assert runs.said == (
        f"{runs.lost.run_dir}/pissa.safetensors is gone, and step-00000004 is only true of the base that it leaves; "
        "bring it back, or start a new run"
    )


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_kind_at_every_stage(base: Plan, ranks: int) -> None:
    plans = on_ranks(base, ranks, {name: tuple(range(4)) for name in KIN}, ALL_STEPS)
    run_group(ranks, train_partitioned, list(plans.values()), timeout_s=3600)
    [alone] = run_group(1, by_peft_alone, {name: plans[f"{name} zero 0"] for name in KIN}, timeout_s=900)
    compare(plans, alone)
