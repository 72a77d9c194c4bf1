"""What a running fine-tune says."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from launcher.cli.launch import before_and_after
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


def test_what_is_trained_from_now_on_is_said(tmp_path: Path) -> None:
    said = io.StringIO()
    show = RunDisplay(tiny_plan(tmp_path, zero=0), Console(file=said, width=200))
    show({"kind": "unfreeze", "step": 30, "last_layers": 2, "parameters": 117824})
    show({"kind": "unfreeze", "step": 60, "last_layers": None, "parameters": 186304})
    assert said.getvalue().splitlines() == [
        "step 30: the last 2 layers are trained from here on, 117,824 parameters",
        "step 60: everything is trained from here on, 186,304 parameters",
    ]


def test_each_figure_of_the_answers_is_said_and_what_makes_it_doubtful(tmp_path: Path) -> None:
    said = io.StringIO()
    show = RunDisplay(tiny_plan(tmp_path, zero=0), Console(file=said, width=200))
    first: dict[str, Any] = {
        "kind": "answers",
        "time": 1.5,
        "step": 0,
        "rows": 200,
        "cut": 150,
        "exact_match": 0.0,
        "bleu": 1.25,
    }
    last = {**first, "step": 40, "cut": 0, "exact_match": 0.875, "bleu": 61.5, "rouge": {"rouge_l": 0.5}}
    last["slices"] = {"kind": {"a": {"rows": 200, "exact_match": 0.875}, "gap": {"least_rows": 20}}}
    show(first)
    show(last)
    assert said.getvalue().splitlines() == [
        "before training: exact match 0.0%, bleu 1.25 on 200 held-out answers, 150 of them cut off",
        "after step 40: exact match 87.5%, bleu 61.5, rouge l 50.0% on 200 held-out answers",
    ]
    assert before_and_after(first, last | {"cut": 3}).splitlines() == [
        "exact match on 200 held-out answers: 0.0% before, 87.5% after",
        "bleu on 200 held-out answers: 1.25 before, 61.5 after",
        "3 of them were cut off: raise evaluate.generate.max_new_tokens",
    ]
