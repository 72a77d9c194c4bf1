"""What a module computes, found out by running its class's own forward on numbers drawn here.

A module's double shares its class and its attributes; parameters and children are replaced by small things that answer
with known numbers, so that neither weights that ZeRO-3 has partitioned nor 4-bit ones are ever read. What comes out is
compared with what our ops compute: names of models and of modules play no part.

A recognizer returns what it found or raises `Unlike`, whose message completes "left as it is: ...".
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import CellType, FunctionType
from typing import Any, get_args

import torch
from torch import Tensor, nn

from launcher_kernels import reference
from launcher_kernels.glu import Activation
from launcher_kernels.norm import Casting

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
TOLERANCE = 1e-5
"""Of a largest difference as a share of the largest number: models compute parts of a float64 forward in fp32."""


class Unlike(Exception):
    """The module computes something else; the message says what."""


class StandIn(nn.Module):
    """A child that answers by a function."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer(*args, **kwargs)


def double(
    module: nn.Module,
    children: Mapping[str, nn.Module | None],
    parameters: Mapping[str, Tensor | None] | None = None,
    training: bool = False,
) -> Any:
    """A module of the same class and attributes over other children and parameters; buffers are copies on the CPU."""
    made = object.__new__(type(module))
    made.__dict__.update({key: value for key, value in module.__dict__.items() if key != "forward"})
    made.__dict__["_modules"] = dict(children)
    made.__dict__["_parameters"] = dict(parameters or {})
    made.__dict__["_buffers"] = {k: None if b is None else b.detach().cpu().clone() for k, b in module._buffers.items()}
    made.__dict__["training"] = training
    if "gradient_checkpointing" in made.__dict__:
        made.__dict__["gradient_checkpointing"] = False
    return made


def drawn(*shape: int, seed: str) -> Tensor:
    """float64 normal numbers, the same for the same shape and seed; the process's own random state is left alone."""
    return _drawn(shape, seed).clone()  # models may write into what they are given


