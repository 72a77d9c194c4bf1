"""E9 of the head's loss, and that it never holds all logits. T hidden states, S supervised, H hidden, V vocabulary."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from launcher_kernels import linear_cross_entropy as op
from launcher_kernels import reference
from tests.fused import DTYPES, assert_e9, assert_fused

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "granite": {"logit_scale": 0.125},
    "gemma": {"softcap": 4.0},
    "all": {"logit_scale": 0.5, "softcap": 30.0, "label_smoothing": 0.1, "z_loss": 1e-2},
}


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some(num_rows: int, vocabulary: int, seed: int = 0) -> Tensor:
    return torch.randint(vocabulary, (num_rows,), generator=torch.Generator().manual_seed(seed))


def pair(**options: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The op and its reference as functions of hidden states, weight and maybe bias."""

    def apply(function, hidden, weight, bias=None):  # type: ignore[no-untyped-def]
        given = dict(options)
        targets = given.pop("targets")
        return function(hidden, weight, targets, bias=bias, **given)

    return partial(apply, op.linear_cross_entropy), partial(apply, reference.linear_cross_entropy)


@contextlib.contextmanager
def allocations() -> Iterator[list[int]]:
    """Bytes that are taken and, below zero, given back inside, in their order; known afterwards."""
    sizes: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        yield sizes
    sizes += [event.nbytes() for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "CHUNK_ROWS", 3)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_one_chunk(form: str, dtype: torch.dtype, launches: Counter[str]) -> None:
    inputs = [draw(6, 24, dtype=dtype), draw(301, 24, dtype=dtype, seed=1)]
    assert_fused(*pair(targets=some(6, 301), **FORMS[form]), inputs, [0, 1])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("form", ["plain", "all"])
def test_some_rows_in_chunks(form: str, dtype: torch.dtype, launches: Counter[str], small_chunks: None) -> None:
    """Supervised rows of many, out of order, weighted, with a bias, in chunks of 3, 3 and 1."""
    inputs = [draw(15, 24, dtype=dtype), draw(320, 24, dtype=dtype, seed=1), draw(320, dtype=dtype, seed=2)]
    options = {"index": torch.tensor([14, 2, 3, 7, 0, 11, 8]), "row_weights": draw(7, seed=3).abs(), **FORMS[form]}
    assert_fused(*pair(targets=some(7, 320), **options), inputs, [0, 1, 2])
    assert launches["cross_entropy"] >= 3


@pytest.mark.parametrize("vocabulary", [2, 7, 64, 1030, 5003])
def test_any_vocabulary(vocabulary: int, launches: Counter[str]) -> None:
    inputs = [draw(3, 16, dtype=torch.bfloat16), draw(vocabulary, 16, dtype=torch.bfloat16, seed=1)]
    assert_fused(*pair(targets=some(3, vocabulary)), inputs, [0, 1])


# Where a gradient has only five numbers, eager in fp32 may by chance be three times as exact as usual: 3 x 16 at least,
# and the same examples in every run.
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(3, 9), st.integers(16, 40), st.integers(2, 400), st.sampled_from(sorted(DTYPES)),
    st.sampled_from(sorted(FORMS)), st.integers(0, 99),
)  # fmt: skip
def test_any_shape(
    launches: Counter[str], small_chunks: None, num_rows: int, hidden: int, vocabulary: int, dtype: str, form: str,
    seed: int,
) -> None:  # fmt: skip
    inputs = [draw(n, hidden, dtype=DTYPES[dtype], seed=seed + n) for n in (num_rows, vocabulary)]
    assert_fused(*pair(targets=some(num_rows, vocabulary, seed), **FORMS[form]), inputs, [0, 1])


def test_states_and_weights_with_gaps(launches: Counter[str]) -> None:
    whole, heads = draw(5, 2, 48), draw(24, 130, seed=1)
    for options in ({}, {"index": torch.tensor([4, 1])}):
        targets = some(2 if options else 5, 130)
        assert_fused(*pair(targets=targets, **options), [whole[:, 1, ::2], heads.t()], [0, 1])


