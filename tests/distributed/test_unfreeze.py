"""Gradual unfreezing: the same run at every ZeRO stage, as plain torch takes it, and from every checkpoint on."""

from __future__ import annotations

import contextlib
import os
import signal
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from launcher.checkpoint.deep import Expected, check, expected_of
from launcher.checkpoint.load import load_weights
from launcher.checkpoint.manifest import read, verify
from launcher.checkpoint.shards import optimizer_steps, phase_of, training_state
from launcher.data.loader import TrainData
from launcher.export.merge import trained_model
from launcher.plan.batch import BatchLayout
from launcher.plan.plan import Plan, UnfreezePlan
from launcher.train.metrics import read as read_metrics
from launcher.train.schedule import lr_factor
from tests.checkpoints import checkpoint_at, copy_checkpoint
from tests.distributed.group import run_group
from tests.distributed.runs import curve, tiny_run, train_all, variant, worst
from tests.plans import method_plan, optimizer_plan

pytestmark = pytest.mark.distributed

STAGES = (0, 2, 3)
"""Of ZeRO; 1 is in the long test."""
STEPS = 9
SECOND, THIRD = 3, 6
"""Steps done when the second and the third phase begin."""
METHOD = method_plan(
    "freeze",
    train_last_layers=1,
    unfreeze=(UnfreezePlan(at=1 / 3, last_layers=2), UnfreezePlan(at=THIRD, last_layers=None)),
)
OF_PHASE = [("model.layers.2.", "model.norm.", "lm_head."), ("model.layers.1.",), ("model.layers.0.", "model.embed")]
LIFE: dict[str, Any] = {"total_steps": STEPS, "max_steps": STEPS, "checkpoint_every_steps": 2, "keep_last": 99}
EXACT = 1e-5
"""The design's tolerance of a relative loss in fp32."""


@dataclass(frozen=True)
class Crossing:
    """What one rank saw at the beginning of a phase."""

    step: int
    gone: bool
    """The engine before, and its model, when the next one was built."""
    carried: bool
    """Masters and moments of what was trained, bit for bit."""
    begins_as_nothing: bool
    """Moments of what is newly trained."""
    of_the_base: bool
    """What was frozen until now, in the model and as a master."""
    steps: set[tuple[int, int]]
    """(phase, Adam's count) of every parameter afterwards."""
    state_numel: int
    """Numbers that the optimizer kept here before."""
    trained_numel: int
    """And what was trained in all."""


def first_phase(name: str) -> int:
    return next(phase for phase, prefixes in enumerate(OF_PHASE) if name.startswith(prefixes))


def base_weights(plan: Plan) -> dict[str, Tensor]:
    return load_file(Path(plan.trajectory.model.path) / "model.safetensors")


def watched(found: list[Crossing]) -> Callable[..., Any]:
    """`unfreeze`, with a look at what there is before, between and after."""
    import deepspeed

    from launcher.train.unfreeze import build_network, unfreeze

    def watching(parts: Any, progress: Any) -> Any:
        engine, base = parts.engine, base_weights(parts.plan)
        before = {key: shard.held.clone() for key, shard in training_state(engine).items()}
        frozen = {name: one for name, one in engine.module.named_parameters() if not one.requires_grad}
        with deepspeed.zero.GatheredParameters(list(frozen.values())):
            untouched = all(torch.equal(one, base[name]) for name, one in frozen.items())
        kept = [value for state in engine.basic_optimizer.state.values() for value in state.values()]
        state_numel = sum(value.numel() for value in kept if torch.is_tensor(value) and value.dim())
        names = [name for name, one in engine.module.named_parameters() if one.requires_grad]
        trained_numel = sum(base[name].numel() for name in names)
        last, module = weakref.ref(engine), weakref.ref(engine.module)
        gone = []
        del engine, frozen, kept

        def build(*arguments: Any, **named: Any) -> Any:
            gone.append(last() is None and module() is None)
            return build_network(*arguments, **named)

        with mock.patch("launcher.train.unfreeze.build_network", build):
            assert unfreeze(parts, progress) is None
        after = training_state(parts.engine)
        new = {key: shard for key, shard in after.items() if key not in before}
        masters = {key.removeprefix("master."): shard for key, shard in new.items() if key.startswith("master.")}
        steps = optimizer_steps(parts.engine)
        named = dict(parts.engine.module.named_parameters())
        found.append(
            Crossing(
                progress.step,
                gone == [True],
                all(torch.equal(held, after[key].held) for key, held in before.items()),
                all(not shard.held.any() for key, shard in new.items() if not key.startswith("master.")),
                untouched
                and all(
                    torch.equal(shard.held, base[name].flatten()[shard.start : shard.start + shard.held.numel()])
                    for name, shard in masters.items()
                ),
                {(phase_of(named[name]), count) for name, count in steps.items()},
                state_numel,
                trained_numel,
            )
        )

    return watching


