"""Packed documents through transformers' attention interface, in any model that dispatches through it.

A micro batch is one flat row of documents laid end to end. Their borders travel as the model's `attention_mask`:
transformers hands a four-dimensional mask to every attention layer as it is, so `cu_seqlens` goes along as an int32
tensor of shape [1, 1, longest document, documents + 1], expanded (stride 0) over the third dimension. The shape carries
the longest document's length without asking the device for it. An ordinary mask (generation, padded batches) is never
int32 and takes transformers' own SDPA.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from launcher.errors import ModelError
from launcher_kernels import attention, reference

# Names without "sdpa" or "flash" in them: transformers takes those words for its own and checks other things.
NAMES = {"sdpa": "slipway_dense", "varlen": "slipway_varlen", "triton": "slipway_triton", "flash": "slipway_fa"}

WITH_SINKS = frozenset({"gpt_oss"})
"""Model types that differ from plain attention by sinks alone, which they pass on as `s_aux`. Others with sinks
(deepseek_v4) compress keys besides, and are refused."""


ATTENTION = frozenset({"attention", "full_attention", "sliding_attention"})
"""Kinds of layers whose tokens meet in attention alone, in all of the document or a window of it. A convolution or a
recurrent state runs on over the borders of documents (lfm2, granitemoehybrid, minimax, recurrent_gemma); attention in
chunks (llama4) is not what our implementations compute."""
KINDS = ("layer_types", "layers_block_type", "block_types")
"""Where configurations name the kinds of their layers."""


def document_borders(cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """[D + 1] int32 to the form that passes through transformers as a mask: [1, 1, max_seqlen, D + 1], no copy."""
    return cu_seqlens.to(torch.int32).expand(1, 1, max_seqlen, -1)


def supports_packing(model_class: type[PreTrainedModel], config: PretrainedConfig) -> bool:
    """True where every attention layer dispatches through transformers' interface, so that documents can be kept apart.

    A model that refuses SDPA does so for a soft cap or for sinks, which we compute, or for something else, which we do
    not.
    """
    text = config.get_text_config(decoder=True)
    if any(kind not in ATTENTION for name in KINDS for kind in getattr(text, name, None) or ()):
        return False
    dispatches = bool(getattr(model_class, "_supports_attention_backend", False))
    plain = bool(getattr(model_class, "_supports_sdpa", False)) or hasattr(config, "attn_logit_softcapping")
    return dispatches and (plain or config.model_type in WITH_SINKS)


def register() -> None:
    """Make the implementations known to transformers, each with a mask function: without one, masks are dropped."""
    forwards = {
        "sdpa": _sdpa_documents,
        "varlen": _varlen_documents,
        "triton": _triton_documents,
        "flash": _flash_documents,
    }
    for kind, name in NAMES.items():
        AttentionInterface.register(name, _dispatch(forwards[kind]))
        AttentionMaskInterface.register(name, sdpa_mask)


class Scoring(NamedTuple):
    """How a layer turns products of queries and keys into weights; the names are `packed_attention`'s."""

    dropout: float
    scale: float | None
    sliding_window: int | None
    softcap: float | None
    sinks: Tensor | None


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
        if attention_mask is None or attention_mask.dtype != torch.int32:
            if softcap is not None or s_aux is not None:
                scoring = Scoring(dropout, scaling, None, softcap, s_aux)  # the mask knows the window
                return _by_hand(query, key, value, attention_mask, scoring), None
            attended, _ = sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
            return attended, None
        # Not query[0]: the backward of an index writes a tensor of zeros to put its gradient into.
        query, key, value = (x.squeeze(0) for x in (query, key, value))
        scoring = Scoring(dropout, scaling, sliding_window, softcap, s_aux)
        attended = documents_forward(query, key, value, attention_mask[0, 0], scoring)
        return attended.unsqueeze(0), None

    return forward


def _sdpa_documents(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, scoring: Scoring) -> Tensor:
    """[H, T, d] to [T, H, d] by PyTorch's own operations, a document at a time."""
    attended = reference.packed_attention(query, key, value, borders[0], **scoring._asdict())
    return attended.transpose(0, 1).contiguous()


def _triton_documents(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, scoring: Scoring) -> Tensor:
    """[H, T, d] to [T, H, d] by our kernels, with windows, caps and sinks; through PyTorch with dropout or on a CPU."""
    longest = borders.shape[0]
    attended = attention.packed_attention(query, key, value, borders[0], max_seqlen=longest, **scoring._asdict())
    return attended.transpose(0, 1).contiguous()


