"""Every optimizer under every stage of ZeRO: E2, E4 and E5 with a rate for each layer, and equal to the library's own.

`test_moments_8bit` has what differs for moments in 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from launcher.checkpoint.deep import Expected, check
from launcher.checkpoint.layout import Checkpoint
from launcher.checkpoint.load import load, load_weights
from launcher.checkpoint.manifest import verify
from launcher.checkpoint.save import save
from launcher.checkpoint.shards import parameter_shapes, training_state
from launcher.errors import DamagedCheckpoint
from launcher.plan.plan import Plan
from launcher.store.folder import FolderStore
from tests.checkpoints import FIRST
from tests.distributed.group import run_group
from tests.distributed.runs import worst
from tests.distributed.tiny import GLOBAL_BATCH, TOKENS, VOCABULARY, begun, quiet, tiny_engine, tiny_plan, train
from tests.plans import optimizer_plan

pytestmark = pytest.mark.distributed

STEPS, SAVED_AT = 8, 4
DECAY = 0.6
"""Of the rate from layer to layer: with two layers three rates, times two for what decays and what does not."""
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-2, "betas": (0.9, 0.95)},
    "lion": {"lr": 1e-3, "betas": (0.9, 0.99)},
    "sgd": {"lr": 0.1},
    "adafactor": {"lr": 1e-2},
}
KINDS = {
    "adamw": {"exp_avg", "exp_avg_sq"},
    "lion": {"exp_avg"},
    "sgd": {"momentum_buffer"},
    "adafactor": {"exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"},
}


@dataclass(frozen=True)
class Case:
    name: str
    zero: int
    dtype: str = "fp32"
    offload: bool = False

    def plan(self, root: Path) -> Plan:
        words = (self.name, self.zero, self.dtype, *["offload"] * self.offload)
        plan = tiny_plan(root, self.zero, self.dtype, self.offload)
        optimizer = optimizer_plan(name=self.name, weight_decay=0.1, layer_decay=DECAY, **SETTINGS[self.name])
        trajectory = plan.trajectory.model_copy(update={"optimizer": optimizer})
        run_dir = str(root / "-".join(map(str, words)))
        return plan.model_copy(update={"trajectory": trajectory, "run_dir": run_dir, "location": run_dir})

    def checkpoint(self, root: Path) -> Checkpoint:
        return Checkpoint(FolderStore(Path(self.plan(root).run_dir)), SAVED_AT)


SOME = [Case("lion", 0), Case("lion", 3), Case("sgd", 0), Case("sgd", 2), Case("adafactor", 0), Case("sgd", 0, "bf16")]
ALL = [Case(name, zero) for name in ("lion", "sgd", "adamw") for zero in range(4)]
ALL += [Case("adafactor", 0), Case("lion", 1, offload=True), Case("sgd", 3, offload=True)]
ALL += [Case(name, zero, "bf16") for name in ("lion", "sgd", "adamw") for zero in range(4)]
ALL += [Case("adafactor", 0, "bf16")]
# Where a checkpoint goes on: at another stage on as many ranks, or on one.
ELSEWHERE = {
    2: [(Case("lion", 3), 1)],
    1: [(Case("lion", 0), 2), (Case("sgd", 2), 0), (Case("adafactor", 0), 0)],
}


@dataclass(frozen=True)
class Curves:
    """Losses of each case: uninterrupted, and of its second half in a fresh engine."""

    cases: list[Case]
    whole: dict[Case, list[float]]
    resumed: dict[Case, list[float]]
    kinds: dict[Case, set[str]]
    rates: dict[Case, set[float]]


def trained(root: Path, cases: list[Case]) -> Curves:
    """Eight steps, saved after four; then the last four again from the checkpoint. Collective."""
    quiet()
    curves = Curves(cases, {}, {}, {}, {})
    for case in cases:
        plan = case.plan(root)
        store = begun(Path(plan.run_dir))
        with tiny_engine(plan) as engine:
            assert not engine.basic_optimizer.state, "a step on zero gradients has left its traces"
            before = train(engine, plan, 0, SAVED_AT)
            checkpoint = save(store, SAVED_AT, FIRST, engine, {"step": SAVED_AT}, plan)
            curves.kinds[case] = {name.partition(".")[0] for name in training_state(engine)} - {"master"}
            curves.rates[case] = {group["lr"] for group in engine.optimizer.param_groups}
            curves.whole[case] = before + train(engine, plan, SAVED_AT, STEPS - SAVED_AT)
            shapes = parameter_shapes(engine)
        with tiny_engine(plan) as engine:
            load(checkpoint, engine, plan)
            curves.resumed[case] = train(engine, plan, SAVED_AT, STEPS - SAVED_AT)
        expected = Expected(plan.trajectory.hash(), plan.trajectory.optimizer, shapes, "the engine")
        manifest = verify(checkpoint)
        check(checkpoint, manifest, expected)
        half = manifest.model_copy(update={"files": dict(sorted(manifest.files.items())[:1])})
        with pytest.raises(DamagedCheckpoint, match="missing"):
            check(checkpoint, half, expected)
    return curves


def gone_on(root: Path, loads: list[tuple[Case, int]]) -> list[list[float]]:
    """The second half at another stage, in engines that have trained already. Collective."""
    quiet()
    losses = []
    for case, zero in loads:
        plan = Case(case.name, zero, case.dtype).plan(root)
        with tiny_engine(plan) as engine:
            train(engine, plan, 0, 1)
            load(case.checkpoint(root), engine, plan)
            losses.append(train(engine, plan, SAVED_AT, STEPS - SAVED_AT))
    return losses


def on_two(root: Path, cases: list[Case]) -> tuple[Curves, list[list[float]]]:
    """Both in one group: most of a group's time goes into imports."""
    curves = trained(root, cases)
    return curves, gone_on(root, ELSEWHERE[2])


