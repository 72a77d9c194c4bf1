"""The training loop: next batch, forward, backward, step, measure, evaluate, checkpoint."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist

from launcher.data.loader import GlobalBatch, MicroBatch
from launcher.errors import Superseded
from launcher.plan.batch import BatchLayout
from launcher.train import startup
from launcher.train.agreement import agreed, agreed_on_time
from launcher.train.beat import SUMS, doing, mark
from launcher.train.engine import optimizer_step as step_engine
from launcher.train.evaluate import evaluate_loss, exact_match
from launcher.train.parts import Parts, Progress
from launcher.train.probe import write_probe
from launcher.train.request import ask_for_checkpoint, checkpoint_asked_for
from launcher.train.saving import PATIENCE_S, checkpoint, report_saves, save_last
from launcher.train.schedule import lr_factor
from launcher.train.throughput import memory_bytes
from launcher.train.verdict import Verdict


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, equal on all ranks."""

    loss: float
    """Mean over the global batch's supervised tokens."""
    accuracy: float
    stop: bool
    save: bool
    """A checkpoint has been asked for."""
    not_finite: str | None
    """What was not finite and in which rows; nothing is saved after it."""
    grad_norm: float | None = None
    """Global, before clipping."""


def train(parts: Parts, progress: Progress) -> Verdict:
    """Run from `progress` to the end of the plan, or to a stop. Collective; the verdict is equal on all ranks.

    Raises Superseded where another launcher has taken the run over.
    """
    plan, life, resumed_at = parts.plan, parts.plan.lifecycle, progress.step
    clock, saved_at = time.monotonic() - progress.elapsed_s, time.monotonic()
    slow = False
    if progress.step == 0 and parts.test_rows is not None:
        progress.exact_match_before = answer_test_rows(parts, 0)
        if progress.exact_match_before is None:
            return Verdict("stopped", 0, "stopped before the first step")
    startup.ended("answers before training")
    parts.watch.lap()
    while progress.step < life.total_steps:
        step, began = progress.step, time.monotonic()
        if life.checkpoint_within_s is not None and began - saved_at >= life.checkpoint_within_s:
            ask_for_checkpoint()
        mark("data", step + 1)
        global_batch = parts.train_data.global_batch(step)
        learning_rate = plan.trajectory.optimizer.lr * lr_factor(plan.trajectory.schedule, step, life.total_steps)
        result = optimizer_step(parts, step, global_batch, learning_rate, interruptible=slow)
        if result is None:
            return stop(parts, progress, resumed_at)
        if result.not_finite is not None:
            parts.saver.join()
            report_saves(parts)
            return Verdict(
                "not_finite",
                step,
                result.not_finite,
                "lower optimizer.lr, lengthen schedule.warmup, or look at these rows with slipway data",
                exit_code=1,
            )
        progress.step += 1
        doing.warm = True
        progress.tokens += global_batch.tokens
        progress.supervised_tokens += global_batch.supervised_tokens
        progress.elapsed_s = time.monotonic() - clock
        report_startup(parts)
        last = progress.step == life.total_steps
        limited = agreed_on_time(parts, progress.elapsed_s, time.monotonic() - began)
        slow, out_of_time = limited.slow, limited.over
        report_saves(parts)
        if progress.step % life.log_every_steps == 0 or last or out_of_time or result.stop:
            log_step(parts, progress, global_batch, result, learning_rate)
        if result.stop and not last:
            return stop(parts, progress, resumed_at)
        measured = True
        if progress.step % life.eval_every_steps == 0 or last or out_of_time:
            measured = measure(parts, progress)
        if last or out_of_time:
            return end(parts, progress, "finished" if last else "out_of_time")
        if not measured:
            return stop(parts, progress, resumed_at)
        if progress.step % life.checkpoint_every_steps == 0 or result.save:
            checkpoint(parts, progress)
            saved_at = time.monotonic()
    return end(parts, progress, "finished", saved=resumed_at == progress.step)


def report_startup(parts: Parts) -> None:
    """After the first step of a launch: write where the time before it went."""
    startup.ended("first step")
    if (told := startup.conclude()) is not None:
        parts.log.write("startup", **told)


def stop(parts: Parts, progress: Progress, resumed_at: int) -> Verdict:
    """Save what has been done, as soon as can be."""
    mark("checkpoint")
    parts.saver.join()
    report_saves(parts)
    done = progress.step == resumed_at or parts.saver.newest == progress.step
    if not agreed(done, parts.device) and (unsaved := save_last(parts, progress, patience_s=0.0)):
        return unsaved
    return Verdict("stopped", progress.step, f"stopped and saved at step {progress.step}")


def end(parts: Parts, progress: Progress, kind: Literal["finished", "out_of_time"], saved: bool = False) -> Verdict:
    """Save the last step for good, then measure what only an end can be measured by."""
    if not saved and (unsaved := save_last(parts, progress, PATIENCE_S)):
        return unsaved
    finish(parts, progress)
    message = f"finished {progress.step} steps"
    if kind == "out_of_time":
        message = f"train.max_time is over: saved at step {progress.step}"
    return Verdict(kind, progress.step, message)


