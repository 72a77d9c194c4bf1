"""PiSSA: what adapters start from, what the base keeps, and how both come back as plain LoRA."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launcher.errors import CheckpointError, ModelError, RecipeError
from launcher.export.merge import trained_model
from launcher.model import pissa
from launcher.model.adapters import apply_method
from launcher.plan.plan import MethodPlan, Plan
from launcher.recipe.load import load
from launcher.store.folder import FolderStore
from tests.checkpoints import write_checkpoint
from tests.distributed.tiny import tiny_plan
from tests.plans import method_plan, model_plan
from tests.unit.test_model_adapters import GPT2, LLAMA, model

IDS = torch.arange(20)[None]
METHODS = {
    "lora": method_plan("lora", rank=4, alpha=8.0, init="pissa"),
    "rslora": method_plan("lora", rank=4, alpha=8.0, init="pissa", rslora=True),
    "dora": method_plan("lora", rank=4, alpha=8.0, init="pissa", dora=True),
}


def started(network: Any, method: MethodPlan) -> tuple[nn.Module, pissa.Factors]:
    """With adapters that have their start, over what is left of the base."""
    adapted = apply_method(network, method, seed=0)
    factors = pissa.principal_factors(adapted, 0, mine=True)
    pissa.start_from(adapted, factors)
    pissa.take_out(adapted)
    return adapted, factors


def logits(network: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = network.eval()(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_start_changes_no_logit_and_an_export_none(config: dict[str, Any], method: MethodPlan) -> None:
    """The base is another one by far, and yet the model is the same: at its start, and as LoRA over the old base."""
    before = logits(model(config))
    network, factors = started(model(config), method)
    torch.testing.assert_close(logits(network), before, rtol=1e-5, atol=1e-6)
    with network.disable_adapter():  # type: ignore[operator]
        assert (logits(network) - before).abs().max() > 0.05 * before.abs().max()
    with torch.no_grad():  # as if it had been trained
        draw = torch.Generator().manual_seed(1)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=draw))
    weights = {name: p.detach().clone() for name, p in network.named_parameters() if p.requires_grad}
    plain_method, plain_weights = pissa.over_original(method, weights, factors)
    assert (plain_method.rank, plain_method.init) == (8, "default")
    assert plain_method.alpha == (8.0 * math.sqrt(2) if method.rslora else 16.0)
    plain: Any = apply_method(model(config), plain_method, seed=0)
    missing = plain.load_state_dict(plain_weights, strict=False)
    assert not missing.unexpected_keys
    after = logits(network)
    assert (after - before).abs().max() > 0.05 * before.abs().max()
    torch.testing.assert_close(logits(plain), after, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(plain.merge_and_unload()), after, rtol=1e-4, atol=1e-5)


def test_adapters_take_the_largest_singular_values() -> None:
    network, factors = started(model(LLAMA), METHODS["lora"])
    weight = model(LLAMA).model.layers[1].mlp.up_proj.weight.detach()
    name = "base_model.model.model.layers.1.mlp.up_proj"
    a, b = (factors[f"{name}.lora_{kind}.default.weight"] for kind in "AB")
    sizes = torch.linalg.svdvals(weight)
    torch.testing.assert_close(torch.linalg.svdvals(2.0 * b @ a)[:4], sizes[:4])
    rest: Any = network.get_submodule(name).base_layer.weight  # type: ignore[union-attr]
    torch.testing.assert_close(torch.linalg.svdvals(rest.detach())[: len(sizes) - 4], sizes[4:])
    assert torch.equal(rest, (weight.double() - 2.0 * b.double() @ a.double()).float())


def test_bf16_adapters_start_from_what_was_taken_out() -> None:
    network, factors = started(model(LLAMA).bfloat16(), METHODS["lora"])
    assert {factor.dtype for factor in factors.values()} == {torch.bfloat16}
    for name, layer in pissa.adapted(network):
        weight = model(LLAMA).bfloat16().get_submodule(name.removeprefix("base_model.model.")).weight
        [a], [b] = layer.lora_A.values(), layer.lora_B.values()
        rest = weight.double() - 2.0 * b.weight.double() @ a.weight.double()
        assert torch.equal(layer.base_layer.weight, rest.bfloat16())  # rounded once


def test_large_weights_are_decomposed_by_iteration() -> None:
    """A spectrum that falls slowly, as those of real weights do."""
    torch.manual_seed(0)
    rows, columns, rank = pissa.EXACT + 40, pissa.EXACT + 1, 8
    left, _ = torch.linalg.qr(torch.randn(rows, 64))
    right, _ = torch.linalg.qr(torch.randn(columns, 64))
    sizes = torch.arange(1, 65) ** -0.5
    weight = left * sizes @ right.t()
    a, b = pissa.principal(weight, rank, 2.0, seed=3)
    assert (a.shape, b.shape) == ((rank, columns), (rows, rank))
    best = sizes[rank:].square().sum().sqrt()
    assert (weight - 2.0 * b @ a).norm() <= (1 + 1e-4) * best
    again = pissa.principal(weight, rank, 2.0, seed=3)
    assert torch.equal(again[0], a)


def test_what_pissa_cannot_start_from() -> None:
    def refusal(network: Any, **changes: Any) -> ModelError:
        with pytest.raises(ModelError) as caught:
            started(network, method_plan("lora", init="pissa", **changes))
        return caught.value

    said = refusal(model(LLAMA), rank=33)
    assert said.message == (
        "method.rank is 33, and base_model.model.model.layers.0.self_attn.q_proj has only 32 singular vectors for "
        "pissa to start from"
    )
    assert said.hint == "choose at most 32, or leave method.init out"
    said = refusal(model(LLAMA), targets=("embed_tokens",))
    assert "embed_tokens has an adapter of kind Embedding, and pissa decomposes linear layers only" in said.message
    said = refusal(model(LLAMA, tie_word_embeddings=True), rank=4, targets=("lm_head",))
    assert "would change the weight of base_model.model.lm_head, which others use too" in said.message


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return tiny_plan(tmp_path, zero=0)


def test_frozen_factors_are_exported_as_they_started(plan: Plan, tmp_path: Path) -> None:
    model(LLAMA).save_pretrained(tmp_path / "base")
    frozen = ("lora_A", r"layers\.0\.", r"layers\.1\..*magnitude")
    method = METHODS["dora"].model_copy(update={"frozen": frozen})
    changes = {"method": method, "model": model_plan(tmp_path / "base")}
    plan = plan.model_copy(update={"trajectory": plan.trajectory.model_copy(update=changes)})
    network, factors = started(model(LLAMA), method)
    store = FolderStore(tmp_path)
    pissa.keep(store, plan, factors)
    trained = {name: one for name, one in network.named_parameters() if one.requires_grad}
    assert not any("lora_A" in name or "layers.0." in name for name in trained)
    before = logits(network)
    with torch.no_grad():
        for one in trained.values():
            one.mul_(1.3)
    checkpoint = write_checkpoint(
        store,
        3,
        shapes={name: tuple(one.shape) for name, one in trained.items()},
        fill=lambda key, *_: trained[key.split(".", 1)[1]].detach().flatten().clone(),
    )
    after = logits(network)
    assert (after - before).abs().max() > 0.05 * before.abs().max()
    torch.testing.assert_close(logits(trained_model(plan, checkpoint)), after, rtol=1e-4, atol=1e-5)


def test_factors_are_kept_once_and_verified(plan: Plan, tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    assert pissa.kept(store, plan) is None
    first, second = ({"x.lora_A.default.weight": torch.full((2, 3), value).bfloat16()} for value in (1.0, 2.0))
    assert pissa.keep(store, plan, first) is first
    # An orphan of an earlier start comes too late: what is there is true of the checkpoints.
    [(name, found)] = pissa.keep(store, plan, second).items()
    assert torch.equal(found, first[name])
    assert found.dtype == torch.bfloat16
    other = plan.model_copy(update={"trajectory": plan.trajectory.model_copy(update={"seed": 9})})
    with pytest.raises(CheckpointError, match=r"pissa.safetensors is another run's"):
        pissa.kept(store, other)
    content = (tmp_path / pissa.FILE).read_bytes()
    for damaged, words in ((content[:-1] + b"!", "content changed"), (content[:50], "damaged"), (b"", "damaged")):
        (tmp_path / pissa.FILE).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=words) as caught:
            pissa.kept(store, plan)
        assert caught.value.hint is not None


def test_factors_of_another_model() -> None:
    network = apply_method(model(LLAMA), METHODS["lora"], seed=0)
    factors = pissa.principal_factors(network, 0, mine=True)
    factors.popitem()
    with pytest.raises(CheckpointError, match="of another model"):
        pissa.start_from(network, factors)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("{dora: true}", "method.dora: there are no adapters with method.kind full\n  leave it out, or use lora"),
        ("{kind: freeze, rslora: true}", "method.rslora: there are no adapters with method.kind freeze"),
        ("{dropout: 0.1}", "method.dropout: there are no adapters with method.kind full"),
        ("{init: pissa}", "method.init: there are no adapters with method.kind full"),
        ("{kind: qlora, init: pissa}", "method.init: pissa leaves a part of the base, and in 4 bits that part is"),
    ],
)
def test_keys_that_would_do_nothing(method: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(f"model: {{path: gpt2}}\ndata: {{train: [{{path: a.jsonl}}]}}\nmethod: {method}\n")
    with pytest.raises(RecipeError) as caught:
        load("x.yaml", ())
    [problem] = caught.value.problems
    assert f"{problem}\n  {problem.hint}".startswith(f"x.yaml:3: {message}")


@pytest.mark.parametrize("kin", ["dora: true", "rslora: true", "init: pissa", "dora: true, rslora: true, init: pissa"])
def test_keys_that_go_together(kin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = f"model: {{path: gpt2}}\ndata: {{train: [{{path: a.jsonl}}]}}\nmethod: {{kind: lora, {kin}}}\n"
    Path("x.yaml").write_text(text)
    assert load("x.yaml", ()).recipe.method.kind == "lora"
