"""What is created of an optimizer's state before its first step is what the step itself creates."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from launcher.checkpoint.moments import allocated, factors, like_master, state_shapes
from launcher.errors import CheckpointError
from launcher.train.optimizer import build_optimizer, parameter_groups
from tests.distributed.tiny import tiny_plan
from tests.plans import optimizer_plan


def stepped(model: nn.Module, optimizer: Any) -> dict[str, dict[str, Any]]:
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    optimizer.step()
    return {name: dict(optimizer.state[parameter]) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("settings", "matrix", "vector"),
    [
        ({"name": "adamw"}, {"exp_avg": (5, 3), "exp_avg_sq": (5, 3)}, {"exp_avg": (5,), "exp_avg_sq": (5,)}),
        ({"name": "lion"}, {"exp_avg": (5, 3)}, {"exp_avg": (5,)}),
        ({"name": "sgd"}, {"momentum_buffer": (5, 3)}, {"momentum_buffer": (5,)}),
        ({"name": "sgd", "momentum": 0.0}, {}, {}),
        ({"name": "adafactor"}, {"exp_avg_sq_row": (5,), "exp_avg_sq_col": (3,)}, {"exp_avg_sq": (5,)}),
    ],
    ids=lambda value: str(value.get("name", "")) + str(value.get("momentum", "")),
)
def test_created_as_the_first_step_creates_it(
    tmp_path: Path, settings: dict[str, Any], matrix: dict[str, Any], vector: dict[str, Any]
) -> None:
    plan = tiny_plan(tmp_path, 0)
    hyper = optimizer_plan(lr=1e-2, weight_decay=0.1, **settings)
    plan = plan.model_copy(update={"trajectory": plan.trajectory.model_copy(update={"optimizer": hyper})})
    ends = []
    for created_before in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(3, 5)
        optimizer = build_optimizer(parameter_groups(model, plan), plan)
        if created_before:
            states = allocated(SimpleNamespace(basic_optimizer=optimizer), list(model.parameters()))
            found = [{**like_master(states[one]), **factors(states[one])} for one in (model.weight, model.bias)]
            assert [{kind: tuple(tensor.shape) for kind, tensor in kept.items()} for kept in found] == [matrix, vector]
            for kept, parameter in zip(found, (model.weight, model.bias), strict=True):
                assert all(not tensor.any() and not tensor.requires_grad for tensor in kept.values())
                assert {kind: tensor.shape for kind, tensor in kept.items()} == state_shapes(
                    hyper.name, hyper.momentum, parameter.shape
                )
        ends.append((stepped(model, optimizer), model.weight.detach().clone()))
    (created, moved), (by_itself, expected) = ends
    assert torch.equal(moved, expected)
    for name, state in by_itself.items():
        assert created[name].keys() == state.keys()
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(created[name][key]), torch.as_tensor(value)), (name, key)


def test_of_an_unknown_optimizer_nothing_is_taken_for_its_state() -> None:
    model = nn.Linear(3, 5)
    with pytest.raises(CheckpointError, match="what Adagrad keeps of the weights is not known") as raised:
        allocated(SimpleNamespace(basic_optimizer=torch.optim.Adagrad(model.parameters())), list(model.parameters()))
    assert raised.value.hint == "use optimizer.name adamw"
