"""What each method trains, in models of both layouts: blocks under `model.layers` and under `transformer.h`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.errors import ModelError
from launcher.model.adapters import apply_method, decoder_layers
from launcher.plan.plan import MethodPlan
from tests.plans import method_plan

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 50,
}
GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 2, "vocab_size": 50}
OPT: dict[str, Any] = {
    "model_type": "opt",
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 50,
}
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def model(config: dict[str, Any], **changes: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**(config | changes)))


def freeze(layers: int) -> MethodPlan:
    return method_plan("freeze", train_last_layers=layers)


def lora(targets: Any = "all-linear", rank: int = 4) -> MethodPlan:
    return method_plan("lora", rank=rank, alpha=8.0, targets=targets)


def trained(network: nn.Module) -> set[str]:
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("config", "blocks", "rest"),
    [
        (LLAMA, "model.layers", {"model.norm.weight", "lm_head.weight"}),
        (LLAMA | {"tie_word_embeddings": True}, "model.layers", {"model.norm.weight"}),
        (GPT2, "transformer.h", {"transformer.ln_f.weight", "transformer.ln_f.bias"}),
        (
            GPT2 | {"tie_word_embeddings": False},
            "transformer.h",
            {"transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.weight"},
        ),
        # One makes its final norm before its layers, the other has a norm of the embedding there.
        (OPT, "model.decoder.layers", {"model.decoder.final_layer_norm.weight", "model.decoder.final_layer_norm.bias"}),
        (GPT2 | {"model_type": "bloom"}, "transformer.h", {"transformer.ln_f.weight", "transformer.ln_f.bias"}),
    ],
    ids=["llama", "llama-tied", "gpt2", "gpt2-untied", "opt", "bloom"],
)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_freeze_trains_the_last_layers_the_final_norm_and_an_untied_head(
    config: dict[str, Any], blocks: str, rest: set[str], count: int
) -> None:
    network = model(config)
    assert apply_method(network, freeze(count), seed=0) is network
    last = tuple(f"{blocks}.{i}." for i in range(3 - count, 3))
    assert trained(network) == rest | {name for name, _ in network.named_parameters() if name.startswith(last)}


def test_full_trains_all() -> None:
    network = model(LLAMA)
    full = method_plan("full")
    assert len(trained(apply_method(network, full, seed=0))) == len(list(network.parameters()))


def test_more_layers_than_there_are() -> None:
    with pytest.raises(ModelError, match="train_last_layers is 4, the model has 3 layers") as caught:
        apply_method(model(LLAMA), freeze(4), seed=0)
    assert caught.value.hint == "choose at most 3, or method.kind full"


def adapted_layers(network: nn.Module) -> set[str]:
    """Names of the layers that have an adapter; nothing but adapters is trained."""
    names = trained(network)
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    return {name.split(".lora_")[0].removeprefix("base_model.model.") for name in names}


def test_lora_on_every_linear_layer_but_the_head() -> None:
    layers = adapted_layers(apply_method(model(LLAMA), lora(), seed=0))
    assert {name.rsplit(".", 1)[1] for name in layers} == LINEAR
    assert len(layers) == 3 * 7


def test_lora_on_gpt2_whose_layers_are_conv1d() -> None:
    layers = adapted_layers(apply_method(model(GPT2), lora(), seed=0))
    assert {name.split(".", 3)[3] for name in layers} == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}


def test_lora_on_named_layers() -> None:
    layers = adapted_layers(apply_method(model(LLAMA), lora(("q_proj", "v_proj")), seed=0))
    assert {name.rsplit(".", 1)[1] for name in layers} == {"q_proj", "v_proj"}


def test_lora_targets_that_the_model_has_not() -> None:
    with pytest.raises(ModelError, match="method.targets: .*c_attn") as caught:
        apply_method(model(LLAMA), lora(("c_attn",)), seed=0)
    assert caught.value.hint == "name linear layers of the model, or all-linear"


def test_adapters_start_from_the_seed_alone_and_as_no_change() -> None:
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = model(LLAMA)(input_ids=ids).logits
        torch.manual_seed(123)
        state = torch.random.get_rng_state()
        first = apply_method(model(LLAMA), lora(), seed=7)
        torch.random.set_rng_state(state)
        torch.rand(5)
        second, third = (apply_method(model(LLAMA), lora(), seed=seed) for seed in (7, 8))
        assert torch.equal(first(input_ids=ids).logits, before)
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), third.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert ("lora_A" not in name) or not torch.equal(a, c), name


def test_adapters_take_the_bases_dtype() -> None:
    network = apply_method(model(LLAMA).to(torch.bfloat16), lora(), seed=0)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}


def test_experts_in_a_list_are_no_decoder_layers() -> None:
    """As models with code of their own have them: more experts in a layer than layers."""
    network = model(LLAMA)
    for layer in network.model.layers:
        layer.mlp.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(8)])
    assert decoder_layers(network) is network.model.layers
