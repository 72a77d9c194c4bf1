"""What is trained: every weight, the last layers, or low-rank adapters over a frozen base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from launcher.errors import ModelError
from launcher.model.frozen import freeze_matching
from launcher.model.head import head_modules
from launcher.model.lora_adapters import add_adapters
from launcher.model.token_rows import train_rows_alone
from launcher.plan.phases import last_layers
from launcher.plan.plan import MethodPlan


def apply_method(
    model: PreTrainedModel, method: MethodPlan, seed: int, added_ids: Sequence[int] = (), phase: int = 0
) -> nn.Module:
    """Mark what is trained, adding adapters where the method has them.

    Returns the model itself, or peft's wrapper around it. Adapters are fp32 or bf16 like the base and start from
    `seed` alone, so they are equal on all ranks and at every ZeRO stage. `added_ids`, see `added_tokens`, are tokens
    whose rows of the embedding and the head are trained whatever the method. `phase` is of gradual unfreezing.

    Raises:
        ModelError: nothing to train, target modules that the model does not have, patterns that freeze nothing, or
            rows that cannot be trained alone.
    """
    if method.kind in ("lora", "qlora"):
        adapted = add_adapters(model, method, seed, added_ids)
        freeze_matching(adapted, method.frozen)
        return adapted
    if method.kind == "freeze":
        unfreeze_to(model, method, phase)
    freeze_matching(model, method.frozen, added_ids)
    return train_rows_alone(model, added_ids) if added_ids and method.kind == "freeze" else model


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The stack of decoder layers: the longest ModuleList of one class that is in no other, as experts are.

    Raises:
        ModelError: there is none.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    inner = {id(module) for stack in lists for layer in stack for module in layer.modules()}
    stacks = [stack for stack in lists if id(stack) not in inner and len({type(layer) for layer in stack}) == 1]
    if not stacks:
        raise ModelError("the model has no list of decoder layers to freeze", hint="use method.kind full or lora")
    return max(stacks, key=len)


def unfreeze_to(model: PreTrainedModel, method: MethodPlan, phase: int) -> None:
    """Train what a phase of gradual unfreezing trains. Each parameter is told its own first one: `parameter.phase`.

    Raises:
        ModelError: the model has fewer layers than a phase trains, also where that is a later one.
    """
    layers = last_layers(method)
    keys = ("train_last_layers", *(f"unfreeze.{number}.last_layers" for number in range(len(method.unfreeze))))
    model.requires_grad_(False)
    for number in reversed(range(len(layers))):
        for parameter in last_parameters(model, layers[number], f"method.{keys[number]}"):
            parameter.phase = number  # type: ignore[attr-defined]
            parameter.requires_grad_(number <= phase)


def last_parameters(model: PreTrainedModel, num_layers: int | None, key: str) -> list[nn.Parameter]:
    """Parameters of the last `num_layers` decoder layers, of what comes after them (the final norm), and of the head
    unless it is tied; all of the model's where None.

    Raises:
        ModelError: the model has fewer layers. `key` is what asks for them.
    """
    if num_layers is None:
        return list(model.parameters())
    layers = decoder_layers(model)
    if num_layers > len(layers):
        raise ModelError(
            f"{key} is {num_layers}, the model has {len(layers)} layers",
            hint=f"choose at most {len(layers)}, or method.kind full",
        )
    modules: list[nn.Module] = list(layers[-num_layers:])
    for parent in model.modules():
        children = list(parent.named_children())
        position = next((i for i, (_, child) in enumerate(children) if child is layers), None)
        if position is not None:
            modules += [child for _, child in children[position + 1 :]]
            # OPT makes its final norm before its layers; Bloom's norm there is the embedding's.
            modules += [child for name, child in children[:position] if is_norm(child) and "emb" not in name]
    head = model.get_output_embeddings()
    modules += [head] if head is not None else [*head_modules(model).values()]
    embedding = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    return [parameter for module in modules for parameter in module.parameters() if id(parameter) not in embedding]


def is_norm(module: nn.Module) -> bool:
    """By the name of its class: LayerNorm, LlamaRMSNorm, ..."""
    return "norm" in type(module).__name__.lower()


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Keep only each layer's input and compute the rest again in the backward pass."""
    base: Any = getattr(model, "get_base_model", lambda: model)()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
