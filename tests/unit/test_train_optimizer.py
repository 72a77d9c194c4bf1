"""Groups of parameters by rate, decay and phase, and the factors of their learning rates."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.model.adapters import apply_method
from launcher.plan.plan import Plan, UnfreezePlan
from launcher.train.optimizer import build_optimizer, parameter_groups, set_learning_rate
from tests.distributed.tiny import tiny_plan
from tests.model_families import SIZES, tiny_model
from tests.plans import method_plan, optimizer_plan


def plan_of(tmp_path: Path, **optimizer: Any) -> Plan:
    plan = tiny_plan(tmp_path, 0)
    settings = optimizer_plan(**{"lr": 1e-3, "weight_decay": 0.1} | optimizer)
    return plan.model_copy(update={"trajectory": plan.trajectory.model_copy(update={"optimizer": settings})})


def grouped(model: nn.Module, plan: Plan) -> dict[tuple[float, float], list[str]]:
    """{(share of the rate, weight decay): names}, in the groups' order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, plan)
    found = {(group["rate"], group["weight_decay"]): [names[id(one)] for one in group["params"]] for group in groups}
    assert len(found) == len(groups)
    return found


def test_without_other_keys_there_are_two_matrices_first(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.transformer.wte.weight.requires_grad_(False)
    groups = grouped(model, plan_of(tmp_path))
    assert list(groups) == [(1.0, 0.1), (1.0, 0.0)]
    shapes = {name: parameter.dim() for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert groups[1.0, 0.1] == [name for name, dimensions in shapes.items() if dimensions > 1]
    assert groups[1.0, 0.0] == [name for name, dimensions in shapes.items() if dimensions == 1]


@pytest.mark.parametrize(("family", "names"), [("gpt_oss", r"experts\..*_bias$"), ("cohere", r"[qk]_norm\.weight$")])
def test_norms_and_biases_of_two_dimensions_do_not_decay_either(tmp_path: Path, family: str, names: str) -> None:
    config = AutoConfig.for_model(family, **SIZES, num_local_experts=4, use_qk_norm=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    of_two = {name for name, one in model.named_parameters() if re.search(names, name)}
    assert {model.get_parameter(name).dim() for name in of_two} == {2}
    assert len(of_two) == 4
    assert of_two <= set(grouped(model, plan_of(tmp_path))[1.0, 0.0])


def test_rates_fall_from_layer_to_layer(tmp_path: Path) -> None:
    groups = grouped(tiny_model("llama"), plan_of(tmp_path, layer_decay=0.5))
    assert list(groups) == [(0.25, 0.1), (0.5, 0.1), (0.5, 0.0), (1.0, 0.1), (1.0, 0.0)]
    assert groups[0.25, 0.1] == ["model.embed_tokens.weight"]
    assert all("layers.0." in name for name in groups[0.5, 0.1] + groups[0.5, 0.0])
    assert "model.norm.weight" in groups[1.0, 0.0]
    assert "lm_head.weight" in groups[1.0, 0.1]


def test_b_of_adapters_learns_faster_and_layers_below_slower(tmp_path: Path) -> None:
    model = apply_method(tiny_model("llama"), method_plan("lora"), 0)
    groups = grouped(model, plan_of(tmp_path, lora_plus_ratio=16.0, layer_decay=0.5))
    assert list(groups) == [(0.5, 0.1), (1.0, 0.1), (8.0, 0.1), (16.0, 0.1)]
    for (rate, _), names in groups.items():
        assert len(names) == 7
        assert all(("lora_B" in name) == (rate > 1) for name in names)
        assert all(("layers.1." in name) == (rate in (1.0, 16.0)) for name in names)


def test_each_phase_has_groups_of_its_own(tmp_path: Path) -> None:
    stages = (UnfreezePlan(at=2, last_layers=None),)
    model = apply_method(tiny_model("llama"), method_plan("freeze", train_last_layers=1, unfreeze=stages), 0, phase=1)
    groups = parameter_groups(model, plan_of(tmp_path))
    assert [(group["phase"], group["weight_decay"]) for group in groups] == [(0, 0.1), (0, 0.0), (1, 0.1), (1, 0.0)]
    assert len(groups[2]["params"]) == 8  # of the first layer, and the embedding


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "adafactor"])
def test_each_optimizer_takes_the_groups_and_the_schedule(tmp_path: Path, name: str) -> None:
    plan = plan_of(tmp_path, name=name, layer_decay=0.5)
    model = tiny_model("llama")
    optimizer = build_optimizer(parameter_groups(model, plan), plan)
    assert type(optimizer).__name__.lower() == name
    set_learning_rate(optimizer, 8e-4)
    assert {group["lr"] for group in optimizer.param_groups} == {2e-4, 4e-4, 8e-4}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    if name == "lion":  # every value moves by the rate, and shrinks by its decay
        for key, rate in (("model.embed_tokens.weight", 2e-4), ("lm_head.weight", 8e-4)):
            torch.testing.assert_close(model.state_dict()[key], before[key] * (1 - 0.1 * rate) - rate)
        torch.testing.assert_close(model.state_dict()["model.norm.weight"], before["model.norm.weight"] - 8e-4)
    moved = {key: (value - before[key]).abs().mean().item() for key, value in model.state_dict().items()}
    first, last = (moved[f"model.layers.{i}.input_layernorm.weight"] for i in (0, 1))
    assert first == pytest.approx(last / 2, rel=1e-3)
