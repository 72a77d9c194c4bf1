"""Training steps beside TRL's SFTTrainer, on this machine, in one run.

`python -m launcher.bench.against_trl --data gsm8k/train.jsonl` (needs `pip install 'slipway[bench]'`). For fp32 and
bf16, with and without gradient checkpointing, three contenders train the same scratch Llama of 7.9M parameters on the
same documents with the same supervised tokens: ours; TRL with its isolated packing; TRL with the packing that lets
documents see each other. Each is a process of its own, and they take turns step by step, so that whatever else the
machine does meets all three alike; a ratio is taken within a round. Only optimizer steps are timed.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from launcher.driver.start import base_model_process, create_run_folder, decide, planned
from launcher.errors import RunFailed
from launcher.plan.facts import this_machine
from launcher.plan.plan import Plan
from launcher.recipe.load import load
from launcher.units import format_bytes

KINDS = ("slipway", "trl-isolated", "trl-leaking")
TITLES = {
    "slipway": "Slipway, isolated",
    "trl-isolated": 'TRL `packing_strategy="bfd"`, isolated',
    "trl-leaking": 'TRL `packing_strategy="wrapped"`, leaks',
}
PACKAGES = ("torch", "trl", "transformers", "accelerate", "deepspeed")
RECIPE: dict[str, Any] = {
    "model": {
        "scratch": {
            "model_type": "llama",
            "hidden_size": 256,
            "intermediate_size": 912,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
            "vocab_size": 8192,
        }
    },
    "data": {"max_length": 1024, "packing": True},
    "train": {"global_batch_size": 4, "micro_batch_size": 4, "max_steps": 1000},
    "optimizer": {"lr": 1e-4, "weight_decay": 0.1},
    "schedule": {"kind": "constant", "warmup": 0},
    "parallel": {"zero": 0},
    "cluster": {"workers": 1, "cpus_per_worker": 2},
}


def write_plan(data: Path, scratch: Path, name: str, dtype: str, checkpointing: bool) -> Path:
    """Prepare the data once, decide one setting's run, write its folder; returns plan.json."""
    recipe_file = scratch / "recipe.yaml"
    train = {"path": str(data.resolve()), "format": "auto"}
    recipe_file.write_text(yaml.safe_dump(RECIPE | {"data": RECIPE["data"] | {"train": [train]}}), encoding="utf-8")
    overrides = [f"train.dtype={dtype}", f"train.gradient_checkpointing={str(checkpointing).lower()}"]
    loaded = load(str(recipe_file), overrides)
    run_dir = scratch / name
    decided = decide(loaded, run_dir, None)
    plan: Plan = planned(decided, this_machine())
    (run_dir / "checkpoints").mkdir(parents=True)
    with closing(base_model_process(decided)) as base_model:
        base_model.wait()
    create_run_folder(plan, loaded)
    return run_dir / "plan.json"


