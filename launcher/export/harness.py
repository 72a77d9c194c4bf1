"""A model folder's score on tasks of lm-evaluation-harness (Gao et al., EleutherAI), which the extra `eval` brings."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.export.loaded import device_here, load_folder
from launcher.export.verify import classifies


def require() -> None:
    """Raise UserError where the harness is not installed."""
    if find_spec("lm_eval") is None:
        raise UserError("--lm-eval needs lm-evaluation-harness", hint="pip install 'slipway[eval]'")


def run_tasks(folder: Path, tasks: list[str], limit: int | None, batch_size: int | None) -> dict[str, dict[str, Any]]:
    """{task: {rows, metric: number}} of the model in `folder`, asked through its own chat template; a group of tasks
    has no rows of its own.

    `tasks` are names that the harness knows, or YAML files of the same form; `limit` questions of each.

    Raises:
        UserError: a task that is not there, or whose data cannot be had; a model that tells classes apart.
        ModelError: the folder cannot be loaded.
    """
    if classifies(folder):
        raise UserError("--lm-eval asks language models, and this one tells classes apart", hint="leave it out")
    # What it downloads and prints on its way is no result.
    with contextlib.redirect_stdout(sys.stderr):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        manager = TaskManager()
        refuse_unknown(tasks, manager.all_tasks)
        model, tokenizer = load_folder(folder, device_here())
        try:
            found = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size or 8),
                tasks=tasks,
                limit=limit,
                task_manager=manager,
                apply_chat_template=tokenizer.chat_template is not None,
                log_samples=False,
            )
        except (OSError, ValueError, KeyError) as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            hint = "its tasks' data comes from the hub: check the network, or the task's own file"
            raise UserError(f"lm-evaluation-harness: {said}", hint) from error
    questions = found["n-samples"]
    return {
        task: {"rows": questions[task]["effective"]} | plain(figures) if task in questions else plain(figures)
        for task, figures in found["results"].items()
    }


def refuse_unknown(tasks: Sequence[str], known: Sequence[str]) -> None:
    """Raise UserError for what is neither a task of the harness nor a file."""
    for task in tasks:
        if task not in known and not Path(task).is_file():
            near = get_close_matches(task, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "give a name that it knows, or a YAML file"
            raise UserError(f"--lm-eval: {task!r} is no task of the harness", hint)


def plain(figures: dict[str, Any]) -> dict[str, float]:
    """The harness's numbers by their names, such as `acc`, or `exact_match strict-match` where it filters answers."""
    return {
        name.removesuffix(",none").replace(",", " "): float(value)
        for name, value in figures.items()
        if "," in name and isinstance(value, int | float)
    }
