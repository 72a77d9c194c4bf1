"""Decoder layers whose second norm reads a residual sum: the sum and the norm become one op.

    h = x + c * z                    z: what attention returned, or the norm or dropout behind it
    n = norm(h)                      one pass over h instead of two
    y = h + c * mlp(n)

The layer's own forward is run once with stand-ins for children. What each of them was called with says how the layer
is put together: a list of steps, which is then run with the children themselves. Children are always called, never
looked into, so that hooks (ZeRO-3's among them) and adapters work as before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from launcher.model.recognize import StandIn, Unlike, double, drawn, has_weights, rebuilt, shape_of

OPTIONS = ("past", "use_cache", "output", "encoder")
"""In names of arguments that training leaves at their defaults, as it does those whose default is no None; where they
are others, the layer's own forward runs."""


@dataclass(frozen=True)
class Ref:
    """Where a step takes an argument from."""

    kind: str
    """`value`: the output of a step, by its number; `argument`: the layer's own, by its name; `constant`."""
    which: Any


@dataclass(frozen=True)
class Sum:
    """left + scale * right, both numbers of values."""

    left: int
    right: int
    scale: float

    def terms(self, values: list[Any]) -> tuple[Tensor, Tensor]:
        # Experts may return [B * T, H], which the layer's own code views as the residual.
        left, right = values[self.left], values[self.right].view_as(values[self.left])
        return left, right if self.scale == 1.0 else right * self.scale

    def of(self, values: list[Any]) -> Tensor:
        left, right = self.terms(values)
        return left + right


@dataclass(frozen=True)
class Call:
    """A child's call; its output, or the first of a pair, is the next value."""

    child: str
    args: tuple[Ref, ...]
    kwargs: tuple[tuple[str, Ref], ...]
    pair: bool
    further: bool
    """It also gets the arguments that the layer has no name for."""


@dataclass(frozen=True)
class AddNorm:
    """A norm of a sum; the next two values are the sum and its norm."""

    child: str
    sum: Sum


@dataclass(frozen=True)
class Steps:
    """A decoder layer."""

    steps: tuple[Call | AddNorm, ...]
    result: Sum

    def run(self, layer: nn.Module, arguments: Mapping[str, Any], first: str, further: Mapping[str, Any]) -> Tensor:
        values: list[Any] = [arguments[first]]
        for step in self.steps:
            child = getattr(layer, step.child)
            if isinstance(step, AddNorm):
                residual, added = step.sum.terms(values)
                normed, total = child(added, residual=residual)
                values += [total, normed]
                continue
            args = [_look_up(ref, values, arguments) for ref in step.args]
            kwargs = {name: _look_up(ref, values, arguments) for name, ref in step.kwargs}
            output = child(*args, **kwargs, **(further if step.further else {}))
            values.append(output[0] if step.pair else output)
        return self.result.of(values)


def _look_up(ref: Ref, values: list[Any], arguments: Mapping[str, Any]) -> Any:
    if ref.kind == "value":
        return values[ref.which]
    return arguments.get(ref.which) if ref.kind == "argument" else ref.which


def fused_layer(layer: nn.Module, norms: Iterable[str]) -> tuple[Any, list[str]]:
    """A forward for `layer`, and which of its `norms` (children that take `residual=`) it calls with a sum.

    Raises Unlike.
    """
    names, defaults = _parameters(layer)
    # With dropout on, and in a dtype in which sums overflow: where a layer does more than add, it shows.
    found = {
        _steps(layer, set(norms), training, dtype, size)
        for training, dtype, size in (
            (True, torch.float64, 1.0),
            (False, torch.float64, 1.0),
            (True, torch.float16, 3e4),
        )
    }
    if len(found) != 1:
        raise Unlike("it does more to its residual sums than add")
    steps = found.pop()
    added = [step.child for step in steps.steps if isinstance(step, AddNorm)]
    if not added:
        raise Unlike("no norm in it reads a residual sum")

    def change(original: Any) -> Any:
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            arguments = dict(zip(names, args, strict=False)) | kwargs
            for name, default in defaults.items():
                given = arguments.get(name, default)
                off = default in (None, False) and (given is None or given is False)
                if not (given is default or off):
                    return original(self, *args, **kwargs)  # a cache, or a wish for more output
            further = {name: value for name, value in arguments.items() if name not in names}
            return steps.run(self, arguments, names[0], further)

        return forward

    return rebuilt(type(layer).forward, change), added


def _parameters(layer: nn.Module) -> tuple[list[str], dict[str, Any]]:
    """The names of a forward's parameters, and the defaults of those that a training step leaves alone."""
    parameters = list(inspect.signature(type(layer).forward).parameters.values())[1:]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    options = [p for p in named[1:] if any(word in p.name for word in OPTIONS) or p.default not in (None, p.empty)]
    return [p.name for p in named], {p.name: None if p.default is p.empty else p.default for p in options}