def test_targets_and_row_weights_with_gaps(launches: Counter[str]) -> None:
    """Columns of tables, and one number seen many times."""
    inputs, table = [draw(6, 24), draw(130, 24, seed=1)], torch.stack([torch.randperm(6), some(6, 130)], -1)
    options = {"index": table[:, 0], "targets": table[:, 1], "row_weights": draw(6, 2, seed=3).abs()[:, 1]}
    assert_fused(*pair(**options), inputs, [0, 1])
    options = {"targets": torch.tensor(7).expand(6), "row_weights": torch.tensor(0.5).expand(6)}
    assert_fused(*pair(**options), inputs, [0, 1])


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has none of its own")
def test_as_torch_has_it(launches: Counter[str]) -> None:
    """A second witness, and not by our own hand."""
    targets = some(6, 203)
    ours, theirs = ([draw(6, 24).requires_grad_(), draw(203, 24, seed=1).requires_grad_()] for _ in range(2))
    found = op.linear_cross_entropy(*ours, targets, label_smoothing=0.1)[0]
    expected = F.linear_cross_entropy(*theirs, targets, reduction="sum", label_smoothing=0.1)
    (found * 0.7).backward()
    (expected * 0.7).backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_first_of_equals_is_the_most_likely(dtype: torch.dtype, launches: Counter[str]) -> None:
    """Rows of small whole numbers, full of ties; each target in turn, as torch's max on a CPU has it."""
    logits = torch.randint(4, (4, 150), generator=torch.Generator().manual_seed(0))
    logits[0] = 1
    logits[1, 100:] = 9
    logits[2, 17] = logits[2, 18] = logits[2, 140] = 9
    head, hidden = logits.t().to(dtype), torch.eye(4, dtype=dtype)
    candidates = [(row, target) for row in range(3) for target in (0, 1, 16, 17, 18, 99, 100, 101, 140)]
    candidates += [(row, int(logits[row].argmax())) for row in range(4)]
    for row, target in candidates:
        _, _, correct = op.linear_cross_entropy(hidden, head, torch.tensor([target]), index=torch.tensor([row]))
        assert correct.item() == (logits[row].max(0).indices.item() == target), (row, target)


def test_extreme_logits_stay_finite(launches: Counter[str]) -> None:
    """Huge logits, and columns that a bias of -inf forbids."""
    weight, bias = torch.tensor([[1e4, -1e37], [-1e4, 1e37], [0.0, 0.0], [0.0, 0.0]]), torch.zeros(4)
    bias[3] = -math.inf
    hidden = torch.eye(2, requires_grad=True)
    loss, _, correct = op.linear_cross_entropy(hidden, weight, torch.tensor([0, 1]), bias=bias)
    loss.backward()
    assert (loss.item(), correct.item()) == (0.0, 2.0)
    assert torch.equal(hidden.grad, torch.zeros(2, 2))


@pytest.mark.parametrize("target", [-100, 30, 2**40])
def test_a_target_outside_of_the_vocabulary_is_no_loss(target: int, launches: Counter[str]) -> None:
    hidden = draw(2, 8).requires_grad_()
    loss, _, correct = op.linear_cross_entropy(hidden, draw(30, 8, seed=1), torch.tensor([3, target]))
    loss.backward()
    assert math.isnan(loss.item())
    assert correct.item() <= 1
    assert hidden.grad.isnan().all(dim=1).tolist() == [False, True]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_no_supervised_row_is_a_loss_of_zero_with_gradients_of_zero(dtype: torch.dtype, launches: Counter[str]) -> None:
    """The micro batch of a rank that has nothing left to learn: it must join the backward, and add nothing."""
    inputs = [draw(n, 8, dtype=dtype, seed=n).requires_grad_() for n in (4, 30)]
    inputs.append(draw(30, dtype=dtype).requires_grad_())
    nothing = torch.empty(0, dtype=torch.int64)
    outputs = op.linear_cross_entropy(*inputs[:2], nothing, index=nothing, bias=inputs[2])
    (outputs[0] * 7.0).backward()
    assert [x.item() for x in outputs] == [0.0, 0.0, 0.0]
    for x in inputs:
        assert torch.equal(x.grad, torch.zeros_like(x))


