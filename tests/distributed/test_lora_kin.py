"""LoRA's kin: each is what peft alone makes of it in one process, at every ZeRO stage, after a resume and exported."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
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
from launcher.train.verdict import Verdict
from tests.checkpoints import checkpoint_at, copy_checkpoint
from tests.distributed.group import run_group
from tests.distributed.runs import LORA, QLORA, STEPS, curve, tiny_run, train_all, variant, worst
from tests.distributed.tiny import gathered_below

pytestmark = pytest.mark.distributed

FP32, BF16, BF16_STAGE_0 = 1e-5, 1e-3, 1e-2
RESUMED_AT = 10


def kin(method: MethodPlan = LORA, **changes: Any) -> MethodPlan:
    return method.model_copy(update=changes)


KIN: dict[str, MethodPlan] = {
    "rslora": kin(rslora=True, alpha=16.0),
    "dora": kin(dora=True),
    "dora qlora": kin(QLORA, dora=True),
    "pissa": kin(init="pissa"),
    "all": kin(rslora=True, alpha=16.0, dora=True, init="pissa"),
}
IN_CI: dict[str, tuple[int, ...]] = {"rslora": (2,), "dora": (3,), "dora qlora": (3,), "pissa": (0,), "all": (3,)}
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
    for step in range(STEPS):
        (batch,) = data.micro_batches(step, BatchLayout(1, rows, 1), 0)
        mean = loss(batch)[0] / len(batch.targets)
        optimizer.zero_grad()
        mean.backward()
        torch.nn.utils.clip_grad_norm_(trained, hyper.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = hyper.lr * lr_factor(run.schedule, step, STEPS)
        optimizer.step()
        losses.append(mean.item())
    return losses


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return tiny_run(tmp_path_factory.mktemp("kin"))


def on_ranks(base: Plan, ranks: int, stages: dict[str, tuple[int, ...]], of: str) -> dict[str, Plan]:
    changes: dict[str, Any] = {"workers": ranks, "micro_batch_size": 2, "checkpoint_every_steps": RESUMED_AT}
    return {
        f"{name} zero {zero}": variant(
            base, f"{of}-{name}-{zero}".replace(" ", "-"), method=KIN[name], zero=zero, keep_last=9, **changes
        )
        for name, each in stages.items()
        for zero in each
    }


@pytest.fixture(scope="module")
def alone(base: Plan) -> dict[str, list[float]]:
    plans = {name: variant(base, name, method=method) for name, method in KIN.items()}
    return run_group(1, by_peft_alone, plans, timeout_s=300)[0]


def train_partitioned(plans: Sequence[Plan]) -> list[Verdict]:
    """`train_all`; ZeRO-3 partitions what it would in a model of real size: all but the smallest lengths."""
    with gathered_below(50):
        return train_all(plans)


@pytest.fixture(scope="module")
def runs(base: Plan) -> dict[str, Plan]:
    plans = on_ranks(base, 2, IN_CI, "ci")
    run_group(2, train_partitioned, list(plans.values()), timeout_s=600)
    return plans


def compare(plans: dict[str, Plan], alone: dict[str, list[float]]) -> None:
    for name, plan in plans.items():
        expected = alone[name.partition(" zero")[0]]
        error = worst(curve(plan), expected)
        print(f"{name}: {error:.1e}")
        assert error <= FP32, (name, curve(plan), expected)


def test_each_is_petfs_own_at_every_stage(runs: dict[str, Plan], alone: dict[str, list[float]]) -> None:
    compare(runs, alone)
    # None is another, nor one that learns nothing.
    for one, other in itertools.combinations(alone.values(), 2):
        assert worst(one, other) > 100 * FP32
    assert all(losses[-1] < 0.95 * losses[0] for losses in alone.values())


def resumed(run: Plan, name: str, **changes: Any) -> Plan:
    """A run that has what `run` had when it was half done."""
    plan = variant(run, name, **changes)
    copy_checkpoint(Path(run.run_dir), RESUMED_AT, Path(plan.run_dir))
    if run.trajectory.method.init == "pissa":
        shutil.copy(Path(run.run_dir) / pissa.FILE, plan.run_dir)
    return plan


def test_e4_resumed_is_uninterrupted(runs: dict[str, Plan]) -> None:
    """Bit for bit: lengths too, and the base that the adapters left when the run began."""
    run = runs["all zero 3"]
    plan = resumed(run, "again")
    [verdict] = run_group(2, train_partitioned, [plan], timeout_s=300)[0]
    assert verdict.kind == "finished"
    found, expected = (last_of_each_step(Path(p.run_dir)) for p in (plan, run))
    assert sorted(found) == list(range(RESUMED_AT + 1, STEPS + 1))
    for step, line in found.items():
        for figure in ("loss", "accuracy", "grad_norm", "lr"):
            assert line[figure] == expected[step][figure], (step, figure)
    ends = [load_weights(checkpoint_at(Path(p.run_dir), STEPS)) for p in (plan, run)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[1])


def test_e5_resumed_elsewhere_is_within_rounding(runs: dict[str, Plan]) -> None:
    """At another stage, on another number of ranks."""
    names = ("all zero 3", "dora qlora zero 3")
    plans = {name: resumed(runs[name], f"{name}-elsewhere".replace(" ", "-"), zero=0) for name in names}
    run_group(1, train_all, list(plans.values()), timeout_s=300)
    for name, plan in plans.items():
        error = worst(curve(plan), curve(runs[name])[RESUMED_AT:])
        print(f"{name} on one rank: {error:.1e}")
        assert error <= FP32


def saved(plan: Plan, folder: Path) -> dict[str, Tensor]:
    """What an export without merging writes, by the model's own names."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    from launcher.export.folder import write_folder
    from launcher.export.merge import trained_model

    tokenizer = AutoTokenizer.from_pretrained(Path(plan.data.folder) / "tokenizer")
    write_folder(plan, trained_model(plan, checkpoint_at(Path(plan.run_dir), STEPS)), tokenizer, folder, merged=False)
    return load_file(folder / "adapter_model.safetensors")


def test_e6_the_saved_adapter_is_whole(runs: dict[str, Plan], tmp_path: Path) -> None:
    for name in ("dora qlora zero 3", "all zero 3"):
        plan = runs[name]
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


def refused(plans: Sequence[Plan]) -> list[str]:
    said = []
    for plan in plans:
        with pytest.raises(CheckpointError) as caught:
            train_all([plan])
        said.append(f"{caught.value.message}; {caught.value.hint}")
    return said


def test_a_checkpoint_is_true_of_one_beginning_only(runs: dict[str, Plan]) -> None:
    run = runs["pissa zero 0"]
    lost, other = resumed(run, "lost", zero=0), resumed(run, "other", zero=0)
    (Path(lost.run_dir) / pissa.FILE).unlink()
    shutil.copy(Path(runs["all zero 3"].run_dir) / pissa.FILE, other.run_dir)
    [gone, another] = run_group(1, refused, [lost, other])[0]
    assert gone == (
        f"{lost.run_dir}/pissa.safetensors is gone, and step-00000010 is only true of the base that it leaves; "
        "bring it back, or start a new run"
    )
    assert another.startswith(f"{other.run_dir}/pissa.safetensors is another run's; bring back the run's own")


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_kind_at_every_stage(base: Plan, alone: dict[str, list[float]], ranks: int) -> None:
    plans = on_ranks(base, ranks, {name: tuple(range(4)) for name in KIN}, f"long-{ranks}")
    run_group(ranks, train_partitioned, list(plans.values()), timeout_s=900)
    compare(plans, alone)
