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
