"""Low-rank adapters over a frozen base: LoRA and its kin, by peft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from launcher.errors import ModelError
from launcher.model.dora import compute_lengths, peft_gathers
from launcher.model.head import head_modules
from launcher.model.token_rows import compute_rows_alone, vocabulary_layers, whole
from launcher.plan.plan import MethodPlan


def add_adapters(model: PreTrainedModel, method: MethodPlan, seed: int, added_ids: Sequence[int]) -> nn.Module:
    """LoRA adapters (Hu et al., 2021) on the target layers, and the rows of added tokens; the base is frozen, but for
    the head of a sequence classification.

    Adapters start as no change, also where the plan has them start otherwise: see `pissa`. Collective for DoRA under
    ZeRO-3.

    Raises:
        ModelError: none of the targets is in the model, one of them is a layer whose rows are trained, or DoRA is asked
            for on what is no linear layer.
    """
    from peft import LoraConfig, get_peft_model

    assert method.rank is not None
    assert method.alpha is not None
    assert method.dropout is not None
    targets: Any = method.targets if isinstance(method.targets, str) else list(method.targets or ())
    layers = vocabulary_layers(model)
    if added_ids:
        refuse_vocabulary_layers(model, method)
    heads = head_modules(model)
    of_heads = [f"{name}.{inner}".rstrip(".") for name, head in heads.items() for inner, _ in head.named_modules()]
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        use_rslora=method.rslora,
        use_dora=method.dora,
        target_modules=targets,
        task_type="SEQ_CLS" if heads else "CAUSAL_LM",
        # Trained whole; peft would put adapters on what it does not take for a head, such as BERT's pooler.
        modules_to_save=list(heads) or None,
        exclude_modules=of_heads or None,
        bias="none",
        trainable_token_indices={name: list(added_ids) for name in layers} if added_ids else None,
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    # peft copies the rows that it finds; of a partitioned weight, none.
    to_read = [layer.weight for layer in layers.values()] if added_ids else []
    with torch.random.fork_rng(devices=[]), peft_gathers(), whole(to_read):
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
    if method.dora:
        compute_lengths(adapted)
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