@lru_cache(maxsize=64)
def _drawn(shape: tuple[int, ...], seed: str) -> Tensor:
    generator = torch.Generator().manual_seed(int.from_bytes(seed.encode()[-7:], "big"))
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def same(found: Any, expected: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether the largest difference is a share of at most `tolerance` of the largest number."""
    if not isinstance(found, Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """Of the whole parameter, also where ZeRO-3 has partitioned it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def has_weights(module: nn.Module | None) -> bool:
    """Whether there are parameters in it."""
    return module is not None and next(module.parameters(), None) is not None


def width_of(child: Any) -> int | None:
    """How many numbers a projection makes of each row; None where a module is no projection. Adapters on it count."""
    return getattr(child, "out_features", None) or getattr(child, "nf", None)


def is_projection(child: nn.Module | None) -> bool:
    """Linear layers, quantized or not, and GPT-2's Conv1D."""
    return width_of(child) is not None


def takes_options(module: nn.Module) -> bool:
    """Whether its forward has parameters with defaults, as attention layers' have."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return any(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def likeness(module: nn.Module) -> Any:
    """Equal for modules that do the same with other weights: layers of one model need be tried once."""
    own = {k: v for k, v in vars(module).items() if not k.startswith("_")}
    attributes = tuple((k, v if isinstance(v, bool | int | float | str | None) else id(v)) for k, v in own.items())
    shapes = tuple((name, shape_of(p)) for name, p in module._parameters.items() if p is not None)
    children = tuple((k, is_projection(c) or likeness(c), width_of(c)) for k, c in module.named_children())
    return type(module), attributes, shapes, children


@dataclass(frozen=True)
class Norm:
    """RMS norm, or layer norm, over the last dimension; the arguments are those of `launcher_kernels.norm`."""

    layer: bool
    eps: float
    offset: float = 0.0
    casting: Casting = "llama"

    def exact(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """What PyTorch computes."""
        if self.layer:
            return reference.layer_norm(x, weight, bias, self.eps)
        return reference.rms_norm(x, weight, self.eps, offset=self.offset, casting=self.casting)


def norm_of(module: nn.Module) -> Norm:
    """Raises Unlike."""
    own = {name: shape_of(p) for name, p in module._parameters.items() if p is not None}
    if module._modules or not {"weight"} <= own.keys() <= {"weight", "bias"} or len(own["weight"]) != 1:
        raise Unlike("it has other parameters than a norm")
    [size] = own["weight"]
    numbers = [v for v in vars(module).values() if isinstance(v, float) and 0 < v < 0.1]
    # Rows of all sizes: where they are small, eps is a large part of what comes out.
    rows = max(4, 1024 // size)
    x = drawn(rows, size, seed="x") * torch.logspace(-3, 1.5, rows, dtype=torch.float64)[:, None]
    weights = {name: drawn(size, seed=name) for name in own}
    candidates = [Norm(True, eps) for eps in numbers]
    if "bias" not in own:
        candidates += [Norm(False, e, o, c) for e in numbers for o in (0.0, 1.0) for c in get_args(Casting)]
    for norm in candidates:
        if all(_computes(module, norm, x.to(d), {k: w.to(d) for k, w in weights.items()}) for d in _NORM_DTYPES):
            return norm
    raise Unlike("it computes neither an RMS norm nor a layer norm")


_NORM_DTYPES = (torch.float32, torch.bfloat16)


def _computes(module: nn.Module, norm: Norm, x: Tensor, weights: dict[str, Tensor]) -> bool:
    """In bf16 nearly every number has to be the same: another order of multiplying and rounding changes a fourth."""
    found, expected = tried(type(module).forward, double(module, {}, weights), x), norm.exact(x, **weights)
    if x.dtype == torch.float32:
        return same(found, expected)
    return same(found, expected, 1e-2) and (found != expected).float().mean().item() < 0.01


def tried(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The forward of someone's class on a double may fail in any way: then it is not what was looked for."""
    try:
        with torch.no_grad():
            return forward(*args, **kwargs)
    except Exception as error:
        raise Unlike(f"its forward could not be tried ({type(error).__name__}: {error})") from error


@dataclass(frozen=True)
class Gated:
    """down(act(gate(x)) * up(x)), by the children's names; `up` is None where `gate` makes both, gate first."""

    gate: str
    up: str | None
    down: str
    activation: Activation


def gated_of(module: nn.Module) -> Gated:
    """Raises Unlike."""
    names = [name for name, child in module._modules.items() if has_weights(child)]
    if module._parameters:
        raise Unlike("it has parameters of its own")
    if len(inspect.signature(type(module).forward).parameters) != 2:
        raise Unlike("it takes more than one input")
    x, seen = drawn(1, 2, 5, seed="x"), dict[str, Tensor]()

    def answer(name: str) -> Callable[[Tensor], Tensor]:
        def record(given: Tensor) -> Tensor:
            seen[name] = given
            return drawn(1, 2, width_of(module._modules[name]) or 12, seed=name)

        return record

    kept = {name: child for name, child in module._modules.items() if name not in names}
    projections = {name: StandIn(answer(name)) for name in names}
    found = None
    for training in (True, False):  # a dropout that is on would show
        seen.clear()
        result = tried(type(module).forward, double(module, kept | projections, training=training), x)
        if seen.keys() != set(names):
            raise Unlike("not all its projections are used")
        down = next(reversed(seen))
        first = [name for name in names if name != down]
        if not same(result, projections[down](seen[down]), 0.0) or any(not same(seen[n], x, 0.0) for n in first):
            raise Unlike("it is no gated product between projections")
        made = [projections[name](x) for name in first]
        matches = [
            Gated(first[i], None if len(first) == 1 else first[1 - i], down, activation)
            for i in range(len(first))
            for activation in ACTIVATIONS
            if _is_product(seen[down], made[i], made[1 - i] if len(first) == 2 else None, activation)
        ]
        if not matches or (found is not None and matches[0] != found):
            raise Unlike("it has no gate, or one that is computed in another way")
        found = matches[0]
    assert found is not None
    return found


def _is_product(inner: Tensor, gate: Tensor, up: Tensor | None, activation: Activation) -> bool:
    if up is not None:
        return gate.shape == up.shape and same(inner, reference.glu(gate, up, activation), 1e-9)
    return gate.shape[-1] % 2 == 0 and same(inner, reference.glu_packed(gate, activation), 1e-9)


GATE = "_apply_gate"
"""The method by which transformers' experts put gate and up together."""


def expert_gate_of(module: Any) -> Activation:
    """The activation of experts whose weights are in one tensor. Raises Unlike."""
    how = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if how in (None, "eager") or not hasattr(type(module), GATE):
        raise Unlike("the weights of all its experts are in one tensor, and it multiplies them one by one")
    gate_up = drawn(3, 12, seed="gate_up")
    kept = {name: child for name, child in module._modules.items() if not has_weights(child)}
    found = tried(getattr(type(module), GATE), double(module, kept), gate_up)
    for activation in ACTIVATIONS:
        if same(found, reference.glu_packed(gate_up, activation), 1e-9):
            return activation
    raise Unlike("its experts' gate is computed in another way")


def innermost(function: Any) -> Any:
    """The function under its decorators."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def rebuilt(function: Any, change: Callable[[Any], Any]) -> Any:
    """The same function with what is under all its decorators changed, and the decorators' own code around it.

    Raises Unlike where a decorator keeps the function out of reach.
    """
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        return change(function)
    changed = rebuilt(inner, change)
    cells = tuple(CellType(changed) if cell.cell_contents is inner else cell for cell in function.__closure__ or ())
    if cells == (function.__closure__ or ()):
        raise Unlike("a decorator of its forward cannot be seen through")
    return _copied(function, function.__globals__, cells, changed)


def with_globals(function: Any, names: Mapping[str, Any]) -> Any:
    """The same function, for which some global names mean something else; its module does not notice."""

    def change(inner: Any) -> Any:
        # Without a __name__ of theirs: torch.compile would take the names from the module instead.
        scope = {key: value for key, value in inner.__globals__.items() if key != "__name__"} | dict(names)
        return _copied(inner, scope, inner.__closure__, None)

    return rebuilt(function, change)


def _copied(function: Any, scope: dict[str, Any], cells: Any, wrapped: Any) -> Any:
    # A code object of its own: torch.compile keeps what it compiles with the code, for one set of globals.
    made = FunctionType(function.__code__.replace(), scope, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__, made.__qualname__, made.__module__ = (
        function.__kwdefaults__,
        function.__qualname__,
        function.__module__,
    )
    made.__dict__.update(function.__dict__)
    if wrapped is not None:
        made.__wrapped__ = wrapped  # type: ignore[attr-defined]
    return made


def without_attention_kernels(config: Any) -> Any:
    """A copy of a configuration whose attention is computed by the model's own eager code."""
    made = copy.copy(config)
    made.__dict__["_attn_implementation_internal"] = "eager"
    return made
