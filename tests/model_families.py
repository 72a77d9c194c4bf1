"""Tiny random models of transformers' families, with every part that makes one differ from the others switched on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.data.loader import MicroBatch
from launcher.model.attention import NAMES, register, supports_packing
from launcher.train.loss import SupervisedLoss
from tests import packs

VOCABULARY = 61
ENDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": VOCABULARY,
} | ENDS
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY} | ENDS
WITHOUT_GROUPS = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen3": SIZES | {"head_dim": 8},
    "mistral": SIZES | {"sliding_window": 5},
    "mixtral": SIZES | EXPERTS,
    "gemma2": SIZES
    | {"head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0},
    "gemma3_text": SIZES | {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": SIZES | {"partial_rotary_factor": 0.5},
    "gpt2": GPT2,
    "gpt_neox": WITHOUT_GROUPS | {"rotary_pct": 0.5},
    "gptj": GPT2 | {"rotary_dim": 4},
    "opt": {key: SIZES[key] for key in WITHOUT_GROUPS if key != "intermediate_size"}
    | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY} | ENDS,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY} | ENDS,
    "olmo2": SIZES,
    "granite": SIZES
    | {"residual_multiplier": 0.22, "logits_scaling": 3.0, "attention_multiplier": 0.3, "embedding_multiplier": 6.0},
    "starcoder2": SIZES,
    "smollm3": SIZES | {"no_rope_layers": [1, 0]},
    "glm4": SIZES | {"head_dim": 8, "partial_rotary_factor": 0.5},
    "gpt_oss": SIZES
    | EXPERTS
    | {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_v3": SIZES
    | {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    | {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    | {"moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "cohere2": SIZES
    | {"logit_scale": 0.3, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
}
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "attention_dropout", "hidden_dropout")


def tiny_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model of one seed, without dropout, whose weights are large enough for every part to matter; its attention
    keeps packed documents apart where it can."""
    settings = FAMILIES[family] | {"initializer_range": 0.2} | changes
    register()
    config = AutoConfig.for_model(family, **settings)
    for name in DROPOUTS:
        if getattr(config, name, 0.0) and name not in changes:
            setattr(config, name, 0.0)
    torch.manual_seed(0)
    # from_config keeps the object it is given: two models of one object would share their attention.
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    if supports_packing(type(model), config):
        model.set_attn_implementation(NAMES["sdpa"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases start from ones and zeros, at which mistakes hide
                parameter += torch.randn(parameter.shape) * 0.2
            parameter.data = parameter.data.to(dtype)  # not the buffers: frequencies stay fp32
    return model


def pack(lengths: Sequence[int] = (5, 9), seed: int = 0) -> MicroBatch:
    """Of these models' tokens. Any seed but 0 gives targets weights."""
    return packs.pack(lengths, seed, vocabulary=VOCABULARY, weighted=seed != 0)


def loss_of(model: Any, label_smoothing: float = 0.0) -> SupervisedLoss:
    """The loss through a model, or through peft's wrapper around one; packed where documents are kept apart."""
    causal_lm = getattr(model, "get_base_model", lambda: model)()
    flat = supports_packing(type(causal_lm), causal_lm.config)
    return SupervisedLoss(model, causal_lm, flat, torch.device("cpu"), label_smoothing)
