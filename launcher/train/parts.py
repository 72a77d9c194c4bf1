"""What a run is made of, and where it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
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
from launcher.train.spikes import remember
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
    answers_before: dict[str, Any] | None = None
    """The line `answers` of before the first step."""
    answers_step: int | None = None
    """When the test rows were answered last."""
    phase: int = 0
    """Of gradual unfreezing: what has been trained so far."""
    heeded_step: int | None = None
    """The step of the evaluation that the guards have taken in last."""
    metric: str = "loss"
    """What `score` and `best_value` are of: `evaluate.metric`."""
    score: float | None = None
    """Of the latest evaluation, turned so that smaller is better; None: it is not to be chosen. Checkpoints are ranked
    by it."""
    best_value: float | None = None
    """Of the metric, over all evaluations so far, and at which step."""
    best_step: int | None = None
    better_than: float | None = None
    """What an evaluation must be better than by `min_delta` to be one that early stopping calls better."""
    bad_evaluations: int = 0
    """In a row, since the last such one."""
    losses: list[float] = field(default_factory=list)
    """Of the latest steps, at most `guard.window`."""
    loss_sum: float = 0.0
    """Of the steps since the latest evaluation, and how many they are."""
    loss_count: int = 0
    history: list[list[float]] = field(default_factory=list)
    """[step, mean training loss since the one before, loss] of the latest evaluations, at most `HISTORY`."""
    overfitting_since: int | None = None
    retain_before: float | None = None
    """Loss on `evaluate.retain` before the first step."""
    retain_loss: float | None = None
    """And of the latest evaluation."""
    forgetting_since: int | None = None
    """The evaluation from which on it was beyond its limit."""
    skipped: list[int] = field(default_factory=list)
    """Steps from which nothing was learned, or nothing stayed: see `guard.spikes`."""
    spikes: int = 0
    """How often a step was left out or the run rolled back."""

    def learn(self, loss: float, tokens: int, supervised_tokens: int, window: int) -> None:
        """Count a step that was taken."""
        self.tokens += tokens
        self.supervised_tokens += supervised_tokens
        self.loss_sum, self.loss_count = self.loss_sum + loss, self.loss_count + 1
        remember(self.losses, loss, window)

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Progress:
        """What `as_dict` gave, also of an earlier version, which saved less or other things."""
        known = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in saved.items() if name in known})


@dataclass
class Parts:
    """Everything the loop works with, made by `run.py` from the Plan. Nothing in it changes but what `unfreeze.rebuild`
    makes anew: engine, loss and phase."""

    plan: Plan
    batch: BatchLayout
    phase: int
    """Of gradual unfreezing: which weights the engine trains."""
    engine: Any
    loss: SupervisedLoss
    train_data: TrainData
    eval_data: EvalData
    retain_data: EvalData
    """What the model should still be good at; empty where the recipe names nothing."""
    test_rows: TestRows | None
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    log: MetricsLog
    watch: Stopwatch
    saver: Saver
    stopping: Callable[[], bool]
    """Whether this rank has been asked to stop; the ranks agree on it once a step."""

    @property
    def run_dir(self) -> Path:
        return Path(self.plan.run_dir)
