"""The head and the loss as one op: a causal LM that is given targets returns the loss sum instead of logits.

    model(input_ids=..., supervised_index=, targets=, row_weights=, label_smoothing=) -> (loss sum, count, correct)

The loss is computed inside the model's forward and by the head's own `__call__`: ZeRO-3 gathers the head's weight there
and frees it behind, and takes the gradient where its hooks expect it (trl#3368, Liger#767, trl#5891). How the model
calls its base, and what it does to logits behind the head, is found out by running its own forward with stand-ins for
both.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce, wraps
from typing import Any

import torch
from torch import Tensor, nn

from launcher.model.recognize import StandIn, Unlike, double, drawn, same, shape_of
from launcher_kernels.linear_cross_entropy import linear_cross_entropy

INPUTS = ("input_ids", "attention_mask", "position_ids")
MARK = "computes_loss_sum"
"""Attribute of a causal LM whose forward takes targets."""


@dataclass(frozen=True)
class Input:
    """Stands in a call for one of INPUTS."""

    name: str


@dataclass(frozen=True)
class BaseCall:
    """How a causal LM calls its base: constants, and Inputs."""

    path: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    def without(self, name: str) -> BaseCall:
        """The same call where that input was not given."""

        def left(value: Any) -> Any:
            return None if value == Input(name) else value

        return BaseCall(self.path, tuple(map(left, self.args)), tuple((k, left(v)) for k, v in self.kwargs))

    def hidden(self, causal_lm: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """[B, T, H] that goes into the head."""

        def value(of: Any) -> Any:
            return inputs.get(of.name) if isinstance(of, Input) else of

        base: Any = reduce(getattr, self.path.split("."), causal_lm)
        output: Tensor = base(*map(value, self.args), **{key: value(of) for key, of in self.kwargs})[0]
        return output


class _Output:
    """What a base model returns: hidden states first, and nothing else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, key: Any) -> Any:
        return self.last_hidden_state if key in (0, "last_hidden_state") else None

    def __getattr__(self, name: str) -> None:
        return None


def fused_head(causal_lm: Any) -> list[tuple[nn.Module, Any]]:
    """Modules with the forwards that they are to have: the causal LM, and its head (each copy that peft keeps).

    Raises Unlike.
    """
    head: Any = causal_lm.get_output_embeddings() if hasattr(causal_lm, "get_output_embeddings") else None
    name = next((name for name, child in causal_lm._modules.items() if child is head and head is not None), None)
    if name is None:
        raise Unlike("it has no head of its own")
    if type(causal_lm).__call__ is not nn.Module.__call__:
        raise Unlike("its class has a __call__ of its own")
    layers = _linear_layers(causal_lm._modules[name])
    # As wide as the head's own: models may leave out what pads a vocabulary, or change the logits of single tokens.
    logits = drawn(2, 3, shape_of(layers[0].get_parameter("weight"))[0], seed="logits")
    call, behind = _trial(causal_lm, name, INPUTS, logits)
    padded, _ = _trial(causal_lm, name, INPUTS[:2], logits)
    trained, behind_trained = _trial(causal_lm, name, INPUTS, logits, training=True)
    if padded != call.without("position_ids") or trained != call or not torch.equal(behind_trained, behind):
        raise Unlike("its base or its head is used in several ways")
    scale, softcap = _behind(logits, lambda logits: _trial(causal_lm, name, INPUTS, logits)[1])
    original = type(causal_lm).forward

    @wraps(original)  # generate() reads the signature
    def forward(self: Any, *args: Any, targets: Tensor | None = None, **kwargs: Any) -> Any:
        if targets is None:
            return original(self, *args, **kwargs)
        index, row_weights = kwargs.pop("supervised_index"), kwargs.pop("row_weights", None)
        smoothing = kwargs.pop("label_smoothing", 0.0)
        inputs = {key: kwargs.pop(key, None) for key in INPUTS}
        unknown = [key for key, value in kwargs.items() if not (value is None or value is False)]
        if args or unknown:
            raise TypeError(f"with targets the model takes {', '.join(INPUTS)} by name, and not {unknown or 'others'}")
        hidden = call.hidden(self, inputs)
        return self._modules[name](
            hidden, targets=targets, index=index, row_weights=row_weights, label_smoothing=smoothing
        )

    of_head = _head_forward(scale, softcap)
    return [(causal_lm, forward), *((layer, of_head) for layer in layers)]


