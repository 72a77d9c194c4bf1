"""Rotary embeddings in attention layers, and the norms of queries and keys before them, as one op.

An attention's forward keeps its code; the global function that turns queries and keys is another one for it alone.
Where queries and keys are normed by RMS straight before, those norms pass their input on and the rotation computes
them. That nothing else reads what they made is shown by a run of the whole attention: with the model's own functions
and with ours, on stand-ins for its projections.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from launcher.model.recognize import (
    Norm,
    StandIn,
    Unlike,
    double,
    drawn,
    has_weights,
    same,
    shape_of,
    tried,
    width_of,
    with_globals,
    without_attention_kernels,
)
from launcher.model.rotations import Rotation, rotation_of, rotations_in
from launcher_kernels import reference
from launcher_kernels.rope import qk_norm_rope, rope

Tables = tuple[str, Tensor, Tensor]


@dataclass(frozen=True)
class FusedRotation:
    """A forward for an attention."""

    forward: Any
    norms: dict[str, Any]
    """Forwards for the queries' norm and the keys', by the children's names, that pass their input on; or none."""


def fused_rotation(attention: nn.Module, tables: Tables, norms: Mapping[nn.Module, Norm]) -> FusedRotation | None:
    """None where this attention turns nothing, though its class may (layers without positions).

    `tables` as `tables_of` gives them. Raises Unlike.
    """
    functions = rotations_in(attention)
    rotations = {name: rotation_of(function, tables[0]) for name, function in functions.items()}
    called: list[tuple[str, Tensor, Tensor]] = []

    def spied(name: str) -> Callable[..., Any]:
        def spy(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
            called.append((name, query, key))
            return functions[name](query, key, *args, **kwargs)

        return spy

    own = _attended(attention, tables, norms, {name: spied(name) for name in functions}, ())
    if not called:
        return None
    _, query, _ = called[0]
    for pair in _norm_pairs(attention, norms, query.shape[-1]):
        norm = norms[attention.get_submodule(pair[0])]
        weights = tuple(drawn(query.shape[-1], seed=f"{child}.weight") for child in pair)
        both = {name: _reference(rotation, norm, weights) for name, rotation in rotations.items()}
        if same(_attended(attention, tables, norms, both, pair), own):
            return _norming(attention, functions, rotations, norm, pair)
    ours = {name: _reference(rotation, None, None) for name, rotation in rotations.items()}
    if not same(_attended(attention, tables, norms, ours, ()), own):
        raise Unlike("its rotation does more than turn queries and keys")
    names = {name: _turning(functions[name], rotation) for name, rotation in rotations.items()}
    return FusedRotation(with_globals(type(attention).forward, names), {})


def _norm_pairs(attention: nn.Module, norms: Mapping[nn.Module, Norm], width: int) -> list[tuple[str, str]]:
    """Two RMS norms of one kind over heads of `width`, in both orders, if there are."""
    heads = {
        name: norms[child]
        for name, child in attention.named_children()
        if child in norms and not norms[child].layer and shape_of(child.get_parameter("weight")) == (width,)
    }
    if len(heads) != 2 or len(set(heads.values())) != 1:
        return []
    first, second = heads
    return [(first, second), (second, first)]


def _attended(
    attention: nn.Module,
    tables: Tables,
    norms: Mapping[nn.Module, Norm],
    rotate: Mapping[str, Callable[..., Any]],
    passing: tuple[str, ...],
) -> Tensor:
    """What the attention's own forward makes of one row of five tokens, with stand-ins for what has weights.

    Raises Unlike.
    """
    children: dict[str, nn.Module | None] = {}
    for name, child in attention._modules.items():
        if name in passing:
            children[name] = StandIn(lambda x: x)
        elif child is not None and child in norms:
            weights = {n: drawn(*shape_of(p), seed=f"{name}.{n}") for n, p in child.named_parameters()}
            children[name] = StandIn(lambda x, norm=norms[child], weights=weights: norm.exact(x, **weights))
        elif not has_weights(child):
            children[name] = child
        else:
            children[name] = StandIn(_projection(name, child))
    parameters = {n: None if p is None else drawn(*shape_of(p), seed=n) for n, p in attention._parameters.items()}
    made = double(attention, children, parameters)
    if hasattr(made, "config"):
        made.__dict__["config"] = without_attention_kernels(made.config)
    given: dict[str, Any] = {}
    signature = list(inspect.signature(type(attention).forward).parameters.values())[1:]
    for i, parameter in enumerate(signature):
        if i == 0:
            given[parameter.name] = drawn(1, 5, 8, seed="hidden")
        elif parameter.name == "position_embeddings":
            given[parameter.name] = tables[1:]
        elif parameter.name == "attention_mask":
            given[parameter.name] = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
        elif parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            given[parameter.name] = None
    result = tried(with_globals(type(attention).forward, rotate), made, **given)
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


def _projection(name: str, child: Any) -> Callable[[Tensor], Tensor]:
    """Numbers of the projection's width in which every number of its input shows."""
    width = width_of(child)
    if width is None:
        raise Unlike(f"its {name} is no projection")

    def project(x: Tensor) -> Tensor:
        seen = (x * drawn(x.shape[-1], seed=f"{name} of")).sum(-1, keepdim=True)
        return drawn(*x.shape[:-1], width, seed=name) + seen * drawn(width, seed=f"{name} to")

    return project


def _reference(rotation: Rotation, norm: Norm | None, weights: tuple[Tensor, ...] | None) -> Callable[..., Any]:
    """In PyTorch, what ours will compute."""

    def turn(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if norm is not None and weights is not None:
            query, key = norm.exact(query, weights[0]), norm.exact(key, weights[1])
        return rotation.turn(lambda c, s, **how: reference.rope(query, key, c, s, **how), cos, sin)

    return turn


def _turning(own: Callable[..., Any], rotation: Rotation) -> Callable[..., Any]:
    """What stands for a model's rotation; for shapes that it was not tried with, the model's own."""

    def turn(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not rotation.fits(query, cos):
            return own(query, key, cos, sin, *args, **kwargs)
        return rotation.turn(lambda c, s, **how: rope(query, key, c, s, **how), cos, sin)

    return turn


class _Weights:
    """Of the norms that were called last."""

    query_weight: Any = None
    key_weight: Any = None


def _norming(
    attention: nn.Module,
    functions: Mapping[str, Callable[..., Any]],
    rotations: Mapping[str, Rotation],
    norm: Norm,
    pair: tuple[str, str],
) -> FusedRotation:
    # The rotation is a global function to the forward and knows no module: the norms lay their weights here for it.
    here = _Weights()

    def turning(own: Callable[..., Any], rotation: Rotation) -> Callable[..., Any]:
        def turn(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
            query_weight, key_weight = here.query_weight, here.key_weight
            if args or kwargs or not rotation.fits(query, cos):
                query, key = norm.exact(query, query_weight), norm.exact(key, key_weight)
                return own(query, key, cos, sin, *args, **kwargs)

            def op(cos: Tensor, sin: Tensor, *, interleaved: bool) -> tuple[Tensor, Tensor]:
                form: dict[str, Any] = {"interleaved": interleaved, "offset": norm.offset, "casting": norm.casting}
                return qk_norm_rope(query, key, query_weight, key_weight, cos, sin, norm.eps, **form)

            return rotation.turn(op, cos, sin)

        return turn

    names = {name: turning(functions[name], rotation) for name, rotation in rotations.items()}
    passing = {child: _pass(here, place) for child, place in zip(pair, ("query_weight", "key_weight"), strict=True)}
    return FusedRotation(with_globals(type(attention).forward, names), passing)


def _pass(here: _Weights, place: str) -> Any:
    """The forward of a norm that is computed together with the rotation."""

    def forward(self: Any, x: Tensor) -> Tensor:
        weight = self.weight
        # ZeRO-3 frees it behind this forward.
        setattr(here, place, weight.clone() if hasattr(weight, "ds_id") else weight)
        return x

    return forward
