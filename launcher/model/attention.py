"""Packed documents through transformers' attention interface, in any model that dispatches through it.

A micro batch is one flat row of documents laid end to end. Their borders travel as the model's `attention_mask`:
transformers hands a four-dimensional mask to every attention layer as it is, so `cu_seqlens` goes along as an int32
tensor of shape [1, 1, longest document, documents + 1], expanded (stride 0) over the third dimension. The shape carries
the longest document's length without asking the device for it. An ordinary mask (generation, padded batches) is never
int32 and takes transformers' own SDPA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from launcher.errors import ModelError
from launcher_kernels.attention import packed_attention

# Names without "sdpa" or "flash" in them: transformers takes those words for its own and checks other things.
NAMES = {"sdpa": "slipway_dense", "varlen": "slipway_varlen", "flash": "slipway_fa"}


def document_borders(cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """[D + 1] int32 to the form that passes through transformers as a mask: [1, 1, max_seqlen, D + 1], no copy."""
    return cu_seqlens.to(torch.int32).expand(1, 1, max_seqlen, -1)


def supports_packing(model_class: type[PreTrainedModel], config: PretrainedConfig) -> bool:
    """True where every attention layer dispatches through transformers' interface, so that documents can be kept apart.

    A model that refuses SDPA does so for a soft cap, which we compute, or for something else, such as attention sinks,
    which we do not.
    """
    dispatches = bool(getattr(model_class, "_supports_attention_backend", False))
    plain = bool(getattr(model_class, "_supports_sdpa", False)) or hasattr(config, "attn_logit_softcapping")
    return dispatches and plain


def register() -> None:
    """Make the implementations known to transformers, each with a mask function: without one, masks are dropped."""
    forwards = {"sdpa": _sdpa_documents, "varlen": _varlen_documents, "flash": _flash_documents}
    for kind, name in NAMES.items():
        AttentionInterface.register(name, _dispatch(forwards[kind]))
        AttentionMaskInterface.register(name, sdpa_mask)


class Scoring(NamedTuple):
    """How a layer turns products of queries and keys into weights; the names are `packed_attention`'s."""

    dropout: float
    scale: float | None
    window: int | None
    softcap: float | None


def _dispatch(documents_forward: Callable[[Tensor, Tensor, Tensor, Tensor, Scoring], Tensor]) -> Any:
    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if s_aux is not None:
            raise ModelError("this model's attention sinks are not computed here", hint="set data.packing to false")
        if attention_mask is None or attention_mask.dtype != torch.int32:
            if softcap is not None:
                return _soft_capped(query, key, value, attention_mask, scaling, softcap), None
            attended, _ = sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
            return attended, None
        # Not query[0]: the backward of an index writes a tensor of zeros to put its gradient into.
        query, key, value = (x.squeeze(0) for x in (query, key, value))
        scoring = Scoring(dropout, scaling, sliding_window, softcap)
        attended = documents_forward(query, key, value, attention_mask[0, 0], scoring)
        return attended.unsqueeze(0), None

    return forward


def _sdpa_documents(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, scoring: Scoring) -> Tensor:
    """[H, T, d] to [T, H, d]."""
    attended = packed_attention(
        query,
        key,
        value,
        borders[0],
        scale=scoring.scale,
        sliding_window=scoring.window,
        softcap=scoring.softcap,
        dropout=scoring.dropout,
    )
    return attended.transpose(0, 1).contiguous()


def _varlen_documents(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, scoring: Scoring) -> Tensor:
    """[H, T, d] to [T, H, d]; torch's varlen kernel has neither dropout nor a soft cap."""
    if scoring.dropout or scoring.softcap is not None:
        return _sdpa_documents(query, key, value, borders, scoring)
    from torch.nn.attention.varlen import varlen_attn

    num_groups = query.shape[0] // key.shape[0]
    if num_groups > 1:
        key, value = (x.repeat_interleave(num_groups, dim=0) for x in (key, value))
    query, key, value = (x.transpose(0, 1).contiguous() for x in (query, key, value))
    longest = borders.shape[0]
    left = -1 if scoring.window is None else scoring.window - 1
    attended = varlen_attn(
        query, key, value, borders[0], borders[0], longest, longest, scale=scoring.scale, window_size=(left, 0)
    )
    assert isinstance(attended, Tensor)
    return attended


def _flash_documents(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, scoring: Scoring) -> Tensor:
    """[H, T, d] to [T, H, d] by flash-attn's varlen kernel."""
    from flash_attn import flash_attn_varlen_func

    query, key, value = (x.transpose(0, 1).contiguous() for x in (query, key, value))
    longest = borders.shape[0]
    attended: Tensor = flash_attn_varlen_func(
        query,
        key,
        value,
        borders[0],
        borders[0],
        longest,
        longest,
        dropout_p=scoring.dropout,
        softmax_scale=scoring.scale,
        causal=True,
        window_size=(-1, -1) if scoring.window is None else (scoring.window - 1, 0),
        softcap=scoring.softcap or 0.0,
    )
    return attended


def _soft_capped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, softcap: float
) -> Tensor:
    """Attention under an ordinary mask with capped scores, which SDPA cannot: [B, H, Q, d] to [B, Q, H, d]."""
    num_groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(num_groups, dim=1) for x in (key, value))
    scores = (query @ key.transpose(-1, -2)) * (scale if scale is not None else query.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril(key.shape[2] - query.shape[2])
    if mask is not None:
        # Not -inf: a padded query sees nothing, its softmax would be NaN, and NaN times a weight of zero is NaN.
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value).transpose(1, 2).contiguous()
