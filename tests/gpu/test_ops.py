"""E9 of every op on a GPU: the contests of kernels/bench at real shapes in bf16, and tiny odd ones in every dtype."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch

from launcher_kernels import dispatch
from tests.fused import DTYPES

pytestmark = pytest.mark.gpu
OPS = ("norm", "rope", "glu", "linear_cross_entropy", "attention", "nf4", "lora")


def contests(dry: bool) -> list:  # type: ignore[type-arg]
    return [each for op in OPS for each in importlib.import_module(f"timed_{op}").contests(dry)]


@pytest.fixture(autouse=True)
def freed() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def assert_ours(contest, dtype: torch.dtype, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    from contest import OURS, Draw, Truth, check

    inputs = contest.inputs(Draw(device, dtype))
    truth = Truth(contest, inputs)
    before = dispatch.launches.total()
    verdict = check(contest, OURS, contest.contenders[OURS](inputs), inputs, truth)
    assert verdict.state == "right", verdict.why
    assert dispatch.launches.total() > before, "no kernel ran: PyTorch was compared with itself"


@pytest.mark.parametrize("contest", contests(dry=False), ids=lambda contest: contest.key)
def test_real_shapes(contest, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    """T = 8192 tokens at the sizes of Llama 3 8B and 70B; float64 takes up to 50 GB of the device's memory."""
    if torch.cuda.get_device_properties(device).total_memory < 70e9:
        pytest.skip("the float64 truth needs a GPU of 80 GB")
    assert_ours(contest, torch.bfloat16, device)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("contest", contests(dry=True), ids=lambda contest: contest.key)
def test_odd_shapes(contest, dtype: torch.dtype, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    if dtype != torch.bfloat16 and (contest.op == "nf4" or "QLoRA" in contest.name):
        pytest.skip("the contest's 4-bit weight is for bf16")
    assert_ours(contest, dtype, device)


def test_a_row_past_two_to_the_31_numbers(device: torch.device) -> None:
    """Offsets are 64-bit: 2.2e9 numbers in one tensor."""
    from launcher_kernels import norm, reference

    num_rows, hidden = 2**19 + 3, 4096
    x = torch.zeros(num_rows, hidden, dtype=torch.bfloat16, device=device)
    x[-5:] = torch.randn(5, hidden, device=device)
    weight = torch.randn(hidden, device=device).bfloat16()
    y = norm.rms_norm(x, weight, 1e-5)
    expected = reference.rms_norm(x[-5:], weight, 1e-5)
    assert torch.allclose(y[-5:].float(), expected.float(), rtol=1e-2, atol=1e-2)


def test_weight_gradients_are_the_same_bits(device: torch.device) -> None:
    from launcher_kernels import norm

    torch.manual_seed(0)
    x, weight = torch.randn(8192, 4096, device=device).bfloat16(), torch.randn(4096, device=device).bfloat16()
    slope, found = torch.randn_like(x), []
    for _ in range(3):
        trained = weight.clone().requires_grad_()
        norm.rms_norm(x, trained, 1e-5).backward(slope)
        found.append(trained.grad)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