def optimizer_step(
    parts: Parts, step: int, global_batch: GlobalBatch, learning_rate: float, interruptible: bool = False
) -> StepResult | None:
    """Forward and backward over this rank's micro batches, then one optimizer step.

    None where the step was given up for a stop, which is looked for between its micro batches if it is `interruptible`:
    the weights are those of the step before.
    """
    engine, batch, rank = parts.engine, parts.batch, dist.get_rank()
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    seed_step(parts.plan.trajectory.seed, step, rank)
    # DeepSpeed averages over ranks and micro steps; this turns that average of sums into the sum over the global batch
    # divided by the weight of its supervised tokens, a number known before the first backward.
    scale = batch.world_size * batch.num_micro_steps / global_batch.weight
    micro_batches = parts.train_data.micro_batches(step, batch, rank)
    losses: list[torch.Tensor] = []
    correct = torch.zeros((), device=parts.device)
    seen: list[MicroBatch] = []
    result: StepResult | None = None
    grad_norm: float | None = None
    for micro_step in range(batch.num_micro_steps):
        if interruptible and agreed(parts.stopping(), parts.device):
            return None
        with parts.watch.part("data"):
            micro_batch = next(micro_batches)
            seen.append(micro_batch)
        with parts.watch.part("forward"):
            loss_sum, micro_correct = parts.loss(micro_batch)
            losses.append(loss_sum.detach())
            correct += micro_correct
        boundary = micro_step == batch.num_micro_steps - 1
        if boundary:
            result = agree(parts, step, torch.stack(losses), correct, seen, global_batch)
            if result.not_finite is not None:
                return result
        with parts.watch.part("backward"):
            engine.backward(loss_sum * scale)
        if boundary:
            with parts.watch.part("checkpoint"):
                parts.saver.before_update()
        with parts.watch.part("step"):
            grad_norm = step_engine(engine, parts.plan)
    assert result is not None
    if grad_norm is not None and not math.isfinite(grad_norm):
        return replace(
            result, not_finite=f"the gradient norm of step {step + 1} is {grad_norm}, its loss {result.loss:.4f}"
        )
    return replace(result, grad_norm=grad_norm)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Random state as a function of (seed, step, rank): a resumed run needs none saved to draw the same dropout
    masks."""
    torch.manual_seed((seed * 1_000_003 + step) * 65_537 + rank)


def agree(
    parts: Parts,
    step: int,
    losses: torch.Tensor,
    correct: torch.Tensor,
    seen: list[MicroBatch],
    global_batch: GlobalBatch,
) -> StepResult:
    """Add the ranks' sums up, and tell every rank of a stop request, a lost lease or a loss that is not finite: the
    step's only wait.

    Raises Superseded.
    """
    mark(SUMS)
    finite = torch.isfinite(losses)
    totals = torch.cat(
        [
            torch.stack([losses.double().sum(), correct.double(), (~finite).sum().double()]),
            torch.tensor(
                [parts.stopping(), parts.saver.superseded, checkpoint_asked_for()], device=parts.device
            ).double(),
        ]
    )
    dist.all_reduce(totals)
    loss_total, correct_total, num_bad, stops, superseded, saves = totals.tolist()
    if superseded:
        raise Superseded(
            f"another launcher has taken {parts.plan.location} over", hint="stop this launcher, the other one goes on"
        )
    loss, accuracy = loss_total / global_batch.weight, correct_total / global_batch.supervised_tokens
    not_finite = None
    if num_bad:
        mine = [where for ok, micro in zip(finite.tolist(), seen, strict=True) if not ok for where in micro.where]
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, mine)
        rows = [where for part in gathered for where in part]
        shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        not_finite = f"the loss of step {step + 1} is {loss}; rows: {shown}"
    return StepResult(loss, accuracy, bool(stops), bool(saves), not_finite)


def log_step(parts: Parts, progress: Progress, global_batch: Any, result: StepResult, learning_rate: float) -> None:
    """A line of metrics.jsonl."""
    seconds = parts.watch.lap()
    parts.log.write(
        "step",
        step=progress.step,
        epoch=round(progress.step / parts.train_data.steps_per_epoch, 4),
        loss=result.loss,
        accuracy=result.accuracy,
        lr=learning_rate,
        grad_norm=result.grad_norm,
        rows=list(global_batch.rows)[:4],
        tokens=global_batch.tokens,
        supervised_tokens=global_batch.supervised_tokens,
        seconds=seconds,
        memory_bytes=memory_bytes(parts.device),
    )


def measure(parts: Parts, progress: Progress) -> bool:
    """Evaluation loss and token accuracy, where rows are held out; False where a stop came first."""
    if not parts.eval_data.num_documents:
        return True
    layout, data = parts.plan.layout, parts.plan.trajectory.data
    with parts.watch.part("evaluate"):
        found = evaluate_loss(
            parts.engine,
            parts.loss,
            parts.eval_data,
            data.max_length * layout.micro_batch_size,
            parts.device,
            parts.stopping,
        )
    if found is None:
        return False
    (progress.eval_loss, accuracy), progress.eval_step = found, progress.step
    parts.log.write("eval", step=progress.step, loss=progress.eval_loss, accuracy=accuracy)
    return True


def answer_test_rows(parts: Parts, step: int) -> float | None:
    """Exact match on the test rows, None where a stop came first; the answers are kept in the run's folder."""
    life = parts.plan.lifecycle
    assert parts.test_rows is not None
    assert life.generate is not None
    with parts.watch.part("evaluate"):
        score = exact_match(
            parts.engine,
            parts.test_rows,
            parts.tokenizer,
            parts.end_of_turn,
            life.generate,
            parts.plan.layout.zero,
            parts.device,
            parts.run_dir / f"answers-{step:08d}.jsonl",
            parts.stopping,
        )
    if score is None:
        return None
    parts.log.write("exact_match", step=step, score=score, rows=len(parts.test_rows))
    return score


def finish(parts: Parts, progress: Progress) -> None:
    """What a run that reached its end still measures."""
    if parts.test_rows is not None:
        answer_test_rows(parts, progress.step)
    first = next(parts.train_data.micro_batches(0, BatchLayout(1, 1, parts.plan.trajectory.global_batch_size), 0))
    write_probe(parts.loss, first, parts.run_dir, progress.step, dist.get_rank())
