"""From a Plan to a transformers model on this rank's device, ready for adapters."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from launcher.errors import ModelError
from launcher.model import attention
from launcher.model.head import POOLER, head_modules, own_classes, set_classes, start_head
from launcher.model.nf4 import train_through_zero
from launcher.model.regularize import set_dropout
from launcher.model.token_rows import add_rows
from launcher.plan.plan import ModelPlan, Plan

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CAUSAL_LM, CLASSIFIER = "AutoModelForCausalLM", "AutoModelForSequenceClassification"


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


def run_config(plan: Plan) -> PretrainedConfig:
    """The model's configuration with the classes of the run's sequence classification. Raises ModelError."""
    config = load_config(plan.trajectory.model)
    if plan.data.classes:
        tokenizer = AutoTokenizer.from_pretrained(Path(plan.data.folder) / "tokenizer")
        set_classes(config, plan.data.classes, tokenizer.pad_token_id)
    return config


def model_class(model: ModelPlan, config: PretrainedConfig, auto: str = CAUSAL_LM) -> type[PreTrainedModel]:
    """The class that transformers would use for this configuration; of a model with its own code, that code's.

    Raises:
        ModelError: it is no causal language model, or there is no CLASSIFIER of it.
    """
    own_code = getattr(config, "auto_map", {}).get(auto)
    if own_code and model.trust_remote_code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        with readable_errors(model):
            own: type[PreTrainedModel] = get_class_from_dynamic_module(own_code, model.path, revision=model.revision)
            return own
    mapping = AutoModelForCausalLM._model_mapping
    if auto == CLASSIFIER:
        mapping = AutoModelForSequenceClassification._model_mapping
        if type(config) not in mapping or config.is_encoder_decoder:
            raise ModelError(
                f"there is no sequence classification by models of type {config.model_type!r}",
                hint="choose a GPT-style model or an encoder, such as llama or bert",
            )
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


def check_classifier(model: ModelPlan, classes: Sequence[str]) -> list[str]:
    """What becomes of a classifier's own head, in a sentence.

    Raises:
        ModelError: there is no sequence classification by models of this type.
    """
    config = load_config(model)
    model_class(model, config, CLASSIFIER)
    own = own_classes(config)
    if not own or model.source == "scratch":
        return []
    if own == tuple(classes):
        return [f"the model tells {named(own)} apart already: its head goes on from there"]
    return [f"the model's own head tells {named(own)} apart: it starts anew for {named(classes)}"]


def named(classes: Sequence[str]) -> str:
    """Classes in words."""
    more = f" and {len(classes) - 4} more" if len(classes) > 5 else ""
    return ", ".join(classes[: 4 if more else 5]) + more


def load_model(
    plan: Plan, deepspeed_config: dict[str, Any], device: torch.device, added_ids: Sequence[int]
) -> PreTrainedModel:
    """The base model with its weights: fp32 or bf16, or 4-bit NF4 for QLoRA; with rows for `added_ids`, see
    `added_tokens`.

    Under ZeRO-3 the weights are partitioned as they are read, so that no rank ever holds the whole model; a quantized
    base is the exception, which each rank reads whole before DeepSpeed partitions it.

    Raises:
        ModelError: weights missing or unreadable, or dropout for a model that has none.
    """
    attention.register()
    model_plan, trajectory = plan.trajectory.model, plan.trajectory
    config = run_config(plan)
    if model_plan.dropout is not None:  # in training alone: what is exported is built from the model's own values
        set_dropout(config, model_plan.dropout)
    dtype = DTYPES[trajectory.dtype]
    arguments: dict[str, Any] = {"dtype": dtype}
    if trajectory.task == "causal_lm" and attention.supports_packing(model_class(model_plan, config), config):
        arguments["attn_implementation"] = attention.NAMES[plan.layout.attention]
    if trajectory.method.kind == "qlora":
        arguments["quantization_config"] = nf4(dtype)
        arguments["device_map"] = {"": device}
    partition = plan.layout.zero == 3 and trajectory.method.kind != "qlora"
    with readable_errors(model_plan), _downloaded_once(model_plan):
        model = from_checkpoint(plan, config, deepspeed_config if partition else None, **arguments)
    if trajectory.method.kind == "qlora":
        log.info("%d linear layers in 4 bits", train_through_zero(model))
    elif not partition:
        model.to(device)
    if added_ids:
        with _partitioned(deepspeed_config if partition else None):
            add_rows(model, added_ids, trajectory.seed, device)
    model.config.use_cache = False
    return model


def from_checkpoint(
    plan: Plan, config: PretrainedConfig, partitioning: dict[str, Any] | None = None, **arguments: Any
) -> PreTrainedModel:
    """The base as transformers reads it with `arguments`; for a sequence classification with a head for its classes,
    which is the checkpoint's own where that tells just these apart.

    `partitioning` is DeepSpeed's configuration under ZeRO-3; collective then.

    Raises:
        ModelError: weights below the head are missing.
    """
    model_plan, classes = plan.trajectory.model, plan.data.classes
    arguments |= {
        "config": config,
        "revision": model_plan.revision,
        "trust_remote_code": model_plan.trust_remote_code,
    }
    if plan.trajectory.task == "causal_lm":
        with _partitioned(partitioning):
            language_model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_plan.path, **arguments)
        return language_model
    with torch.device("meta"):
        heads = list(head_modules(model_class(model_plan, config, CLASSIFIER)(config)))
    if "quantization_config" in arguments:
        arguments["quantization_config"].llm_int8_skip_modules = heads
    other_classes = own_classes(load_config(model_plan)) not in ((), classes)
    replaced = [name for name in heads if not name.endswith(POOLER)] if other_classes else []
    if replaced and partitioning is not None:  # under ZeRO-3 a weight of another shape ends the run: look for none
        arguments["key_mapping"] = {rf"^{re.escape(name)}\.": f"left_out_{name}." for name in replaced}
    classifier: PreTrainedModel
    with _partitioned(partitioning):
        classifier, told = AutoModelForSequenceClassification.from_pretrained(
            model_plan.path, output_loading_info=True, ignore_mismatched_sizes=bool(replaced), **arguments
        )
    anew = set(told["missing_keys"]) | {name for name, *_ in told["mismatched_keys"]}
    for name in replaced:
        anew |= {f"{name}.{inner}" for inner, _ in classifier.get_submodule(name).named_parameters()}
    if anew:
        log.info("weights of the head that start from train.seed: %s", ", ".join(sorted(anew)))
        start_head(classifier, anew, plan.trajectory.seed)
    return classifier


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
def _partitioned(deepspeed_config: dict[str, Any] | None) -> Iterator[None]:
    """Let transformers build the model inside DeepSpeed's `zero.Init`, unless there is no configuration for that."""
    if deepspeed_config is None:
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
