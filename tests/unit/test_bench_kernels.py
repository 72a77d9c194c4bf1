"""The GPU benchmark of the kernels, as far as a CPU can go: every path of it runs, and it tells right from wrong."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "kernels" / "bench"))

contests, floors, gpu_page, timing = map(importlib.import_module, ("contest", "floors", "gpu_page", "timing"))
OURS, Part = contests.OURS, contests.Part

DRY = torch.device("cpu")


def doubled(**changes: Any) -> Any:
    """y = 2 x, and some who compute it."""
    values: dict[str, Any] = {
        "op": "double",
        "name": "2 x",
        "inputs": lambda draw: {"x": draw.normal(5, 3)},
        "eager": lambda x: 2 * x,
        "differentiable": ("x",),
        "contenders": {},
        "parts": {
            "forward": Part(floors.Work(1e9), {OURS: contests.Target(0.5, {"peer": 1.0})}),
            "backward": Part(floors.Work()),
        },
        "compiles": False,
    }
    return contests.Contest(**(values | changes))


def held(**contenders: Any) -> dict[str, Any]:
    built = {name: (lambda _, function=function: function) for name, function in contenders.items()}
    return contests.hold(doubled(contenders=built), DRY, timing.Deadline(60), rounds=2)["contenders"]


def test_right_wrong_and_near() -> None:
    def unwritten(x: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(x)
        return torch.where(torch.arange(3) < 2, 2 * x, y + 0 * x)

    found = held(slipway=lambda x: x + x, forgetful=unwritten, off=lambda x: 2.5 * x, near=lambda x: 2.035 * x)
    assert {name: each["state"] for name, each in found.items()} == {
        "slipway": "right",
        "forgetful": "wrong",
        "off": "wrong",
        "near": "inexact",
        "eager": "right",
    }
    assert "seconds" not in found["off"]
    assert len(found["near"]["seconds"]["backward"]) == 2
    assert found["forgetful"]["errors"]["output 0"][0] == float("inf"), "what is not written must be NaN"


def test_ours_must_be_exact() -> None:
    assert held(slipway=lambda x: 2.035 * x)["slipway"]["state"] == "wrong"
    assert "bfloat16" in held(slipway=lambda x: 2 * x.float())["slipway"]["why"]


def test_a_contender_that_overwrites_its_input_disturbs_nobody() -> None:
    class InPlace(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.mul_(2)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return grad.mul_(2)

    found = held(peer=lambda x: InPlace.apply(x.view_as(x)), slipway=lambda x: x + x)
    assert [found[name]["state"] for name in ("peer", "slipway", "eager")] == ["right"] * 3


def test_what_is_missing_or_fails_is_said() -> None:
    def missing(_: Any) -> Any:
        raise ImportError("No module named 'liger_kernel'")

    contenders = {"peer": missing, OURS: missing, "broken": lambda _: lambda x: x @ x}
    found = contests.hold(doubled(contenders=contenders), DRY, timing.Deadline(60), rounds=1)["contenders"]
    assert [found[name]["state"] for name in contenders] == ["not installed", "not there", "failed"]
    assert "liger_kernel" in found["peer"]["why"]


def test_floors() -> None:
    """The bytes and FLOPs of the notes on the kernels, at Llama 3 8B's shapes and 8,192 tokens."""
    rates = floors.Rates(copy=4.3e12, matmul=790e12)

    def micros(*works: floors.Work) -> list[float]:
        return [round(rates.floor_s(work) * 1e6) for work in works]

    assert micros(*floors.norm(8192, 4096, add=False)) == [31, 47]
    assert micros(*floors.norm(8192, 4096, add=True)) == [62, 62]
    assert micros(floors.rope(8192, 40, 128)) == [39]
    assert micros(*floors.glu(8192, 14336)) == [164, 273]
    assert micros(floors.linear_cross_entropy(4096, 4096, 128256, True)) == pytest.approx([16343], rel=1e-3)
    assert micros(floors.linear_cross_entropy(4096, 4096, 128256, False)) == pytest.approx([10895], rel=1e-3)
    assert micros(*floors.attention([8192], 32, 8, 128)) == [696, 1740]
    assert micros(*floors.attention([1024] * 8, 32, 8, 128)) == [87, 217]
    assert micros(floors.nf4(4096, 14336)) == [34]


def test_the_page() -> None:
    seconds = {"forward": [4e-3, 5e-3, 4e-3], "backward": [1e-3] * 3}
    entries = {
        OURS: {"state": "right", "seconds": seconds},
        "peer": {
            "state": "inexact",
            "seconds": {part: [2 * each for each in taken] for part, taken in seconds.items()},
        },
        "absent": {"state": "not installed", "why": "No module"},
    }
    parts = {"forward": {"work": {"bytes": 1e9, "flops": 0.0}, "targets": {OURS: {"floor": 0.5, "over": {"peer": 3}}}}}
    result = {"op": "double", "name": "2 x", "contenders": entries, "parts": parts}
    ours, peer, absent = gpu_page.rows(result, {"copy": 5e11, "matmul": 1e12}, dry=False)
    assert "| 4,000.0 (4,000.0 to 5,000.0) |  | 50% | 50% of the floor: met; 3 x peer: missed |" in ours
    assert "| peer (*inexact*) | 8,000.0 (8,000.0 to 10,000.0) | 2.00 | 25% |" in peer
    assert "| absent | not installed: No module |" in absent


def test_the_whole_command(tmp_path: Path) -> None:
    """Of two ops: what the others' contests hold is tested below, without the seconds that compiling takes."""
    out = tmp_path / "page"
    command = [sys.executable, str(ROOT / "kernels/bench/gpu.py"), "glu", "nf4", "--dry", "--out", str(out)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.with_suffix(".json").read_text())
    assert {result["op"] for result in found["results"]} == {"glu", "nf4"}
    for result in found["results"]:
        assert result["contenders"][OURS]["state"] == "right", result
    text = out.with_suffix(".md").read_text()
    assert "A dry run on a CPU, which measures nothing." in text
    assert "not measured" in text
    assert " met" not in text


CRASH = """
import os
from contest import Contest, Part
from floors import Work

def contests(dry):
    inputs = lambda draw: {"x": draw.normal(3)}
    crash = {"slipway": lambda _: os._exit(3)}
    return [Contest("glu", "crash", inputs, lambda x: 2 * x, ("x",), crash, {"forward": Part(Work(1.0))})]
"""


def test_a_lost_device_costs_one_contest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = importlib.import_module("gpu")
    (tmp_path / "timed_crash.py").write_text(CRASH)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")]))
    found = gpu.gather(["crash", "nf4"], 120.0, rounds=1, dry=True)
    assert [(lost["name"], lost["why"]) for lost in found["lost"]] == [("crash", "the process ended with 3")]
    assert [result["op"] for result in found["results"]] == ["nf4"]


@pytest.mark.parametrize("op", ["norm", "rope", "glu", "linear_cross_entropy", "attention", "nf4", "lora"])
def test_ours_is_right_in_every_contest(op: str) -> None:
    """On a CPU ours is the reference: names, arguments and shapes of the contests are what is tested here."""
    for each in importlib.import_module(f"timed_{op}").contests(dry=True):
        inputs = each.inputs(contests.Draw(DRY, torch.bfloat16))
        truth = contests.Truth(each, inputs)
        verdict = contests.check(each, OURS, each.contenders[OURS](inputs), inputs, truth)
        assert verdict.state == "right", f"{each.key}: {verdict.why}"
        real = importlib.import_module(f"timed_{op}").contests(dry=False)
        assert len({contest.key for contest in real}) == len(real)
