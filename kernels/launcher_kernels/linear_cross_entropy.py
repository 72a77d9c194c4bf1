"""Cross entropy of the language model's head, from hidden states to the loss, without ever holding all logits.

    l = softcap tanh(logit_scale (x W^T + b) / softcap)     z = log sum exp(l)     p = exp(l - z)
    loss = sum over rows of w ((1 - e) (z - l_t) + e (z - mean(l)) + c z^2)
    dloss / dl = w (p (1 + 2 c z) - (1 - e) [column = t] - e / V)

with target t, row weight w, label smoothing e and z-loss c. T hidden states of H numbers, S supervised of them, V
vocabulary. Label smoothing: Szegedy et al., 2016; z-loss: Chowdhery et al., 2022 (PaLM); softcap: Gemma Team, 2024.

Only the S supervised rows are multiplied, a chunk of them at a time: one matrix product makes the chunk's logits, one
kernel turns them in place into their gradient, two more products turn that into the gradients of hidden states and
weight. So gradients are made in the forward pass, which alone reads the weight (ZeRO-3 has it gathered then), and the
backward pass multiplies them by the slope that comes in. FLOPs: 2SHV for the loss, 2SHV for each of the two gradients
that is needed. Bytes of the kernel in a 16-bit dtype: 6SV, 2SV without gradients.

The weight gradient is added up in fp32 over chunks. In bf16 each chunk would round it, and that is suspected of
training runs that diverged (Liger-Kernel#512, axolotl#1601).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from launcher_kernels import reference
from launcher_kernels.dispatch import launch, runs_triton

CHUNK_ROWS = 4096
"""Rows of a chunk at most: a product of so many is as fast as any, and the fp32 sum of the weight gradient is read and
written once a chunk (1 ms of 16 at Llama-3-8B's head)."""
CHUNK_BYTES = 2**30
"""Bytes of a chunk's logits at most."""
_LINE = 64
"""Rows of logits are padded to so many numbers, for 128-bit loads and fast products whatever the vocabulary."""


@triton.jit
def capped_logits(x, scale, softcap, DTYPE: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr):
    """Logits in fp32, rounded to the dtype after each step as eager does, and the softcap's tanh.

    The softcap divides by multiplying, as PyTorch does on a GPU.
    """
    if SCALED:
        x = (x * scale).to(DTYPE).to(tl.float32)
    turned = x
    if CAPPED:
        y = (x * (1.0 / softcap)).to(DTYPE).to(tl.float32)
        size = tl.abs(y)
        # Near zero the exponential loses the digits; a fitted polynomial is exact to 3e-9 up to 0.6.
        square = y * y
        near = -0.333332962 + square * (
            0.133318803 + square * (-0.0537803994 + square * (0.0207851476 - square * 0.00588323306))
        )
        shrunk = tl.exp(-2.0 * size)
        turned = tl.where(size < 0.6, size + size * (square * near), 1.0 - 2.0 * shrunk / (1.0 + shrunk))
        turned = tl.where(y < 0.0, -turned, turned).to(DTYPE).to(tl.float32)
        x = (turned * softcap).to(DTYPE).to(tl.float32)
    return x, turned


@triton.jit
def cross_entropy(
    logits_ptr, target_ptr, row_weight_ptr, loss_ptr, correct_ptr, V, stride,
    scale, softcap, smoothing, z_loss,
    WEIGHTED: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, PADDED: tl.constexpr,
    GRADIENT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """A row a program: its loss, whether its target is its first largest logit, and its gradient over its logits.

    The row is walked in blocks of LANES x VECTOR, where VECTOR numbers are one thread's 128-bit load: what is kept
    while walking is kept once a lane, so that nothing crosses threads before the row's end.
    """
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    lane = tl.arange(0, LANES)
    column = lane[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    target = tl.load(target_ptr + row)
    scale, softcap = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    smoothing, z_loss = tl.cast(smoothing, tl.float32), tl.cast(z_loss, tl.float32)
    # A target outside of the vocabulary must not pass for a small loss.
    known = (target >= 0) & (target < V)
    target = tl.where(known, target, 0)
    own = tl.load(logits_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    own = capped_logits(own, scale, softcap, dtype, SCALED, CAPPED)[0]
    # The target's own lane holds columns before and after it: looked at here, before any thread overwrites them.
    beside = target // VECTOR * VECTOR + tl.arange(0, VECTOR)
    before = tl.load(logits_ptr + beside, mask=beside < target, other=0.0).to(tl.float32)
    before = capped_logits(before, scale, softcap, dtype, SCALED, CAPPED)[0]
    beaten = tl.max(((before >= own) & (beside < target)).to(tl.int32), axis=0)

    highest = tl.full((LANES,), -3.0e38, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    plain = tl.zeros((LANES,), tl.float32)
    behind = tl.zeros((LANES,), tl.int32)
    OUTSIDE: tl.constexpr = 0.0 if CAPPED else float("-inf")
    for start in range(0, V, LANES * VECTOR):
        x = tl.load(logits_ptr + start + column, mask=start + column < stride, other=OUTSIDE).to(tl.float32)
        x = capped_logits(x, scale, softcap, dtype, SCALED, CAPPED)[0]
        if SMOOTHED:
            plain += tl.sum(tl.where(start + column < V, x, 0.0), axis=1)
        if PADDED or SCALED or CAPPED:
            x = tl.where(start + column < V, x, float("-inf"))
        top = tl.max(x, axis=1)
        higher = tl.maximum(highest, top)
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher[:, None]), axis=1)
        highest = higher
        behind |= tl.where(start // VECTOR + lane < target // VECTOR, top >= own, top > own).to(tl.int32)
    peak = tl.max(highest, axis=0)
    total = tl.sum(total * tl.exp(highest - peak), axis=0)
    beaten |= tl.max(behind, axis=0)
    tl.store(correct_ptr + row, tl.where(known & (beaten == 0), 1.0, 0.0))

    z = peak + tl.log(total)
    loss = tl.log(total) + (peak - own)
    if SMOOTHED:
        loss = (1.0 - smoothing) * loss + smoothing * (tl.log(total) + (peak - tl.sum(plain, axis=0) / V))
    loss += z_loss * z * z
    weight = tl.cast(1.0, tl.float32)
    if WEIGHTED:
        weight = tl.load(row_weight_ptr + row).to(tl.float32)
        loss *= weight
    tl.store(loss_ptr + row, loss)

    if GRADIENT:
        weight = tl.where(known, weight, float("nan"))
        factor = weight * (1.0 + 2.0 * z_loss * z) / total
        for start in range(0, V, LANES * VECTOR):
            inside = start + column < stride
            x = tl.load(logits_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
            x, turned = capped_logits(x, scale, softcap, dtype, SCALED, CAPPED)
            slope = tl.exp(x - peak) * factor
            if SMOOTHED:
                slope -= weight * smoothing / V
            slope = tl.where(start + column == target, slope - weight * (1.0 - smoothing), slope)
            if CAPPED:
                slope *= 1.0 - turned * turned
            if SCALED:
                slope *= scale
            tl.store(logits_ptr + start + column, slope.to(dtype), mask=inside)


@triton.jit
def scale_rows(
    x_ptr, factor_ptr, index_ptr, y_ptr, S, H, INDEXED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Row i of x [S, H] times the factor, rounded once, to row i of y or to the row that index names."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < S) & (column < H)
    x = tl.load(x_ptr + row * H + column, mask=inside, other=0.0).to(tl.float32) * tl.load(factor_ptr).to(tl.float32)
    if INDEXED:
        row = tl.load(index_ptr + row, mask=row < S, other=0).to(tl.int64)
    tl.store(y_ptr + row * H + column, x.to(y_ptr.dtype.element_ty), mask=inside)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    index: Tensor | None = None,
    bias: Tensor | None = None,
    row_weights: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed cross entropy of the supervised rows; the sums over all micro batches and ranks make the exact mean.

    Args:
        hidden: [T, H]
        weight: [V, H] of the same dtype, the head's
        targets: [S] int64, each in [0, V); another makes the loss NaN
        index: [S] int64, distinct rows of `hidden` that are supervised; all T in their order where None
        bias: [V] of the same dtype
        row_weights: [S], what each row counts; 1 where None. Gets no gradient
        logit_scale: factor on the logits
        softcap: logits become softcap * tanh(logits / softcap), after the scale
        label_smoothing: share of the target's probability that is spread over all V
        z_loss: factor on the square of each row's log sum exp

    Returns:
        loss sum, [] fp32, differentiable in `hidden`, `weight` and `bias` (where they need it; otherwise the work is
        not done); sum of row weights, [] fp32; rows whose target is the most likely token, the first of equals, [] fp32
    """
    assert targets.shape[0] == (hidden if index is None else index).shape[0], "a target for each supervised row"
    assert row_weights is None or row_weights.shape == targets.shape, "a weight for each supervised row"
    if not _fits(hidden, weight, bias):
        return reference.linear_cross_entropy(
            hidden, weight, targets, index=index, bias=bias, row_weights=row_weights, logit_scale=logit_scale,
            softcap=softcap, label_smoothing=label_smoothing, z_loss=z_loss,
        )  # fmt: skip
    needed = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    loss, correct, *_ = _linear_cross_entropy(
        hidden, weight, targets, index, bias, row_weights, logit_scale, softcap, label_smoothing, z_loss, *needed
    )
    if row_weights is None:
        count = torch.full((), targets.shape[0], dtype=torch.float32, device=hidden.device)
    else:
        count = row_weights.detach().float().sum()
    return loss, count, correct


def _fits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    dtypes = {x.dtype for x in (hidden, weight, bias) if x is not None}
    return runs_triton(hidden) and len(dtypes) == 1 and dtypes <= {torch.float32, torch.bfloat16, torch.float16}


def chunk_rows(num_rows: int, vocabulary: int, itemsize: int) -> int:
    """Rows of each chunk but the last: as few chunks as CHUNK_ROWS and CHUNK_BYTES allow, of equal size, in 128s."""
    fitting = max(CHUNK_BYTES // (vocabulary * itemsize) // 128 * 128, 128)
    most = min(CHUNK_ROWS, fitting)
    chunks = max(triton.cdiv(num_rows, most), 1)
    return min(most, triton.cdiv(triton.cdiv(num_rows, chunks), 128) * 128) or most


def _sum_dtype(dtype: torch.dtype, several: bool) -> torch.dtype:
    """Of the weight gradient until it is scaled: 16 bits only where one product makes it. Not fp16: before a mean's
    factor its sums reach beyond 65504."""
    return dtype if dtype == torch.bfloat16 and not several else torch.float32


def _shape(vocabulary: int, itemsize: int) -> tuple[int, int, int]:
    """(lanes, numbers of a lane, warps): about 8 blocks a row, 4 loads of 128 bits a thread in flight."""
    vector = 16 // itemsize
    lanes = min(max(triton.next_power_of_2(triton.cdiv(vocabulary, 8 * vector)), 32), 2048)
    return lanes, vector, max(lanes // 128, 1)


@torch.library.custom_op("launcher_kernels::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, index: Tensor | None, bias: Tensor | None,
    row_weights: Tensor | None, logit_scale: float, softcap: float | None, label_smoothing: float, z_loss: float,
    need_dhidden: bool, need_dweight: bool, need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, correct rows, and the loss's gradients, empty where not needed: [S, H], [V, H] and [V] fp32."""
    num_rows, vocabulary = targets.shape[0], weight.shape[0]
    targets, row_weights = targets.contiguous(), row_weights if row_weights is None else row_weights.contiguous()
    together = chunk_rows(num_rows, vocabulary, hidden.element_size())
    line = triton.cdiv(vocabulary, _LINE) * _LINE
    buffer = hidden.new_empty(min(together, num_rows), line)
    buffer[:, vocabulary:].zero_()
    losses, correct = (hidden.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    dhidden, dweight, dbias = _gradients(hidden, weight, num_rows, need_dhidden, need_dweight, need_dbias)
    lanes, vector, warps = _shape(vocabulary, hidden.element_size())
    for start in range(0, max(num_rows, 1), together):
        chunk = slice(start, min(start + together, num_rows))
        x = hidden[chunk] if index is None else hidden.index_select(0, index[chunk])
        logits = buffer[: len(x), :vocabulary]
        if bias is None:
            torch.mm(x, weight.t(), out=logits)
        else:
            torch.addmm(bias, x, weight.t(), out=logits)
        launch(
            cross_entropy, (len(x),),
            logits, targets[chunk], targets if row_weights is None else row_weights[chunk], losses[chunk],
            correct[chunk], vocabulary, line, logit_scale, softcap or 1.0, label_smoothing, z_loss,
            WEIGHTED=row_weights is not None, SCALED=logit_scale != 1.0, CAPPED=softcap is not None,
            SMOOTHED=label_smoothing != 0.0, PADDED=line != vocabulary,
            GRADIENT=need_dhidden or need_dweight or need_dbias, LANES=lanes, VECTOR=vector, num_warps=warps,
        )  # fmt: skip
        if need_dhidden:
            torch.mm(logits, weight, out=dhidden[chunk])
        if need_dweight:
            _add_product(dweight, logits.t(), x, first=start == 0)
        if need_dbias:
            dbias += logits.sum(0, dtype=torch.float32)
    return losses.sum(), correct.sum(), dhidden, dweight, dbias


def _gradients(
    hidden: Tensor, weight: Tensor, num_rows: int, need_dhidden: bool, need_dweight: bool, need_dbias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for what is needed, and nothing else. Sizes may be symbols, which `len` would fix to one number."""
    several = need_dweight and num_rows > chunk_rows(num_rows, weight.shape[0], hidden.element_size())
    dweight_shape = weight.shape if need_dweight else (0, weight.shape[1])
    return (
        hidden.new_empty(num_rows if need_dhidden else 0, hidden.shape[1]),
        weight.new_empty(dweight_shape, dtype=_sum_dtype(weight.dtype, several)),
        weight.new_zeros(weight.shape[0] if need_dbias else 0, dtype=torch.float32),
    )


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total = a b, or total += a b, added up in fp32."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    elif total.is_cuda:
        torch.addmm(total, a, b, beta=0 if first else 1, out_dtype=total.dtype, out=total)
    else:  # the CPU has no product of 16-bit matrices that ends in fp32
        torch.addmm(total, a.float(), b.float(), beta=0 if first else 1, out=total)


@_linear_cross_entropy.register_fake
def _(hidden, weight, targets, index, bias, row_weights, scale, softcap, smoothing, z_loss, *needed):
    loss, correct = (hidden.new_empty((), dtype=torch.float32) for _ in range(2))
    return loss, correct, *_gradients(hidden, weight, targets.shape[0], *needed)


@torch.library.custom_op("launcher_kernels::scaled_rows", mutates_args=())
def _scaled_rows(x: Tensor, factor: Tensor, index: Tensor | None, num_rows: int, dtype: torch.dtype) -> Tensor:
    """x [S, H] times `factor` [] in a tensor [num_rows, H], at the rows that `index` [S] names and zeros elsewhere."""
    make = torch.empty if index is None else torch.zeros
    y = make(num_rows, x.shape[1], dtype=dtype, device=x.device)
    block = min(triton.next_power_of_2(x.shape[1]), 1024)
    together = 4096 // block
    launch(
        scale_rows, (triton.cdiv(len(x), together), triton.cdiv(x.shape[1], block)),
        x, factor, factor if index is None else index.contiguous(), y, len(x), x.shape[1],
        INDEXED=index is not None, ROWS=together, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return y


@_scaled_rows.register_fake
def _(x, factor, index, num_rows, dtype):
    return x.new_empty(num_rows, x.shape[1], dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, _, index, *_ = inputs
    _, correct, dhidden, dweight, dbias = output
    ctx.save_for_backward(dhidden, dweight, dbias, index)
    ctx.num_rows, ctx.vocabulary, ctx.dtype = hidden.shape[0], weight.shape[0], weight.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(correct, dhidden, dweight, dbias)


def _differentiate(ctx: Any, slope: Tensor | None, *_: Any) -> tuple[Any, ...]:
    dhidden, dweight, dbias, index = ctx.saved_tensors
    need_dhidden, need_dweight, _, _, need_dbias, *_ = ctx.needs_input_grad
    found: list[Tensor | None] = [None] * 13
    if slope is not None and need_dhidden:
        found[0] = _scaled_rows(dhidden, slope, index, ctx.num_rows, ctx.dtype)
    if slope is not None and need_dweight:
        found[1] = _scaled_rows(dweight, slope, None, ctx.vocabulary, ctx.dtype)
    if slope is not None and need_dbias:
        found[4] = (dbias * slope).to(ctx.dtype)
    return tuple(found)


_linear_cross_entropy.register_autograd(_differentiate, setup_context=_keep)
