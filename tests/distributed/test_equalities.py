"""E1, E2, E4 and E6: the same run on other ranks, ZeRO stages, micro batches and restarts is the same run.

All cases are trained first, in one process group for each number of ranks: most of a group's time goes into imports.
The tests compare what the runs wrote down.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from launcher.checkpoint.deep import check, expected_of
from launcher.checkpoint.load import load_weights
from launcher.checkpoint.manifest import verify
from launcher.data.loader import TrainData
from launcher.export.folder import write_folder
from launcher.export.merge import trained_model
from launcher.plan.batch import BatchLayout
from launcher.plan.plan import Plan
from launcher.store.folder import FolderStore
from launcher.train.loss import SupervisedLoss
from launcher.train.metrics import last_of_each_step
from launcher.train.verdict import forget, request_stop
from tests.checkpoints import checkpoint_at, copy_checkpoint
from tests.distributed.group import run_group
from tests.distributed.runs import (
    FREEZE,
    LORA,
    METHODS,
    QLORA,
    STEPS,
    curve,
    open_folder,
    tiny_run,
    train_all,
    variant,
    worst,
)
from tests.distributed.tiny import quiet

pytestmark = pytest.mark.distributed

FP32, BF16, BF16_STAGE_0 = 1e-5, 1e-3, 1e-2  # the design's tolerances of a relative loss
BF16_NORM = 5e-2
"""Of a gradient norm in bf16, which the design does not bound: one rounding is 2^-8 = 4e-3, and 20 steps add up."""
RESUMED_AT = 10

Adapters = dict[str, Tensor]


@dataclass(frozen=True)
class Runs:
    """Finished runs by name, and what the QLoRA ones had in memory at the start and at the end."""

    plans: dict[str, Plan]
    adapters: dict[str, tuple[Adapters, Adapters]]

    def agree(self, name: str, with_: str, loss: float, norm: float | None = None) -> None:
        """Losses within `loss` and gradient norms within `norm` (the same where None) of another run's."""
        found, expected = self.plans[name], self.plans[with_]
        errors = [worst(curve(found, figure), curve(expected, figure)) for figure in ("loss", "grad_norm")]
        print(f"{name} = {with_}: loss {errors[0]:.1e}, gradient norm {errors[1]:.1e}")
        assert len(curve(found)) == STEPS
        assert errors[0] <= loss, (curve(found), curve(expected))
        assert errors[1] <= (norm or loss), (curve(found, "grad_norm"), curve(expected, "grad_norm"))


def one_rank_plans(base: Plan) -> dict[str, Plan]:
    """The references, and accumulation against them."""
    return {
        "full": variant(base, "full"),
        "full 6 x 1": variant(base, "full-6x1", micro_batch_size=1),
        "full of 5": variant(base, "full-of-5", global_batch_size=5),
        "full bf16": variant(base, "full-bf16", dtype="bf16", zero=1),
        "freeze": variant(base, "freeze", method=FREEZE),
        "lora": variant(base, "lora", method=LORA),
        "qlora": variant(base, "qlora", method=QLORA),
        "qlora bf16": variant(base, "qlora-bf16", method=QLORA, dtype="bf16", zero=2),
    }


DROPOUT = {"lora": LORA.model_copy(update={"dropout": 0.2}), "qlora": QLORA.model_copy(update={"dropout": 0.2})}


