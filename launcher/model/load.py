"""From a Plan to a transformers model on this rank's device, ready for adapters."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from launcher.errors import ModelError
from launcher.model import attention
from launcher.model.nf4 import train_through_zero
from launcher.model.token_rows import add_rows
from launcher.plan.plan import ModelPlan, Plan

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_config(model: ModelPlan) -> PretrainedConfig:
    """The model's configuration.

    Raises:
        ModelError: a hub id that cannot be had, or a folder without a configuration transformers knows.
    """
    with readable_errors(model):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
        return config


def model_class(model: ModelPlan, config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that transformers would use for this configuration; of a model with its own code, that code's.

    Raises:
        ModelError: it is no causal language model.
    """
    own_code = getattr(config, "auto_map", {}).get("AutoModelForCausalLM")
    if own_code and model.trust_remote_code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        with readable_errors(model):
            own: type[PreTrainedModel] = get_class_from_dynamic_module(own_code, model.path, revision=model.revision)
            return own
    mapping = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        raise ModelError(
            f"model type {config.model_type!r} is no causal language model",
            hint="choose a GPT-style model, such as gpt2 or llama",
        )
    found: type[PreTrainedModel] = mapping[type(config)]
    return found


def check_packing(model: ModelPlan, packing: bool) -> None:
    """Refuse packing where documents could not be kept apart.

    Raises:
        ModelError: the family does not dispatch its attention through transformers' interface.
    """
    config = load_config(model)
    if packing and not attention.supports_packing(model_class(model, config), config):
        raise ModelError(
            f"packed documents would see each other: the attention of {config.model_type} cannot be told their borders",
            hint="set data.packing to false",
        )


def load_model(
    plan: Plan, deepspeed_config: dict[str, Any], device: torch.device, added_ids: Sequence[int]
) -> PreTrainedModel:
    """The base model with its weights: fp32 or bf16, or 4-bit NF4 for QLoRA; with rows for `added_ids`, see
    `added_tokens`.

    Under ZeRO-3 the weights are partitioned as they are read, so that no rank ever holds the whole model; a quantized
    base is the exception, which each rank reads whole before DeepSpeed partitions it.

    Raises:
        ModelError: weights missing or unreadable.
    """
    attention.register()
    model_plan, trajectory = plan.trajectory.model, plan.trajectory
    config = load_config(model_plan)
    dtype = DTYPES[trajectory.dtype]
    arguments: dict[str, Any] = {
        "config": config,
        "revision": model_plan.revision,
        "trust_remote_code": model_plan.trust_remote_code,
        "dtype": dtype,
    }
    if attention.supports_packing(model_class(model_plan, config), config):
        arguments["attn_implementation"] = attention.NAMES[plan.layout.attention]
    if trajectory.method.kind == "qlora":
        arguments["quantization_config"] = nf4(dtype)
        arguments["device_map"] = {"": device}
    partition = plan.layout.zero == 3 and trajectory.method.kind != "qlora"
    with readable_errors(model_plan), _downloaded_once(model_plan), _partitioned(partition, deepspeed_config):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_plan.path, **arguments)
    if trajectory.method.kind == "qlora":
        log.info("%d linear layers in 4 bits", train_through_zero(model))
    elif not partition:
        model.to(device)
    if added_ids:
        with _partitioned(partition, deepspeed_config):
            add_rows(model, added_ids, trajectory.seed, device)
    model.config.use_cache = False
    return model


def nf4(dtype: torch.dtype) -> Any:
    """bitsandbytes' 4-bit NormalFloat with double quantization (Dettmers et al., 2023).

    The 4-bit bytes are stored as tensors of the training dtype: ZeRO-3 flattens parameters of one dtype together, and
    DeepSpeed casts every floating tensor to that dtype, which would corrupt bytes stored as another.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


@contextlib.contextmanager
def _partitioned(partition: bool, deepspeed_config: dict[str, Any]) -> Iterator[None]:
    """Let transformers build the model inside DeepSpeed's `zero.Init`."""
    if not partition:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    # transformers keeps only a weak reference: the name holds it alive until the model is read.
    config = HfDeepSpeedConfig(deepspeed_config)
    try:
        yield
    finally:
        del config
        unset_hf_deepspeed_config()


@contextlib.contextmanager
def _downloaded_once(model: ModelPlan) -> Iterator[None]:
    """One download a node: the first rank fetches under a lock, the others find it in the cache."""
    if model.source == "hub":
        from huggingface_hub import constants, snapshot_download

        lock = Path(constants.HF_HUB_CACHE) / f".slipway-{model.path.replace('/', '--')}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            snapshot_download(
                model.path,
                revision=model.revision,
                allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"],
            )
    yield


@contextlib.contextmanager
def readable_errors(model: ModelPlan) -> Iterator[None]:
    """Turn what transformers and the hub raise into a ModelError that says what to do."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError) as error:
        first_line = str(error).strip().split("\n")[0]
        if model.source == "hub":
            gated = "gated" in str(error).lower() or "401" in str(error) or "403" in str(error)
            hint = (
                "accept the model's terms on its page and set HF_TOKEN"
                if gated
                else "check the id and the network; with HF_HUB_OFFLINE=1 the model must already be in the cache"
            )
        else:
            hint = "the folder needs config.json and safetensors weights, as save_pretrained writes them"
        raise ModelError(f"cannot load {model.path}: {first_line}", hint=hint) from error
