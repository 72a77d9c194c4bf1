"""What turns queries and keys in a model, and how: the tables of cosines and sines, and the functions that read them.

Rotary embeddings: Su et al., 2021. Models differ in which numbers of a head make a pair, in how wide a part of the head
turns, in how the tables repeat the angle of a pair, and in the order of what comes back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from launcher.model.recognize import Unlike, double, drawn, innermost, same, tried
from launcher_kernels import reference


def tables_of(module: nn.Module, kinds: tuple[str, ...] = ()) -> tuple[str, Tensor, Tensor]:
    """How a module lays cosines and sines out, and those of positions 0 to 4: [1, 5, W] float64 each.

    `twice`: the angles of the R / 2 pairs, and once more behind them; `pairs`: each angle twice; `once`. `kinds` are
    the values of a further argument, for models whose layers turn at different speeds.

    Raises Unlike.
    """
    if module._modules or module._parameters or not any("inv_freq" in name for name in module._buffers):
        raise Unlike("it holds no frequencies")
    layouts = set()
    further = list(inspect.signature(type(module).forward).parameters)[3:4] == ["layer_type"]
    for kind in kinds if further else (None,):
        x, positions = torch.zeros(1, dtype=torch.float64), torch.arange(5)[None]
        made = tried(type(module).forward, double(module, {}), x, positions, *([kind] if kind else []))
        shapes = [t.shape for t in made] if isinstance(made, tuple) else []
        if len(shapes) != 2 or any(shape[:2] != (1, 5) or len(shape) != 3 for shape in shapes):
            raise Unlike("it makes no cosines and sines of [1, T, W]")
        cos, sin = made
        width = cos.shape[-1]
        if width % 2 == 0 and all(torch.equal(t[..., : width // 2], t[..., width // 2 :]) for t in made):
            layouts.add("twice")
        elif width % 2 == 0 and all(torch.equal(t[..., ::2], t[..., 1::2]) for t in made):
            layouts.add("pairs")
        else:
            layouts.add("once")
    if len(layouts) != 1:
        raise Unlike("its cosines are laid out in several ways")
    return layouts.pop(), cos.double(), sin.double()


@dataclass(frozen=True)
class Rotation:
    """How a function turns queries and keys."""

    tables: str
    """As `tables_of` names them."""
    interleaved: bool
    """Neighbouring numbers make a pair; otherwise numbers half a rotation apart."""
    parted: bool
    """What turned comes back with all first numbers of the pairs before all second ones."""
    partial: bool
    """The function leaves what is beyond the rotation's width as it is."""

    def angles(self, table: Tensor) -> Tensor:
        """[B, T, R / 2] of the model's table [B, T, W]."""
        if self.tables == "once":
            return table
        return table[..., ::2] if self.tables == "pairs" else table[..., : table.shape[-1] // 2]

    def fits(self, query: Tensor, cos: Tensor) -> bool:
        """Whether the function was shown to do this with such shapes."""
        width = cos.shape[-1] * (2 if self.tables == "once" else 1)
        return query.dim() == 4 and cos.dim() == 3 and (width == query.shape[-1] or self.partial)

    def turn(self, op: Callable[..., tuple[Tensor, Tensor]], cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """`op` takes (cos, sin, interleaved=)."""
        query, key = op(self.angles(cos), self.angles(sin), interleaved=self.interleaved)
        return (_part(query), _part(key)) if self.parted else (query, key)


def _part(x: Tensor) -> Tensor:
    return torch.cat([x[..., 0::2], x[..., 1::2]], -1)


def rotation_of(function: Callable[..., Any], tables: str) -> Rotation:
    """What `function(q, k, cos, sin)` does with q [B, Hq, T, d] and k [B, Hk, T, d].

    Raises Unlike.
    """
    names = list(inspect.signature(function).parameters)
    if names[2:4] != ["cos", "sin"]:
        raise Unlike(f"its rotation takes ({', '.join(names)})")
    query, key, angle = drawn(2, 3, 4, 8, seed="q"), drawn(2, 1, 4, 8, seed="k"), drawn(2, 4, 4, seed="angle")
    forms = [Rotation(tables, interleaved, parted, True) for interleaved, parted in _FORMS]
    matches: list[list[Rotation]] = []
    for num_pairs in (4, 2):  # of the eight numbers all, or half of them, turn
        spread = {"twice": lambda t: torch.cat([t, t], -1), "pairs": lambda t: t.repeat_interleave(2, -1)}
        cos, sin = (spread.get(tables, lambda t: t)(t[..., :num_pairs]) for t in (angle.cos(), angle.sin()))
        try:
            found = function(query, key, cos, sin)
        except Exception:
            matches.append([])
            continue
        matches.append([form for form in forms if _turns(form, found, query, key, cos, sin)])
    if not matches[0]:
        raise Unlike("its rotation is another one")
    form = matches[0][0]
    return Rotation(tables, form.interleaved, form.parted, form in matches[1] and not form.parted)


_FORMS = ((False, False), (True, False), (True, True))


def _turns(form: Rotation, found: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> bool:
    expected = form.turn(lambda c, s, **how: reference.rope(query, key, c, s, **how), cos, sin)
    return len(found) == 2 and all(same(a, b) for a, b in zip(found, expected, strict=True))


def rotations_in(module: nn.Module) -> dict[str, Callable[..., Any]]:
    """Global functions by name that a forward calls with cosines and sines."""
    forward = innermost(type(module).forward)
    if not isinstance(forward, FunctionType):
        return {}
    found = {name: forward.__globals__.get(name) for name in forward.__code__.co_names}
    return {
        name: function
        for name, function in found.items()
        if inspect.isfunction(function) and {"cos", "sin"} <= inspect.signature(function).parameters.keys()
    }