def two_rank_plans(base: Plan) -> dict[str, Plan]:
    """The same on two ranks over the ZeRO stages; a micro batch of 2 cuts 6 rows into slots of 2 2 2 and 0."""
    two = base.model_copy(update={"layout": base.layout.model_copy(update={"workers": 2, "micro_batch_size": 2})})
    often = {"eval_every_steps": 4, "eval_max_rows": 3}
    midway = {"checkpoint_every_steps": RESUMED_AT, "keep_last": 9}
    return {
        "full zero 0": variant(two, "2-full-0"),
        "full zero 1": variant(two, "2-full-1", zero=1),
        "full zero 2 offloaded": variant(two, "2-full-2-offload", zero=2, offload=True),
        "full zero 3": variant(two, "2-full-3", zero=3),
        "full of 5 zero 2": variant(two, "2-full-of-5", zero=2, global_batch_size=5, micro_batch_size=1),
        "full bf16 zero 0": variant(two, "2-full-bf16-0", dtype="bf16"),
        "full bf16 zero 3": variant(two, "2-full-bf16-3", dtype="bf16", zero=3),
        "freeze zero 2": variant(two, "2-freeze-2", method=FREEZE, zero=2),
        "lora zero 3": variant(two, "2-lora-3", method=LORA, zero=3),
        "lora dropout": variant(two, "2-lora-dropout", method=DROPOUT["lora"], zero=2, **midway),
        "qlora dropout": variant(two, "2-qlora-dropout", method=DROPOUT["qlora"], zero=3, dtype="bf16", **midway),
        "qlora zero 0": variant(two, "2-qlora-0", method=QLORA),
        "qlora zero 2": variant(two, "2-qlora-2", method=QLORA, zero=2),
        "qlora zero 3": variant(two, "2-qlora-3", method=QLORA, zero=3),
        "qlora bf16 zero 3": variant(two, "2-qlora-bf16-3", method=QLORA, dtype="bf16", zero=3),
        "qlora bf16 zero 3 evaluated": variant(two, "2-qlora-bf16-3-eval", method=QLORA, dtype="bf16", zero=3, **often),
    }


def train_plans(plans: dict[str, Plan]) -> dict[str, tuple[Adapters, Adapters]]:
    """Train all, QLoRA without dropout with a look at its adapters before and after."""
    watched = [name for name in plans if name.startswith("qlora") and "dropout" not in name]
    train_all([plan for name, plan in plans.items() if name not in watched])
    return {name: train_watched(plans[name]) for name in watched}


def train_watched(plan: Plan) -> tuple[Adapters, Adapters]:
    """What `train_run` does, with the adapters as they are before the first step and after the last."""
    import torch.distributed as dist

    from launcher.plan.batch import batch_layout
    from launcher.train.loop import train
    from launcher.train.metrics import MetricsLog
    from launcher.train.parts import Progress
    from launcher.train.run import begin_together, build_parts, use_device

    open_folder(plan)
    batch = batch_layout(plan.trajectory.global_batch_size, plan.layout.micro_batch_size, dist.get_world_size())
    store = FolderStore(Path(plan.run_dir))
    attempt = begin_together(store, 0)
    log = MetricsLog(Path(plan.run_dir), str(attempt), writes=dist.get_rank() == 0)
    parts = build_parts(plan, batch, use_device(plan), log, store, attempt, lambda: False)
    before = whole_adapters(parts.engine.module)
    train(parts, Progress())
    return before, whole_adapters(parts.engine.module)


def whole_adapters(model: torch.nn.Module) -> Adapters:
    """Every trained parameter as the model computes with it, gathered under ZeRO-3."""
    import deepspeed

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with deepspeed.zero.GatheredParameters(list(trained.values())):
        return {name: parameter.detach().clone() for name, parameter in trained.items()}


def train_and_stop(plans: dict[str, Plan], stopped: Plan) -> dict[str, tuple[Adapters, Adapters]]:
    """All runs of two ranks, and one that is asked to stop before its first step."""
    quiet()
    open_folder(stopped)
    request_stop(Path(stopped.run_dir), "a test asks")
    [verdict] = train_all([stopped])
    assert (verdict.kind, verdict.step) == ("stopped", 1)
    return train_plans(plans)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return tiny_run(tmp_path_factory.mktemp("equalities"))


def lora_stopped(plans: dict[str, Plan]) -> Plan:
    return variant(plans["lora dropout"], "2-lora-dropout-stopped")


