"""The loss of a micro batch: a sum over supervised tokens, computed where they are and nowhere else.

T tokens of the flat row, S supervised of them, D documents, L the longest, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from launcher.data.loader import MicroBatch
from launcher.model.attention import document_borders
from launcher.model.fused_head import takes_targets
from launcher_kernels.cross_entropy import cross_entropy_sum


class SupervisedLoss:
    """Loss sum and correct tokens of micro batches through one model or engine."""

    def __init__(
        self, network: Any, causal_lm: Any, flat: bool, device: torch.device, label_smoothing: float = 0.0
    ) -> None:
        """
        Args:
            network: what is called: the DeepSpeed engine, or a model
            causal_lm: the transformers model inside it; where `fuse` gave it a head for the loss, that computes it
            flat: documents end to end in one row, kept apart by the packed attention; otherwise a padded row each
            device: where the batch goes
            label_smoothing: share of each target that is spread over the vocabulary, while the model is training
        """
        self.network, self.causal_lm, self.flat, self.device = network, causal_lm, flat, device
        self.label_smoothing = label_smoothing
        self.head_takes_index = flat and "logits_to_keep" in inspect.signature(type(causal_lm).forward).parameters

    def __call__(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Weighted sum of the cross entropy over the S supervised tokens, differentiable, and correct tokens: both []
        fp32."""
        targets_S = batch.targets.to(self.device, non_blocking=True)
        weights_S = batch.weights.to(self.device, non_blocking=True) if batch.weights is not None else None
        smoothing = self.label_smoothing if self.causal_lm.training else 0.0
        if not takes_targets(self.causal_lm):
            return cross_entropy_sum(self.logits(batch), targets_S, weights_S, smoothing)
        index_S = batch.supervised_index
        if not self.flat:  # of the padded rows end to end
            index_S = self._kept(batch).flatten().nonzero()[:, 0][index_S]
        loss, _, correct = self.network(
            **self._inputs(batch),
            supervised_index=index_S.to(self.device, non_blocking=True),
            targets=targets_S,
            row_weights=weights_S,
            label_smoothing=smoothing,
        )
        return loss, correct

    def logits(self, batch: MicroBatch) -> Tensor:
        """[S, V] logits that predict the batch's supervised tokens."""
        index_S = batch.supervised_index.to(self.device, non_blocking=True)
        # transformers computes the head only on the positions named here, with all the model does to its logits.
        keep: dict[str, Any] = {"logits_to_keep": index_S} if self.head_takes_index else {}
        logits: Tensor = self.network(**self._inputs(batch), **keep).logits
        logits = logits.squeeze(0) if self.flat else logits[self._kept(batch).to(self.device)]
        return logits if self.head_takes_index else logits[index_S]

    def _inputs(self, batch: MicroBatch) -> dict[str, Any]:
        """What the network is called with."""
        if self.flat:
            return {
                "input_ids": batch.input_ids.to(self.device, non_blocking=True),
                "position_ids": batch.position_ids.to(self.device, non_blocking=True),
                "attention_mask": document_borders(batch.cu_seqlens, batch.max_seqlen).to(self.device),
                "use_cache": False,
            }
        # For families whose attention only knows [D, L] rows with a padding mask.
        mask_DL = self._kept(batch)
        tokens_DL = torch.zeros(mask_DL.shape, dtype=torch.long)
        tokens_DL[mask_DL] = batch.input_ids[0]
        return {
            "input_ids": tokens_DL.to(self.device),
            "attention_mask": mask_DL.long().to(self.device),
            "use_cache": False,
        }

    def _kept(self, batch: MicroBatch) -> Tensor:
        """[D, L] bool, where the documents' tokens are in padded rows; on the CPU."""
        return torch.arange(batch.max_seqlen)[None, :] < batch.cu_seqlens.diff().long()[:, None]
