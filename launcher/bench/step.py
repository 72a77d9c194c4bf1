"""Whole training steps on one GPU beside TRL and plain transformers, with and without Liger. No Ray, no network.

PYTHONPATH=.:kernels python -m launcher.bench.step --model 8b --method lora,qlora --out docs/benchmarks
PYTHONPATH=.:kernels python -m launcher.bench.step --model 1b --method full --out docs/benchmarks
PYTHONPATH=.:kernels python -m launcher.bench.step --tiny                  the same on a CPU, in seconds; claims nothing

Weights and tokens are random, documents of random lengths are packed into a row of 4,096 tokens, 40% of each is
supervised. Each contender is a process of its own, one after another, so that each has the GPU's memory to itself; one
whose package is missing is left out. About two minutes a method. Packages that travel as wheels: PYTHONPATH names
their folder, too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from launcher.bench.against_trl import publish, spread
from launcher.bench.step_setting import MODELS, SUPERVISED, Setting, documents, model_flops
from launcher.units import format_bytes

KINDS = {
    "slipway": "Slipway",
    "trl": "TRL SFTTrainer",
    "trl-liger": "TRL SFTTrainer, Liger",
    "liger": "transformers, Liger",
    "transformers": "transformers",
}
DENSE_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""FLOP/s of the vendor's datasheet, by a word of the GPU's name."""
LIMIT_S = 400
"""A contender that takes longer has failed."""


def contend(kind: str, setting: Setting) -> dict[str, Any]:
    """One contender's answer; `failed` is its last line where it gave none."""
    sys.stderr.write(f"{setting.model} {setting.method}: {kind}\n")
    command = [sys.executable, "-m", "launcher.bench.step_contenders", kind, json.dumps(asdict(setting))]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return {"kind": kind, "failed": f"not done after {LIMIT_S} s"}
    if done.returncode == 0 and done.stdout:
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer
    return {"kind": kind, "failed": _reason(done.stderr), "stderr": done.stderr[-4000:]}


def _reason(stderr: str) -> str:
    """The last line that looks like an error's."""
    lines = [line for line in stderr.strip().splitlines() if line.strip()]
    named = [line for line in lines if not line.startswith(" ") and "Error" in line.split(":", 1)[0]]
    return (named or lines or ["no output"])[-1][:300]


def rates(result: dict[str, Any]) -> list[float]:
    """Tokens a second of each step."""
    return [step["tokens"] / step["seconds"] for step in result["steps"]]


def model_rate(setting: Setting, result: dict[str, Any]) -> float:
    """FLOP/s: what our documents' rows need, per token, at this contender's median rate."""
    rows = [documents(setting, number) for number in range(setting.warmup, setting.warmup + setting.steps)]
    flops = sum(model_flops(setting.config, setting.method, setting.rank, row) for row in rows)
    return flops / (setting.tokens * len(rows)) * statistics.median(rates(result))


