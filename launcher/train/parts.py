"""What a run is made of, and where it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from launcher.checkpoint.saver import Saver
from launcher.data.loader import EvalData, TestRows, TrainData
from launcher.plan.batch import BatchLayout
from launcher.plan.plan import Plan
from launcher.train.loss import SupervisedLoss
from launcher.train.metrics import MetricsLog
from launcher.train.throughput import Stopwatch


@dataclass
class Progress:
    """Where the run is; saved with every checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    supervised_tokens: int = 0
    elapsed_s: float = 0.0
    """Seconds in the loop, over all attempts."""
    eval_loss: float | None = None
    """Of the latest evaluation."""
    eval_step: int | None = None
    """When that was."""
    exact_match_before: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Parts:
    """Everything the loop works with, made by `run.py` from the Plan."""

    plan: Plan
    batch: BatchLayout
    engine: Any
    loss: SupervisedLoss
    train_data: TrainData
    eval_data: EvalData
    test_rows: TestRows | None
    tokenizer: PreTrainedTokenizerBase
    end_of_turn: int
    device: torch.device
    log: MetricsLog
    watch: Stopwatch
    saver: Saver
    stopping: Callable[[], bool]
    """Whether this rank has been asked to stop; the ranks agree on it once a step."""

    @property
    def run_dir(self) -> Path:
        return Path(self.plan.run_dir)
