"""PiSSA: adapters start as the principal part of their weights, and the base keeps the rest (Meng et al., 2024).

    W = U S V^T        B0 = U_r sqrt(S_r / s)        A0 = sqrt(S_r / s) V_r^T        base = W - s B0 A0

of the r largest singular values; s is the adapters' scale, W [N, K], B [N, r], A [r, K].

No two machines decompose a weight to the same bits, and a checkpoint's A and B are only true of the base that was left
by the A0 and B0 which its run began with. So those are made once, by the first start, and lie in the run's folder; what
is left of a weight is computed from them in float64 and rounded once: the same bits wherever it is done.

What was trained is exported as plain LoRA of rank 2r over the weights as they were, W + s ([B, -B0] [A; A0]).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import xxhash
from safetensors.torch import load, save
from torch import Tensor, nn

from launcher.errors import CheckpointError, ModelError
from launcher.model.lora_layers import other_kind
from launcher.model.token_rows import whole
from launcher.plan.plan import MethodPlan, Plan
from launcher.store.store import Store

FILE = "pissa.safetensors"
"""In the run's folder: A0 and B0 by the names of the parameters that start from them, in the training dtype."""
EXACT = 1024
"""Up to so many rows or columns a weight is decomposed whole; beyond, its principal part is found by iteration."""
ITERATIONS, SPARE = 16, 16
"""Of the iteration (Halko et al., 2011): how often, and how many vectors more than the rank."""
ROWS = 1024
"""Of a weight that are in float64 at once."""

Factors = dict[str, Tensor]


def adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Each adapter layer of `model` by its name.

    Raises:
        ModelError: one is on another layer than a linear one, on a weight that is used elsewhere too, or of a higher
            rank than its weight.
    """
    from peft.tuners.lora import LoraLayer

    users = [id(weight) for _, weight in model.named_parameters(remove_duplicate=False)]
    hint = "leave that layer out of method.targets, or method.init out"
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        weight: Any = layer.base_layer.weight
        if (reason := other_kind(layer)) is not None:
            raise ModelError(f"method.init: {name} has {reason}, and pissa decomposes linear layers only", hint=hint)
        if users.count(id(weight)) > 1:
            raise ModelError(f"method.init: pissa would change the weight of {name}, which others use too", hint=hint)
        rank, most = next(iter(layer.r.values())), min(getattr(weight, "ds_shape", weight.shape))
        if rank > most:
            raise ModelError(
                f"method.rank is {rank}, and {name} has only {most} singular vectors for pissa to start from",
                hint=f"choose at most {most}, or leave method.init out",
            )
        yield name, layer


def principal_factors(model: nn.Module, seed: int, mine: bool) -> Factors:
    """A0 and B0 of every adapter, on the CPU; nothing unless they are `mine` to compute. Collective under ZeRO-3.

    Raises ModelError as `adapted`.
    """
    factors: Factors = {}
    for name, layer in adapted(model):
        with torch.no_grad(), whole([layer.base_layer.weight]):
            if mine:
                [rank], [scaling] = layer.r.values(), layer.scaling.values()
                found = principal(_by_output(layer), rank, scaling, seed)
                for (kind, part), factor in zip(_parts(layer), found, strict=True):
                    factors[_key(name, kind)] = factor.to(part.dtype).cpu().contiguous()
    return factors


def principal(weight_NK: Tensor, rank: int, scaling: float, seed: int) -> tuple[Tensor, Tensor]:
    """A0 [r, K] and B0 [N, r] in fp32, scaling * B0 A0 the weight's principal part."""
    wide_NK = weight_NK.float()
    if min(wide_NK.shape) <= EXACT:
        left_Nr, sizes_r, right_rK = torch.linalg.svd(wide_NK, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found = torch.svd_lowrank(wide_NK, min(rank + SPARE, *wide_NK.shape), niter=ITERATIONS)
        left_Nr, sizes_r, right_rK = found[0], found[1], found[2].t()
    root_r = (sizes_r[:rank] / scaling).sqrt()
    return root_r[:, None] * right_rK[:rank], left_Nr[:, :rank] * root_r


def start_from(model: nn.Module, factors: Mapping[str, Tensor]) -> None:
    """Put A0 and B0 into the adapters.

    Raises:
        CheckpointError: `factors` are of another model.
    """
    parts = {_key(name, kind): part for name, layer in adapted(model) for kind, part in _parts(layer)}
    shapes = {key: tuple(part.shape) for key, part in parts.items()}
    if shapes != {key: tuple(factor.shape) for key, factor in factors.items()}:
        raise CheckpointError(f"{FILE} is of another model than this run's", hint="bring the run's own back")
    with torch.no_grad():
        for key, part in parts.items():
            part.copy_(factors[key])


def take_out(model: nn.Module) -> None:
    """Leave in the base what the adapters, as they are now, do not say. Collective under ZeRO-3."""
    for _, layer in adapted(model):
        (a_rK, b_Nr), [scaling] = (part.double() for _, part in _parts(layer)), layer.scaling.values()
        with torch.no_grad(), whole([layer.base_layer.weight], write=True):
            weight_NK = _by_output(layer)
            for first in range(0, len(weight_NK), ROWS):
                rows = slice(first, first + ROWS)
                weight_NK[rows] = weight_NK[rows].double() - scaling * (b_Nr[rows] @ a_rK)


def over_original(
    method: MethodPlan, weights: Mapping[str, Tensor], factors: Mapping[str, Tensor]
) -> tuple[MethodPlan, dict[str, Tensor]]:
    """The method and the trained weights of a run as those of adapters of rank 2r over the base as it was; factors that
    were frozen are as they started."""
    assert method.rank is not None
    assert method.alpha is not None
    doubled = dict(weights)
    for name, start in factors.items():
        sign, dim = (-1, 1) if ".lora_B." in name else (1, 0)
        trained = weights.get(name, start)
        doubled[name] = torch.cat([trained, sign * start.to(trained.dtype)], dim)
    alpha = method.alpha * (math.sqrt(2) if method.rslora else 2)  # the same scale
    changes = {"rank": 2 * method.rank, "alpha": alpha, "init": "default"}
    return method.model_copy(update=changes), doubled


def kept(store: Store, plan: Plan) -> Factors | None:
    """A0 and B0 of a run; None where none were made yet.

    Raises:
        CheckpointError: they are damaged, or another run's.
        OSError: the store cannot be read.
    """
    try:
        content = store.read(FILE)
    except FileNotFoundError:
        return None
    hint = "bring back the run's own: its checkpoints are true of no other; before the first, delete it"
    try:
        head = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        factors = load(content)
        sound = head["xxh3_128"] == _digest(factors)
    except Exception as error:  # safetensors has an exception of its own, which is no ValueError
        raise CheckpointError(f"{store}/{FILE} is damaged: {error}", hint=hint) from error
    if not sound:
        raise CheckpointError(f"{store}/{FILE} is damaged: content changed", hint=hint)
    if head.get("trajectory") != plan.trajectory.hash():
        raise CheckpointError(f"{store}/{FILE} is another run's", hint=hint)
    return factors


def needed(store: Store, plan: Plan, checkpoint: str) -> Factors:
    """A0 and B0 of a run that has a checkpoint of that name. Raises as `kept`; CheckpointError where they are gone."""
    found = kept(store, plan)
    if found is None:
        raise CheckpointError(
            f"{store}/{FILE} is gone, and {checkpoint} is only true of the base that it leaves",
            hint="bring it back, or start a new run",
        )
    return found


def keep(store: Store, plan: Plan, factors: Factors) -> Factors:
    """Write A0 and B0 into the run's folder; those that an earlier start has written, if it did so meanwhile.

    Raises as `kept`.
    """
    head = {"format": "pt", "trajectory": plan.trajectory.hash(), "xxh3_128": _digest(factors)}
    if store.create(FILE, save(factors, head)):
        return factors
    found = kept(store, plan)
    assert found is not None
    return found


def _parts(layer: Any) -> list[tuple[str, nn.Parameter]]:
    [a], [b] = layer.lora_A.values(), layer.lora_B.values()
    return [("A", a.weight), ("B", b.weight)]


def _key(name: str, kind: str) -> str:
    return f"{name}.lora_{kind}.default.weight"


def _by_output(layer: Any) -> Tensor:
    """[N, K], a view of the layer's weight; GPT-2's Conv1D has it the other way around."""
    weight: Tensor = layer.base_layer.weight.data
    return weight.t() if layer.fan_in_fan_out else weight


def _digest(factors: Mapping[str, Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for name in sorted(factors):
        digest.update(name.encode())
        array: Any = factors[name].contiguous().view(torch.uint8).numpy()
        digest.update(memoryview(array))
    return digest.hexdigest()