def by_library(plan: Plan, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights by the library's own optimizer over a group for each parameter, without an engine."""
    hyper = plan.trajectory.optimizer
    with tiny_engine(plan) as engine:
        model = engine.module
        groups = []
        for name, parameter in model.named_parameters():
            below = {"embed": 2, "layers.0": 1}
            power = next((number for part, number in below.items() if part in name), 0)
            decay = hyper.weight_decay if parameter.dim() > 1 else 0.0
            groups.append({"params": [parameter], "lr": hyper.lr * DECAY**power, "weight_decay": decay})
        optimizer = library(hyper, groups)
        losses = []
        for step in range(steps):
            rows = torch.randint(0, VOCABULARY, (GLOBAL_BATCH, TOKENS), generator=torch.Generator().manual_seed(step))
            model.zero_grad()
            loss = model(input_ids=rows, labels=rows).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), hyper.max_grad_norm)
            optimizer.step()
            losses.append(loss.item())
        return losses, {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def library(hyper: Any, groups: list[dict[str, Any]]) -> Any:
    if hyper.name == "lion":
        return LionByHand(groups, hyper.betas)
    if hyper.name == "sgd":
        return torch.optim.SGD(groups, momentum=hyper.momentum, nesterov=True)
    if hyper.name == "adafactor":
        return Adafactor(groups, scale_parameter=False, relative_step=False)
    return torch.optim.AdamW(groups, betas=hyper.betas, eps=hyper.eps)


class LionByHand:
    """Algorithm 2 of the paper, a line each: no library that runs on every machine has it right."""

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        self.groups, self.betas = groups, betas
        self.m = [torch.zeros_like(group["params"][0]) for group in groups]

    @torch.no_grad()
    def step(self) -> None:
        beta1, beta2 = self.betas
        for m, group in zip(self.m, self.groups, strict=True):
            [theta] = group["params"]
            c = beta1 * m + (1 - beta1) * theta.grad
            theta -= group["lr"] * (torch.sign(c) + group["weight_decay"] * theta)
            m.copy_(beta2 * m + (1 - beta2) * theta.grad)


def on_one(root: Path, steps: int) -> tuple[list[list[float]], dict[str, tuple[list[float], list[float], float]]]:
    """The checkpoints of two ranks go on; and of each optimizer the losses of `steps` steps, those of the library's
    own, and how far the weights are apart at the end."""
    losses, equal = gone_on(root, ELSEWHERE[1]), {}
    for name in SETTINGS:
        plan = Case(name, 0).plan(root)
        expected, weights = by_library(plan, steps)
        with tiny_engine(plan) as engine:
            found = train(engine, plan, 0, steps)
            apart = [(p - weights[n]).abs().max() / weights[n].abs().max() for n, p in engine.module.named_parameters()]
        equal[name] = found, expected, max(apart).item()
    return losses, equal


Runs = tuple[Path, Curves, list[list[float]]]


@pytest.fixture(scope="module", params=[SOME, pytest.param(ALL, marks=pytest.mark.long)], ids=["some", "all"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("optimizers")
    return root, *run_group(2, on_two, root, request.param, timeout_s=1800)[0]


def test_every_stage_is_the_same_run(runs: Runs) -> None:
    _, curves, _ = runs
    for case in curves.cases:
        first, tolerance = Case(case.name, 0), 1e-5 if case.dtype == "fp32" else 1e-2
        error = worst(curves.whole[case], curves.whole[first])
        print(f"{case}: {error:.1e}")
        assert error <= tolerance, (case, curves.whole[case], curves.whole[first])
        assert curves.kinds[case] == KINDS[case.name]
        rate = SETTINGS[case.name]["lr"]
        assert sorted(curves.rates[case]) == pytest.approx([rate * DECAY**power for power in (2, 1, 0)])


def test_resumed_is_uninterrupted_to_the_last_bit(runs: Runs) -> None:
    _, curves, _ = runs
    for case in curves.cases:
        assert curves.resumed[case] == curves.whole[case][SAVED_AT:], case


def check_elsewhere(curves: Curves, ranks: int, losses: list[list[float]]) -> None:
    for (case, zero), found in zip(ELSEWHERE[ranks], losses, strict=True):
        error = worst(found, curves.whole[case][SAVED_AT:])
        print(f"{case} -> ZeRO {zero} on {ranks}: {error:.1e}")
        assert error <= 1e-5, (case, zero)


def test_goes_on_at_another_stage_on_other_ranks_and_is_the_librarys_own(runs: Runs) -> None:
    root, curves, at_other_stages = runs
    check_elsewhere(curves, 2, at_other_stages)
    steps = 20 if curves.cases == ALL else STEPS
    on_other_ranks, equal = run_group(1, on_one, root, steps, timeout_s=1800)[0]
    check_elsewhere(curves, 1, on_other_ranks)
    for name, (found, expected, apart) in equal.items():
        print(f"{name}: losses {worst(found, expected):.1e}, weights {apart:.1e} apart")
        assert worst(found, expected) <= 1e-6, name
        assert apart <= 1e-4, name
    weights = load_weights(Case("adafactor", 0).checkpoint(root))
    assert weights["lm_head.weight"].shape == (VOCABULARY, 32)