@pytest.fixture(scope="module")
def runs(base: Plan) -> Runs:
    one, two = one_rank_plans(base), two_rank_plans(base)
    weighted = tiny_run(Path(base.run_dir).parent / "weighted", balance="weights")
    one["weighted"] = variant(weighted, "weighted")
    two["weighted zero 2"] = variant(weighted, "2-weighted-2", workers=2, micro_batch_size=1, zero=2)
    adapters = run_group(1, train_plans, one, timeout_s=600)[0]
    adapters |= run_group(2, train_and_stop, two, lora_stopped(two), timeout_s=600)[0]
    return Runs(one | two, adapters)


def test_e1_the_loss_is_the_mean_over_the_global_batchs_tokens(runs: Runs) -> None:
    plan = runs.plans["full"]
    model = trained_model(plan, checkpoint_at(Path(plan.run_dir), STEPS))
    loss = SupervisedLoss(model, model, False, torch.device("cpu"))
    data = TrainData(plan.data.folder, plan.trajectory.global_batch_size, plan.trajectory.seed)
    errors = []
    for step in range(5):
        sums: list[float] = []
        counts: list[int] = []
        for row in data.micro_batches(step, BatchLayout(1, 1, plan.trajectory.global_batch_size), 0):
            with torch.no_grad():
                sums.append(loss(row)[0].item())
            counts.append(len(row.targets))
        assert max(counts) > 5 * min(counts)
        mean = sum(sums) / sum(counts)
        mean_of_means = sum(total / count for total, count in zip(sums, counts, strict=True)) / len(sums)
        errors.append(abs(mean_of_means - mean) / mean)
    print("a mean of means would be off by", errors)
    # The mistake that this equality is about would be seen, by far, at every step.
    assert min(errors) > 100 * FP32, errors


def test_e1_accumulation_and_ranks_change_nothing(runs: Runs) -> None:
    runs.agree("full 6 x 1", "full", FP32)
    runs.agree("full zero 0", "full", FP32)
    runs.agree("full of 5 zero 2", "full of 5", FP32)
    runs.agree("freeze zero 2", "freeze", FP32)
    runs.agree("lora zero 3", "lora", FP32)
    runs.agree("full bf16 zero 3", "full bf16", BF16, BF16_NORM)


def test_e1_a_weighted_loss_is_the_mean_by_weight(runs: Runs) -> None:
    """`data.balance: weights`: rows of a class that has half as many count twice as much, on any ranks."""
    runs.agree("weighted zero 2", "weighted", FP32)
    plan = runs.plans["weighted"]
    model = trained_model(plan, checkpoint_at(Path(plan.run_dir), STEPS))
    loss = SupervisedLoss(model, model, False, torch.device("cpu"))
    data = TrainData(plan.data.folder, plan.trajectory.global_batch_size, plan.trajectory.seed)
    (batch,) = data.micro_batches(0, BatchLayout(1, plan.trajectory.global_batch_size, 1), 0)
    assert batch.weights is not None
    assert len(batch.weights.unique()) == 2
    with torch.no_grad():
        by_token = torch.nn.functional.cross_entropy(loss.logits(batch), batch.targets, reduction="none")
        total, _ = loss(batch)
    assert total.item() == pytest.approx((by_token * batch.weights).sum().item(), rel=1e-6)
    assert data.global_batch(0).weight == pytest.approx(batch.weights.sum().item(), rel=1e-6)
    first, unweighted = curve(plan)[0], curve(runs.plans["full"])[0]
    assert abs(first - unweighted) > 10 * FP32 * unweighted, "the weights would be without effect"


def test_e1_every_run_learned_from_the_same_rows_at_the_same_rate(runs: Runs) -> None:
    for name, plan in runs.plans.items():
        reference = runs.plans["full of 5" if "of 5" in name else "full"]
        for figure in ("rows", "lr", "tokens", "supervised_tokens", "epoch"):
            assert curve(plan, figure) == curve(reference, figure), (name, figure)
        assert curve(plan)[-1] < 0.95 * curve(plan)[0], name


