"""TensorBoard's event files in the run's folder: `tensorboard --logdir runs` shows the runs in it beside each other.

It keeps 32-bit floats.
"""

from __future__ import annotations

import json
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from launcher.plan.plan import Plan
from launcher.train.trackers.kept import Kept
from launcher.train.trackers.lines import Line, settings

FOLDER = "tensorboard"


class TensorBoard:
    """A writer of one file; each start of the run adds one."""

    def __init__(self, folder: Path) -> None:
        self._writer = EventFileWriter(str(folder))

    def text(self, tag: str, words: str, step: int, time: float) -> None:
        """A line of Markdown."""
        self._writer.add_event(Event(step=step, wall_time=time, summary=text_pb(tag, words)))

    def tell(self, lines: list[Line]) -> None:
        for line in lines:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in line.numbers.items()]
            if values:
                self._writer.add_event(Event(step=line.step, wall_time=line.time, summary=Summary(value=values)))
            if line.words is not None:
                self.text(f"events/{line.kind}", line.words, line.step, line.time)
        self._writer.flush()

    def close(self, well: bool) -> None:
        self._writer.close()


def opened(plan: Plan, kept: Kept) -> TensorBoard:
    """A new file in the run's folder, the first of which shows the Plan."""
    tracker = TensorBoard(Path(plan.run_dir) / FOLDER)
    if kept.get("id") is None:
        written = json.dumps(settings(plan), indent=4, ensure_ascii=False)
        tracker.text("plan", "\n".join(f"    {line}" for line in written.splitlines()), 0, 0.0)
        kept.put(id=FOLDER)
    return tracker
