"""A model from random weights, written once as an ordinary folder: everything after treats it as any other base."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
)

from launcher.errors import ModelError
from launcher.model.added_tokens import new_tokens
from launcher.model.head import set_classes
from launcher.plan.plan import ModelPlan


def scratch_config(model: ModelPlan, tokenizer_folder: Path) -> PretrainedConfig:
    """The transformers configuration of a scratch model, with the tokenizer's special tokens.

    `vocab_size` counts the tokens before any is added: it is raised to hold them.

    Raises:
        ModelError: an unknown model type, an unknown key, or values that do not fit together.
    """
    assert model.scratch is not None
    settings = dict(model.scratch)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    settings.setdefault("vocab_size", len(tokenizer))
    if settings["vocab_size"] + len(new_tokens(model, tokenizer_folder)) < len(tokenizer):
        raise ModelError(
            f"model.scratch.vocab_size is {settings['vocab_size']}, the tokenizer has {len(tokenizer)} tokens",
            hint="leave vocab_size out, or raise it",
        )
    settings["vocab_size"] = max(settings["vocab_size"], len(tokenizer))
    settings |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    settings |= {"pad_token_id": tokenizer.pad_token_id}
    try:
        config: PretrainedConfig = AutoConfig.for_model(**settings)
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"model.scratch: {error}", hint="use the keys of the model type's transformers configuration"
        ) from error
    unknown = [
        key
        for key in settings
        if key != "model_type" and key not in type(config)().to_dict() and key not in config.attribute_map
    ]
    if unknown:
        raise ModelError(
            f"model.scratch: {', '.join(unknown)}: no key of a {config.model_type} configuration",
            hint="use the keys of the model type's transformers configuration",
        )
    return config


def create_scratch(
    model: ModelPlan, tokenizer_folder: Path, seed: int, folder: Path, classes: Sequence[str] = ()
) -> None:
    """Write a model with random fp32 weights, a function of `seed` alone, and its tokenizer into `folder`.

    With `classes` it is one that tells these apart. Written beside and renamed, so that a killed launcher leaves no
    half model; a folder that is there is kept.
    """
    if folder.is_dir():
        return
    transformers.utils.logging.disable_progress_bar()
    staging = folder.with_name(f".{folder.name}-{os.getpid()}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            config = scratch_config(model, tokenizer_folder)
            if classes:
                set_classes(config, classes, config.pad_token_id)
            kind = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
            network = kind.from_config(config, dtype=torch.float32)
        except (ValueError, TypeError) as error:
            raise ModelError(f"model.scratch: {error}", hint="these sizes do not fit together") from error
    try:
        network.save_pretrained(staging)
        AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(staging)
        os.rename(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
