"""Rows of the embedding and of the head for added tokens: where they start, and how they alone are trained.

Under adapters peft's `trainable_token_indices` keeps a few rows as parameters of their own, saves them beside the
adapters and merges them. What it computes is right at every ZeRO stage; but it copies the whole matrix in every forward
pass, to put the rows in, and in the backward pass computes the gradient of the whole matrix, to take the rows out. So
its layers' forward is replaced here: the frozen layer is called as it is, and the rows take their places in what it
returns. Beside 65,536 rows of 512 the step of a small model takes 5% longer with two added tokens, instead of 72%
(docs/decisions/0007).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from launcher.errors import ModelError

SPREAD = 0.01
"""How far added rows start from the mean, as a share of the vocabulary's own spread: enough to differ in bf16."""


def add_rows(model: PreTrainedModel, ids: Sequence[int], seed: int, device: torch.device) -> None:
    """Give the tokens `ids`, ascending and the last of the vocabulary, their first rows.

    Where the embedding has no such rows they are appended; rows to spare (a vocabulary padded to a round size) hold
    noise and are overwritten. A row starts near the mean of the known tokens' rows: no added token is then likelier
    than the average one (Hewitt, 2021, "Initializing new word embeddings for pretrained language models"). The same
    for the same weights and seed, on all ranks. Collective where there are several; under ZeRO-3 transformers must
    know of it still (`HfDeepSpeedConfig`). `device` is this rank's own.
    """
    embedding: Any = model.get_input_embeddings()
    if ids[-1] >= embedding.num_embeddings:
        model.resize_token_embeddings(ids[-1] + 1, mean_resizing=False)
    draw = torch.Generator().manual_seed(seed)
    for layer in vocabulary_layers(model).values():
        weight: Any = layer.weight
        with torch.no_grad(), whole([weight], write=True):
            known_VH = weight[: ids[0]].to(device)
            mean_H = known_VH.mean(0, dtype=torch.float32)
            square_H = torch.linalg.vector_norm(known_VH, dim=0, dtype=torch.float32).square() / len(known_VH)
            noise_NH = torch.randn(len(ids), len(mean_H), generator=draw).to(device)
            start_NH = mean_H + SPREAD * (square_H - mean_H.square()).clamp_min(0).sqrt() * noise_NH
            if dist.is_initialized():  # the ranks may add the vocabulary up in another order
                dist.broadcast(start_NH, 0)
            weight[torch.tensor(ids, device=weight.device)] = start_NH.to(weight)


def vocabulary_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """{name: layer} of the embedding and of the head, unless that is the embedding's own weight."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    return {name: module for name, module in model.named_modules() if any(module is layer for layer in layers)}


@contextlib.contextmanager
def whole(weights: Sequence[Any], write: bool = False) -> Iterator[None]:
    """Gather weights that ZeRO-3 has partitioned; with `write`, rank 0's changes are kept. Collective."""
    partitioned = [weight for weight in weights if hasattr(weight, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if write else None):
        yield


def train_rows_alone(model: PreTrainedModel, ids: Sequence[int]) -> nn.Module:
    """peft's wrapper around a model whose trained weights are chosen already; the rows `ids` of the embedding, and of a
    head tied to it, are trained too."""
    from peft import TrainableTokensConfig, get_peft_model

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    name = next(name for name, layer in model.named_modules() if layer is model.get_input_embeddings())
    config = TrainableTokensConfig(token_indices=list(ids), target_modules=[name], task_type="CAUSAL_LM")
    with whole([layer.weight for layer in vocabulary_layers(model).values()]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)  # peft ties them
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    for parameter in trained:
        parameter.requires_grad_(True)
    compute_rows_alone(adapted)
    return adapted


def compute_rows_alone(model: nn.Module) -> None:
    """Replace the forward of every layer of `model` that peft trains rows of.

    Raises:
        ModelError: such a layer has a bias, which peft drops.
    """
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for layer in [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]:
        if getattr(layer.base_layer, "bias", None) is not None:
            raise ModelError(
                "this model's head has a bias, and adapters cannot train single rows of such a head",
                hint="use method.kind full, or leave out model.add_tokens",
            )
        [(adapter, ids)] = layer.token_indices.items()
        layer.trained_ids = torch.tensor(ids, device=layer.trainable_tokens_delta[adapter].device)
        forward = _embed if isinstance(layer.base_layer, nn.Embedding) else _score
        layer.forward = MethodType(forward, layer)


def _rows(layer: Any) -> Tensor:
    """[N, H] trained rows. Under ZeRO-3 DeepSpeed gathers them when they are looked up, for both passes."""
    [rows] = layer.trainable_tokens_delta.values()
    found: Tensor = rows
    return found


def _embed(self: Any, tokens: Tensor) -> Tensor:
    """[..., H] of token ids [...]; rows in the order of the ascending `trained_ids` [N]."""
    embedded: Tensor = self.base_layer(tokens)
    ids_N = self.trained_ids.to(tokens.device)
    place = torch.searchsorted(ids_N, tokens).clamp_(max=len(ids_N) - 1)
    trained = F.embedding(place, _rows(self))
    scale = self._get_embed_scale()  # Gemma's embedding multiplies what it looked up
    if scale is not None:
        trained = trained * scale.to(trained.dtype)
    return torch.where((ids_N[place] == tokens).unsqueeze(-1), trained, embedded)


def _score(self: Any, hidden: Tensor) -> Tensor:
    """[..., V] logits of [..., H]; written into what the frozen head returned, which no backward pass reads."""
    logits: Tensor = self.base_layer(hidden)
    return logits.index_copy_(-1, self.trained_ids.to(hidden.device), F.linear(hidden, _rows(self)))