def table(setting: Setting, results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each contender."""
    lines = [
        "| contender | tokens/s, median (least to most) | ours over it | step, ms | of the datasheet's FLOP/s |"
        " of the measured matmul rate | peak memory | loss, first to last |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ours = next((each for each in results if each["kind"] == "slipway" and "steps" in each), None)
    for result in results:
        title = KINDS[result["kind"]]
        if "steps" not in result:
            why = f"not installed: {result['missing']}" if "missing" in result else f"failed: {result['failed']}"
            lines.append(f"| {title} | {why} | | | | | | |")
            continue
        every = [*result["warmup"], *result["steps"]]
        losses = [step["loss"] for step in every if "loss" in step]
        numbers = measured(setting, result, ours) if setting.device == "cuda" else ["not measured", *[""] * 5]
        lines.append(f"| {' | '.join([title, *numbers, f'{losses[0]:.3f} to {losses[-1]:.3f}'])} |")
    return "\n".join(lines) + "\n"


def measured(setting: Setting, result: dict[str, Any], ours: dict[str, Any] | None) -> list[str]:
    """The cells of a contender's row that are figures."""
    ratio = f"{statistics.median(rates(ours)) / statistics.median(rates(result)):.2f}" if ours else ""
    return [
        spread(rates(result), ",.0f"),
        "" if result is ours else ratio,
        f"{statistics.median(step['seconds'] for step in result['steps']) * 1e3:,.1f}",
        *utilisation(setting, result),
        format_bytes(result["memory_bytes"]),
    ]


def utilisation(setting: Setting, result: dict[str, Any]) -> tuple[str, str]:
    """Model FLOP/s as a fraction of the datasheet's and of what a large product reaches on this device."""
    rate, measured = model_rate(setting, result), result["matmul_flops_per_s"]
    name = result.get("device", {}).get("name", "")
    sheet = next((flops for word, flops in DENSE_BF16.items() if word in name), None)
    return f"{rate / sheet:.1%}" if sheet else "", f"{rate / measured:.1%}" if measured else ""


def page(found: dict[str, Any]) -> str:
    """The Markdown page of all comparisons of one command."""
    results = [result for compared in found["comparisons"] for result in compared["results"]]
    able = [result for result in results if "versions" in result]
    versions = ", ".join(f"{name} {version}" for name, version in able[0]["versions"].items()) if able else "unknown"
    device = next((result["device"]["name"] for result in able if "device" in result), "a CPU")
    matmul = next((result["matmul_flops_per_s"] for result in able if result["matmul_flops_per_s"]), None)
    rate = f" A large bf16 product reaches {matmul / 1e12:.0f} TFLOP/s on it." if matmul else ""
    where = f"Measured on {found['machine']['date']} on one {device}; {versions}."
    claim = where if matmul else "A run on a CPU: it shows that the paths work, and measures nothing."
    parts = [
        f"# Training steps on {device}",
        f"{claim}{rate}",
        f"    {found['command']}",
        f"Random weights, documents of random tokens packed into one row, {SUPERVISED:.0%} of each supervised. Every"
        " contender is a process of its own; a step is timed from its batch on the host to the end of the optimizer,"
        " waiting for the device.",
    ]
    for compared in found["comparisons"]:
        setting = Setting(**compared["setting"])
        adapters = "" if setting.method == "full" else f", rank {setting.rank} on all linear layers"
        checkpointing = "with" if setting.checkpointing else "without"
        parts.append(f"## {setting.model}, {setting.method}{adapters}, {setting.tokens:,} tokens")
        parts.append(f"{setting.steps} steps after {setting.warmup}; {checkpointing} gradient checkpointing; bf16.")
        parts.append(table(setting, compared["results"]).rstrip())
        facts = [(KINDS[result["kind"]], result["facts"]) for result in compared["results"] if "facts" in result]
        parts.append(
            "\n".join(
                f"- {title}: {'; '.join(f'{key}: {value}' for key, value in said.items())}" for title, said in facts
            )
        )
    parts.append(
        "Model FLOPs: 6 N T for N trained weights of the decoder layers and T tokens, 4 N T where the base is frozen, 6"
        " A T for A adapter weights; the head's over supervised tokens alone; causal attention 6 d H L² a layer and"
        " document. Nothing computed twice counts. The datasheet's rate is 989 TFLOP/s for H100 and H200."
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="8b")
    parser.add_argument("--method", default="lora", help="of full, lora, qlora; several with commas")
    parser.add_argument("--contenders", default=",".join(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--tokens", type=int, default=4096, help="of a step: one packed row")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warmup", type=int, default=4, help="steps before the timed ones")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, for all")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on a CPU: shows that everything runs")
    parser.add_argument("--out", type=Path, help="folder for the page and its raw numbers")
    chosen = parser.parse_args(arguments)
    if chosen.tiny:
        chosen.model, chosen.tokens, chosen.steps, chosen.warmup, chosen.rank = "tiny", 96, 2, 1, 4
    given = sys.argv[1:] if arguments is None else arguments
    found: dict[str, Any] = {
        "machine": {"date": date.today().isoformat()},
        "command": f"python -m launcher.bench.step {' '.join(given)}".strip(),
        "comparisons": [],
    }
    for method in chosen.method.split(","):
        setting = Setting(
            model=chosen.model,
            method=method,
            tokens=chosen.tokens,
            warmup=chosen.warmup,
            steps=chosen.steps,
            rank=chosen.rank,
            checkpointing=chosen.checkpointing,
            device="cpu" if chosen.tiny else "cuda",
        )
        results = [contend(kind, setting) for kind in chosen.contenders.split(",")]
        found["comparisons"].append({"setting": asdict(setting), "results": results})
    publish(found, page(found), chosen.out, f"step-{chosen.model}-{chosen.method.replace(',', '-')}")


if __name__ == "__main__":
    main()