def test_gradients_that_nobody_needs_are_not_made(launches: Counter[str]) -> None:
    hidden, weight, targets = draw(4, 8), draw(30, 8, seed=1), some(4, 30)
    for kept in ((True, False), (False, True)):
        a, b = hidden.clone().requires_grad_(kept[0]), weight.clone().requires_grad_(kept[1])
        op.linear_cross_entropy(a, b, targets)[0].backward()
        assert (a.grad is not None, b.grad is not None) == kept
    for needed in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
        made = op._linear_cross_entropy(hidden, weight, targets, None, None, None, 1.0, None, 0.0, 0.0, *needed)[2:]
        assert tuple(x.numel() > 0 for x in made) == needed


def test_evaluation_makes_no_gradient(launches: Counter[str]) -> None:
    hidden, weight, targets = draw(4, 200).requires_grad_(), draw(30, 200, seed=1).requires_grad_(), some(4, 30)
    trained = op.linear_cross_entropy(hidden, weight, targets, softcap=5.0)
    with torch.no_grad(), allocations() as sizes:
        evaluated = op.linear_cross_entropy(hidden, weight, targets, softcap=5.0)
    assert max(sizes) == 4 * 64 * 4, "more than the logits, whose rows are padded to 64"
    assert not evaluated[0].requires_grad
    assert [x.item() for x in evaluated] == [x.item() for x in trained]


def test_the_weight_is_read_in_the_forward_only(launches: Counter[str]) -> None:
    """ZeRO-3 has let go of it when the backward comes; and a second backward finds the gradients as they were."""
    weight = draw(30, 8, seed=1).requires_grad_()
    loss = op.linear_cross_entropy(draw(4, 8), weight, some(4, 30))[0]
    with torch.no_grad():
        weight.zero_()
    (first,) = torch.autograd.grad(loss * 3.0, weight, retain_graph=True)
    (second,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(first, second * 3.0)
    assert first.abs().max() > 0.1


def test_two_micro_batches_add_up_as_one(launches: Counter[str]) -> None:
    hidden, targets = draw(6, 8), some(6, 30)
    gradients = []
    for parts in ([slice(0, 6)], [slice(0, 2), slice(2, 6)]):
        weight = draw(30, 8, seed=1).requires_grad_()
        losses = [op.linear_cross_entropy(hidden[part], weight, targets[part])[0] for part in parts]
        (sum(losses) * 0.25).backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients)


def test_tied_embeddings(launches: Counter[str]) -> None:
    """The head's weight is the embedding's: both gradients arrive in it."""
    tokens, targets = some(5, 30, seed=4), some(5, 30)

    def tied(function: Callable[..., Any], weight: Tensor) -> Tensor:
        loss: Tensor = function(torch.tanh(F.embedding(tokens, weight)), weight, targets)[0]
        return loss

    fused, eager = partial(tied, op.linear_cross_entropy), partial(tied, reference.linear_cross_entropy)
    assert_fused(fused, eager, [draw(30, 8, seed=1)], [0])


def test_checkpointed(launches: Counter[str]) -> None:
    inputs = [draw(4, 8), draw(30, 8, seed=1)]
    targets = some(4, 30)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return op.linear_cross_entropy(torch.tanh(hidden), weight, targets)[0] * 0.5

    plain, again = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    loss(*plain).backward()
    checkpoint(loss, *again, use_reentrant=False).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain, again, strict=True))


def test_sums_beyond_fp16_do_not_overflow(launches: Counter[str]) -> None:
    """A weight gradient of 120000 that the mean's factor brings back to 15000."""
    hidden, weight = torch.full((8, 1), 30000.0, dtype=torch.float16), torch.zeros(2, 1, dtype=torch.float16)
    weight.requires_grad_()
    (op.linear_cross_entropy(hidden, weight, torch.zeros(8, dtype=torch.int64))[0] / 8).backward()
    assert weight.grad.flatten().tolist() == [-15000.0, 15000.0]