class CutOff(Exception):
    """A process ends just when the engine of one phase is gone and that of the next is not there yet."""


def cut_off(plan: Plan) -> None:
    """Train to the second phase, and end so."""
    with (
        mock.patch("launcher.train.unfreeze.build_network", side_effect=CutOff),
        contextlib.suppress(CutOff),
    ):
        train_all([plan])


def die(plan: Plan) -> None:
    """The same by a signal that nobody can heed."""

    def kill(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch("launcher.train.unfreeze.build_network", kill):
        train_all([plan])


def two_ranks(plans: dict[str, Plan], resumed: dict[str, Plan], cut: Plan) -> dict[str, list[Crossing]]:
    """All runs of two ranks: first those from the first step on, then those that go on from their checkpoints."""
    crossings: dict[str, list[Crossing]] = {}
    for name, plan in plans.items():
        found: list[Crossing] = []
        with mock.patch("launcher.train.loop.unfreeze", watched(found)):
            train_all([plan])
        crossings[name] = found
    if dist.get_rank() == 0:
        for name, plan in resumed.items():
            for step in map(int, name.partition("from ")[2].split(" and ")):
                copy_checkpoint(Path(plans["zero 2"].run_dir), step, Path(plan.run_dir))
        spoil(resumed["damaged from 2 and 4"])
    dist.barrier()
    cut_off(cut)
    train_all([*resumed.values(), cut])
    return crossings


def spoil(plan: Plan) -> None:
    """Flip a bit of the checkpoint of step 4."""
    checkpoint = checkpoint_at(Path(plan.run_dir), 4)
    shard = next((Path(plan.run_dir) / checkpoint.folder).glob("attempt-*/shard-00001.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


def all_of(plans: dict[str, Plan]) -> None:
    train_all(list(plans.values()))


@dataclass(frozen=True)
class Runs:
    plans: dict[str, Plan]
    crossings: list[dict[str, list[Crossing]]]
    """By rank."""

    def losses(self, name: str) -> list[float]:
        return curve(self.plans[name])

    def of(self, name: str, step: int) -> Any:
        return checkpoint_at(Path(self.plans[name].run_dir), step)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    base = tiny_run(tmp_path_factory.mktemp("unfreeze"), num_hidden_layers=3)
    two = variant(base, "two", method=METHOD, workers=2, micro_batch_size=3, **LIFE)
    plans = {f"zero {zero}": variant(two, f"zero-{zero}", zero=zero) for zero in STAGES}
    resumed = {"damaged from 2 and 4": variant(two, "damaged", zero=2), "from 4": variant(two, "from-4", zero=2)}
    cut = variant(two, "cut", zero=2)
    crossings = run_group(2, two_ranks, plans, resumed, cut, timeout_s=600)
    alone = variant(base, "alone", method=METHOD, zero=3, **LIFE)
    copy_checkpoint(Path(plans["zero 2"].run_dir), SECOND, Path(alone.run_dir))
    run_group(1, train_all, [alone], timeout_s=600)
    return Runs(plans | resumed | {"cut off": cut, "alone": alone}, crossings)


def reference(plan: Plan) -> list[float]:
    """The same schedule in plain torch: one process, AdamW whose groups are added when their layers are unfrozen."""
    from launcher.model.load import load_model
    from launcher.train.loss import SupervisedLoss

    model = load_model(plan, {}, torch.device("cpu"), ()).train()
    loss = SupervisedLoss(model, model, True, torch.device("cpu"))
    data = TrainData(Path(plan.data.folder), plan.trajectory.global_batch_size, plan.trajectory.seed)
    hyper = plan.trajectory.optimizer
    model.requires_grad_(False)
    groups: list[dict[str, Any]] = []
    optimizer: Any = None
    losses = []
    for step in range(STEPS):
        if step in (0, SECOND, THIRD):
            phase = (0, SECOND, THIRD).index(step)
            new = [one for name, one in model.named_parameters() if first_phase(name) == phase]
            for one in new:
                one.requires_grad_(True)
            for decay, dims in ((hyper.weight_decay, 2), (0.0, 1)):
                groups = [{"params": [one for one in new if one.dim() == dims], "weight_decay": decay}]
                if optimizer is None:
                    optimizer = torch.optim.AdamW(groups, lr=hyper.lr, betas=hyper.betas, eps=hyper.eps)
                elif groups[0]["params"]:
                    optimizer.add_param_group(groups[0])
        for group in optimizer.param_groups:
            group["lr"] = hyper.lr * lr_factor(plan.trajectory.schedule, step, STEPS)
        [batch] = data.micro_batches(step, BatchLayout(1, plan.trajectory.global_batch_size, 1), 0)
        mean = loss(batch)[0] / data.global_batch(step).weight
        mean.backward()
        torch.nn.utils.clip_grad_norm_([one for one in model.parameters() if one.requires_grad], hyper.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean.item())
    return losses


@pytest.fixture(scope="module")
def expected(runs: Runs) -> list[float]:
    return reference(runs.plans["zero 0"])


@pytest.mark.parametrize("zero", STAGES)
def test_every_stage_trains_as_plain_torch_does(runs: Runs, expected: list[float], zero: int) -> None:
    error = worst(runs.losses(f"zero {zero}"), expected)
    print(f"ZeRO {zero}: {error:.1e}; {expected}")
    assert len(expected) == STEPS
    assert error <= EXACT
    said = [one for one in read_metrics(Path(runs.plans[f"zero {zero}"].run_dir)) if one["kind"] == "unfreeze"]
    base = base_weights(runs.plans["zero 0"])
    trained = [sum(one.numel() for name, one in base.items() if first_phase(name) <= phase) for phase in (1, 2)]
    assert [(one["step"], one["last_layers"], one["parameters"]) for one in said] == [
        (SECOND, 2, trained[0]),
        (THIRD, None, trained[1]),
    ]


@pytest.mark.parametrize("zero", STAGES)
def test_what_was_trained_is_carried_over_and_what_was_frozen_begins_anew(runs: Runs, zero: int) -> None:
    for rank in range(2):
        second, third = runs.crossings[rank][f"zero {zero}"]
        assert (second.step, third.step) == (SECOND, THIRD)
        for crossing in (second, third):
            assert crossing.carried
            assert crossing.begins_as_nothing
            assert crossing.of_the_base
            assert crossing.gone
            ranks = 1 if zero == 0 else 2
            # A partition is padded to be cut evenly; two groups, four after the first crossing.
            assert crossing.state_numel <= 2 * (crossing.trained_numel / ranks + 4 * 64)
        assert second.steps == {(0, SECOND), (1, 0)}
        assert third.steps == {(0, THIRD), (1, THIRD - SECOND), (2, 0)}


@pytest.mark.parametrize(("name", "step"), [("damaged from 2 and 4", 2), ("cut off", 0), ("from 4", 4)])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(runs: Runs, name: str, step: int) -> None:
    """From right before an unfreezing, from it, and from right after it."""
    assert runs.losses(name) == runs.losses("zero 2")[step:]
    ends = [runs.of(run, STEPS) for run in (name, "zero 2")]
    assert read(ends[0]).optimizer_steps == read(ends[1]).optimizer_steps
    assert read(ends[0]).files == read(ends[1]).files  # masters and both moments, every byte


def test_a_cut_off_run_goes_on_from_the_step_of_the_unfreezing(runs: Runs) -> None:
    said = list(read_metrics(Path(runs.plans["cut off"].run_dir)))
    assert [one["step"] for one in said if one["kind"] == "start"] == [0, SECOND]
    assert [one["step"] for one in said if one["kind"] == "unfreeze"] == [SECOND, THIRD]


def test_a_run_resumed_at_another_stage_and_size_is_the_same(runs: Runs) -> None:
    assert worst(runs.losses("alone"), runs.losses("zero 2")[SECOND:]) <= EXACT


def test_a_damaged_checkpoint_of_a_later_phase_gives_way_to_one_of_an_earlier(runs: Runs) -> None:
    plan = runs.plans["damaged from 2 and 4"]
    [damaged] = [one for one in read_metrics(Path(plan.run_dir)) if one["kind"] == "damaged_checkpoint"]
    assert "step-00000004" in damaged["message"]
    assert [one["step"] for one in read_metrics(Path(plan.run_dir)) if one["kind"] == "start"] == [2]


@pytest.mark.parametrize(("step", "phase"), [(2, 0), (SECOND, 0), (4, 1), (THIRD, 1), (8, 2), (STEPS, 2)])
def test_a_checkpoint_of_any_phase_is_verified_and_exported(runs: Runs, step: int, phase: int) -> None:
    plan, checkpoint = runs.plans["zero 2"], runs.of("zero 2", step)
    base, weights = base_weights(plan), load_weights(checkpoint)
    assert set(weights) == {name for name in base if first_phase(name) <= phase}
    manifest = verify(checkpoint)
    assert {(first_phase(name), manifest.steps_of(name)) for name in weights} == {
        (each, step - began) for each, began in enumerate((0, SECOND, THIRD)) if each <= phase
    }
    assert ("optimizer_steps" in manifest.to_json().decode()) == (phase > 0)
    check(checkpoint, manifest, expected_of(plan, []))
    with mock.patch("launcher.checkpoint.deep.trained_parameters", side_effect=RuntimeError("no such code")):
        others = [runs.of("zero 2", other) for other in (2, 4, 8)]
        told = expected_of(plan, others)
    assert isinstance(told, Expected)
    assert told.source.startswith("step-00000002, step-00000004, step-00000008, as the model cannot be built")
    check(checkpoint, manifest, told)
    for name, one in trained_model(plan, checkpoint).named_parameters():
        assert torch.equal(one, weights.get(name, base[name]))


@pytest.mark.long
def test_other_optimizers_dtypes_and_methods_of_freezing(tmp_path: Path) -> None:
    base = tiny_run(tmp_path, num_hidden_layers=3)
    two = variant(base, "two", method=METHOD, workers=2, micro_batch_size=3, **LIFE)
    rates: dict[str, Any] = {"lr": 2e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
    eight_bit, lion = (optimizer_plan(name=name, **rates) for name in ("adamw_8bit", "lion"))
    frozen = METHOD.model_copy(update={"frozen": (r"layers\.1\.mlp", "embed_tokens")})
    plans = {f"bf16 {zero}": variant(two, f"bf16-{zero}", zero=zero, dtype="bf16") for zero in range(4)}
    plans |= {f"8 bit {zero}": variant(two, f"8-bit-{zero}", zero=zero, optimizer=eight_bit) for zero in (0, 2, 3)}
    plans |= {f"lion {zero}": variant(two, f"lion-{zero}", zero=zero, optimizer=lion) for zero in (0, 3)}
    plans |= {f"frozen {zero}": variant(two, f"frozen-{zero}", zero=zero, method=frozen) for zero in (0, 3)}
    plans["plain"] = variant(two, "plain")
    plans["zero 1"] = variant(two, "zero-1", zero=1)
    plans["recomputed"] = variant(two, "recomputed", zero=3, gradient_checkpointing=True)
    plans["offloaded"] = variant(two, "offloaded", zero=2, offload=True)
    run_group(2, all_of, plans, timeout_s=1800)
    curves = {name: curve(plan) for name, plan in plans.items()}
    for zero in (2, 3):
        assert worst(curves[f"bf16 {zero}"], curves["bf16 1"]) <= 1e-3
    assert worst(curves["bf16 0"], curves["bf16 1"]) <= 1e-2
    pairs = {"lion 3": "lion 0", "frozen 3": "frozen 0"} | dict.fromkeys(("zero 1", "recomputed", "offloaded"), "plain")
    for one, other in pairs.items():
        print(f"{one} = {other}: {worst(curves[one], curves[other]):.1e}")
        assert worst(curves[one], curves[other]) <= EXACT
    last = load_weights(checkpoint_at(Path(plans["frozen 0"].run_dir), STEPS))
    assert base_weights(base).keys() - last.keys() == {
        *(f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        "model.embed_tokens.weight",
    }
    again = {}
    for name, step in [("8 bit 0", 4), ("8 bit 2", 3), ("8 bit 3", 2), ("bf16 0", 3), ("lion 3", 3)]:
        again[name] = variant(plans[name], f"{name}-again")
        copy_checkpoint(Path(plans[name].run_dir), step, Path(again[name].run_dir))
    run_group(2, all_of, again, timeout_s=1800)
    for name, plan in again.items():
        found = curve(plan)
        assert found == curves[name][-len(found) :], name


@pytest.mark.long
def test_a_kill_in_the_middle_loses_nothing(tmp_path: Path) -> None:
    base = tiny_run(tmp_path, num_hidden_layers=3)
    two = variant(base, "two", method=METHOD, workers=2, micro_batch_size=3, **LIFE)
    whole, killed = (variant(two, name, zero=2) for name in ("whole", "killed"))
    with pytest.raises(RuntimeError, match="died with exit code -9"):
        run_group(2, die, killed, timeout_s=600)
    run_group(2, train_all, [whole, killed], timeout_s=600)
    assert curve(killed) == curve(whole)
