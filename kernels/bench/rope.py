"""Rotary embedding, alone and after a norm of each head, at the heads of 1B to 70B models."""

from __future__ import annotations

import torch
from offline import Case

from launcher_kernels import rope

HEADS = {
    "Llama 8B": (32, 8, 128, 128, False),
    "Llama 1B": (32, 8, 64, 64, False),
    "Llama 70B": (64, 8, 128, 128, False),
    "Phi-3 mini": (32, 32, 96, 96, False),
    "Phi-4 mini": (24, 8, 128, 96, False),
    "Gemma-2 9B": (16, 8, 256, 256, False),
    "Gemma 2B": (8, 1, 256, 256, False),
    "GPT-J 6B": (16, 16, 256, 64, True),
}
"""{model: query heads, key heads, numbers a head, how many of them turn, whether neighbours are pairs}"""
NORMED = {
    "Qwen3 8B": (32, 8, 128, 0.0, "llama"),
    "Qwen3 0.6B": (16, 8, 128, 0.0, "llama"),
    "Gemma-3 4B": (8, 4, 256, 1.0, "gemma"),
}
"""{model: query heads, key heads, numbers a head, offset, casting}"""
TOKENS = 64


def _heads(num_heads: int, head: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(1, TOKENS, num_heads, head, dtype=dtype).transpose(1, 2).requires_grad_()


def _angles(turned: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """As transformers has them: each angle twice, of which the first is taken."""
    return [torch.empty(1, TOKENS, turned, dtype=dtype)[..., : turned // 2] for _ in range(2)]


def _rope(form: tuple[int, int, int, int, bool], dtype: torch.dtype) -> None:
    query_heads, key_heads, head, turned, interleaved = form
    query, key = _heads(query_heads, head, dtype), _heads(key_heads, head, dtype)
    outputs = rope.rope(query, key, *_angles(turned, dtype), interleaved=interleaved)
    torch.autograd.backward(outputs, [torch.empty_like(each) for each in outputs])


def _normed(form: tuple[int, int, int, float, rope.Casting], dtype: torch.dtype, trained: bool) -> None:
    query_heads, key_heads, head, offset, casting = form
    query, key = _heads(query_heads, head, dtype), _heads(key_heads, head, dtype)
    weights = [torch.empty(head, dtype=dtype, requires_grad=trained) for _ in range(2)]
    outputs = rope.qk_norm_rope(query, key, *weights, *_angles(head, dtype), 1e-6, offset=offset, casting=casting)
    torch.autograd.backward(outputs, [torch.empty_like(each) for each in outputs])


def cases() -> list[Case]:
    """Each model in bf16, and one in fp32 and fp16; the norm's weights trained, and once frozen."""
    expects = {name: ["LDG.128", "STG.128"] for name in ("rope_turn", "qk_norm_rope_backward")}
    every = (torch.bfloat16, torch.float16, torch.float32)
    found = []
    for model, form in HEADS.items():
        for dtype in every if model == "Llama 8B" else every[:1]:
            title = f"rope {str(dtype)[6:]} heads={form[0]}+{form[1]} d={form[2]} R={form[3]} ({model})"
            found.append(Case(title, lambda f=form, d=dtype: _rope(f, d), expects))
    for model, normed in NORMED.items():
        for trained in (True, False) if model == "Qwen3 8B" else (True,):
            for dtype in every if model == "Qwen3 8B" and trained else every[:1]:
                weights = "" if trained else " weights frozen"
                title = f"qk_norm_rope {str(dtype)[6:]} heads={normed[0]}+{normed[1]} d={normed[2]}{weights} ({model})"
                found.append(Case(title, lambda f=normed, d=dtype, t=trained: _normed(f, d, t), expects))
    return found