def _head_forward(scale: float, softcap: float | None) -> Any:
    def forward(
        self: Any,
        hidden: Tensor,
        *,
        targets: Tensor | None = None,
        index: Tensor | None = None,
        row_weights: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Any:
        if targets is None:
            return nn.functional.linear(hidden, self.weight, self.bias)
        return linear_cross_entropy(
            hidden.flatten(0, -2),
            self.weight,
            targets,
            index=index,
            bias=self.bias,
            row_weights=row_weights,
            logit_scale=scale,
            softcap=softcap,
            label_smoothing=label_smoothing,
        )

    return forward


def _linear_layers(head: Any) -> list[nn.Module]:
    """The plain linear layers behind a head's `__call__`.

    Raises Unlike.
    """
    layers = [head]
    if "peft" in sys.modules:  # six seconds to import, and where nobody has there is no layer of its
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

        if isinstance(head, ModulesToSaveWrapper):
            layers = [*head.modules_to_save.values(), head.original_module]
        elif isinstance(head, AuxiliaryTrainingWrapper):
            raise Unlike("single rows of it are trained")
        elif isinstance(head, BaseTunerLayer):
            raise Unlike("an adapter is on it")
    for layer in layers:
        if type(layer).forward is not nn.Linear.forward or "forward" in vars(layer):
            raise Unlike(f"its layer is a {type(layer).__name__} with a forward of its own")
    return layers


def _trial(
    causal_lm: nn.Module, head: str, given: tuple[str, ...], logits: Tensor, training: bool = False
) -> tuple[BaseCall, Tensor]:
    """How the base is called, and what comes out where the head returns `logits`.

    Raises Unlike.
    """
    hidden = drawn(*logits.shape[:-1], 8, seed="hidden")
    inputs = {name: torch.ones(logits.shape[:-1], dtype=torch.int64) for name in given}
    calls: list[BaseCall] = []
    heard: list[Tensor] = []

    def standing_for(value: Any) -> Any:
        name = next((name for name, tensor in inputs.items() if tensor is value), None)
        if name is None and not (value is None or isinstance(value, bool | int | float | str)):
            raise Unlike("its base is given something that was computed on the way")
        return value if name is None else Input(name)

    def base(path: str, *args: Any, **kwargs: Any) -> _Output:
        named = tuple((key, standing_for(value)) for key, value in kwargs.items())
        calls.append(BaseCall(path, tuple(map(standing_for, args)), named))
        return _Output(hidden)

    def listen(x: Tensor) -> Tensor:
        heard.append(x)
        return logits.clone()

    def stand_in(path: str, module: nn.Module | None, depth: int) -> StandIn:
        made = StandIn(partial(base, path))
        if module is not None and depth:  # OPT calls the decoder inside its base
            for name, child in module._modules.items():
                made._modules[name] = stand_in(f"{path}.{name}", child, depth - 1)
        return made

    children = {
        name: StandIn(listen) if name == head else stand_in(name, child, 1)
        for name, child in causal_lm._modules.items()
    }
    try:
        with torch.no_grad():
            output = type(causal_lm).forward(double(causal_lm, children, training=training), **inputs, use_cache=False)
        found = output.logits
    except Unlike:
        raise
    except Exception as error:
        raise Unlike(f"the model's forward could not be tried ({type(error).__name__}: {error})") from error
    if len(calls) != 1 or len(heard) != 1 or not same(heard[0], hidden, 0.0):
        raise Unlike("something is computed between the base and the head")
    if not isinstance(found, Tensor) or found.shape != logits.shape:
        raise Unlike("its logits are not those of the head")
    return calls[0], found


def _behind(logits: Tensor, transformed: Callable[[Tensor], Tensor]) -> tuple[float, float | None]:
    """(logit scale, soft cap) of what a model does to such logits: they are scaled, then capped.

    Raises Unlike.
    """
    # Small logits show the scale alone, huge ones the cap.
    scale = (transformed(logits * 1e-6).double() / (logits * 1e-6)).median().item()
    scale = 1.0 if abs(scale - 1.0) < 1e-9 else float(f"{scale:.12g}")
    huge = transformed(logits * 1e9).double().abs()
    softcap = float(f"{huge.max().item():.12g}") if huge.max() < 1e6 else None
    for size in (1.0, 30.0, 300.0):
        expected = logits * size * scale
        if softcap is not None:
            expected = torch.tanh(expected / softcap) * softcap
        if not same(transformed(logits * size).double(), expected, 1e-6):
            raise Unlike("its logits are changed behind the head in a way that the op does not know")
    return scale, softcap


def takes_targets(causal_lm: Any) -> bool:
    """Whether `fuse` gave this model a forward that computes the loss."""
    return bool(vars(causal_lm).get(MARK, False))
