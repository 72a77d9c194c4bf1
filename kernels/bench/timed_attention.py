"""Attention over packed documents at the heads of Llama 3 8B and 70B: one document of 8k tokens, eight of 1k, four of
2k.

Heads lie in memory as projections write them, [T, H, d] seen as [H, T, d]; what comes out is [T, H, d], as the next
projection reads it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import floors
import torch
from contest import FLEX, OURS, Build, Contest, Draw, Part, Target
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from launcher_kernels import reference

HEADS = {"8B": (32, 8), "70B": (64, 8)}
PACKINGS = {"1 x 8k": [8192], "8 x 1k": [1024] * 8, "4 x 2k": [2048] * 4}

AUTO = "slipway, attention: auto"
TARGETS = {OURS: Target(over={"best": 0.8}), AUTO: Target(over={"best": 0.95})}


def contests(dry: bool) -> list[Contest]:
    if dry:
        return [_contest("3 documents", [5, 3, 4], 4, 2, 16)]
    shapes = [(*heads, packing) for heads in HEADS.values() for packing in PACKINGS]
    return [_contest(packing, PACKINGS[packing], queries, keys, 128) for queries, keys, packing in shapes]


def _contest(packing: str, lengths: Sequence[int], queries: int, keys: int, head_size: int) -> Contest:
    tokens, longest = sum(lengths), max(lengths)

    def inputs(draw: Draw) -> dict[str, Tensor]:
        borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=draw.device)
        heads = {"query": queries, "key": keys, "value": keys}
        found = {name: draw.normal(tokens, count, head_size).transpose(0, 1) for name, count in heads.items()}
        return found | {"cu_seqlens": borders}

    forward, backward = floors.attention(lengths, queries, keys, head_size)
    others: dict[str, Build] = {
        OURS: lambda _: _ours(longest),
        AUTO: lambda _: _auto(longest),
        "flash-attn 3": lambda _: _flash_3(longest),
        "flash-attn 2": lambda _: _flash_2(longest),
        "torch varlen_attn": lambda _: _varlen(longest),
    }
    if queries == HEADS["8B"][0]:  # compiling it takes a quarter of a minute each time
        others[FLEX] = _flex
    return Contest(
        op="attention",
        name=f"{packing}, {queries} and {keys} heads of {head_size}",
        inputs=inputs,
        eager=_by_token(reference.packed_attention),
        differentiable=("query", "key", "value"),
        contenders=others,
        parts={
            "forward": Part(forward, TARGETS),
            "backward": Part(backward, TARGETS),
            "both": Part(forward + backward, TARGETS),
        },
        exact=_by_token(_exact),
        compiles=False,
    )


def _by_token(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """[H, T, d] to [T, H, d]."""
    return lambda **inputs: function(**inputs).transpose(0, 1).contiguous()


def _exact(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The group of each key head by itself: in float64 all scores of 8k tokens would take 34 GB."""
    group = len(query) // len(key)

    def some(first: int) -> Tensor:
        own = query[first * group : (first + 1) * group]
        return reference.packed_attention(own, key[first : first + 1], value[first : first + 1], cu_seqlens)

    return torch.cat([checkpoint(some, first, use_reentrant=False) for first in range(len(key))])  # type: ignore[arg-type]


def _ours(longest: int) -> Any:
    from launcher_kernels.attention import packed_attention

    if "max_seqlen" not in inspect.signature(packed_attention).parameters:
        raise ImportError("launcher_kernels.attention has no kernel of its own")
    return _by_token(lambda **given: packed_attention(**given, max_seqlen=longest))


def _auto(longest: int) -> Any:
    """What a run whose recipe says nothing of attention takes on a GPU."""
    from launcher.plan.facts import ClusterFacts, NodeFacts
    from launcher.plan.layout import resolve_layout
    from launcher.recipe.schema import Recipe

    recipe = Recipe.model_validate({"model": {"path": "any"}, "data": {"train": [{"path": "any"}]}})
    with_gpu = ClusterFacts((NodeFacts("here", cpus=1, gpus=1),))
    return registered(resolve_layout(recipe, with_gpu, "bf16", 8_000_000_000, {}).attention, longest)


def registered(kind: str, longest: int) -> Any:
    """An implementation of `launcher.model.attention`, called as transformers calls it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from launcher.model import attention

    attention.register()
    forward, module = ALL_ATTENTION_FUNCTIONS[attention.NAMES[kind]], torch.nn.Module()

    def function(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Any:
        borders = attention.document_borders(cu_seqlens, longest)
        return forward(module, query[None], key[None], value[None], borders)[0].squeeze(0)

    return function


def _by_head(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For kernels that take and return [T, H, d]: no copies."""

    def turned(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Tensor:
        return function(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), cu_seqlens)

    return turned


def _flash_2(longest: int) -> Any:
    from flash_attn import flash_attn_varlen_func

    return _by_head(lambda q, k, v, cu: flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True))


def _flash_3(longest: int) -> Any:
    from flash_attn_interface import flash_attn_varlen_func

    def function(query: Tensor, key: Tensor, value: Tensor, borders: Tensor) -> Any:
        found = flash_attn_varlen_func(query, key, value, borders, borders, longest, longest, causal=True)
        return found[0] if isinstance(found, tuple) else found  # its first releases return the log sums as well

    return _by_head(function)


def _varlen(longest: int) -> Any:
    from torch.nn.attention.varlen import varlen_attn

    takes = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in takes else {"is_causal": True}
    if "enable_gqa" in takes:
        options["enable_gqa"] = True

    def function(query: Tensor, key: Tensor, value: Tensor, borders: Tensor) -> Any:
        if "enable_gqa" not in takes:
            groups = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        return varlen_attn(query, key, value, borders, borders, longest, longest, **options)

    return _by_head(function)


def _flex(inputs: Any) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not inputs["query"].is_cuda:
        raise ImportError("flex_attention is for GPUs")
    borders, tokens = inputs["cu_seqlens"], inputs["query"].shape[1]
    document = torch.bucketize(torch.arange(tokens, device=borders.device), borders[1:], right=True)

    def visible(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (document[row] == document[column]) & (row >= column)

    mask = create_block_mask(visible, None, None, tokens, tokens, device=str(borders.device))
    compiled = torch.compile(flex_attention, dynamic=False)

    def function(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Any:
        found = compiled(query[None], key[None], value[None], block_mask=mask, enable_gqa=True)
        return found.squeeze(0).transpose(0, 1).contiguous()

    return function
