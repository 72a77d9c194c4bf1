"""What a running fine-tune looks like: a bar in a terminal, a line now and then without one. All of it on stderr."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from launcher.evaluate.value import figures, shown, spoken
from launcher.plan.plan import Plan
from launcher.units import format_bytes

LINE_EVERY_S = 10.0
"""Without a terminal: seconds between two lines about steps."""


class RunDisplay:
    """Listens to a run's metrics and shows them."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self.plan, self.console = plan, console
        self.losses: dict[str, float] = {}
        self.last_line = 0.0
        self.starts = 0
        self.after = ""
        """What the next start follows upon."""
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("starting", total=plan.lifecycle.total_steps, figures="")

    def __enter__(self) -> RunDisplay:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def __call__(self, record: dict[str, Any]) -> None:
        """Show one line of metrics.jsonl; kinds that say nothing to a person are passed over."""
        show = getattr(self, f"_on_{record['kind']}", None)
        if show is not None:
            show(record)

    def say(self, text: str) -> None:
        """A line that stays, above the bar; brackets in it are those of a chat template or a file's name."""
        self.console.print(text, highlight=False, markup=False, emoji=False)

    def _on_start(self, record: dict[str, Any]) -> None:
        self.starts += 1
        after, self.after = self.after, "after a failed worker, "
        if record["step"]:
            self.say(f"{after}going on from the checkpoint of step {record['step']}")
        elif self.starts > 1:
            self.say(f"{after}starting again: there was no checkpoint yet")
        self.bar.update(self.task, description="training", completed=record["step"])

    def _on_failed(self, record: dict[str, Any]) -> None:
        self.say(f"rank {record['rank']} on {record['host']} failed: {record['message']}")

    def _on_lost(self, record: dict[str, Any]) -> None:
        hosts = " and ".join(record["hosts"])
        self.after = f"after the loss of {hosts}, "
        self.say(f"{hosts} is gone: Ray does not reach it any more")

    def _on_waiting(self, record: dict[str, Any]) -> None:
        self.say(f"{record['message']}; waiting for up to {record['wait_s']:g} s")
        self.after = ""
        self.bar.update(self.task, description="waiting")

    def _on_growing(self, record: dict[str, Any]) -> None:
        self.say(f"there is room for {record['workers']} workers now: saving, then going on with them")

    def _on_resize(self, record: dict[str, Any]) -> None:
        self.after = f"{record['why']}: {record['to']} workers instead of {record['from']}, "

    def _on_audit(self, record: dict[str, Any]) -> None:
        if record["checked"]:
            self.say(f"audit: {', '.join(record['checked'])} in {record['seconds']:.1f} s")

    def _on_audit_finding(self, record: dict[str, Any]) -> None:
        self.say(f"audit: {record['what']}: {record['detail']}")
        self.say(f"hint: {record['hint']}")

    def _on_step(self, record: dict[str, Any]) -> None:
        rate = record["tokens"] / record["seconds"]["total"]
        left = self.plan.lifecycle.total_steps - record["step"]
        figures = f"loss {record['loss']:.4f}  {rate:,.0f} tok/s  {format_bytes(record['memory_bytes'])}"
        self.bar.update(self.task, completed=record["step"], figures=figures)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self.last_line >= LINE_EVERY_S or not left):
            self.last_line = now
            self.say(f"step {record['step']}/{self.plan.lifecycle.total_steps}  {figures}  lr {record['lr']:.2e}")

    def _on_eval(self, record: dict[str, Any]) -> None:
        found = []
        if "loss" in record:
            self.losses["eval"] = record["loss"]
            accuracy = f"{'accuracy' if 'f1_macro' in record else 'token accuracy'} {record['accuracy']:.1%}"
            found.append(f"held-out loss {record['loss']:.4f}, {accuracy}")
            if "f1_macro" in record:  # of a sequence classification
                found.append(f"F1 {record['f1_macro']:.1%}")
        if "retain_loss" in record:
            found.append(f"loss on evaluate.retain {record['retain_loss']:.4f}")
        self.say(f"step {record['step']}: {', '.join(found)}")

    def _on_answers(self, record: dict[str, Any]) -> None:
        when = "before training" if record["step"] == 0 else f"after step {record['step']}"
        found = ", ".join(f"{spoken(name)} {shown(name, value)}" for name, value in figures(record).items())
        cut = f", {record['cut']} of them cut off" if record["cut"] else ""
        self.say(f"{when}: {found} on {record['rows']} held-out answers{cut}")

    def _on_spike(self, record: dict[str, Any]) -> None:
        left_out = "; the step is left out" if record["action"] == "skip" else ""
        self.say(f"spike: {record['message']}{left_out}")

    def _on_rollback(self, record: dict[str, Any]) -> None:
        self.say(record["message"])

    _on_overfitting = _on_forgetting = _on_rollback

    def _on_unfreeze(self, record: dict[str, Any]) -> None:
        layers = record["last_layers"]
        which = "everything is" if layers is None else f"the last {layers} layers are"
        self.say(f"step {record['step']}: {which} trained from here on, {record['parameters']:,} parameters")

    def _on_damaged_checkpoint(self, record: dict[str, Any]) -> None:
        self.say(f"damaged checkpoint passed over: {record['message']}")

    def _on_checkpoint_failed(self, record: dict[str, Any]) -> None:
        newest = record.get("newest")
        left = f"the newest is of step {newest}" if newest is not None else "there is none yet"
        failed = f"the checkpoint of step {record['step']} could not be written: {record['message']}"
        self.say(f"{failed}; training goes on, {left}")

    def _on_saves_in_foreground(self, record: dict[str, Any]) -> None:
        self.say(f"training waits while checkpoints are written: {record['message']}")

    def _on_last_save_waits(self, record: dict[str, Any]) -> None:
        self.say(f"the end cannot be saved yet: {record['message']}; trying again")
        if record.get("hint"):
            self.say(f"hint: {record['hint']}")

    def _on_metrics_lost(self, record: dict[str, Any]) -> None:
        self.say(f"{record['lines']:,} lines of metrics.jsonl are lost: its disk took none for too long")

    def _on_hanging(self, record: dict[str, Any]) -> None:
        self.say(f"hang: {record['what']}")
        self.say(f"  stacks of all ranks: {record['stacks']}")

    def _on_stopping(self, record: dict[str, Any]) -> None:
        grace_s = record.get("grace_s")
        within = f" within {grace_s:g} s" if grace_s is not None else ""
        self.say(f"{record['signal']}: stopping after this step, then saving{within}; once more stops at once")
        self.bar.update(self.task, description="stopping")


@contextlib.contextmanager
def preparing(console: Console) -> Iterator[Any]:
    """A reporter for the preparation: a bar with the time left for each of its phases, or a line now and then."""
    with Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("rows, left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        # No thread of its own: preparation forks, and a lock that a thread holds then stays locked in the child.
        auto_refresh=False,
    ) as bar:
        tasks: dict[str, Any] = {}
        last_line = time.monotonic()

        def report(what: str, done: int, total: int | None) -> None:
            nonlocal last_line
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)
            bar.refresh()
            if not console.is_terminal and time.monotonic() - last_line > LINE_EVERY_S:
                last_line = time.monotonic()
                of = f" of {total:,}" if total is not None else ""
                console.print(f"{what}: {done:,}{of} rows", highlight=False)

        yield report