def test_e2_zero_stages_and_offload_change_nothing(runs: Runs) -> None:
    for name in ("full zero 1", "full zero 2 offloaded", "full zero 3"):
        runs.agree(name, "full zero 0", FP32)
    runs.agree("full bf16 zero 3", "full bf16", BF16, BF16_NORM)
    runs.agree("full bf16 zero 0", "full bf16", BF16_STAGE_0, BF16_NORM)


def test_e6_qlora_is_the_same_at_every_stage(runs: Runs) -> None:
    for name in ("qlora zero 0", "qlora zero 2", "qlora zero 3"):
        runs.agree(name, "qlora", FP32)
    runs.agree("qlora bf16 zero 3", "qlora bf16", BF16, BF16_NORM)
    # Over a base of its own: four bits cost something.
    assert worst(curve(runs.plans["qlora"]), curve(runs.plans["lora"])) > 100 * FP32


def test_e6_adapters_start_equal_to_the_last_bit(runs: Runs) -> None:
    for dtype, reference in (("", "qlora"), (" bf16", "qlora bf16")):
        start, _ = runs.adapters[reference]
        assert len(start) == 2 * 2 * 7  # A and B of seven linear layers in each of two layers
        for name, (found, _) in runs.adapters.items():
            if name.startswith(f"qlora{dtype} zero"):
                assert found.keys() == start.keys()
                assert all(torch.equal(found[key], start[key]) for key in start), name


def test_e6_an_evaluation_changes_nothing(runs: Runs) -> None:
    """Not a bit: bitsandbytes would repack the base in evaluation mode on CPUs with AVX512-BF16."""
    plain, evaluated = "qlora bf16 zero 3", "qlora bf16 zero 3 evaluated"
    for figure in ("loss", "grad_norm", "accuracy"):
        assert curve(runs.plans[evaluated], figure) == curve(runs.plans[plain], figure)
    assert sorted(last_of_each_step(Path(runs.plans[evaluated].run_dir), "eval")) == [4, 8, 12, 16, 20]
    for name, tensor in runs.adapters[plain][1].items():
        assert torch.equal(runs.adapters[evaluated][1][name], tensor)


def test_e6_the_saved_adapter_is_whole(runs: Runs, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    plan, (start, trained) = runs.plans["qlora zero 3"], runs.adapters["qlora zero 3"]
    checkpoint = checkpoint_at(Path(plan.run_dir), STEPS)
    masters = load_weights(checkpoint)
    assert masters.keys() == trained.keys()
    tokenizer = AutoTokenizer.from_pretrained(Path(plan.data.folder) / "tokenizer")
    write_folder(plan, trained_model(plan, checkpoint), tokenizer, tmp_path / "model", merged=False)
    saved = load_file(tmp_path / "model" / "adapter_model.safetensors")
    assert len(saved) == len(trained)
    for name, tensor in trained.items():
        assert tensor.numel() > 0
        assert not torch.equal(tensor, start[name]), name
        assert torch.equal(saved[name.replace(".default.", ".")], tensor), name
        assert torch.equal(masters[name], tensor), name


def test_a_deep_check_takes_what_every_method_saves(runs: Runs) -> None:
    for name in ("full zero 3", "full bf16 zero 0", "freeze zero 2", "lora zero 3", "qlora zero 0", "qlora bf16"):
        checkpoint = checkpoint_at(Path(runs.plans[name].run_dir), STEPS)
        expected = expected_of(runs.plans[name], [])
        assert expected.source == "the model of the run's plan.json"
        check(checkpoint, verify(checkpoint), expected)


def test_e4_resumed_is_uninterrupted(runs: Runs) -> None:
    """In fresh processes, through `train_run`: after a stop at step 1, and from a checkpoint in the middle."""
    stopped = lora_stopped(runs.plans)
    forget(Path(stopped.run_dir))
    resumed = [(stopped, "lora dropout")]
    for name in ("lora dropout", "qlora dropout"):
        plan = variant(runs.plans[name], f"{Path(runs.plans[name].run_dir).name}-resumed")
        copy_checkpoint(Path(runs.plans[name].run_dir), RESUMED_AT, Path(plan.run_dir))
        resumed.append((plan, name))
    verdicts = run_group(2, train_all, [plan for plan, _ in resumed], timeout_s=600)[0]
    assert [verdict.kind for verdict in verdicts] == ["finished"] * 3
    for plan, name in resumed:
        found, expected = (last_of_each_step(Path(p.run_dir)) for p in (plan, runs.plans[name]))
        assert len(found) == (STEPS if plan is stopped else STEPS - RESUMED_AT)
        for step, line in found.items():
            for figure in ("loss", "accuracy", "grad_norm", "lr", "rows", "tokens", "epoch"):
                assert line[figure] == expected[step][figure], (name, step, figure)
        ends = [load_weights(checkpoint_at(Path(p.run_dir), STEPS)) for p in (plan, runs.plans[name])]
        assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[1])
    # Dropout was on: without it the losses are others.
    assert worst(curve(runs.plans["lora dropout"]), curve(runs.plans["lora"])) > 100 * FP32


