"""The head of a sequence classification: which of a model's weights it is, and what they start from.

What stands behind the layers is the head, BERT's pooler too: all of it is trained, whatever the method.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from launcher.data.tokenizer import is_encoder
from launcher.errors import ModelError
from launcher.model.token_rows import whole

POOLER = "pooler"
"""What encoders have between their layers and the classifier, inside the model without a head."""


def set_classes(config: PretrainedConfig, classes: Sequence[str], padding: int) -> None:
    """Have a model of `config` tell `classes` apart.

    A GPT-style one looks for the last token that is not `padding`, so that must be what rows are filled up with.
    """
    config.num_labels = len(classes)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: number for number, name in enumerate(classes)}
    config.problem_type = "single_label_classification"
    if config.pad_token_id is None or not is_encoder(config.model_type):
        config.pad_token_id = padding
        config.get_text_config().pad_token_id = padding


def own_classes(config: PretrainedConfig) -> tuple[str, ...]:
    """What the checkpoint's own head tells apart, in the order of its outputs; () where it has none."""
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return ()
    return tuple(config.id2label[number] for number in sorted(config.id2label))


def head_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """{name: module} of a sequence classification's head; of a language model, which has its own, nothing."""
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return {}
    body = model.base_model
    found = {name: module for name, module in model.named_children() if module is not body}
    if isinstance(pooler := getattr(body, POOLER, None), nn.Module):
        found[f"{model.base_model_prefix}.{POOLER}"] = pooler
    return {name: module for name, module in found.items() if any(True for _ in module.parameters())}


def start_head(model: PreTrainedModel, missing: Collection[str], seed: int) -> None:
    """Give the weights `missing`, which the checkpoint does not hold, what the model's layers of their kind start from:
    a function of `seed` alone, on all ranks and at every ZeRO stage. Collective under ZeRO-3.

    Raises:
        ModelError: some of them are not the head's.
    """
    heads = tuple(f"{name}." for name in head_modules(model))
    if others := sorted(name for name in missing if not name.startswith(heads)):
        raise ModelError(
            f"the checkpoint has no weights for {len(others)} parts of the model below its head, such as {others[0]}",
            hint="choose a base that transformers loads without such a warning",
        )
    owners = sorted({name.rpartition(".")[0] for name in missing})
    with torch.device("meta"):
        fresh = type(model)(model.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for owner in owners:
            module = fresh.get_submodule(owner).to_empty(device="cpu", recurse=False)
            for weight in module.parameters(recurse=False):  # where the model has no rule for such a module
                nn.init.normal_(weight, std=0.02)
            fresh._init_weights(module)
    weights: dict[str, Any] = dict(model.named_parameters())
    with torch.no_grad(), whole([weights[name] for name in missing], write=True):
        for name in missing:
            weights[name].copy_(fresh.get_parameter(name))
