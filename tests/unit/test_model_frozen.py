"""`method.frozen`: what it freezes with each method, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.errors import ModelError
from launcher.model.adapters import apply_method
from launcher.model.depth import layers_above
from launcher.plan.plan import UnfreezePlan
from tests.model_families import SIZES, tiny_model
from tests.plans import method_plan


def trained(network: nn.Module) -> set[str]:
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def test_full_but_embeddings_and_norms() -> None:
    model = tiny_model("llama")
    everything = trained(model)
    apply_method(model, method_plan("full", frozen=("embed_tokens", r"norm\.weight$")), 0)
    frozen = everything - trained(model)
    assert "model.embed_tokens.weight" in frozen
    assert frozen == {name for name in everything if "embed_tokens" in name or name.endswith("norm.weight")}


def test_the_last_layers_but_the_head_and_later_phases_too() -> None:
    stages = (UnfreezePlan(at=2, last_layers=2),)
    method = method_plan("freeze", train_last_layers=1, frozen=("lm_head", "layers.0.self_attn"), unfreeze=stages)
    first, second = (apply_method(tiny_model("llama"), method, 0, phase=phase) for phase in (0, 1))
    assert trained(first) == {name for name in trained(second) if "layers.0" not in name}
    assert "model.layers.1.self_attn.q_proj.weight" in trained(first)
    assert "model.layers.0.mlp.up_proj.weight" in trained(second)
    assert not any("lm_head" in name or "layers.0.self_attn" in name for name in trained(second))


def test_of_adapters_those_that_it_names() -> None:
    model = apply_method(tiny_model("llama"), method_plan("lora", frozen=("layers.0.",)), 0)
    assert trained(model)
    assert all("layers.1." in name for name in trained(model))
    model = apply_method(tiny_model("llama"), method_plan("lora", frozen=("lora_A",)), 0)
    assert all("lora_B" in name for name in trained(model))


def test_rows_of_added_tokens_stay_trained() -> None:
    model = apply_method(tiny_model("llama"), method_plan("lora", frozen=("layers",)), 0, (59, 60))
    assert {name.rpartition(".token_adapter")[2] for name in trained(model)} == {".trainable_tokens_delta.default"}
    last = method_plan("freeze", train_last_layers=1, frozen=("mlp",))
    assert any("trainable_tokens" in name for name in trained(apply_method(tiny_model("gpt2"), last, 0, (59, 60))))


@pytest.mark.parametrize(
    ("kind", "frozen", "message", "hint"),
    [
        (
            "full",
            ("mlp", "embed_token$"),
            r"method.frozen.1: 'embed_token\$' is found in no parameter's name",
            "model.embed_tokens.weight",
        ),
        ("lora", ("embed_tokens",), "'embed_tokens' is found only in names of parameters that are frozen", "lora_A"),
        ("freeze", ("layers.0",), "'layers.0' is found only in names of parameters that are frozen", "layers.1"),
        ("full", ("",), "method.frozen freezes all that would be trained", "name fewer"),
        ("lora", ("lora_A", "lora_B"), "method.frozen freezes all that would be trained", "name fewer"),
    ],
)
def test_what_freezes_nothing_or_everything_is_refused(
    kind: str, frozen: tuple[str, ...], message: str, hint: str
) -> None:
    changes = {"train_last_layers": 1} if kind == "freeze" else {}
    with pytest.raises(ModelError, match=message) as raised:
        apply_method(tiny_model("llama"), method_plan(kind, frozen=frozen, **changes), 0)
    assert hint in str(raised.value.hint)


def test_new_rows_must_not_be_frozen_with_the_rest_of_the_vocabulary() -> None:
    with pytest.raises(ModelError, match="method.frozen: rows of lm_head are new, for model.add_tokens") as raised:
        apply_method(tiny_model("llama"), method_plan("full", frozen=("lm_head",)), 0, (59, 60))
    assert "use method.kind lora" in str(raised.value.hint)


@pytest.mark.parametrize(
    ("family", "below", "last"),
    [
        ("llama", {"model.embed_tokens.weight"}, {"model.norm.weight", "lm_head.weight"}),
        ("gpt2", {"transformer.wte.weight", "transformer.wpe.weight"}, {"transformer.ln_f.weight"}),
        ("gpt_neox", {"gpt_neox.embed_in.weight"}, {"gpt_neox.final_layer_norm.bias"}),
        (
            "opt",
            {"model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"},
            {"model.decoder.final_layer_norm.weight"},
        ),
        ("bloom", {"transformer.word_embeddings_layernorm.weight"}, {"transformer.ln_f.weight"}),
    ],
)
def test_how_deep_a_parameter_is(family: str, below: set[str], last: set[str]) -> None:
    model = tiny_model(family, **{"n_layer" if family in ("gpt2", "bloom") else "num_hidden_layers": 3})
    above = layers_above(model)
    assert above.keys() == {name for name, _ in model.named_parameters()}
    assert {above[name] for name in below} == {3}
    assert {above[name] for name in last} == {0}
    for name, number in above.items():
        layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
        assert layer is None or number == 2 - layer, name


def test_a_final_norm_that_is_called_an_embeddings() -> None:
    config = AutoConfig.for_model("lfm2", **SIZES, layer_types=["conv", "full_attention"])
    with torch.device("meta"):
        above = layers_above(AutoModelForCausalLM.from_config(config))
    assert (above["model.embed_tokens.weight"], above["model.embedding_norm.weight"]) == (2, 0)


def test_an_encoder_and_adapters_have_depths_too() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 50}
    above = layers_above(BertForSequenceClassification(BertConfig(num_hidden_layers=3, **sizes)))
    assert above["bert.embeddings.LayerNorm.weight"] == above["bert.embeddings.word_embeddings.weight"] == 3
    assert above["bert.encoder.layer.0.attention.self.query.weight"] == 2
    assert above["bert.pooler.dense.weight"] == above["classifier.bias"] == 0
    with torch.no_grad():
        above = layers_above(apply_method(tiny_model("llama"), method_plan("lora"), 0, (59, 60)))
    adapters = {name: number for name, number in above.items() if "lora_" in name}
    assert {name.split(".")[4]: number for name, number in adapters.items()} == {"0": 1, "1": 0}
    assert {number for name, number in above.items() if "embed_tokens" in name} == {2}
    assert {number for name, number in above.items() if "lm_head" in name} == {0}
