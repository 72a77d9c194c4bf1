"""Dequantized 4-bit weights, to the bit what bitsandbytes makes of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from launcher.model.nf4 import arguments_of
from launcher_kernels.nf4 import dequantize_nf4
from tests.fused import DTYPES

SHAPES = [(1, 4), (7, 10), (64, 64), (3, 1000), (130, 250)]
"""With rows of a multiple of the block size, or of no multiple of 16: others bitsandbytes' CPU code gets wrong."""


def quantized(
    *shape: int, dtype: torch.dtype, double: bool = True, block_size: int = 64, storage: torch.dtype = torch.uint8,
    quant_type: str = "nf4", seed: int = 0,
) -> tuple[Tensor, Any]:  # fmt: skip
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    packed, state = quantize_4bit(
        weight.to(dtype), blocksize=block_size, compress_statistics=double, quant_type=quant_type, quant_storage=storage
    )
    return packed, state


def assert_same_bits(packed: Tensor, state: Any) -> None:
    from bitsandbytes.functional import dequantize_4bit

    with torch.compiler.set_stance("force_eager"):  # bitsandbytes compiles its path for odd shapes, each anew
        expected = dequantize_4bit(packed, state)
    found = dequantize_nf4(packed, dtype=state.dtype, **arguments_of(state))
    assert found.dtype == expected.dtype == state.dtype
    assert found.shape == expected.shape
    as_bits = torch.int32 if state.dtype == torch.float32 else torch.int16
    assert torch.equal(found.view(as_bits), expected.view(as_bits))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_are_those_of_bitsandbytes(
    shape: tuple[int, int], double: bool, dtype: torch.dtype, launches: Counter[str]
) -> None:
    assert_same_bits(*quantized(*shape, dtype=dtype, double=double))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_more_blocks_than_one_scale_has(dtype: torch.dtype, launches: Counter[str]) -> None:
    """256 blocks share a scale: here are 293, the last of them short, in three programs."""
    packed, state = quantized(75, 250, dtype=dtype)
    assert len(state.absmax) == 293
    assert len(state.state2.absmax) == 2
    before = launches["nf4_dequantize"]
    assert_same_bits(packed, state)
    assert launches["nf4_dequantize"] == before + 1


@pytest.mark.parametrize("block_size", [32, 128, 256, 512, 1024])
def test_block_sizes(block_size: int, launches: Counter[str]) -> None:
    assert_same_bits(*quantized(37, 100, dtype=torch.bfloat16, block_size=block_size))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bytes_in_tensors_of_any_dtype(storage: torch.dtype, launches: Counter[str]) -> None:
    packed, state = quantized(24, 40, dtype=torch.bfloat16, storage=storage)
    assert packed.dtype == storage
    assert_same_bits(packed, state)


def test_an_odd_number_of_values(launches: Counter[str]) -> None:
    """The last byte holds one."""
    packed, state = quantized(7, 9, dtype=torch.float32)
    assert packed.numel() == 32
    assert_same_bits(packed, state)


def test_fp4_is_another_code(launches: Counter[str]) -> None:
    """Which has two zeros: bitsandbytes' CPU code makes them of other signs than its table says."""
    from bitsandbytes.functional import dequantize_4bit

    packed, state = quantized(8, 50, dtype=torch.bfloat16, quant_type="fp4")
    found = dequantize_nf4(packed, dtype=torch.bfloat16, **arguments_of(state))
    assert torch.equal(found, dequantize_4bit(packed, state))


@pytest.mark.parametrize("columns", [16, 48, 208])
def test_rows_that_end_within_a_block(columns: int, launches: Counter[str]) -> None:
    """On CPUs with AVX512 bitsandbytes 0.50.2 multiplies such rows by other rows' absmax: off by 48% to 98%."""
    packed, state = quantized(64, columns, dtype=torch.float32)
    found = dequantize_nf4(packed, dtype=torch.float32, **arguments_of(state))
    state.shape = torch.Size((columns, 64))  # the same numbers in the same order, in rows that it gets right
    assert_same_bits(packed, state)
    assert torch.equal(found.flatten(), dequantize_nf4(packed, dtype=torch.float32, **arguments_of(state)).flatten())


COLUMNS = st.integers(1, 150).map(lambda half: 2 * half).filter(lambda columns: columns % 16 or not columns % 128)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(2, 40), COLUMNS, st.sampled_from(sorted(DTYPES)), st.booleans(), st.sampled_from([64, 128]),
    st.integers(0, 99),
)  # fmt: skip
def test_any_shape(
    launches: Counter[str], num_rows: int, columns: int, dtype: str, double: bool, block_size: int, seed: int
) -> None:
    assert_same_bits(
        *quantized(num_rows, columns, dtype=DTYPES[dtype], double=double, block_size=block_size, seed=seed)
    )


def test_a_product_and_a_sum_are_two_roundings() -> None:
    """As one fused multiply-add, a tenth of all absmax would be others: the kernel is compiled without them."""
    _, state = quantized(256, 64, dtype=torch.float32)
    factor = state.state2.code[state.absmax.long()].double() * state.state2.absmax.double()
    contracted = (factor + state.offset.double()).float()
    rounded = factor.float() + state.offset
    share = (contracted != rounded).double().mean().item()
    assert 0.02 < share < 0.5


def test_no_values(launches: Counter[str]) -> None:
    arguments = {"absmax": torch.empty(0), "shape": (0, 8), "code": torch.zeros(16)}
    assert dequantize_nf4(torch.empty(0, dtype=torch.uint8), dtype=torch.bfloat16, **arguments).shape == (0, 8)
    assert_same_bits(*quantized(4, 8, dtype=torch.bfloat16))


def test_torch_finds_the_op_well_made(launches: Counter[str]) -> None:
    packed, state = quantized(8, 16, dtype=torch.bfloat16)
    second = state.state2
    arguments = (packed, state.code, state.absmax, [8, 16], torch.bfloat16, 64)
    arguments += (second.code, second.absmax, state.offset, 256)
    torch.library.opcheck(torch.ops.launcher_kernels.dequantize_nf4.default, arguments)


def test_compiled(launches: Counter[str]) -> None:
    packed, state = quantized(8, 16, dtype=torch.bfloat16)

    def twice(bytes_: Tensor) -> Tensor:
        return dequantize_nf4(bytes_, dtype=torch.bfloat16, **arguments_of(state)) * 2

    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(packed), twice(packed))


def test_without_a_gpu_it_is_pytorch() -> None:
    for dtype in DTYPES.values():
        assert_same_bits(*quantized(130, 250, dtype=dtype))
