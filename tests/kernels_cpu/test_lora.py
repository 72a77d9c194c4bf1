"""E9 of a linear layer with an adapter, and of the adapter's gradients from one read."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from launcher_kernels import lora, reference
from tests.fused import DTYPES, assert_e9, assert_fused

SCALING = 1.7
SHAPES = [(1, 8, 8, 1), (5, 24, 40, 4), (33, 70, 130, 16), (70, 48, 300, 20)]
"""Rows, K, N, rank."""


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(num_rows: int, k: int, n: int, rank: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """x, weight, bias, A, B of the sizes that training sees."""
    scales = (1.0, k**-0.5, 0.1, k**-0.5, 0.1)
    shapes = ((num_rows, k), (n, k), (n,), (rank, k), (n, rank))
    return [
        draw(*shape, dtype=dtype, seed=seed + i) * s for i, (shape, s) in enumerate(zip(shapes, scales, strict=True))
    ]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lora_linear(shape: tuple[int, int, int, int], dtype: torch.dtype, launches: Counter[str]) -> None:
    fused, eager = (partial(module.lora_linear, scaling=SCALING) for module in (lora, reference))
    assert_fused(fused, eager, layer(*shape, dtype=dtype), [0, 3, 4])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_without_bias_and_with_leading_dimensions(dtype: torch.dtype, launches: Counter[str]) -> None:
    x, weight, _, a, b = layer(12, 40, 72, 8, dtype)

    def apply(function, x, weight, a, b):  # type: ignore[no-untyped-def]
        return function(x, weight, None, a, b, SCALING)

    fused, eager = partial(apply, lora.lora_linear), partial(apply, reference.lora_linear)
    assert_fused(fused, eager, [x.view(2, 6, 40), weight, a, b], [0, 2, 3])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_adapter_may_see_something_else(dtype: torch.dtype, launches: Counter[str]) -> None:
    """As after dropout; both inputs get their own gradients."""
    x, weight, bias, a, b = layer(20, 40, 72, 8, dtype)
    seen = draw(20, 40, dtype=dtype, seed=9)

    def apply(function, x, seen, a, b):  # type: ignore[no-untyped-def]
        wide = x.dtype == torch.float64
        w, c = (weight.double(), bias.double()) if wide else (weight, bias)
        return function(x, w, c, a, b, SCALING, adapter_x=seen)

    assert_fused(partial(apply, lora.lora_linear), partial(apply, reference.lora_linear), [x, seen, a, b], range(4))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.just(0) | st.integers(48, 150), st.integers(48, 300), st.integers(1, lora.MAX_RANK),
    st.sampled_from(sorted(DTYPES)), st.integers(0, 99),
)  # fmt: skip
def test_any_gradients(launches: Counter[str], num_rows: int, columns: int, rank: int, dtype: str, seed: int) -> None:
    """Of 48 numbers or more: eager is exact by chance in a handful of them."""
    shapes = ((num_rows, columns), (num_rows, rank), (columns, rank))
    given = [draw(*shape, dtype=DTYPES[dtype], seed=seed + i) for i, shape in enumerate(shapes)]
    found = lora.lora_gradients(*given, SCALING)
    dy, xa, b = given
    exact = dy.double() @ b.double() * SCALING, dy.double().t() @ xa.double() * SCALING
    for a, e, c in zip(found, (dy @ b * SCALING, dy.t() @ xa * SCALING), exact, strict=True):
        assert_e9(a, e, c)


def test_rows_are_shared_out(launches: Counter[str]) -> None:
    """Several blocks of columns and shares of rows, whose parts are added up."""
    dy, xa, b = (
        draw(200, 600, dtype=torch.bfloat16),
        draw(200, 16, dtype=torch.bfloat16),
        draw(600, 16, dtype=torch.bfloat16),
    )
    u, db = lora.lora_gradients(dy, xa, b, SCALING)
    assert_e9(u, dy @ b * SCALING, dy.double() @ b.double() * SCALING)
    assert_e9(db, dy.t() @ xa * SCALING, dy.double().t() @ xa.double() * SCALING)
    assert launches["lora_backward"] > 0


def test_the_gradients_are_the_same_bits(launches: Counter[str]) -> None:
    given = [draw(*shape, dtype=torch.bfloat16) for shape in ((130, 300), (130, 8), (300, 8))]
    first, second = (lora.lora_gradients(*given, SCALING) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_great_ranks_are_two_products(launches: Counter[str]) -> None:
    inputs = layer(40, 48, 64, lora.MAX_RANK + 1, torch.bfloat16)
    before = launches["lora_backward"]
    fused, eager = (partial(module.lora_linear, scaling=SCALING) for module in (lora, reference))
    assert_fused(fused, eager, inputs, [0, 3, 4])
    assert launches["lora_backward"] == before
    assert_fused(fused, eager, layer(4, 8, 8, 4, torch.bfloat16), [0, 3, 4])


def test_rows_with_gaps(launches: Counter[str]) -> None:
    """A slice of a larger x, and a gradient whose rows do not follow each other."""
    _, weight, bias, a, b = layer(1, 40, 72, 8, torch.float32)
    whole = draw(6, 8, 100, dtype=torch.float32)

    def apply(function, x, a, b):  # type: ignore[no-untyped-def]
        wide = x.dtype == torch.float64
        w, c = (weight.double(), bias.double()) if wide else (weight, bias)
        y = function(x, w, c, a, b, SCALING)
        return torch.cat([y, y * 2], -1).transpose(0, 1)

    for x in (whole[:, 1, 10:50], whole[..., ::2][..., :40], whole.transpose(0, 1)[..., :40]):
        assert_fused(partial(apply, lora.lora_linear), partial(apply, reference.lora_linear), [x, a, b], range(3))


def test_a_frozen_input_gets_no_gradient(launches: Counter[str]) -> None:
    """As in the first layer, whose input is the frozen embedding's; and the weight's is never computed."""
    x, weight, bias, a, b = layer(6, 16, 24, 4, torch.float32)
    a.requires_grad_()
    b.requires_grad_()
    lora.lora_linear(x, weight, bias, a, b, SCALING).sum().backward()
    assert x.grad is None
    assert weight.grad is None
    assert bias.grad is None
    assert a.grad is not None
    assert b.grad is not None
    a.requires_grad_(False).grad = None
    x.requires_grad_()
    lora.lora_linear(x, weight, bias, a, b, SCALING).sum().backward()
    assert a.grad is None
    assert x.grad is not None


def test_a_weight_is_asked_for_once_a_pass_and_not_kept(launches: Counter[str]) -> None:
    x, weight, bias, a, b = layer(6, 16, 24, 4, torch.bfloat16)
    asked: list[torch.dtype] = []

    def give(dtype: torch.dtype) -> Tensor:
        asked.append(dtype)
        return weight.clone()

    x.requires_grad_()
    y = lora.lora_linear(x, give, bias, a.requires_grad_(), b.requires_grad_(), SCALING)
    assert asked == [torch.bfloat16]
    assert all(kept.shape != weight.shape for kept in y.grad_fn.saved_tensors)
    weight.mul_(2)  # the backward pass reads it anew
    y.sum().backward()
    assert asked == [torch.bfloat16] * 2
    expected = torch.ones_like(y) @ weight + SCALING * (torch.ones_like(y) @ b @ a)
    torch.testing.assert_close(x.grad, expected, rtol=2e-2, atol=2e-2)


def test_the_output_may_be_changed_in_place(launches: Counter[str]) -> None:
    """As Olmo does, which clamps queries, keys and values."""
    x, weight, bias, a, b = layer(6, 16, 24, 4, torch.float32)
    x.requires_grad_()
    lora.lora_linear(x.view(2, 3, 16), weight, bias, a, b, SCALING).clamp_(-0.5, 0.5).sum().backward()
    inside = reference.lora_linear(x.detach(), weight, bias, a, b, SCALING).abs() < 0.5
    torch.testing.assert_close(x.grad, inside.float() @ (weight + SCALING * b @ a))


def test_fakes_lie_as_the_gradients_do(launches: Counter[str]) -> None:
    """Also of inputs whose numbers do not follow each other: torch.compile counts on strides."""
    op = torch.ops.launcher_kernels.lora_gradients
    given = [draw(*shape, dtype=torch.float32).t() for shape in ((24, 6), (4, 6), (4, 24))]
    with FakeTensorMode() as mode:
        fakes = op(*(mode.from_tensor(x) for x in given), SCALING)
    assert [x.stride() for x in op(*given, SCALING)] == [x.stride() for x in fakes]


def test_torch_finds_the_op_well_made(launches: Counter[str]) -> None:
    given = [draw(*shape, dtype=torch.bfloat16) for shape in ((20, 40), (20, 8), (40, 8))]
    torch.library.opcheck(torch.ops.launcher_kernels.lora_gradients.default, (*given, SCALING))


def test_compiled(launches: Counter[str]) -> None:
    inputs = layer(6, 16, 24, 4, torch.float32)
    results = []
    apply = partial(lora.lora_linear, scaling=SCALING)
    for function in (torch.compile(apply, backend="aot_eager", fullgraph=True), apply):
        given = [x.clone().requires_grad_(i in (0, 3, 4)) for i, x in enumerate(inputs)]
        y = function(*given)
        y.square().sum().backward()
        results.append([y, *(given[i].grad for i in (0, 3, 4))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_without_a_gpu_it_is_pytorch() -> None:
    inputs = layer(6, 16, 24, 4, torch.bfloat16)
    found, expected = (module.lora_linear(*inputs, SCALING) for module in (lora, reference))
    assert torch.equal(found, expected)
