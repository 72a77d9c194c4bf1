"""E9 of the gated linear units."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from launcher_kernels import glu, reference
from tests.fused import DTYPES, assert_fused

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
SHAPES = [(1, 48), (3, 7), (2, 3, 96), (5, 1030)]


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(3).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_glu(shape: tuple[int, ...], activation: glu.Activation, dtype: torch.dtype, launches: Counter[str]) -> None:
    inputs = [draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)]
    assert_fused(partial(glu.glu, activation=activation), partial(reference.glu, activation=activation), inputs, [0, 1])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_glu_packed(
    shape: tuple[int, ...], activation: glu.Activation, dtype: torch.dtype, launches: Counter[str]
) -> None:
    inputs, before = [draw(*shape[:-1], 2 * shape[-1], dtype=dtype)], Counter(launches)
    fused, eager = (partial(module.glu_packed, activation=activation) for module in (glu, reference))
    assert_fused(fused, eager, inputs, [0])
    assert launches - before == {"glu_forward": 1, "glu_backward": 1}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 40), st.integers(1, 300), st.sampled_from(ACTIVATIONS), st.booleans(),
    st.sampled_from(sorted(DTYPES)), st.integers(0, 99),
)  # fmt: skip
def test_any_shape(
    launches: Counter[str], num_rows: int, columns: int, activation: str, packed: bool, dtype: str, seed: int
) -> None:
    gate_up = draw(num_rows, 2 * columns, dtype=DTYPES[dtype], seed=seed)
    inputs = [gate_up] if packed else list(gate_up.chunk(2, -1))
    fused, eager = (
        partial(module.glu_packed if packed else module.glu, activation=activation) for module in (glu, reference)
    )
    assert_fused(fused, eager, inputs, range(len(inputs)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_from_zero(activation: glu.Activation, launches: Counter[str]) -> None:
    """Where exp overflows and tanh is one, and where 1 + tanh and 1 + erf cancel."""
    gate = torch.cat([torch.linspace(-120, 120, 97), torch.tensor([-1e4, -20.0, 0.0, 1e4])])
    inputs = [gate, draw(*gate.shape, dtype=torch.float32, seed=1)]
    assert_fused(partial(glu.glu, activation=activation), partial(reference.glu, activation=activation), inputs, [0, 1])


def test_the_activation_is_rounded_before_the_product(launches: Counter[str]) -> None:
    """As eager rounds it, the product of two bf16 numbers is the same bits."""
    gate, up = draw(8, 64, dtype=torch.bfloat16), draw(8, 64, dtype=torch.bfloat16, seed=1)
    same = (glu.glu(gate, up) == reference.glu(gate, up)).float().mean()
    assert same > 0.99


def test_rows_with_gaps(launches: Counter[str]) -> None:
    """Halves of one projection, transposes, and columns that do not follow each other."""
    whole = draw(4, 6, 192, dtype=torch.float32)
    for gate, up in (
        whole.chunk(2, -1),
        (whole[:, 1, 10:74], whole[:, 4, 100:164]),
        (whole.transpose(0, 1)[..., :64], whole.transpose(0, 1)[..., 64:128]),
        (whole[..., ::3], whole[..., 1::3]),
    ):
        assert_fused(glu.glu, reference.glu, [gate, up], [0, 1])
    assert_fused(glu.glu_packed, reference.glu_packed, [whole.transpose(0, 1)[..., 5:105]], [0])


def test_halves_are_read_where_they_lie(launches: Counter[str]) -> None:
    """Slices of gate_up share its memory, and `rows` copies none of them."""
    gate_up = draw(4, 6, 192, dtype=torch.float32)
    for half in gate_up.chunk(2, -1):
        assert glu.rows(half).untyped_storage().data_ptr() == gate_up.untyped_storage().data_ptr()
    glu.glu_packed(gate_up)


def test_a_gradient_without_strides(launches: Counter[str]) -> None:
    gate, up = (draw(3, 32, dtype=torch.float32, seed=i).requires_grad_() for i in range(2))
    glu.glu(gate, up).sum().backward()
    torch.testing.assert_close(up.grad, torch.nn.functional.silu(gate.detach()))


def test_inputs_and_gradients_are_left_alone(launches: Counter[str]) -> None:
    """Liger#370: gradients written over what others still read."""
    gate, up = (draw(3, 32, dtype=torch.float32, seed=i).requires_grad_() for i in range(2))
    slope = draw(3, 32, dtype=torch.float32, seed=2)
    before = [x.detach().clone() for x in (gate, up, slope)]
    glu.glu(gate, up).backward(slope)
    assert all(torch.equal(x, y) for x, y in zip((gate.detach(), up.detach(), slope), before, strict=True))


def test_only_the_inputs_are_kept(launches: Counter[str]) -> None:
    kept: list[Tensor] = []
    gate, up = (draw(3, 32, dtype=torch.float32, seed=i).requires_grad_() for i in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        glu.glu(gate, up)
    assert {x.data_ptr() for x in kept} == {gate.data_ptr(), up.data_ptr()}


def test_a_frozen_half_gets_no_gradient(launches: Counter[str]) -> None:
    gate, up = (draw(3, 32, dtype=torch.float32, seed=i) for i in range(2))
    glu.glu(gate.requires_grad_(), up).sum().backward()
    assert gate.grad is not None
    assert up.grad is None


def test_no_rows(launches: Counter[str]) -> None:
    gate_up, before = torch.empty(2, 0, 32, requires_grad=True), Counter(launches)
    glu.glu_packed(gate_up).sum().backward()
    assert gate_up.grad.shape == (2, 0, 32)
    assert launches == before
    glu.glu_packed(torch.ones(1, 32))


def test_torch_finds_the_ops_well_made(launches: Counter[str]) -> None:
    """Schema, fake and autograd registration, as torch.compile will rely on them."""
    gate, up = (draw(4, 32, dtype=torch.float32, seed=i).requires_grad_() for i in range(2))
    torch.library.opcheck(torch.ops.launcher_kernels.glu.default, (gate, up, "silu"))
    torch.library.opcheck(torch.ops.launcher_kernels.glu_packed.default, (gate, "gelu_tanh"))


def test_compiled(launches: Counter[str]) -> None:
    gate_up = draw(4, 32, dtype=torch.float32)
    compiled = torch.compile(lambda x: glu.glu_packed(x, "gelu") * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(gate_up), glu.glu_packed(gate_up, "gelu") * 2)


def test_without_a_gpu_it_is_pytorch() -> None:
    gate, up = draw(4, 32, dtype=torch.bfloat16), draw(4, 32, dtype=torch.bfloat16, seed=1)
    assert torch.equal(glu.glu(gate, up, "gelu"), reference.glu(gate, up, "gelu"))
    assert torch.equal(glu.glu_packed(gate, "gelu_tanh"), reference.glu_packed(gate, "gelu_tanh"))
