"""What a running fine-tune says."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from launcher.cli.progress import RunDisplay
from tests.distributed.tiny import tiny_plan


def test_brackets_of_a_chat_template_are_shown_as_they_are(tmp_path: Path) -> None:
    """Rich would take them for its own marks, and stop at one that closes nothing."""
    said = io.StringIO()
    show = RunDisplay(tiny_plan(tmp_path, zero=0), Console(file=said, width=200))
    show({"kind": "audit_finding", "what": "masks", "detail": "[INST] before '[/INST]' :smile:", "hint": "look [here]"})
    assert said.getvalue() == "audit: masks: [INST] before '[/INST]' :smile:\nhint: look [here]\n"


def test_what_became_of_a_lost_machine_is_said(tmp_path: Path) -> None:
    said = io.StringIO()
    show = RunDisplay(tiny_plan(tmp_path, zero=0), Console(file=said, width=200))
    for record in (
        {"kind": "start", "step": 0},
        {"kind": "lost", "hosts": ["host3"]},
        {"kind": "resize", "step": 5, "from": 3, "to": 2, "why": "host3 is gone"},
        {"kind": "start", "step": 5},
        {"kind": "start", "step": 5},
        {"kind": "waiting", "message": "2 workers are the least, the cluster has room for 1", "wait_s": 600.0},
        {"kind": "start", "step": 10},
        {"kind": "growing", "workers": 3},
    ):
        show(record)
    assert said.getvalue().splitlines() == [
        "host3 is gone: Ray does not reach it any more",
        "host3 is gone: 2 workers instead of 3, going on from the checkpoint of step 5",
        "after a failed worker, going on from the checkpoint of step 5",
        "2 workers are the least, the cluster has room for 1; waiting for up to 600 s",
        "going on from the checkpoint of step 10",
        "there is room for 3 workers now: saving, then going on with them",
    ]
