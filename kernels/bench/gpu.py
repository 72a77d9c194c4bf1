"""Every op on a GPU beside what others offer, forward and backward, in one command of less than eight minutes.

PYTHONPATH=.:kernels python kernels/bench/gpu.py --out docs/benchmarks/DATE-kernels-MACHINE      all; writes .json, .md
PYTHONPATH=.:kernels python kernels/bench/gpu.py norm glu --seconds 90                        two ops, prints the table
PYTHONPATH=.:kernels python kernels/bench/gpu.py --dry                 the same paths on a CPU, tiny, without any claim

First it measures what this machine copies and multiplies; a floor is what an op cannot do without, over that. Then for
each op and shape every contender is checked against float64 (E9) on random numbers and timed: cold L2, CUDA events, in
turns, medians. A contender that is not installed is left out, a wrong one is named and not timed. Without a network,
packages travel as wheels and PYTHONPATH names their folder, too.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from gpu_page import page

OPS = ("linear_cross_entropy", "attention", "norm", "glu", "rope", "nf4", "lora")
SECONDS = 400.0
"""Of eight minutes, what the contests may take; starting and the last contest's end come on top."""
_KILL_AFTER_S = 40.0
"""A worker that is so late hangs."""


def gather(ops: list[str], seconds: float, rounds: int, dry: bool) -> dict[str, Any]:
    """Hold all contests in a worker; in another one the rest, where a contender took the device down."""
    found: dict[str, Any] = {"results": [], "lost": []}
    end = time.monotonic() + seconds
    while True:
        done = len(found["results"]) + len(found["lost"])
        left = end - time.monotonic()
        command = [sys.executable, str(Path(__file__).with_name("gpu_worker.py")), "--ops", ",".join(ops)]
        command += ["--seconds", str(left), "--rounds", str(rounds), "--done", str(done)] + ["--dry"] * dry
        begun: dict[str, Any] | None = None
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None
            watchdog = threading.Timer(max(left, 0.0) + _KILL_AFTER_S, worker.kill)
            watchdog.start()
            for line in worker.stdout:
                said = json.loads(line)
                if "begin" in said:
                    begun = said["begin"]
                    sys.stderr.write(f"{begun['key']}\n")
                elif "result" in said:
                    found["results"].append(said["result"])
                    begun = None
                else:
                    found |= {"machine": said["machine"], "rates": said["rates"]}
            code = worker.wait()
            watchdog.cancel()
        if code == 0:
            return found
        if begun is None:
            raise SystemExit(f"the worker ended with {code} before it began a contest")
        found["lost"].append(begun | {"why": f"the process ended with {code}"})
        sys.stderr.write(f"{begun['key']}: lost, the process ended with {code}\n")
        if end - time.monotonic() < _KILL_AFTER_S:
            return found


def driver() -> dict[str, str]:
    """What nvidia-smi says of the first GPU; empty without one."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "power.limit", "temperature.gpu")
    try:
        said = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(fields, (value.strip() for value in said.split(",")), strict=False))


def main() -> int:
    parser = argparse.ArgumentParser(description="Every op on a GPU beside what others offer.")
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}; all where left out")
    parser.add_argument("--out", type=Path, help="where to write the results, without a suffix")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for all contests")
    parser.add_argument("--rounds", type=int, default=40, help="timed turns of each contender at most")
    parser.add_argument("--dry", action="store_true", help="on a CPU, tiny shapes, one round, no claim")
    options = parser.parse_args()
    ops = options.ops or list(OPS)
    if unknown := [op for op in ops if op not in OPS]:
        parser.error(f"no op {', '.join(unknown)}; there are {', '.join(OPS)}")
    began = time.monotonic()
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": f"python kernels/bench/gpu.py {' '.join(sys.argv[1:])}".strip(),
        "dry": options.dry,
        "driver_before": driver(),
    }
    found |= gather(ops, options.seconds, 1 if options.dry else options.rounds, options.dry)
    found |= {"driver_after": driver(), "took_s": time.monotonic() - began}
    text = page(found)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{options.out}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        Path(f"{options.out}.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    wrong = [
        each for each in found["results"] if each["contenders"].get("slipway", {}).get("state") in ("wrong", "failed")
    ]
    return 1 if wrong or found["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
