"""The training loop: next batch, forward, backward, step, measure, evaluate, checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from launcher.data.loader import GlobalBatch, MicroBatch
from launcher.errors import Superseded
from launcher.train import startup
from launcher.train.agreement import agreed, agreed_on_time
from launcher.train.beat import SUMS, doing, mark
from launcher.train.best import restore
from launcher.train.ending import Ended, ended
from launcher.train.engine import optimizer_step as step_engine
from launcher.train.guards import keeps_best, missed, over
from launcher.train.measure import baseline, finish, measure
from launcher.train.optimizer import set_learning_rate
from launcher.train.parts import Parts, Progress
from launcher.train.request import ask_for_checkpoint, checkpoint_asked_for
from launcher.train.saving import PATIENCE_S, checkpoint, report_saves, save_last
from launcher.train.schedule import lr_factor
from launcher.train.spiked import named, respond, suspects
from launcher.train.spikes import Spike, judge, judge_norm
from launcher.train.throughput import memory_bytes
from launcher.train.unfreeze import begins_next, unfreeze
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
    spike: Spike | None
    """Why it is not to be trusted, and what follows."""
    grad_norm: float | None = None
    """Global, before clipping."""

    @property
    def learned(self) -> bool:
        """Whether the weights have changed."""
        return self.spike is None or not self.spike.left_out


def train(parts: Parts, progress: Progress) -> Verdict:
    """Run from `progress` to the end of the plan, or to a stop. Collective; the verdict is equal on all ranks.

    Raises Superseded where another launcher has taken the run over.
    """
    plan, life, resumed_at = parts.plan, parts.plan.lifecycle, progress.step
    clock, saved_at = time.monotonic() - progress.elapsed_s, time.monotonic()
    slow = False
    if progress.step == 0 and not baseline(parts, progress):
        return Verdict("stopped", 0, "stopped before the first step")
    if progress.step > 0 and missed(progress, life) and measure(parts, progress) is None:
        return stop(parts, progress, resumed_at)
    if over(progress, life) and progress.step < life.total_steps:
        return end(parts, progress, "stopped_early", saved=True)
    startup.ended("answers before training")
    parts.watch.lap()
    while progress.step < life.total_steps:
        step, began = progress.step, time.monotonic()
        if life.checkpoint_within_s is not None and began - saved_at >= life.checkpoint_within_s:
            ask_for_checkpoint()
        mark("data", step + 1)
        global_batch = parts.train_data.global_batch(step)
        learning_rate = plan.trajectory.optimizer.lr * lr_factor(plan.trajectory.schedule, step, life.total_steps)
        result = optimizer_step(parts, step, global_batch, learning_rate, progress.losses, interruptible=slow)
        if result is None:
            return stop(parts, progress, resumed_at)
        if result.spike is not None and (verdict := respond(parts, progress, result.spike)):
            return verdict
        progress.step += 1
        doing.warm = True
        if result.learned:
            progress.learn(result.loss, global_batch.tokens, global_batch.supervised_tokens, life.guard.window)
        progress.elapsed_s = time.monotonic() - clock
        report_startup(parts)
        last = progress.step == life.total_steps
        limited = agreed_on_time(parts, progress.elapsed_s, time.monotonic() - began)
        slow, out_of_time = limited.slow, limited.over
        report_saves(parts)
        due = progress.step % life.log_every_steps == 0 or last or out_of_time or result.stop
        if due and math.isfinite(result.loss):
            log_step(parts, progress, global_batch, result, learning_rate)
        if result.stop and not last:
            return stop(parts, progress, resumed_at)
        measured = None
        if evaluates := progress.step % life.eval_every_steps == 0 or last or out_of_time:
            measured = measure(parts, progress)
        if last or out_of_time:
            return end(parts, progress, "finished" if last else "out_of_time")
        if evaluates and measured is None:
            return stop(parts, progress, resumed_at)
        if over(progress, life):
            return end(parts, progress, "stopped_early")
        if begins_next(parts, progress.step):
            if unsaved := unfreeze(parts, progress):
                return unsaved
            saved_at = time.monotonic()
        elif progress.step % life.checkpoint_every_steps == 0 or result.save or keeps_best(progress, life):
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


def end(parts: Parts, progress: Progress, kind: Ended, saved: bool = False) -> Verdict:
    """Save the last step for good, then measure what only an end can be measured by: of the best one, where the model
    is made from that."""
    if not saved and (unsaved := save_last(parts, progress, PATIENCE_S)):
        return unsaved
    of_model = restore(parts, progress)
    finish(parts, of_model)
    return ended(parts, progress, of_model, kind)


def optimizer_step(
    parts: Parts,
    step: int,
    global_batch: GlobalBatch,
    learning_rate: float,
    recent: Sequence[float] = (),
    interruptible: bool = False,
) -> StepResult | None:
    """Forward and backward over this rank's micro batches, then one optimizer step, unless its loss is a spike among
    the `recent` ones.

    None where the step was given up for a stop, which is looked for between its micro batches if it is `interruptible`:
    the weights are those of the step before.
    """
    engine, batch, rank = parts.engine, parts.batch, dist.get_rank()
    set_learning_rate(engine.optimizer, learning_rate)
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
            result = agree(parts, step, torch.stack(losses), correct, seen, global_batch, recent)
            if result.spike is not None and result.spike.action == "stop":
                return result
        with parts.watch.part("backward"):
            engine.backward(loss_sum * scale)
        if boundary:
            with parts.watch.part("checkpoint"):
                parts.saver.before_update()
        with parts.watch.part("step"):
            # Also for a step that is left out: it ends the accumulation, and clears what has been accumulated.
            grad_norm = step_engine(engine, parts.plan, update=result is None or result.learned)
    assert result is not None
    if grad_norm is None or math.isfinite(grad_norm):
        return replace(result, grad_norm=grad_norm)
    if not result.learned:
        return result
    return replace(result, spike=judge_norm(parts.plan.lifecycle.guard, step + 1, result.loss, grad_norm))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Random state as a function of (seed, step, rank): a resumed run needs none saved to draw the same dropout
    masks."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank) % 2**64)  # of more bits torch takes no seed


def agree(
    parts: Parts,
    step: int,
    losses: torch.Tensor,
    correct: torch.Tensor,
    seen: list[MicroBatch],
    global_batch: GlobalBatch,
    recent: Sequence[float],
) -> StepResult:
    """Add the ranks' sums up, and tell every rank of a stop request, a lost lease or a loss that is a spike among the
    `recent` ones: the step's only wait.

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
    spike = judge(parts.plan.lifecycle.guard, recent, step + 1, loss, finite=not num_bad)
    if spike is not None:
        spike = replace(spike, message=spike.message + named(suspects(losses, seen)))
    return StepResult(loss, accuracy, bool(stops), bool(saves), spike)


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
