"""Packed attention at the heads of 1B to 70B models."""

from __future__ import annotations

import torch
from offline import Case

from launcher_kernels.attention import packed_attention

HEADS = {"1B": (32, 8, 64), "8B": (32, 8, 128), "70B": (64, 8, 128)}
TOKENS, DOCUMENTS = 256, 4


def _call(
    heads: int, kv_heads: int, size: int, dtype: torch.dtype, window: int | None, capped: bool, sinks: bool
) -> None:
    query, key, value = (
        torch.empty(TOKENS, n, size, dtype=dtype, requires_grad=True).transpose(0, 1)
        for n in (heads, kv_heads, kv_heads)
    )
    borders = torch.empty(DOCUMENTS + 1, dtype=torch.int32)
    sink = torch.empty(heads, dtype=dtype, requires_grad=True) if sinks else None
    cap = 50.0 if capped else None
    output = packed_attention(query, key, value, borders, sliding_window=window, softcap=cap, sinks=sink)
    output.backward(torch.empty(TOKENS, heads, size, dtype=dtype).transpose(0, 1))


def cases() -> list[Case]:
    """Plain in bf16; then gpt_oss, gemma2 and gemma3, a head size that is no power of two, and fp16 and fp32."""
    products = ("attention_forward", "attention_backward_query", "attention_backward_key")
    found = []

    def add(title: str, heads: tuple[int, int, int], dtype: torch.dtype = torch.bfloat16, window: int | None = None,
            capped: bool = False, sinks: bool = False) -> None:  # fmt: skip
        name = f"attention {str(dtype)[6:]} d={heads[2]} ({title})"
        # Of heads beyond 128, a tile of keys large enough for HGMMA would spill: HMMA on smaller ones.
        fast = () if dtype == torch.float32 else products if heads[2] <= 128 else products[:2]
        expects = dict.fromkeys(fast, ("HGMMA",))
        found.append(Case(name, lambda: _call(*heads, dtype, window, capped, sinks), expects))

    add("1B", HEADS["1B"])
    add("8B", HEADS["8B"])
    add("70B", HEADS["70B"])
    add("8B", HEADS["8B"], torch.float16)
    add("1B", HEADS["1B"], torch.float32)
    add("8B", HEADS["8B"], torch.float32)
    add("gpt_oss", (64, 8, 64), window=128, sinks=True)
    add("mistral", (32, 8, 128), window=128)
    add("gemma2 9B", (16, 8, 256), window=128, capped=True)
    add("gemma2 27B", (32, 16, 128), window=128, capped=True)
    add("gemma3", (16, 8, 256), window=128)
    add("phi", (32, 32, 80))
    add("phi3", (32, 32, 96))
    add("tiny", (4, 2, 16))
    return found