def test_chunks_add_up_in_fp32(launches: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight gradient of 16 chunks is as close to the truth as that of one.

    In bf16 the first one's -57.6 would swallow each of the others' -0.1125.
    """
    hidden, targets = torch.full((16, 4), 0.125, dtype=torch.bfloat16), torch.zeros(16, dtype=torch.int64)
    hidden[0] = 64.0
    gradients = []
    for rows, function in ((1, op), (16, op), (16, reference)):
        monkeypatch.setattr(op, "CHUNK_ROWS", rows)
        dtype = torch.float64 if function is reference else torch.bfloat16
        weight = torch.zeros(10, 4, dtype=dtype, requires_grad=True)
        function.linear_cross_entropy(hidden.to(dtype), weight, targets)[0].backward()
        gradients.append(weight.grad)
    assert_e9(*gradients, "weight gradient of many chunks beside one's")


def test_memory_holds_one_chunk_of_logits(launches: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """S rows of V logits are 10 chunks; at no time is more than one there, beside the gradients that are asked for."""
    monkeypatch.setattr(op, "CHUNK_ROWS", 2)
    num_rows, vocabulary, width = 20, 4096, 8
    hidden, weight = draw(num_rows, width).requires_grad_(), draw(vocabulary, width, seed=1)
    with allocations() as sizes:
        op.linear_cross_entropy(hidden, weight, some(num_rows, vocabulary))[0].backward()
    chunk = 2 * vocabulary * 4
    assert max(sizes) == chunk
    held = peak = 0
    for size in sizes:
        held += size
        peak = max(peak, held)
    assert chunk <= peak <= chunk + 8 * num_rows * width * 4
    assert hidden.grad is not None


def test_chunks_fit_and_are_equal() -> None:
    for num_rows, vocabulary, itemsize, expected in [
        (4096, 128256, 2, 4096),  # one
        (4200, 128256, 2, 2176),  # two of about the same size, not one of 104
        (8192, 128256, 4, 2048),
        (8192, 262144, 2, 2048),
        (8192, 151936, 2, 2816),  # three; 3456 would fit
        (100, 32000, 2, 128),
        (0, 32000, 2, 4096),
    ]:
        rows = op.chunk_rows(num_rows, vocabulary, itemsize)
        assert rows == expected
        assert rows * vocabulary * itemsize <= 2**30


def test_torch_finds_the_ops_well_made(launches: Counter[str]) -> None:
    """Schema, fakes and autograd registration, as torch.compile will rely on them."""
    hidden, weight, bias = draw(6, 8).requires_grad_(), draw(30, 8, seed=1).requires_grad_(), draw(30, seed=2)
    bias.requires_grad_()
    arguments = (hidden, weight, some(3, 30), torch.tensor([5, 0, 2]), bias, draw(3), 0.5, 5.0, 0.1, 0.01)
    torch.library.opcheck(torch.ops.launcher_kernels.linear_cross_entropy.default, (*arguments, True, True, True))
    scaled = (draw(3, 8), torch.tensor(0.5), torch.tensor([5, 0, 2]), 6, torch.bfloat16)
    torch.library.opcheck(torch.ops.launcher_kernels.scaled_rows.default, scaled)


def test_compiled(launches: Counter[str], small_chunks: None) -> None:
    """In one graph with what comes before, and in inference."""
    targets, index = some(4, 30), torch.tensor([5, 0, 2, 3])

    def step(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        loss, count, correct = op.linear_cross_entropy(torch.tanh(hidden), weight, targets, index=index)
        return loss / count, correct

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    results = []
    for function in (step, compiled):
        inputs = [draw(6, 8).requires_grad_(), draw(30, 8, seed=1).requires_grad_()]
        outputs = function(*inputs)
        outputs[0].backward()
        with torch.no_grad():
            results.append([*(x.detach() for x in outputs), *(x.grad for x in inputs), *function(*inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_one_graph_for_any_number_of_rows(launches: Counter[str]) -> None:
    """Each micro batch has another number of supervised rows; none of them may cost a compilation."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op.linear_cross_entropy, backend=counter, fullgraph=True, dynamic=True)
    hidden, weight = draw(6, 8).requires_grad_(), draw(30, 8, seed=1).requires_grad_()
    counts = []
    for num_rows in (2, 3, 5):
        compiled(hidden, weight, some(num_rows, 30), index=torch.arange(num_rows))[0].backward()
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1] > 0


def test_without_a_gpu_it_is_pytorch() -> None:
    hidden, weight, targets = draw(4, 8, dtype=torch.bfloat16), draw(30, 8, dtype=torch.bfloat16, seed=1), some(4, 30)
    found, expected = (x.linear_cross_entropy(hidden, weight, targets, softcap=5.0) for x in (op, reference))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