@pytest.fixture(scope="module")
def references(base: Plan) -> Runs:
    """Every method in both dtypes, alone in one process."""
    cases = itertools.product(METHODS, (("fp32", 0), ("bf16", 1)))
    plans = {
        f"{kind} {dtype}": variant(base, f"{kind}-{dtype}-alone", method=METHODS[kind], dtype=dtype, zero=zero)
        for kind, (dtype, zero) in cases
    }
    run_group(1, train_all, list(plans.values()), timeout_s=600)
    return Runs(plans, {})


@pytest.mark.long
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_method_at_every_stage_on_any_ranks(references: Runs, base: Plan, world_size: int) -> None:
    """E1, E2 and E6 in full: 38 runs for each number of ranks."""
    plans: dict[str, Plan] = {}
    tolerances = {}
    for kind, dtype, zero, offload in itertools.product(METHODS, ("fp32", "bf16"), range(4), (False, True)):
        if offload and (kind != "full" or zero == 0):
            continue
        name = f"{kind} {dtype} zero {zero}{' offloaded' if offload else ''} on {world_size}"
        layout = {"zero": zero, "offload": offload, "workers": world_size}
        # Slots of 4 and 2 on one rank, of 4 2 on two, of 1 on three: full, short and (in the next test) empty ones.
        plans[name] = variant(
            base,
            name.replace(" ", "-"),
            method=METHODS[kind],
            dtype=dtype,
            micro_batch_size=1 if world_size == 3 else 4,
            **layout,
        )
        fp32, bf16 = (FP32, FP32), (BF16 if zero else BF16_STAGE_0, BF16_NORM)
        tolerances[name] = f"{kind} {dtype}", *(fp32 if dtype == "fp32" else bf16)
    run_group(world_size, train_all, list(plans.values()), timeout_s=1200)
    both = Runs(plans | references.plans, {})
    for name, (reference, loss, norm) in tolerances.items():
        both.agree(name, reference, loss, norm)


@pytest.mark.long
def test_slots_with_nothing_in_them_change_nothing(runs: Runs, base: Plan) -> None:
    """Five rows on three ranks: one rank's second micro batch weighs nothing, and its gradients must too."""
    settings = {"global_batch_size": 5, "workers": 3, "micro_batch_size": 1}
    plans = {f"3 ranks zero {zero}": variant(base, f"3-of-5-{zero}", zero=zero, **settings) for zero in range(4)}
    run_group(3, train_all, list(plans.values()), timeout_s=600)
    both = Runs(plans | runs.plans, {})
    for name in plans:
        both.agree(name, "full of 5", FP32)
