"""Layers with adapters computed in one operation, over weights in 4 and more bits, against peft's own forward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from launcher.model.lora_layers import fuse_adapters, why_not
from launcher.model.nf4 import dequantized
from tests.adapted_layers import DTYPES, K, N, adapted, draw, layer_of, passed, truth
from tests.fused import assert_e9


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", ["linear", "conv1d", "packed"])
def test_fused_is_petfs_own_by_e9(kind: str, dtype: torch.dtype, dropout: float) -> None:
    model = adapted(kind, dtype, lora_dropout=dropout)
    x = draw(2, 9, K, dtype=dtype)
    by_peft, state_by_peft = passed(model, x), torch.get_rng_state()
    names = list(model.state_dict())
    counts, left, undo = fuse_adapters(model)
    assert counts == {"qlora_linear" if kind == "packed" else "lora_linear": 1}
    assert left == {}
    fused = passed(model, x)
    assert torch.equal(torch.get_rng_state(), state_by_peft), "other random numbers were drawn"
    for name, a, b, c in zip(("y", "dx", "dA", "dB"), fused, by_peft, truth(model, x, dropout), strict=True):
        assert_e9(a, b, c, name)
    assert list(model.state_dict()) == names
    undo[0]()
    assert all(torch.equal(a, b) for a, b in zip(passed(model, x), by_peft, strict=True))


@pytest.mark.parametrize("kind", ["linear", "packed"])
def test_what_else_peft_does_stays_as_it_is(kind: str) -> None:
    model = adapted(kind, torch.float32, lora_dropout=0.2)
    plain = copy.deepcopy(model)
    assert fuse_adapters(model)[0]
    x = draw(5, K, dtype=torch.float32)
    with torch.no_grad():
        model.eval()
        plain.eval()
        torch.testing.assert_close(model(x), plain(x))
        with model.disable_adapter(), plain.disable_adapter():
            assert torch.equal(model(x), plain(x))
            assert torch.equal(model(x), layer_of(model).base_layer(x))
        for each in (model, plain):
            each.merge_adapter()
        assert torch.equal(model(x), plain(x))
        for each in (model, plain):
            each.unmerge_adapter()
        torch.testing.assert_close(model(x), plain(x))
        layer_of(model).scale_layer(0.5)
        layer_of(plain).scale_layer(0.5)
        torch.testing.assert_close(model(x), plain(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(model(x), plain(x))


def test_several_adapters_are_petfs_business() -> None:
    from peft import LoraConfig

    model = adapted("linear", torch.float32)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False))
    plain = copy.deepcopy(model)
    assert fuse_adapters(model)[0]
    x = draw(5, K, dtype=torch.float32)
    for active in ("default", "other", ["default", "other"]):
        for each in (model, plain):
            each.base_model.set_adapter(active)
        torch.testing.assert_close(model(x), plain(x))
    assert why_not(layer_of(plain)) == "2 active adapters"


def test_what_is_left_says_why() -> None:
    assert why_not(layer_of(adapted("linear", torch.float32))) is None
    assert why_not(layer_of(adapted("linear", torch.float32, use_dora=True))) == "a variant of LoRA"
    assert why_not(layer_of(adapted("linear", torch.float32, lora_bias=True))) == "an adapter with a bias"
    merged = adapted("linear", torch.float32)
    merged.merge_adapter()
    assert why_not(layer_of(merged)) == "its adapter is merged"
    wide = adapted("linear", torch.float32)
    layer_of(wide).base_layer.bfloat16()
    assert why_not(layer_of(wide)) == "an adapter in torch.float32 over a weight in torch.bfloat16"
    trained = adapted("linear", torch.float32)
    layer_of(trained).base_layer.bias.requires_grad_()
    assert why_not(layer_of(trained)) == "its own weight is trained"
    hooked = adapted("linear", torch.float32)
    layer_of(hooked).lora_A.default.register_forward_hook(lambda *_: None)
    assert why_not(layer_of(hooked)) == "hooks on its parts, which would not be called"
    twice = adapted("linear", torch.float32)
    assert fuse_adapters(twice)[0] == {"lora_linear": 1}
    counts, left, undo = fuse_adapters(twice)
    assert (counts, undo) == ({}, [])
    assert left == {"base_model.model.proj": "its forward has been replaced already"}


def test_adapters_on_an_embedding_are_left() -> None:
    from peft import LoraConfig, get_peft_model

    network = nn.Module()
    network.words = nn.Embedding(10, 8)
    model = get_peft_model(network, LoraConfig(r=2, target_modules=["words"]))
    assert fuse_adapters(model) == ({}, {"base_model.model.words": "an adapter of kind Embedding"}, [])


def test_a_model_without_adapters() -> None:
    assert fuse_adapters(nn.Sequential(nn.Linear(4, 4))) == ({}, {}, [])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rows_that_end_within_a_block(dtype: torch.dtype) -> None:
    """96 columns in blocks of 64: bitsandbytes' code for AVX512 makes something else of them."""
    torch.manual_seed(0)
    weight = torch.randn(N, K) * torch.logspace(-1, 1, N)[:, None]
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight.to(dtype), quant_type="nf4", compress_statistics=True)
    found = dequantized(nn.Parameter(packed, requires_grad=False), state, dtype)
    assert ((found.float() - weight).norm() / weight.norm()).item() < 0.12
