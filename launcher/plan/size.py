"""How large a model is, from its configuration alone: no weights read, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def parameter_count(config: Mapping[str, Any]) -> int:
    """Estimated parameters of a GPT-style model or an encoder from its config.json; within a few percent for GPT-2,
    Llama and BERT families.

    Attention with grouped key-value heads, a gated (three matrices) or plain (two) feed-forward, embeddings once
    where tied. Experts are counted whole. Returns 0 where the configuration does not name its sizes.
    """

    def first(*names: str) -> int:
        return next((int(config[name]) for name in names if config.get(name)), 0)

    hidden = first("hidden_size", "n_embd", "d_model", "dim")
    layers = first("num_hidden_layers", "n_layer", "n_layers")
    heads = first("num_attention_heads", "n_head", "n_heads")
    if not (hidden and layers and heads):
        return 0
    head_size = first("head_dim") or hidden // heads
    kv_heads = first("num_key_value_heads") or heads
    attention = 2 * hidden * head_size * (heads + kv_heads)
    model_type = str(config.get("model_type", ""))
    encoder = "bert" in model_type or model_type in ("electra", "mpnet") or model_type.startswith("deberta")
    plain = encoder or model_type.startswith(("gpt", "opt", "bloom"))
    inner = first("intermediate_size", "n_inner", "ffn_dim", "hidden_dim") or 4 * hidden
    experts = first("num_local_experts", "num_experts") or 1
    feed_forward = (2 if plain else 3) * hidden * inner * experts
    tied = bool(config.get("tie_word_embeddings", plain))
    embeddings = first("vocab_size") * hidden * (1 if tied else 2)
    return layers * (attention + feed_forward) + embeddings
