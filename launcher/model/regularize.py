"""What keeps a model from learning its rows by heart: dropout, and noise on its embeddings. Both in training only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from launcher.errors import ModelError

DROPOUTS = ("dropout", "pdrop")
"""In the names of probabilities in configurations: `attention_dropout`, `hidden_dropout_prob`, `resid_pdrop`, ...; not
in `layerdrop`, which leaves whole layers out."""


def set_dropout(config: PretrainedConfig, probability: float) -> None:
    """Overwrite every dropout probability that the configuration names, and those of the models inside it.

    What is None, as BERT's `classifier_dropout`, follows another. Attention weights are dropped in every implementation
    of ours; `triton`, and `varlen` and version 3 of `flash`, leave that to PyTorch, document by document, which is
    slower.

    Raises:
        ModelError: it names none.
    """
    named = [(one, name) for one in _configurations(config) for name in _probabilities(one)]
    if not named:
        raise ModelError(
            f"model.dropout: a configuration of type {config.model_type} names no dropout",
            hint="leave it out; method.dropout is for adapters, train.neftune_alpha for noise on the embeddings",
        )
    for one, name in named:
        vars(one)[name] = probability  # past the type that is declared: MPT's attn_pdrop is an int


def _configurations(config: PretrainedConfig) -> list[PretrainedConfig]:
    parts = [getattr(config, name, None) for name in type(config).sub_configs]
    return [config, *(part for part in parts if isinstance(part, PretrainedConfig))]


def _probabilities(config: PretrainedConfig) -> list[str]:
    return [
        name
        for name, value in vars(config).items()
        if any(word in name for word in DROPOUTS) and isinstance(value, int | float) and not isinstance(value, bool)
    ]


class EmbeddingNoise:
    """NEFTune: each embedded token is moved by noise, uniform within alpha / sqrt(L H) (Jain et al., 2023).

    L is the number of tokens of its own document, whatever is packed beside it, and H the hidden size. Drawn from
    torch's generator, as dropout is.
    """

    def __init__(self, model: nn.Module, alpha: float) -> None:
        """Put it on `model`, which is what gets called, with `attention_mask` by name: a causal LM or classifier of
        transformers, or peft's wrapper around one."""
        self.alpha, self.mask = alpha, None
        base: Any = getattr(model, "get_base_model", lambda: model)()
        model.register_forward_pre_hook(self._see, with_kwargs=True)
        base.get_input_embeddings().register_forward_hook(self._add)

    def _see(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.mask = kwargs.get("attention_mask")

    def _add(self, layer: nn.Module, _: tuple[Any, ...], embedded_BTH: Tensor) -> Tensor:
        if not layer.training:
            return embedded_BTH
        lengths_BT = document_lengths(self.mask, embedded_BTH)
        bound_BT = self.alpha / (lengths_BT.float() * embedded_BTH.shape[-1]).sqrt()
        noise_BTH = torch.empty_like(embedded_BTH).uniform_(-1, 1)
        return embedded_BTH + noise_BTH * bound_BT.unsqueeze(-1).to(noise_BTH)


def document_lengths(mask: Tensor | None, embedded_BTH: Tensor) -> Tensor:
    """[B, T] or [B, 1], for each token how many its document has: by the borders of documents laid end to end, see
    `attention.document_borders`, or by a mask [B, T] of padded rows, whose padding counts as its row."""
    _, tokens, _ = embedded_BTH.shape
    if mask is None:
        return torch.full((1, 1), tokens, device=embedded_BTH.device)
    if mask.dtype == torch.int32 and mask.dim() == 4:
        lengths_D = mask[0, 0, 0].diff()
        return torch.repeat_interleave(lengths_D, lengths_D, output_size=tokens).unsqueeze(0)
    return mask.sum(1, keepdim=True)
