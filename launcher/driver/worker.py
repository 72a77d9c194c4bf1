"""What Ray runs in every worker: environment, logs, then `train.run`."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from launcher.errors import SlipwayError
from launcher.plan.plan import Plan
from launcher.train.verdict import Verdict

FAILURES = "failures.jsonl"


def train_worker(config: dict[str, Any]) -> None:
    """One rank, from Ray's `train_loop_config`: {"plan": Plan as JSON, "attempt": int}.

    An error that a restart cannot mend becomes a verdict, and the restarted workers end when they find it. Any other
    error is recorded with its time, so that the driver can tell the first from those it caused in other ranks, and
    raised for Ray to count.
    """
    import ray.train

    plan = Plan.model_validate(config["plan"])
    run_dir, rank = Path(plan.run_dir), ray.train.get_context().get_world_rank()
    redirect_output(run_dir / "logs" / f"worker-{rank}.log")
    if Verdict.load(run_dir) is not None:
        return
    try:
        from launcher.train.run import train_run

        verdict = train_run(plan, config["attempt"])
    except SlipwayError as error:
        Verdict("error", 0, error.message, error.hint, error.exit_code).save(run_dir)
        raise
    except Exception as error:
        record_failure(run_dir, rank, error)
        raise
    if rank == 0:
        verdict.save(run_dir)


def redirect_output(log_file: Path) -> None:
    """Everything this process prints, libraries and C++ included, goes to `log_file` and not to the user's terminal."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 (lives as long as the process)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    # DeepSpeed 0.19 calls collectives by their old names, and torch 2.13 says so at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )


def record_failure(run_dir: Path, rank: int, error: BaseException) -> None:
    """Append what happened, when and where, to logs/failures.jsonl."""
    traceback.print_exception(error)
    line = {
        "time": time.time(),
        "rank": rank,
        "host": socket.gethostname(),
        "type": type(error).__name__,
        "message": str(error),
    }
    with (run_dir / "logs" / FAILURES).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
