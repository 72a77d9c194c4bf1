"""Every op in plain PyTorch: what the kernels are compared with, and what runs where there is no GPU.

Written as transformers' models compute them, so that in any dtype the roundings are eager's; in float64 they are the
truth of E9. Shapes and arguments are those of the ops' own files.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F


def ulp(value: float, dtype: torch.dtype) -> float:
    """Distance between neighbouring numbers of `dtype` at `value`: the unit in the last place of E9."""
    tiny = torch.finfo(dtype).smallest_normal
    return float(2.0 ** math.floor(math.log2(max(abs(value), tiny))) * torch.finfo(dtype).eps)


def _wide(x: Tensor) -> Tensor:
    """fp32, or float64 where that is what came in."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, casting: str = "llama") -> Tensor:
    wide = _wide(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if casting == "llama":
        return (weight + offset if offset else weight) * normed.to(x.dtype)
    return (normed * (_wide(weight) + offset)).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, casting: str = "llama"
) -> tuple[Tensor, Tensor]:
    h = x + residual
    return rms_norm(h, weight, eps, offset=offset, casting=casting), h


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    h = x + residual
    return layer_norm(h, weight, bias, eps), h


def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    return _rotated(query, cos, sin, interleaved), _rotated(key, cos, sin, interleaved)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """[B, N, T, d] by angles whose cosines are [B or 1, T, R / 2]; the first R numbers of each head turn."""
    turned = 2 * cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if interleaved:
        first, second = x[..., 0:turned:2], x[..., 1:turned:2]
    else:
        first, second = x[..., : turned // 2], x[..., turned // 2 : turned]
    pair = (first * cos - second * sin, second * cos + first * sin)
    rotated = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([rotated.to(x.dtype), x[..., turned:]], -1)


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    interleaved: bool = False,
    offset: float = 0.0,
    casting: str = "llama",
) -> tuple[Tensor, Tensor]:
    query = rms_norm(query, query_weight, eps, offset=offset, casting=casting)
    key = rms_norm(key, key_weight, eps, offset=offset, casting=casting)
    return rope(query, key, cos, sin, interleaved=interleaved)


def glu(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    if activation == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


def glu_packed(gate_up: Tensor, activation: str = "silu") -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return glu(gate, up, activation)


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
    """See `linear_cross_entropy.linear_cross_entropy`."""
    chosen = hidden if index is None else hidden.index_select(0, index)
    logits = F.linear(chosen, weight, bias)
    if logit_scale != 1.0:
        logits = logits * logit_scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    wide = _wide(logits)
    losses = F.cross_entropy(wide, targets, reduction="none", label_smoothing=label_smoothing)
    if z_loss:
        losses = losses + z_loss * torch.logsumexp(wide, -1).square()
    weighted = losses if row_weights is None else losses * row_weights
    with torch.no_grad():
        # max, not argmax: the same index, and four times as fast on a CPU in bf16.
        correct = (logits.max(-1).indices == targets).sum().float() if len(targets) else wide.new_zeros(()).float()
        count = (
            row_weights.sum().float()
            if row_weights is not None
            else torch.tensor(float(len(targets)), device=hidden.device)
        )
    return weighted.sum(), count, correct


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """See `attention.packed_attention`. On an accelerator reading `cu_seqlens` waits for the device once a call."""
    dtype = query.dtype
    if query.device.type == "cpu" and dtype == torch.bfloat16:
        # The backward of the CPU's flash kernel is 1.5 times as fast in fp32 as in bf16, and closer.
        query, key, value = query.float(), key.float(), value.float()
    num_groups = query.shape[0] // key.shape[0]
    if num_groups > 1:
        key, value = (x.repeat_interleave(num_groups, dim=0) for x in (key, value))
    bounds = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in pairwise(bounds)]
    # One split each, not a slice a document: the backward of a slice writes a whole [H, T, d] of zeros.
    documents = zip(*(x.split(lengths, dim=1) for x in (query, key, value)), strict=True)
    attended = [_one_document(q, k, v, scale, sliding_window, softcap, sinks, dropout) for q, k, v in documents]
    return torch.cat(attended, dim=1).to(dtype)


def _one_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    length = query.shape[1]
    windowed = sliding_window is not None and sliding_window < length
    by_hand = softcap is not None or sinks is not None
    mask = causal_mask(length, sliding_window, query.device) if windowed or by_hand else None
    if by_hand:
        assert mask is not None
        scores = (query @ key.transpose(-1, -2)) * (scale if scale is not None else query.shape[-1] ** -0.5)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~mask, float("-inf"))
        if sinks is not None:  # one more column that takes its share of the weight and gives nothing
            scores = torch.cat([scores, sinks.to(scores.dtype).view(-1, 1, 1).expand(-1, length, 1)], -1)
        weights = _wide(scores).softmax(-1).to(value.dtype)[..., :length]
        return F.dropout(weights, dropout) @ value
    # The CPU's flash kernel wants four dimensions; with three it takes the one that builds the whole score matrix.
    attended = F.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale
    )
    return attended.squeeze(0)


def causal_mask(length: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """[length, length] bool, True where row i may see column j: i - sliding_window < j <= i."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    mask = distance >= 0
    return mask if sliding_window is None else mask & (distance < sliding_window)


def dequantize_nf4(
    packed: Tensor,
    code: Tensor,
    absmax: Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    block_size: int = 64,
    absmax_code: Tensor | None = None,
    absmax_scale: Tensor | None = None,
    absmax_offset: Tensor | None = None,
    absmax_block_size: int = 256,
) -> Tensor:
    """See `nf4.dequantize_nf4`."""
    if absmax_code is not None:
        assert absmax_scale is not None
        assert absmax_offset is not None
        scales = absmax_scale.repeat_interleave(absmax_block_size)[: len(absmax)]
        absmax = absmax_code[absmax.long()] * scales + absmax_offset
    pairs = packed.reshape(-1).view(torch.uint8)
    values = code[torch.stack([pairs >> 4, pairs & 15], -1).flatten().long()][: shape[0] * shape[1]]
    scaled = values * absmax.repeat_interleave(block_size)[: len(values)]
    return scaled.to(dtype).reshape(shape)


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float, *,
    adapter_x: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[..., N] = x W^T + bias + scaling (x A^T) B^T, with W [N, K], A [r, K], B [N, r]; see `lora.lora_linear`."""
    seen = x if adapter_x is None else adapter_x
    return F.linear(x, weight, bias) + F.linear(F.linear(seen, lora_a), lora_b) * scaling
