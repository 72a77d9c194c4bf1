"""What is trained: every weight, the last layers, or low-rank adapters over a frozen base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from launcher.errors import ModelError
from launcher.model.token_rows import compute_rows_alone, train_rows_alone, vocabulary_layers, whole
from launcher.plan.plan import MethodPlan


def apply_method(model: PreTrainedModel, method: MethodPlan, seed: int, added_ids: Sequence[int] = ()) -> nn.Module:
    """Mark what is trained, adding adapters where the method has them.

    Returns the model itself, or peft's wrapper around it. Adapters are fp32 or bf16 like the base and start from
    `seed` alone, so they are equal on all ranks and at every ZeRO stage. `added_ids`, see `added_tokens`, are tokens
    whose rows of the embedding and the head are trained whatever the method.

    Raises:
        ModelError: nothing to train, target modules that the model does not have, or rows that cannot be trained alone.
    """
    if method.kind == "full":
        return model
    if method.kind == "freeze":
        assert method.train_last_layers is not None
        freeze_all_but_last(model, method.train_last_layers)
        return train_rows_alone(model, added_ids) if added_ids else model
    return add_adapters(model, method, seed, added_ids)


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


def freeze_all_but_last(model: PreTrainedModel, num_layers: int) -> None:
    """Train the last `num_layers` decoder layers, what comes after them (the final norm), and the head unless it is
    tied.

    Raises:
        ModelError: the model has fewer layers.
    """
    layers = decoder_layers(model)
    if num_layers > len(layers):
        raise ModelError(
            f"method.train_last_layers is {num_layers}, the model has {len(layers)} layers",
            hint=f"choose at most {len(layers)}, or method.kind full",
        )
    trained: list[nn.Module] = list(layers[-num_layers:])
    for parent in model.modules():
        children = list(parent.children())
        position = next((i for i, child in enumerate(children) if child is layers), None)
        if position is not None:
            trained += children[position + 1 :]
    head = model.get_output_embeddings()
    trained += [head] if head is not None else []
    embedding = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    model.requires_grad_(False)
    for module in trained:
        for parameter in module.parameters():
            parameter.requires_grad_(id(parameter) not in embedding)


def add_adapters(model: PreTrainedModel, method: MethodPlan, seed: int, added_ids: Sequence[int]) -> nn.Module:
    """LoRA adapters (Hu et al., 2021) on the target layers, and the rows of added tokens; the base is frozen.

    Raises:
        ModelError: none of the targets is in the model, or one of them is a layer whose rows are trained.
    """
    from peft import LoraConfig, get_peft_model

    assert method.rank is not None
    assert method.alpha is not None
    assert method.dropout is not None
    targets: Any = method.targets if isinstance(method.targets, str) else list(method.targets or ())
    layers = vocabulary_layers(model)
    if added_ids:
        refuse_vocabulary_layers(model, method)
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        bias="none",
        trainable_token_indices={name: list(added_ids) for name in layers} if added_ids else None,
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    # peft copies the rows that it finds; of a partitioned weight, none.
    to_read = [layer.weight for layer in layers.values()] if added_ids else []
    with torch.random.fork_rng(devices=[]), whole(to_read):
        torch.manual_seed(seed)
        try:
            # autocast_adapter_dtype would keep adapters in fp32 beside a bf16 base, which ZeRO's flat groups do not
            # take.
            adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
        except ValueError as error:
            raise ModelError(
                f"method.targets: {str(error).splitlines()[0]}", hint="name linear layers of the model, or all-linear"
            ) from error
    compute_rows_alone(adapted)
    return adapted


def refuse_vocabulary_layers(model: PreTrainedModel, method: MethodPlan) -> None:
    """peft cannot put an adapter on a layer and train rows of it as well.

    Raises:
        ModelError: one of the targets is the embedding or the head.
    """
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if any(module is x for x in layers)}
    targets = () if isinstance(method.targets, str) else method.targets or ()
    if named := [target for target in targets if target.rpartition(".")[2] in names]:
        raise ModelError(
            f"method.targets: rows of {named[0]} are trained for model.add_tokens, so it cannot have an adapter too",
            hint=f"leave {named[0]} out of method.targets",
        )


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Keep only each layer's input and compute the rest again in the backward pass."""
    base: Any = getattr(model, "get_base_model", lambda: model)()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