def _varlen_documents(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, scoring: Scoring) -> Tensor:
    """[H, T, d] to [T, H, d] by torch's varlen kernel; what it has not, such as a soft cap or sinks, by ours."""
    missing = bool(scoring.dropout) or scoring.softcap is not None or scoring.sinks is not None
    if missing or not _fits(query, value):
        return _triton_documents(query, key, value, borders, scoring)
    varlen_attn, parameters = _varlen()
    settings: dict[str, Any] = {}
    if scoring.scale is not None:
        settings["scale"] = scoring.scale
    if "window_size" in parameters or scoring.sliding_window is not None:
        settings["window_size"] = (-1 if scoring.sliding_window is None else scoring.sliding_window - 1, 0)
    else:
        settings["is_causal"] = True
    if not settings.keys() <= parameters:
        return _triton_documents(query, key, value, borders, scoring)
    num_groups = query.shape[0] // key.shape[0]
    if num_groups > 1 and "enable_gqa" in parameters:
        settings["enable_gqa"] = True
    elif num_groups > 1:
        key, value = (x.repeat_interleave(num_groups, dim=0) for x in (key, value))
    query, key, value = (x.transpose(0, 1).contiguous() for x in (query, key, value))
    longest = borders.shape[0]
    attended: Tensor = varlen_attn(query, key, value, borders[0], borders[0], longest, longest, **settings)
    return attended


@cache
def _varlen() -> tuple[Callable[..., Any], frozenset[str]]:
    """torch's kernel and its parameters: 2.10 has `is_causal`, later ones windows and scale, then grouped heads."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def _flash_documents(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, scoring: Scoring) -> Tensor:
    """[H, T, d] to [T, H, d] by flash-attn's varlen kernel; sinks, and dropout under version 3, by ours or PyTorch."""
    if scoring.sinks is not None or not _fits(query, value):
        return _triton_documents(query, key, value, borders, scoring)
    flash_attn_varlen_func, drops = _flash(query.device)
    if scoring.dropout and not drops:
        return _triton_documents(query, key, value, borders, scoring)
    query, key, value = (x.transpose(0, 1).contiguous() for x in (query, key, value))
    longest = borders.shape[0]
    attended = flash_attn_varlen_func(
        query,
        key,
        value,
        borders[0],
        borders[0],
        longest,
        longest,
        softmax_scale=scoring.scale,
        causal=True,
        window_size=(-1, -1) if scoring.sliding_window is None else (scoring.sliding_window - 1, 0),
        softcap=scoring.softcap or 0.0,
        **({"dropout_p": scoring.dropout} if drops else {}),
    )
    # Version 3's first releases return the logarithm of the sums as well.
    found: Tensor = attended[0] if isinstance(attended, tuple) else attended
    return found


@cache
def _flash(device: torch.device) -> tuple[Callable[..., Any], bool]:
    """flash-attn 3 where it is installed and the GPU is a Hopper, else 2; and whether it knows dropout."""
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    third = hopper and importlib.util.find_spec("flash_attn_interface") is not None
    try:
        package = importlib.import_module("flash_attn_interface" if third else "flash_attn")
    except ImportError as error:
        raise ModelError(
            f"flash-attn for this GPU cannot be loaded: {error}", hint="set model.attention to varlen or triton"
        ) from error
    kernel = package.flash_attn_varlen_func
    return kernel, "dropout_p" in inspect.signature(kernel).parameters


def _fits(query: Tensor, value: Tensor) -> bool:
    """Whether the variable-length kernels of others take these: 16 bits, on a GPU, heads of one size up to 256."""
    size = query.shape[-1]
    sized = size == value.shape[-1] and size % 8 == 0 and size <= 256
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and sized


def _by_hand(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
    """Attention under an ordinary mask with capped scores or sinks, which SDPA cannot: [B, H, Q, d] to [B, Q, H, d]."""
    num_groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(num_groups, dim=1) for x in (key, value))
    scores = (query @ key.transpose(-1, -2)) * (scoring.scale if scoring.scale is not None else query.shape[-1] ** -0.5)
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril(key.shape[2] - query.shape[2])
    if mask is not None:
        # Not -inf: a padded query sees nothing, its softmax would be NaN, and NaN times a weight of zero is NaN.
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    if scoring.sinks is not None:  # one more column that takes its share of the weight and gives nothing
        sinks = scoring.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)[..., : key.shape[2]]
    return (F.dropout(weights, scoring.dropout) @ value).transpose(1, 2).contiguous()
