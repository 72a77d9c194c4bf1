"""DoRA's layers with a forward of our own, against peft's and against float64; and where they cannot be."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from launcher.errors import ModelError
from launcher.model.adapters import apply_method
from launcher.model.dora import compute_lengths
from launcher.model.lora_layers import fuse_adapters
from tests.adapted_layers import DTYPES, K, adapted, draw, layer_of, passed, truth
from tests.fused import assert_e9
from tests.plans import method_plan
from tests.unit.test_model_adapters import GPT2, LLAMA, model, trained


def with_dora(kind: str, dtype: torch.dtype, **settings: Any) -> Any:
    made = adapted(kind, dtype, use_dora=True, **settings)
    with torch.no_grad():  # or lengths would have nothing to do
        magnitude = layer_of(made).lora_magnitude_vector.default.weight
        magnitude.mul_(1 + 0.3 * draw(*magnitude.shape, dtype=dtype, seed=9))
    return made


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", ["linear", "conv1d", "packed"])
def test_ours_is_petfs_own_by_e9(kind: str, dtype: torch.dtype, dropout: float) -> None:
    network = with_dora(kind, dtype, lora_dropout=dropout)
    x = draw(2, 9, K, dtype=dtype)
    exact = truth(network, x, dropout)
    # peft dequantizes rows of 96 by code of bitsandbytes that gets them wrong, see test_model_nf4.
    by_peft, state = (passed(network, x), torch.get_rng_state()) if kind != "packed" else (exact, None)
    lengths = layer_of(network).lora_magnitude_vector.default.weight.detach().clone()
    compute_lengths(network)
    with torch.no_grad():  # those of 4-bit layers were computed anew
        layer_of(network).lora_magnitude_vector.default.weight.copy_(lengths)
    ours = passed(network, x)
    assert state is None or torch.equal(torch.get_rng_state(), state), "other random numbers were drawn"
    for name, a, b, c in zip(("y", "dx", "dA", "dB", "dm"), ours, by_peft, exact, strict=True):
        if kind != "packed":
            assert_e9(a, b, c, name)
        else:
            tolerance = 1e-5 if dtype == torch.float32 else 4e-2
            assert (a.double() - c).abs().max() <= tolerance * c.abs().max(), name


@pytest.mark.parametrize("kind", ["linear", "packed"])
def test_what_else_peft_does_stays_as_it_is(kind: str) -> None:
    network = with_dora(kind, torch.float32, lora_dropout=0.2).eval()
    compute_lengths(network)
    x = draw(5, K, dtype=torch.float32)
    with torch.no_grad():
        before = network(x)
        with network.disable_adapter():
            assert torch.equal(network(x), layer_of(network).base_layer(x))
        if kind == "linear":
            network.merge_adapter()
            torch.testing.assert_close(network(x), before)
            network.unmerge_adapter()
        torch.testing.assert_close(copy.deepcopy(network)(x), before)


def test_dora_starts_as_no_change_and_trains_lengths_too() -> None:
    ids = torch.arange(20)[None]
    for config in (LLAMA, GPT2):
        with torch.no_grad():
            before = model(config).eval()(input_ids=ids).logits
            network = apply_method(model(config), method_plan("lora", rank=4, dora=True), seed=0)
            torch.testing.assert_close(network.eval()(input_ids=ids).logits, before)
        kinds = {next(kind for kind in ("_A", "_B", "magnitude") if kind in name) for name in trained(network)}
        assert kinds == {"_A", "_B", "magnitude"}
    bf16 = apply_method(model(LLAMA).bfloat16(), method_plan("lora", rank=4, dora=True), seed=0)
    assert {parameter.dtype for parameter in bf16.parameters()} == {torch.bfloat16}


def test_kernels_leave_lengths_alone() -> None:
    network = apply_method(model(LLAMA), method_plan("lora", targets=("q_proj",), dora=True), seed=0)
    counts, left, undo = fuse_adapters(network)
    assert (counts, undo) == ({}, [])
    assert set(left.values()) == {"a variant of LoRA"}
    plain = apply_method(model(LLAMA), method_plan("lora", targets=("q_proj",), rslora=True), seed=0)
    assert fuse_adapters(plain)[0] == {"lora_linear": 3}


def test_no_lengths_of_an_embedding() -> None:
    with pytest.raises(ModelError, match=r"method.dora: .*embed_tokens has an adapter of kind Embedding") as caught:
        apply_method(model(LLAMA), method_plan("lora", targets=("embed_tokens",), dora=True), seed=0)
    assert caught.value.hint == "leave that layer out of method.targets, or set method.dora to false"


def test_no_lengths_of_rows_that_are_zero() -> None:
    """As blocks have them that were put between those of a trained model."""
    network = model(LLAMA)
    with torch.no_grad():
        network.model.layers[1].mlp.down_proj.weight[3:5] = 0
    with pytest.raises(ModelError, match=r"rows of .*layers.1.mlp.down_proj's weight are zero, and have no length"):
        apply_method(network, method_plan("lora", rank=4, dora=True), seed=0)


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    from peft.tuners.lora import LoraLayer

    for rslora, scale in ((False, 2.0), (True, 8.0)):
        network: nn.Module = apply_method(model(LLAMA), method_plan("lora", alpha=32.0, rslora=rslora), seed=0)
        scales = {tuple(layer.scaling.values()) for layer in network.modules() if isinstance(layer, LoraLayer)}
        assert scales == {(scale,)}
