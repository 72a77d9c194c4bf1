"""Lion, from the paper: bitsandbytes' own on GPUs adds weight decay to the gradient, whose sign is all that counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Evolved sign momentum with decoupled weight decay (Chen et al., 2023, program 1).

    p *= 1 - lr * weight_decay;  p -= lr * sign(beta1 * m + (1 - beta1) * g);  m = beta2 * m + (1 - beta2) * g
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], weight_decay: float = 0.0
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
                momentum, gradient = state["exp_avg"], parameter.grad
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                parameter.add_(torch.lerp(gradient, momentum, beta1).sign_(), alpha=-group["lr"])
                momentum.lerp_(gradient, 1.0 - beta2)
        return loss
