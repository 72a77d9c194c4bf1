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
from launcher_kernels.cross_entropy import cross_entropy_sum


class SupervisedLoss:
    """Loss sum and correct tokens of micro batches through one model or engine."""

    def __init__(self, network: Any, causal_lm: Any, flat: bool, device: torch.device) -> None:
        """
        Args:
            network: what is called: the DeepSpeed engine, or a model
            causal_lm: the transformers model inside it
            flat: documents end to end in one row, kept apart by the packed attention; otherwise a padded row each
            device: where the batch goes
        """
        self.network, self.flat, self.device = network, flat, device
        self.head_takes_index = flat and "logits_to_keep" in inspect.signature(type(causal_lm).forward).parameters

    def __call__(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Weighted sum of the cross entropy over the S supervised tokens, differentiable, and correct tokens: both []
        fp32."""
        logits_SV = self.logits(batch)
        weights_S = batch.weights.to(self.device, non_blocking=True) if batch.weights is not None else None
        return cross_entropy_sum(logits_SV, batch.targets.to(self.device, non_blocking=True), weights_S)

    def logits(self, batch: MicroBatch) -> Tensor:
        """[S, V] logits that predict the batch's supervised tokens."""
        index_S = batch.supervised_index.to(self.device, non_blocking=True)
        if not self.flat:
            return self._padded_logits(batch, index_S)
        borders = document_borders(batch.cu_seqlens, batch.max_seqlen).to(self.device)
        # transformers computes the head only on the positions named here, with all the model does to its logits.
        keep: dict[str, Any] = {"logits_to_keep": index_S} if self.head_takes_index else {}
        output = self.network(
            input_ids=batch.input_ids.to(self.device, non_blocking=True),
            position_ids=batch.position_ids.to(self.device, non_blocking=True),
            attention_mask=borders,
            use_cache=False,
            **keep,
        )
        logits: Tensor = output.logits.squeeze(0)
        return logits if self.head_takes_index else logits[index_S]

    def _padded_logits(self, batch: MicroBatch, index_S: Tensor) -> Tensor:
        """For families whose attention only knows [D, L] rows with a padding mask."""
        lengths_D = batch.cu_seqlens.diff().long()
        mask_DL = torch.arange(batch.max_seqlen)[None, :] < lengths_D[:, None]
        tokens_DL = torch.zeros(mask_DL.shape, dtype=torch.long)
        tokens_DL[mask_DL] = batch.input_ids[0]
        mask_DL = mask_DL.to(self.device)
        output = self.network(input_ids=tokens_DL.to(self.device), attention_mask=mask_DL.long(), use_cache=False)
        flat_logits: Tensor = output.logits[mask_DL]
        return flat_logits[index_S]
