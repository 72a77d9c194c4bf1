"""E9 of the norms, alone and after a residual addition."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from launcher_kernels import norm, reference
from tests.fused import DTYPES, assert_fused

EPS = 1e-5
RMS = {
    "llama": {"offset": 0.0, "casting": "llama"},
    "gemma": {"offset": 1.0, "casting": "gemma"},
    "olmo2": {"offset": 0.0, "casting": "gemma"},
}
SHAPES = [(1, 8), (3, 7), (5, 128), (2, 3, 96), (33, 257), (4, 1030)]


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("form", RMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(shape: tuple[int, ...], form: str, dtype: torch.dtype, launches: Counter[str]) -> None:
    x, weight = draw(*shape, dtype=dtype), draw(shape[-1], dtype=dtype, seed=1)
    fused = partial(norm.rms_norm, eps=EPS, **RMS[form])
    assert_fused(fused, partial(reference.rms_norm, eps=EPS, **RMS[form]), [x, weight], [0, 1])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("form", RMS)
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_add_rms_norm(shape: tuple[int, ...], form: str, dtype: torch.dtype, launches: Counter[str]) -> None:
    inputs = [draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=2), draw(shape[-1], dtype=dtype, seed=1)]
    fused = partial(norm.add_rms_norm, eps=EPS, **RMS[form])
    assert_fused(fused, partial(reference.add_rms_norm, eps=EPS, **RMS[form]), inputs, [0, 1, 2])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_layer_norm(shape: tuple[int, ...], bias: bool, dtype: torch.dtype, launches: Counter[str]) -> None:
    inputs = [draw(*shape, dtype=dtype) + 3, draw(shape[-1], dtype=dtype, seed=1)]
    inputs += [draw(shape[-1], dtype=dtype, seed=2)] if bias else []

    def apply(function, x, weight, bias=None):  # type: ignore[no-untyped-def]
        return function(x, weight, bias, EPS)

    fused, eager = partial(apply, norm.layer_norm), partial(apply, reference.layer_norm)
    assert_fused(fused, eager, inputs, range(len(inputs)))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_add_layer_norm(dtype: torch.dtype, launches: Counter[str]) -> None:
    inputs = [draw(5, 96, dtype=dtype), draw(5, 96, dtype=dtype, seed=3)]
    inputs += [draw(96, dtype=dtype, seed=1), draw(96, dtype=dtype, seed=2)]
    assert_fused(partial(norm.add_layer_norm, eps=EPS), partial(reference.add_layer_norm, eps=EPS), inputs, range(4))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(8, 300), st.sampled_from(sorted(DTYPES)), st.integers(0, 99))
def test_any_shape(launches: Counter[str], num_rows: int, hidden: int, dtype: str, seed: int) -> None:
    x, weight = draw(num_rows, hidden, dtype=DTYPES[dtype], seed=seed), draw(hidden, dtype=DTYPES[dtype], seed=seed + 1)
    assert_fused(partial(norm.rms_norm, eps=EPS), partial(reference.rms_norm, eps=EPS), [x, weight], [0, 1])


def test_long_rows_take_two_kernels(launches: Counter[str]) -> None:
    x, weight, bias = draw(67, 9000, dtype=torch.bfloat16), *draw(2, 9000, dtype=torch.bfloat16, seed=1)
    assert_fused(partial(norm.rms_norm, eps=EPS), partial(reference.rms_norm, eps=EPS), [x, weight], [0, 1])
    fused, eager = (partial(module.layer_norm, eps=EPS) for module in (norm, reference))
    assert_fused(fused, eager, [x[:35] + 3, weight, bias], range(3))
    assert launches["norm_backward_weight"] > 1


def test_rows_with_gaps(launches: Counter[str]) -> None:
    """Slices and transposes of a larger tensor, whose rows do not follow each other."""
    whole, weight = draw(6, 8, 200, dtype=torch.float32), draw(64, dtype=torch.float32, seed=1)
    for x in (whole[:, 1, 10:74], whole[..., ::3][..., :64], whole.transpose(0, 1)[..., :64]):
        assert_fused(partial(norm.rms_norm, eps=EPS), partial(reference.rms_norm, eps=EPS), [x, weight], [0, 1])


@pytest.mark.parametrize("casting", ["llama", "gemma"])
def test_roundings_are_those_of_eager(casting: norm.Casting, launches: Counter[str]) -> None:
    """Fewer of them would pass for closer to the truth."""
    x, residual, weight = (
        draw(*shape, dtype=torch.bfloat16, seed=i) for i, shape in enumerate([(9, 96)] * 2 + [(96,)])
    )
    found, eager = (module.add_rms_norm(x, residual, weight, EPS, casting=casting) for module in (norm, reference))
    assert torch.equal(found[1], eager[1])
    assert (found[0] == eager[0]).float().mean() > 0.995
    assert torch.equal(found[0], norm.rms_norm(eager[1], weight, EPS, casting=casting))


def test_weights_with_gaps(launches: Counter[str]) -> None:
    x, pairs = draw(5, 96, dtype=torch.float32), draw(96, 2, dtype=torch.float32, seed=1)
    fused, eager = (partial(module.layer_norm, eps=EPS) for module in (norm, reference))
    assert_fused(fused, eager, [x, pairs[:, 0], pairs[:, 1]], range(3))
    assert_fused(fused, eager, [x, pairs[:1, 0].expand(96), pairs[:1, 1].expand(96)], range(3))


def test_what_does_not_fit_goes_through_pytorch(launches: Counter[str]) -> None:
    """A residual or a bias that is broadcast or promoted, and a weight of another size."""
    x, weight, before = draw(5, 96, dtype=torch.bfloat16), draw(96, dtype=torch.bfloat16), Counter(launches)
    for residual in (x[:1], x.float()):
        expected = reference.add_rms_norm(x, residual, weight, EPS)
        found = norm.add_rms_norm(x, residual, weight, EPS)
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(RuntimeError):
        norm.layer_norm(x, weight, weight.float(), EPS)
    with pytest.raises(RuntimeError):
        norm.rms_norm(x, weight[:8], EPS)
    assert launches == before
    norm.rms_norm(x, weight, EPS)


def test_the_weight_gradient_is_the_same_bits(launches: Counter[str]) -> None:
    weight = draw(96, dtype=torch.float32, seed=1)
    gradients = []
    for _ in range(2):
        trained = weight.clone().requires_grad_()
        norm.rms_norm(draw(50, 96, dtype=torch.float32), trained, EPS).square().sum().backward()
        gradients.append(trained.grad)
    assert torch.equal(gradients[0], gradients[1])


def test_a_frozen_weight_gets_no_gradient(launches: Counter[str]) -> None:
    x = draw(4, 32, dtype=torch.float32).requires_grad_()
    weight = draw(32, dtype=torch.float32, seed=1)
    norm.rms_norm(x, weight, EPS).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_only_the_sum_goes_on(launches: Counter[str]) -> None:
    """The last layer's norm may be of no use to anyone, but its sum is."""
    x, residual, weight = (draw(4, 32, dtype=torch.float32, seed=i).requires_grad_() for i in range(3))
    norm.add_rms_norm(x, residual, weight[0], EPS)[1].sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(residual.grad, torch.ones_like(x))


def test_torch_finds_the_ops_well_made(launches: Counter[str]) -> None:
    """Schema, fake and autograd registration, as torch.compile will rely on them."""
    x, residual, weight = (draw(4, 32, dtype=torch.float32, seed=i).requires_grad_() for i in range(3))
    arguments = (x, residual, weight[0].detach().requires_grad_(), None, EPS, False, True, 0.0)
    torch.library.opcheck(torch.ops.launcher_kernels.norm.default, arguments)


def test_compiled(launches: Counter[str]) -> None:
    x, weight = draw(4, 32, dtype=torch.float32), draw(32, dtype=torch.float32, seed=1)
    compiled = torch.compile(lambda a, b: norm.rms_norm(a, b, EPS) * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, weight), norm.rms_norm(x, weight, EPS) * 2)


def test_without_a_gpu_it_is_pytorch() -> None:
    x, weight = draw(4, 32, dtype=torch.bfloat16), draw(32, dtype=torch.bfloat16, seed=1)
    assert torch.equal(norm.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS))
