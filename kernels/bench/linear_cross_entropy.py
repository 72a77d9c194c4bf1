"""The head's loss at the vocabularies of 1B to 70B models. Products run for real while recording, so H is small."""

from __future__ import annotations

from typing import Any

import torch
from offline import Case

from launcher_kernels import linear_cross_entropy as op

VOCABULARIES = {"Llama-3": 128256, "Llama-2": 32000, "GPT-2": 50257, "Qwen2": 151936, "Gemma": 262144}
HIDDEN = 64
ROWS = 3
ALL = {"logit_scale": 0.0625, "softcap": 30.0, "label_smoothing": 0.1, "z_loss": 1e-4}


def _call(vocabulary: int, dtype: torch.dtype, train_head: bool, options: dict[str, Any]) -> None:
    hidden = torch.zeros(2 * ROWS, HIDDEN, dtype=dtype, requires_grad=True)
    weight = torch.zeros(vocabulary, HIDDEN, dtype=dtype, requires_grad=train_head)
    targets, index = torch.zeros(ROWS, dtype=torch.int64), torch.arange(ROWS)
    op.linear_cross_entropy(hidden, weight, targets, index=index, **options)[0].backward()


def _evaluate(vocabulary: int) -> None:
    hidden, weight = (torch.zeros(n, HIDDEN, dtype=torch.bfloat16) for n in (ROWS, vocabulary))
    op.linear_cross_entropy(hidden, weight, torch.zeros(ROWS, dtype=torch.int64))


def cases() -> list[Case]:
    """Each vocabulary in bf16, one in fp16 and fp32, one with everything at once, one without gradients."""
    wide = {"cross_entropy": ["LDG.128", "STG.128"], "scale_rows": ["LDG.128", "STG.128"]}
    found = []
    for model, vocabulary in VOCABULARIES.items():
        for dtype in (torch.bfloat16, torch.float16, torch.float32) if model == "Llama-3" else (torch.bfloat16,):
            name = f"linear_cross_entropy {str(dtype)[6:]} V={vocabulary} ({model})"
            found.append(Case(name, lambda v=vocabulary, d=dtype: _call(v, d, True, {}), wide))
    name = "linear_cross_entropy bfloat16 V=262144 scaled, capped, smoothed, z-loss, frozen head"
    found.append(Case(name, lambda: _call(262144, torch.bfloat16, False, ALL), wide))
    wide = {"cross_entropy": ["LDG.128"]}
    found.append(Case("linear_cross_entropy bfloat16 V=128256 (Llama-3) evaluation", lambda: _evaluate(128256), wide))
    return found
