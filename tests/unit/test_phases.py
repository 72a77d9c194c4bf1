"""Gradual unfreezing: which weights are trained from which step on, and what of it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.checkpoint.manifest import Manifest, read
from launcher.errors import ModelError, RecipeError
from launcher.model.adapters import apply_method
from launcher.plan.phases import Phase, phase_at, phases, refuse_useless
from launcher.plan.plan import MethodPlan, UnfreezePlan
from launcher.recipe.load import load
from launcher.store.folder import FolderStore
from launcher.train.unfreeze import phase_after
from tests.checkpoints import write_checkpoint
from tests.distributed.tiny import tiny_plan
from tests.plans import method_plan

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 50,
}
GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 50}


def method(*stages: tuple[float, int | None], first: int = 1) -> MethodPlan:
    unfreeze = tuple(UnfreezePlan(at=at, last_layers=layers) for at, layers in stages)
    return method_plan("freeze", train_last_layers=first, unfreeze=unfreeze)


def model(config: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


def trained(network: torch.nn.Module) -> set[str]:
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def test_a_stage_begins_after_a_share_of_the_steps_rounded_up_or_after_a_number_of_them() -> None:
    assert phases(method((0.3, 2), (0.6, None)), 10) == (Phase(0, 1), Phase(3, 2), Phase(6, None))
    assert [phase.begins for phase in phases(method((0.3, 2), (50, None)), 101)] == [0, 31, 50]
    assert phases(method((0.07, 2)), 100)[1].begins == 7  # and not 8, for 0.07 * 100 is 7.000000000000001
    assert phases(method((1, 2)), 100)[1].begins == 1
    assert phases(method_plan("full"), 100) == (Phase(0, None),)


@given(st.floats(0.01, 0.4), st.floats(0.5, 0.9), st.integers(10, 10_000))
def test_every_step_is_in_one_phase_and_no_phase_is_gone_back_to(first: float, second: float, total: int) -> None:
    plan = method((first, 2), (second, None))
    refuse_useless(plan, total)
    begins = [phase.begins for phase in phases(plan, total)]
    assert [phase_at(plan, total, step) for step in begins] == [0, 1, 2]
    assert [phase_at(plan, total, step - 1) for step in begins[1:]] == [0, 1]
    assert phase_at(plan, total, total) == 2
    assert first * total <= begins[1] + 1e-6 < first * total + 1


def test_a_stage_without_a_step_is_refused() -> None:
    with pytest.raises(ModelError) as beyond:
        refuse_useless(method((10, 2), (20, None)), 20)
    assert str(beyond.value) == (
        "method.unfreeze: the stage at 20 begins after step 20, and the run ends after step 20"
    )
    assert beyond.value.hint == "give each stage some steps: a later `at` for the next one, or a longer run"
    with pytest.raises(ModelError, match="stage at 0.3 begins after step 2, and the next stage begins after step 2"):
        refuse_useless(method((0.3, 2), (2, None)), 5)
    with pytest.raises(ModelError, match="stage at 0.9 begins after step 2, and the run ends after step 2"):
        refuse_useless(method((0.9, 2)), 2)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["untied", "tied"])
def test_each_phase_trains_what_the_one_before_did_and_more(config: dict[str, Any]) -> None:
    plan = method((0.3, 2), (0.6, 3), (0.8, None))
    networks = [apply_method(model(config), plan, 0, phase=phase) for phase in range(4)]
    found = [trained(network) for network in networks]
    for phase, layers in enumerate((1, 2, 3)):
        assert found[phase] == trained(apply_method(model(config), method(first=layers), 0))
    assert found[3] == {name for name, _ in networks[3].named_parameters()}
    for network in networks:  # each is told its own first phase, also where that is still to come
        for name, parameter in network.named_parameters():
            assert parameter.phase == next(phase for phase in range(4) if name in found[phase])


def test_rows_of_added_tokens_are_trained_from_the_start_and_the_rest_of_the_embedding_in_its_turn() -> None:
    plan = method((0.3, 2), (0.6, None))
    torch.manual_seed(0)
    networks = [AutoModelForCausalLM.from_config(AutoConfig.for_model(**GPT2)) for _ in range(3)]
    adapted = [apply_method(network, plan, 0, (48, 49), phase) for phase, network in enumerate(networks)]
    for phase, network in enumerate(adapted):
        rest = {name for name, _ in network.named_parameters()} - trained(network)
        assert any("trainable_tokens_delta" in name for name in trained(network))
        assert any(name.endswith("wte.base_layer.weight") for name in rest) == (phase < 2)
        assert not any(
            getattr(parameter, "phase", 0) for name, parameter in network.named_parameters() if "delta" in name
        )


def test_layers_that_the_model_has_not_are_refused_from_the_start() -> None:
    with pytest.raises(ModelError) as caught:
        apply_method(model(LLAMA), method((0.3, 2), (0.6, 4)), 0)
    assert str(caught.value) == "method.unfreeze.1.last_layers is 4, the model has 3 layers"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            "{kind: lora, unfreeze: [{at: 0.3, last_layers: 4}]}",
            "method.unfreeze: method.kind lora has no layers that wait",
        ),
        (
            "{kind: freeze, unfreeze: [{at: 0.3, last_layers: 2}]}",
            "method.unfreeze.0.last_layers: 2 is no more than 2, which method.train_last_layers trains from the start",
        ),
        (
            "{kind: freeze, unfreeze: [{at: 0.3, last_layers: all}, {at: 0.6, last_layers: 4}]}",
            "method.unfreeze.1.last_layers: 4 is no more than all, which the stage before trains",
        ),
        (
            "{kind: freeze, unfreeze: [{at: 0.6, last_layers: 4}, {at: 0.3, last_layers: all}]}",
            "method.unfreeze.1.at: 0.3 is no later than the stage before",
        ),
        (
            "{kind: freeze, unfreeze: [{at: 9, last_layers: 4}, {at: 9, last_layers: all}]}",
            "method.unfreeze.1.at: 9 is no later than the stage before",
        ),
        (
            "{kind: freeze, unfreeze: [{at: 2.5, last_layers: 4}]}",
            "method.unfreeze.0.at: 2.5 is neither a share of the steps nor a whole number of them",
        ),
    ],
)
def test_stages_that_make_no_sense_are_refused(tmp_path: Path, lines: str, said: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(f"model: {{path: m}}\ndata: {{train: [{{path: rows.jsonl}}]}}\nmethod: {lines}\n")
    with pytest.raises(RecipeError) as caught:
        load(str(file))
    [problem] = caught.value.problems
    assert str(problem) == f"{file}:3: {said}"
    assert problem.hint


def test_what_has_been_unfrozen_stays_so_in_a_run_that_is_made_longer(tmp_path: Path) -> None:
    plan = tiny_plan(tmp_path, 0)
    unfreezing = plan.trajectory.model_copy(update={"method": method((0.5, 2))})
    plan = plan.model_copy(update={"trajectory": unfreezing})
    longer = plan.model_copy(update={"lifecycle": plan.lifecycle.model_copy(update={"total_steps": 80})})
    store = FolderStore(tmp_path)

    def saved(step: int, **progress: Any) -> Manifest:
        return read(write_checkpoint(store, step, progress={"step": step} | progress))

    found = [saved(3), saved(4, phase=0), saved(5, phase=1)]
    assert [phase_after(plan, manifest) for manifest in found] == [0, 1, 1]
    assert [phase_after(longer, manifest) for manifest in found] == [0, 0, 1]


def test_counts_of_steps_are_written_where_they_differ_and_nowhere_else(tmp_path: Path) -> None:
    manifest = read(write_checkpoint(FolderStore(tmp_path), 7))
    assert b"optimizer_steps" not in manifest.to_json()  # as versions wrote it that know of one count only
    assert {name: manifest.steps_of(name) for name in manifest.parameters} == {"norm.weight": 7, "up.weight": 7}
    later = manifest.model_copy(update={"optimizer_steps": {"up.weight": 2}})
    assert Manifest.model_validate_json(later.to_json()) == later
    assert {name: later.steps_of(name) for name in later.parameters} == {"norm.weight": 7, "up.weight": 2}
