"""One document's logits, as the trained model gives them in the last step: what an exported folder is compared with."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from launcher.data.loader import MicroBatch
from launcher.store.durable import replace_synced
from launcher.train.evaluate import evaluating
from launcher.train.loss import SupervisedLoss

log = logging.getLogger(__name__)

MAX_TOKENS = 128


def probe_file(run_dir: Path, step: int) -> Path:
    """Where the probe of a step is."""
    return run_dir / f"probe-{step:08d}.safetensors"


def write_probe(loss: SupervisedLoss, batch: MicroBatch, run_dir: Path, step: int, rank: int) -> None:
    """Save {"input_ids" [T] int64, "logits" [T, V] fp32} of the batch's first document. Collective: every rank
    computes it. A disk that does not take the file is only logged."""
    length = min(int(batch.cu_seqlens[1]), MAX_TOKENS)
    document = MicroBatch(
        input_ids=batch.input_ids[:, :length],
        position_ids=batch.position_ids[:, :length],
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        max_seqlen=length,
        supervised_index=torch.arange(length),
        targets=torch.zeros(length, dtype=torch.int64),
        weights=None,
        where=batch.where[:1],
        num_tokens=length,
    )
    with evaluating(loss.network):
        logits = loss.logits(document).float().cpu().contiguous()
    if rank == 0:
        path = probe_file(run_dir, step)
        # As bytes: safetensors' own writer leaves half a file on a full disk, and raises what is no OSError.
        content = save({"input_ids": document.input_ids[0].contiguous(), "logits": logits})
        try:
            replace_synced(path, content)
        except OSError as error:
            log.warning("the export will have no probe to be checked with: %s: %s", path, error.strerror or error)


def read_probe(run_dir: Path, step: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Token ids [T] and logits [T, V] of a step, or None if the run did not end there."""
    path = probe_file(run_dir, step)
    if not path.exists():
        return None
    tensors = load_file(path)
    return tensors["input_ids"], tensors["logits"]
