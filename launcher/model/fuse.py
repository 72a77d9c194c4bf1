"""Our kernels in any causal LM of transformers, by what its modules compute and not by what they are called.

Only forwards are replaced, on the instances: parameters and their names, the tree of modules, hooks and state dicts
stay, and so do peft's and DeepSpeed's ways of working with them. What a module computes is found out by running its
class's own code on small stand-ins (`recognize`, `rotations`, `fused_layer`, `fused_head`); a module that computes
something else is left alone, with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from launcher.model.fused_head import MARK, fused_head
from launcher.model.fused_layer import fused_layer, is_layer
from launcher.model.fused_rotation import fused_rotation
from launcher.model.lora_layers import fuse_adapters
from launcher.model.recognize import (
    GATE,
    Gated,
    Norm,
    Unlike,
    expert_gate_of,
    gated_of,
    has_weights,
    is_projection,
    likeness,
    norm_of,
    shape_of,
    takes_options,
)
from launcher.model.rotations import rotations_in, tables_of
from launcher_kernels.glu import Activation, glu, glu_packed
from launcher_kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm

_MISSING = object()


@dataclass
class Fusion:
    """What was replaced in a model."""

    counts: dict[str, int] = field(default_factory=dict)
    """How many modules use each op."""
    left: dict[str, str] = field(default_factory=dict)
    """What was left as it is, by class or by part, and why."""
    undoing: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put everything back as it was; a second call does nothing."""
        while self.undoing:
            self.undoing.pop()()

    def __str__(self) -> str:
        counted = ", ".join(f"{op} {count}" for op, count in sorted(self.counts.items()))
        by_reason: dict[str, list[str]] = {}
        for what, why in self.left.items():
            by_reason.setdefault(why, []).append(what)
        left = "; ".join(
            f"{', '.join(some[:3])}{f' and {len(some) - 3} more' * (len(some) > 3)}: {why}"
            for why, some in by_reason.items()
        )
        return (f"kernels fused: {counted}" if counted else "no kernel was fused") + (
            f" (left: {left})" if left else ""
        )

    def replace(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """Make `function`, which takes the module first, its forward."""
        # A bound method: a deep copy of the module binds it to the copy.
        self.put(module, "forward", MethodType(function, module))

    def put(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute of the instance, until `undo`."""
        before = module.__dict__.get(name, _MISSING)
        module.__dict__[name] = value

        def restore() -> None:
            if before is _MISSING:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = before

        self.undoing.append(restore)


def fuse(model: nn.Module) -> Fusion:
    """Put our kernels into `model`, a causal LM of transformers or peft's wrapper around one.

    Called when peft has wrapped the model and before DeepSpeed's engine is made. Weights are not read: they may be
    partitioned (ZeRO-3) or quantized. The same on all ranks. Where nothing can be fused, `counts` is empty and the
    model unchanged.
    """
    causal_lm: Any = getattr(model, "get_base_model", lambda: model)()
    fusion, counts = Fusion(), Counter[str]()
    try:
        with torch.random.fork_rng(devices=[]):  # dropout on trial draws numbers
            norms = _fuse_norms(causal_lm, fusion, counts)
            _fuse_rotations(causal_lm, norms, fusion, counts)
            _fuse_gates(causal_lm, fusion, counts)
            _fuse_experts(causal_lm, fusion, counts)
            _fuse_layers(causal_lm, norms, fusion, counts)
            _fuse_head(causal_lm, fusion, counts)
        adapters, reasons, undoing = fuse_adapters(model)
        fusion.undoing += undoing
    except BaseException:
        fusion.undo()
        raise
    counts.update(adapters)
    fusion.left.update(reasons)
    fusion.counts = {op: count for op, count in sorted(counts.items()) if count}
    return fusion


def _free(model: nn.Module) -> list[nn.Module]:
    """Modules whose class says what they do."""
    return [module for module in model.modules() if "forward" not in vars(module)]


def _remembering() -> Callable[[Callable[[nn.Module], Any], nn.Module], Any]:
    """A recognizer's answer, or reason, for a module that is like one that it has been shown."""
    seen: dict[Any, Any] = {}

    def ask(recognizer: Callable[[nn.Module], Any], module: nn.Module) -> Any:
        key = likeness(module)
        if key not in seen:
            try:
                seen[key] = recognizer(module)
            except Unlike as reason:
                seen[key] = reason
        if isinstance(seen[key], Unlike):
            raise seen[key]
        return seen[key]

    return ask


def _fuse_norms(model: nn.Module, fusion: Fusion, counts: Counter[str]) -> dict[nn.Module, Norm]:
    norms, tried = dict[nn.Module, Norm](), _remembering()
    for module in _free(model):
        vectors = [len(shape_of(p)) == 1 for p in module._parameters.values() if p is not None]
        if not vectors or not all(vectors) or module._modules:
            continue
        try:
            norms[module] = tried(norm_of, module)
        except Unlike as reason:
            fusion.left[type(module).__name__] = str(reason)
    for module, norm in norms.items():
        fusion.replace(module, _norm_forward(norm))
        counts["layer_norm" if norm.layer else "rms_norm"] += 1
    return norms


def _norm_forward(norm: Norm) -> Any:
    """Also takes what is to be added first, and then returns the norm and the sum."""
    if norm.layer:

        def forward(self: Any, x: Tensor, residual: Tensor | None = None) -> Any:
            weight, bias = self.weight, getattr(self, "bias", None)
            if residual is None:
                return layer_norm(x, weight, bias, norm.eps)
            return add_layer_norm(x, residual, weight, bias, norm.eps)

        return forward
    eps = norm.eps
    how: dict[str, Any] = {"offset": norm.offset, "casting": norm.casting}

    def forward_rms(self: Any, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return rms_norm(x, self.weight, eps, **how)
        return add_rms_norm(x, residual, self.weight, eps, **how)

    return forward_rms


def _fuse_rotations(model: nn.Module, norms: dict[nn.Module, Norm], fusion: Fusion, counts: Counter[str]) -> None:
    turning = [module for module in _free(model) if rotations_in(module)]
    if not turning:
        fusion.left["rope"] = "nothing turns queries and keys"
        return
    kinds = tuple(dict.fromkeys(getattr(getattr(model, "config", None), "layer_types", None) or ()))
    tables, why = [], "no module makes cosines and sines for all layers"
    for module in model.modules():
        if any("inv_freq" in name for name in module._buffers):
            try:
                tables.append(tables_of(module, kinds))
            except Unlike as reason:
                why = str(reason)
    if len({layout for layout, _, _ in tables}) != 1:
        fusion.left["rope"] = why
        return
    for module in turning:
        try:
            fused = fused_rotation(module, tables[0], norms)
        except Unlike as reason:
            fusion.left[type(module).__name__] = str(reason)
            continue
        if fused is None:
            fusion.left[f"rope of some {type(module).__name__}"] = "these layers turn nothing"
            continue
        fusion.replace(module, fused.forward)
        for name, passing in fused.norms.items():
            fusion.replace(module.get_submodule(name), passing)
            counts["rms_norm"] -= 1
        counts["qk_norm_rope" if fused.norms else "rope"] += 1


def _fuse_gates(model: nn.Module, fusion: Fusion, counts: Counter[str]) -> None:
    tried = _remembering()
    for module in _free(model):
        weighted = [child for child in module._modules.values() if has_weights(child)]
        if len(weighted) not in (2, 3) or not all(is_projection(child) for child in weighted) or takes_options(module):
            continue
        try:
            gated = tried(gated_of, module)
        except Unlike as reason:
            fusion.left[type(module).__name__] = str(reason)
            continue
        fusion.replace(module, _gated_forward(gated))
        counts["glu" if gated.up else "glu_packed"] += 1


def _gated_forward(gated: Gated) -> Any:
    if gated.up is None:

        def forward_packed(self: Any, x: Tensor) -> Tensor:
            down, both = self._modules[gated.down], self._modules[gated.gate]
            return down(glu_packed(both(x), gated.activation))

        return forward_packed
    name = gated.up

    def forward(self: Any, x: Tensor) -> Tensor:
        gate, up, down = self._modules[gated.gate], self._modules[name], self._modules[gated.down]
        return down(glu(gate(x), up(x), gated.activation))

    return forward


def _fuse_experts(model: nn.Module, fusion: Fusion, counts: Counter[str]) -> None:
    """Experts whose weights are one tensor: transformers' grouped products call a method of theirs for the gate."""
    for module in _free(model):
        name = type(module).__name__
        if not any(len(shape_of(p)) == 3 for p in module._parameters.values() if p is not None):
            continue
        try:
            activation = expert_gate_of(module)
        except Unlike as reason:
            fusion.left[name] = str(reason)
            continue
        fusion.put(module, GATE, MethodType(_expert_gate(activation), module))
        counts["glu_packed"] += 1


def _expert_gate(activation: Activation) -> Any:
    def gate(self: nn.Module, gate_up: Tensor) -> Tensor:
        return glu_packed(gate_up, activation)

    return gate


def _fuse_layers(model: nn.Module, norms: dict[nn.Module, Norm], fusion: Fusion, counts: Counter[str]) -> None:
    stacked = [layer for stack in model.modules() if isinstance(stack, nn.ModuleList) for layer in stack]
    for module in stacked:
        mine = {name: norms[child] for name, child in module._modules.items() if child in norms}
        if not mine or not is_layer(module) or "forward" in vars(module):
            continue
        try:
            forward, added = fused_layer(module, mine)
        except Unlike as reason:
            fusion.left[type(module).__name__] = str(reason)
            continue
        fusion.replace(module, forward)
        for name in added:
            op = "layer_norm" if mine[name].layer else "rms_norm"
            counts[op] -= 1
            counts[f"add_{op}"] += 1


def _fuse_head(causal_lm: nn.Module, fusion: Fusion, counts: Counter[str]) -> None:
    try:
        replaced = fused_head(causal_lm)
    except Unlike as reason:
        fusion.left["head"] = str(reason)
        return
    for module, forward in replaced:
        fusion.replace(module, forward)
    fusion.put(causal_lm, MARK, True)
    counts["linear_cross_entropy"] += 1
