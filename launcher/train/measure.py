"""What an evaluation measures: lines of metrics.jsonl, figures in the progress, answers in the run's folder.

All of it is collective. It breaks off where a stop comes, and what was not measured to its end gives no figure.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from launcher.checkpoint.together import together
from launcher.data.loader import EvalData, TestRows
from launcher.evaluate.answers import as_jsonl, scored, try_out
from launcher.evaluate.generate import generate_answers
from launcher.plan.batch import BatchLayout
from launcher.plan.plan import Plan
from launcher.store.durable import replace_synced
from launcher.train.agreement import agreed
from launcher.train.beat import GENERATE, mark
from launcher.train.classification import evaluate_classes, keep_last
from launcher.train.evaluate import eval_figures, evaluate_sums, evaluating, means, outside_of_the_engine
from launcher.train.guards import heed
from launcher.train.parts import Parts, Progress
from launcher.train.probe import write_probe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """One evaluation, equal on all ranks: what its lines of metrics.jsonl say. `evaluate.value` finds the metric."""

    evaluated: dict[str, Any] | None
    """None where no rows are held out."""
    answered: dict[str, Any] | None
    """None where answers are measured only before the first step and after the last."""


def open_test_rows(plan: Plan) -> TestRows | None:
    """The rows that are answered in words, with every metric tried on them; None where the recipe asks for none.

    Raises:
        DataError: a metric that says nothing about these rows, or a function of the user's that fails.
    """
    generate = plan.lifecycle.generate
    if generate is None:
        return None
    rows = TestRows(Path(plan.data.folder), generate.rows)
    slices, rank = plan.lifecycle.slices, dist.get_rank()
    together("trying the metrics", lambda: try_out(rows, generate.metrics, slices) if rank == 0 else None)
    return rows


def baseline(parts: Parts, progress: Progress) -> bool:
    """What can be measured only before the first step; False where a stop came first."""
    if parts.retain_data.num_documents or (parts.plan.data.classes and parts.eval_data.num_documents):
        before = evaluate(parts, progress)
        if before is None:
            return False
        progress.retain_before = before.get("retain_loss")
    if parts.test_rows is None:
        return True
    progress.answers_before = answer(parts, progress)
    return progress.answers_before is not None


def measure(parts: Parts, progress: Progress) -> Measured | None:
    """Loss, perplexity and token accuracy where rows are held out, and with `generate.during` answers; None where a
    stop came first. The guards take heed of it."""
    evaluated = answered = None
    if parts.eval_data.num_documents or parts.retain_data.num_documents:
        evaluated = evaluate(parts, progress)
        if evaluated is None:
            return None
    generate = parts.plan.lifecycle.generate
    if generate is not None and generate.during:
        answered = answer(parts, progress)
        if answered is None:
            return None
    heed(parts, progress, evaluated, answered)
    return Measured(evaluated, answered)


def evaluate(parts: Parts, progress: Progress) -> dict[str, Any] | None:
    """The figures of a line `eval`, with the loss on what is to be retained; None where a stop came first."""
    figures: dict[str, Any] = {}
    if parts.eval_data.num_documents:
        held_out = evaluate_classes(parts, progress) if parts.plan.data.classes else evaluate_tokens(parts)
        if held_out is None:
            return None
        figures, progress.eval_loss = held_out, held_out["loss"]
    if parts.retain_data.num_documents:
        sums = sums_on(parts, parts.retain_data)
        if sums is None:
            return None
        figures["retain_loss"] = means(sums)[0]
    progress.eval_step = progress.step
    parts.log.write("eval", step=progress.step, **figures)
    return figures


def evaluate_tokens(parts: Parts) -> dict[str, Any] | None:
    """{loss, accuracy, perplexity, slices?} of the held-out rows, None where a stop came first."""
    sums = sums_on(parts, parts.eval_data)
    return None if sums is None else eval_figures(sums, parts.eval_data)


def sums_on(parts: Parts, rows: EvalData) -> Tensor | None:
    """What `evaluate_sums` gives for `rows`, in micro batches as large as those of training."""
    budget = parts.plan.trajectory.data.max_length * parts.plan.layout.micro_batch_size
    with parts.watch.part("evaluate"):
        return evaluate_sums(parts.engine, parts.loss, rows, budget, parts.device, parts.stopping)


def answer(parts: Parts, progress: Progress) -> dict[str, Any] | None:
    """The figures of a line `answers`, None where a stop came first; the answers are kept in the run's folder.

    Raises:
        DataError: a function of the user's fails.
    """
    rows, life, step = parts.test_rows, parts.plan.lifecycle, progress.step
    assert rows is not None
    assert life.generate is not None
    metrics = life.generate.metrics

    def interrupted() -> bool:
        stops = agreed(parts.stopping(), parts.device)
        mark(GENERATE)
        return stops

    module = parts.engine.module
    with parts.watch.part("evaluate"), evaluating(parts.engine), outside_of_the_engine(module):
        answers = generate_answers(
            module,
            [row.prompt_ids for row in rows],
            parts.tokenizer,
            life.generate,
            parts.plan.trajectory.seed,
            parts.device,
            synced=parts.plan.layout.zero == 3 and dist.get_world_size() > 1,
            interrupted=interrupted,
        )
    if answers is None:
        return None

    def told() -> dict[str, Any]:
        figures, lines = scored(rows, answers, metrics, life.slices)
        keep(lines, parts.run_dir / f"answers-{step:08d}.jsonl")
        return figures

    # By one rank for all: a function of the user's need not say the same twice, and the ranks decide by it.
    figures = together("scoring the answers", lambda: told() if dist.get_rank() == 0 else None)[0]
    assert figures is not None
    progress.answers_step = step
    parts.log.write("answers", step=step, **figures)
    return figures


def keep(lines: list[dict[str, Any]], file: Path) -> None:
    """Write the answers down; a disk that does not take them is only logged."""
    try:
        replace_synced(file, as_jsonl(lines))
    except OSError as error:
        log.warning("the answers are not kept: %s: %s", file, error.strerror or error)


def finish(parts: Parts, progress: Progress) -> None:
    """What a run that reached its end still measures."""
    if parts.test_rows is not None and progress.answers_step != progress.step:
        answer(parts, progress)
    if parts.plan.data.classes and parts.eval_data.num_documents:
        keep_last(parts, progress)
    first = next(parts.train_data.micro_batches(0, BatchLayout(1, 1, parts.plan.trajectory.global_batch_size), 0))
    write_probe(parts.loss, first, parts.run_dir, progress.step, dist.get_rank())