class Contender:
    """A process that takes a step when asked."""

    def __init__(self, kind: str, plan_file: Path, dtype: str, threads: int) -> None:
        self.kind, self.log = kind, plan_file.with_name(f"{kind}.log")
        environment = {
            "OMP_NUM_THREADS": str(threads),
            "HF_DATASETS_CACHE": str(plan_file.parent.parent / "datasets"),
            "HF_HUB_OFFLINE": "1",
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "launcher.bench.contenders", kind, str(plan_file), dtype],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
                env=os.environ | environment,
            )
        self.facts = self._answer()

    def step(self) -> dict[str, Any]:
        """One optimizer step: its seconds, tokens, loss.

        Raises:
            RunFailed: the process ended; with the last line that it printed.
        """
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            last = self.log.read_text(encoding="utf-8").strip().splitlines()[-1:] or ["no output"]
            raise RunFailed(f"{self.kind} ended: {last[0]}", hint="pip install 'slipway[bench]' brings TRL")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """Close its input and wait; it is killed if it does not end by itself."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def compare(plan_file: Path, dtype: str, trl_dtype: str, warmup: int, rounds: int) -> list[dict[str, Any]]:
    """Steps of all three in turn; each round begins with another one."""
    plan = Plan.load(plan_file)
    results: list[dict[str, Any]] = []
    contenders: list[Contender] = []
    try:
        for kind in KINDS:
            own = dtype if kind == "slipway" else trl_dtype
            contenders.append(Contender(kind, plan_file, own, plan.layout.cpus_per_worker))
            results.append({"kind": kind, "dtype": own, "facts": contenders[-1].facts, "warmup": [], "steps": []})
        for number in range(warmup + rounds):
            for place in range(len(KINDS)):
                index = (place + number) % len(KINDS)
                step = contenders[index].step()
                results[index]["warmup" if number < warmup else "steps"].append(step)
                sys.stderr.write(f"{dtype} {KINDS[index]}: {step['tokens'] / step['seconds']:,.0f} tokens/s\n")
    finally:
        for contender in contenders:
            contender.end()
    for result in results:
        result["gradient_checkpointing"] = plan.layout.gradient_checkpointing
    return results


def rates(result: dict[str, Any]) -> list[float]:
    """Tokens a second of each step."""
    return [step["tokens"] / step["seconds"] for step in result["steps"]]


def spread(values: Sequence[float], form: str) -> str:
    """Median, with the least and the most in brackets."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each contender in each setting."""
    lines = [
        "| dtype | gradient checkpointing | contender | tokens/s, median (least to most) | step, s | ours over it |"
        " supervised of tokens | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for ours, *others in by_setting(results):
        for result in (ours, *others):
            steps = result["steps"]
            paired = [mine / its for mine, its in zip(rates(ours), rates(result), strict=True)]
            cells = [
                result["dtype"],
                "on" if result["gradient_checkpointing"] else "off",
                TITLES[result["kind"]],
                spread(rates(result), ",.0f"),
                f"{statistics.median(step['seconds'] for step in steps):.2f}",
                "" if result is ours else spread(paired, ".2f"),
                f"{statistics.mean(step['supervised_tokens'] for step in steps):,.0f} of "
                f"{statistics.mean(step['tokens'] for step in steps):,.0f}",
                format_bytes(max(step["memory_bytes"] for step in steps)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def by_setting(results: Sequence[dict[str, Any]]) -> list[Sequence[dict[str, Any]]]:
    """The three contenders of each setting, ours first."""
    return [results[start : start + len(KINDS)] for start in range(0, len(results), len(KINDS))]


def machine(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": ", ".join(sorted(models)) or platform.processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory": format_bytes(memory),
        "python": platform.python_version(),
        "packages": {package: metadata.version(package) for package in packages},
        "load_before": os.getloadavg()[0],
    }


def page(found: dict[str, Any]) -> str:
    """The Markdown page of a comparison."""
    where, results = found["machine"], found["results"]
    parameters = results[0]["facts"]["parameters"]
    versions = ", ".join(f"{name} {version}" for name, version in where["packages"].items())
    return f"""# Beside TRL's SFTTrainer on a CPU

Measured on {where["date"]} on {where["cpu"]}, {where["cpus"]} CPUs, {where["memory"]} of memory, 2 threads a process,
load {where["load_before"]:.1f} when it began; Python {where["python"]}, {versions}.

    {found["command"]}

One rank, ZeRO 0, a scratch Llama of {parameters / 1e6:.1f}M parameters, 4 rows of up to 1,024 tokens a step,
AdamW, clipping at 1. The three are processes of their own that take turns step by step: {found["warmup"]} steps to
warm up, then {found["rounds"]} rounds. "Ours over it" is the ratio of tokens/s within a round: median, least and most.

{table(results)}
- All three have the same documents and supervise the same tokens of them: the assistant's words and its end of turn.
  `wrapped` cuts documents where a row ends, so its steps hold other ones.
- Isolated: a document attends to itself alone. Without flash-attn TRL does that with a dense mask over one row of all
  the batch's tokens. `wrapped` is plain causal attention over each row: documents see those before them.
- TRL's `bf16` is its default, fp32 weights under autocast. Ours computes and stores weights in bf16 with fp32 masters
  in the optimizer. `bf16-weights`, where a row has it, is bf16 throughout and without masters.
- Timed: for ours, next batch, forward, backward, clipping, optimizer; for TRL, what lies between `on_step_begin` and
  `on_step_end`, which leaves the next batch out.
"""


def publish(found: dict[str, Any], text: str, folder: Path | None, name: str) -> None:
    """Print a comparison's page, and write it with its raw numbers to `folder`, if one is given."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{found['machine']['date']}-{name}"
        path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="JSONL that slipway reads, such as GSM8K's train.jsonl"
    )
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each contender in each setting")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the timed ones")
    parser.add_argument("--out", type=Path, help="folder for the page and its raw numbers")
    parser.add_argument("--dtypes", default="fp32,bf16", help="of fp32, bf16, bf16-weights (TRL's; see contenders.py)")
    parser.add_argument("--checkpointing", default="on,off", help="gradient checkpointing: on, off or both")
    chosen = parser.parse_args(arguments)
    found: dict[str, Any] = {
        "machine": machine(),
        "command": f"python -m launcher.bench.against_trl --data {chosen.data.name} --steps {chosen.steps}"
        f" --warmup {chosen.warmup} --dtypes {chosen.dtypes} --checkpointing {chosen.checkpointing}",
        "warmup": chosen.warmup,
        "rounds": chosen.steps,
        "recipe": RECIPE,
        "results": [],
    }
    with tempfile.TemporaryDirectory(prefix="slipway-bench-") as scratch:
        for trl_dtype, checkpointing in itertools.product(chosen.dtypes.split(","), chosen.checkpointing.split(",")):
            dtype = trl_dtype.removesuffix("-weights")
            plan_file = write_plan(
                chosen.data, Path(scratch), f"{trl_dtype}-{checkpointing}", dtype, checkpointing == "on"
            )
            found["results"] += compare(plan_file, dtype, trl_dtype, chosen.warmup, chosen.steps)
    publish(found, page(found), chosen.out, "trl-cpu")


if __name__ == "__main__":
    main()