def _steps(layer: nn.Module, norms: set[str], training: bool, dtype: torch.dtype, size: float) -> Steps:
    """Which children return pairs is found out by trying: where the layer fails, it was the last one called."""
    pairs: set[str] = set()
    while True:
        recorder = _Recorder(layer, norms, pairs, training, dtype, size)
        try:
            return recorder.run()
        except Unlike:
            raise
        except Exception as error:
            if recorder.last is None or recorder.last in pairs:
                raise Unlike(f"its forward could not be tried ({type(error).__name__}: {error})") from error
            pairs.add(recorder.last)


class _Recorder:
    """One run of a layer's forward over stand-ins."""

    def __init__(
        self, layer: nn.Module, norms: set[str], pairs: set[str], training: bool, dtype: torch.dtype, size: float
    ) -> None:
        self.layer, self.norms, self.pairs, self.training = layer, norms, pairs, training
        self.dtype, self.size = dtype, size
        self.scales = [1.0, *{v for v in vars(layer).values() if isinstance(v, float)} - {1.0}]
        self.names, defaults = _parameters(layer)
        self.given = {name: object() for name in self.names[1:] if name not in defaults}
        self.arguments: dict[str, Any] = self.given | defaults
        kinds = {p.kind for p in inspect.signature(type(layer).forward).parameters.values()}
        self.further: Any = object() if inspect.Parameter.VAR_KEYWORD in kinds else None
        self.width = max(shape_of(layer.get_submodule(name).get_parameter("weight"))[0] for name in norms)
        self.values: list[Tensor] = [self.draw("x")]
        self.steps: list[Call | AddNorm] = []
        self.last: str | None = None

    def draw(self, seed: str) -> Tensor:
        # Cut off at 2: one number alone does not overflow in fp16, and sums of them do.
        return (drawn(1, 3, self.width, seed=seed).clamp(-2.0, 2.0) * self.size).to(self.dtype)

    def run(self) -> Steps:
        children = {name: StandIn(self.answer(name)) for name in self.layer._modules}
        made = double(self.layer, children, training=self.training)
        further = {} if self.further is None else {"something_else": self.further}
        with torch.no_grad():
            result = type(self.layer).forward(made, self.values[0], **self.arguments, **further)
        total = self.sum_in(result) if isinstance(result, Tensor) else None
        if total is None:
            raise Unlike("what it returns is no sum of a residual and one branch")
        return Steps(tuple(self.steps), total)

    def answer(self, name: str) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            self.last = name
            further = self.further is not None and kwargs.pop("something_else", None) is self.further
            first: Any = args[0] if args else None
            if name in self.norms and len(args) == 1 and not kwargs and self.number(first) is None:
                total = self.sum_in(first)
                if total is None:
                    raise Unlike("a norm in it reads no residual sum")
                self.steps.append(AddNorm(name, total))
                self.values += [first, self.draw(name)]
                return self.values[-1]
            refs = tuple(self.ref(value) for value in args)
            named = tuple((key, self.ref(value)) for key, value in kwargs.items())
            self.steps.append(Call(name, refs, named, name in self.pairs, further))
            self.values.append(self.draw(f"{name}{len(self.values)}"))
            return (self.values[-1], None) if name in self.pairs else self.values[-1]

        return record

    def number(self, tensor: Any) -> int | None:
        return next((i for i, value in enumerate(self.values) if value is tensor), None)

    def ref(self, value: Any) -> Ref:
        if (number := self.number(value)) is not None:
            return Ref("value", number)
        for name, argument in self.given.items():
            if value is argument:
                return Ref("argument", name)
        if value is None or isinstance(value, bool | int | float | str):
            return Ref("constant", value)
        if isinstance(value, Tensor) and self.sum_in(value) is not None:
            raise Unlike("its residual sum is read by a child that is no norm")
        raise Unlike("a child of it reads something that was computed on the way")

    def sum_in(self, tensor: Tensor) -> Sum | None:
        """The two values that add up to `tensor`, to the bit."""
        for left, a in enumerate(self.values):
            for right in range(len(self.values)):
                for scale in self.scales:
                    total = Sum(left, right, scale)
                    if left != right and a.shape == tensor.shape and torch.equal(total.of(self.values), tensor):
                        return total
        return None


def is_layer(module: nn.Module) -> bool:
    """Whether a module with a norm may be a decoder layer: two children or more besides have weights."""
    return sum(has_weights(child) for child in module._modules.values()) >= 3
