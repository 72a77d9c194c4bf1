"""A run's own model with its first decoder layers alone: small enough to be computed twice over before the first step.

The copies share the memory of the model's weights and have gradients of their own. The exact one computes in a wider
dtype: weights that are trained are copied in it, since their gradients are compared; a frozen linear layer or embedding
is widened where it is used, a piece at a time; an NF4 base is dequantized where it is used anyway.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from itertools import islice
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from launcher.model.adapters import decoder_layers
from launcher.model.attention import NAMES
from launcher.model.recognize import shape_of
from launcher.model.token_rows import whole

WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32}
"""In which dtype the truth is computed: its own error is 2^-16 of a bf16 run's and 2^-29 of an fp32 run's, so that it
does not count. float64 for bf16 would take twice the memory to say the same."""
PIECE = 1 << 24
"""Values of a frozen weight that are widened at once: 64 MiB in fp32, and no more time than all of a head at once."""
LARGE = 1 << 22
"""Values from which on a weight's gradient is what costs memory: no norm and no adapter has as many."""


@contextlib.contextmanager
def first_layers(model: nn.Module, count: int) -> Iterator[Callable[[bool], nn.Module]]:
    """Yields what makes copies of `model` with its first `count` layers, for use within the block; told whether to
    train what is LARGE too.

    Under ZeRO-3 their weights are gathered meanwhile, on all ranks; no engine may have been built yet. Collective.
    Where only later layers are trained, the copies' layers are too: they stand for those. Raises ModelError where there
    are no layers.
    """
    layers = decoder_layers(model)
    every = layers._modules
    layers._modules = dict(islice(every.items(), count))
    try:
        weights = list(model.parameters())
        trains_here = any(weight.requires_grad for weight in layers.parameters())
        own = {id(weight) for weight in layers.parameters() if weight.is_floating_point() and not trains_here}
        with whole(weights):

            def copied(large: bool) -> nn.Module:
                memo: dict[int, Any] = {
                    id(weight): nn.Parameter(weight.data, weight.requires_grad or id(weight) in own)
                    for weight in weights
                }
                states = [getattr(module, "quant_state", None) for module in model.modules()]
                memo |= {id(state): state for state in states if state is not None}
                made = copy.deepcopy(model, memo).eval()
                freeze_embedding(causal_lm(made))
                for weight in made.parameters():
                    weight.requires_grad_(weight.requires_grad and (large or weight.numel() < LARGE))
                fill_zeros(made)
                return made

            yield copied
    finally:
        layers._modules = every


def causal_lm(model: nn.Module) -> Any:
    """The transformers model inside peft's wrapper, where there is one."""
    return getattr(model, "get_base_model", lambda: model)()


def freeze_embedding(network: Any) -> None:
    """Train no embedding that is not the head's weight too: its output's gradient tells what it would learn."""
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    if isinstance(embedding, nn.Embedding) and (head is None or embedding.weight is not bare(head).weight):
        embedding.requires_grad_(False)


def fill_zeros(model: nn.Module) -> None:
    """Give trained matrices that are zero, as adapters begin, the same small values in every copy: they would hide what
    comes before them, and its gradients."""
    draw = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.requires_grad and weight.dim() > 1 and weight.numel() < LARGE and not weight.any():
            weight.data = (0.02 * torch.randn(weight.shape, generator=draw)).to(weight)


def vocabulary(network: Any) -> int:
    """Tokens that both the embedding and the head have a row for; ZeRO-3 may have partitioned them."""
    layers = (network.get_input_embeddings(), network.get_output_embeddings())
    return min(shape_of(bare(layer).weight)[0] for layer in layers if layer is not None)


def bare(layer: Any) -> Any:
    """The model's own layer under those that peft puts around it, whose `weight` is put together anew for each use."""
    for name in ("original_module", "base_layer"):
        layer = getattr(layer, name, layer)
    return layer


def reference_attention(model: nn.Module) -> None:
    """Attend with torch's SDPA, document by document: it has every dtype."""
    network = causal_lm(model)
    if network.config._attn_implementation in NAMES.values():
        network.set_attn_implementation(NAMES["sdpa"])


def widen(model: nn.Module, dtype: torch.dtype) -> None:
    """Have a copy compute in `dtype`, with the attention and the expert layers that have every dtype."""
    reference_attention(model)
    causal_lm(model).set_experts_implementation("eager")
    wide: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        if widens_by_itself(module):
            continue
        if is_frozen(module, nn.Linear):
            module.forward = MethodType(_wide_linear, module)
        elif is_frozen(module, nn.Embedding):
            module.register_forward_hook(lambda module, given, found: found.to(dtype))
        else:
            for name, weight in module._parameters.items():
                if weight is not None and weight.is_floating_point():
                    made = nn.Parameter(weight.data.to(dtype), weight.requires_grad)
                    module._parameters[name] = wide.setdefault(weight, made)


def widens_by_itself(module: nn.Module) -> bool:
    """A 4-bit layer's forward takes whatever dtype it is given, see `model.nf4`."""
    return getattr(module, "quant_state", None) is not None


def is_frozen(module: nn.Module, kind: type[nn.Linear] | type[nn.Embedding]) -> bool:
    """Whether `module` is a `kind` that computes as torch's own does, and nothing of it is trained."""
    plain = type(module) is kind or (kind is nn.Embedding and isinstance(module, kind))
    return plain and not any(weight.requires_grad for weight in module.parameters(recurse=False))


def _wide_linear(self: Any, x: Tensor) -> Tensor:
    product: Tensor = _WideLinear.apply(x, self.weight)
    return product if self.bias is None else product + self.bias.to(product.dtype)


class _WideLinear(torch.autograd.Function):
    """y = x W^T in the dtype of x; W is widened for each use, PIECE values at a time, and not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return torch.cat([F.linear(x, piece.to(x.dtype)) for piece in _pieces(weight)], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        pieces = _pieces(ctx.weight)
        parts = zip(grad.split([len(piece) for piece in pieces], -1), pieces, strict=True)
        found = grad.new_zeros(*grad.shape[:-1], ctx.weight.shape[1])
        for part, piece in parts:
            found += part @ piece.to(grad.dtype)
        return found, None


def _pieces(weight: Tensor) -> tuple[Tensor, ...]:
    return weight.split(max(1, PIECE // weight.shape[1]))
