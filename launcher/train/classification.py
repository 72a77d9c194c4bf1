"""A sequence classification: the loss of its one target a document, and what it predicts of the held-out rows.

D documents, L tokens of the longest, C classes.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.checkpoint.together import together
from launcher.data.loader import MicroBatch
from launcher.evaluate.predictions import Prediction, as_jsonl, class_scores
from launcher.store.durable import replace_synced
from launcher.train.evaluate import eval_figures, evaluate_sums
from launcher.train.loss import SupervisedLoss
from launcher.train.parts import Parts, Progress
from launcher_kernels.cross_entropy import cross_entropy_sum

log = logging.getLogger(__name__)


class ClassLoss(SupervisedLoss):
    """Loss sum and correct documents of micro batches, each document in a padded row of its own."""

    def __init__(self, network: Any, classifier: Any, device: torch.device, label_smoothing: float = 0.0) -> None:
        """
        Args:
            network: what is called: the DeepSpeed engine, or a model
            classifier: the transformers model inside it
            device: where the batch goes
            label_smoothing: share of each target that is spread over the classes, while the model is training
        """
        super().__init__(network, classifier, False, device, label_smoothing)

    def logits(self, batch: MicroBatch) -> Tensor:
        """[D, C] logits of the batch's documents; none of an empty slot's, which has no target."""
        logits: Tensor = self.network(**self._inputs(batch)).logits
        return logits[: len(batch.targets)]

    def _inputs(self, batch: MicroBatch) -> dict[str, Any]:
        mask_DL = self._kept(batch)
        # GPT-style models look for a document's last token by what rows are filled up with, and not by the mask.
        tokens_DL = torch.full(mask_DL.shape, self.causal_lm.config.pad_token_id)
        tokens_DL[mask_DL] = batch.input_ids[0]
        return {
            "input_ids": tokens_DL.to(self.device, non_blocking=True),
            "attention_mask": mask_DL.long().to(self.device, non_blocking=True),
        }


class Predicting:
    """A loss that keeps what is predicted of each document that goes through it."""

    def __init__(self, loss: SupervisedLoss) -> None:
        self.loss = loss
        self.predictions: list[Prediction] = []

    def __call__(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        logits_DC = self.loss.logits(batch)
        probabilities_DC = logits_DC.float().softmax(-1).tolist()
        documents = batch.input_ids[0].split(batch.cu_seqlens.diff().tolist())
        self.predictions += [
            Prediction(where, ids.tolist(), label, probabilities)
            for where, ids, label, probabilities in zip(  # an empty slot has a document, and nothing else
                batch.where, documents[: len(batch.where)], batch.targets.tolist(), probabilities_DC, strict=True
            )
        ]
        return cross_entropy_sum(logits_DC, batch.targets.to(logits_DC.device), None)


def evaluate_classes(parts: Parts, progress: Progress) -> dict[str, Any] | None:
    """The figures of a line `eval`, None where a stop came first. Before the first step, and after the last, what was
    predicted is kept in the run's folder. Collective."""
    predicted = predict(parts)
    if predicted is None:
        return None
    sums, predictions = predicted
    if progress.step in (0, parts.plan.lifecycle.total_steps):
        keep(predictions, parts, progress)
    classes = parts.plan.data.classes
    # By one rank for all: the ranks decide by what is measured.
    scores = together(
        "scoring what was predicted", lambda: class_scores(predictions, classes) if dist.get_rank() == 0 else None
    )[0]
    assert scores is not None
    figures = eval_figures(sums, parts.eval_data)
    del figures["perplexity"]  # of words that could follow; a class is none
    return figures | scores


def predict(parts: Parts) -> tuple[Tensor, list[Prediction]] | None:
    """As `evaluate_sums`, and what is predicted of each held-out row, in the order of the files. Collective."""
    loss, budget = Predicting(parts.loss), parts.plan.trajectory.data.max_length * parts.plan.layout.micro_batch_size
    with parts.watch.part("evaluate"):
        sums = evaluate_sums(parts.engine, loss, parts.eval_data, budget, parts.device, parts.stopping)
    if sums is None:
        return None
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, loss.predictions)
    return sums, sorted((one for part in gathered for one in part), key=lambda one: one.place)


def keep(predictions: list[Prediction], parts: Parts, progress: Progress) -> None:
    """Write predictions-<step>.jsonl; a disk that does not take it is only logged."""
    if dist.get_rank() != 0:
        return
    file = parts.run_dir / f"predictions-{progress.step:08d}.jsonl"
    try:
        replace_synced(file, as_jsonl(predictions, parts.plan.data.classes, parts.tokenizer))
    except OSError as error:
        log.warning("the predictions are not kept: %s: %s", file, error.strerror or error)


def keep_last(parts: Parts, progress: Progress) -> None:
    """The predictions of a run that has not ended with its last step, or whose model is not of that. Collective."""
    if progress.step != parts.plan.lifecycle.total_steps and (predicted := predict(parts)) is not None:
        keep(predicted[1], parts, progress)
