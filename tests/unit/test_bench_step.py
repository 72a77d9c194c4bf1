"""The benchmark of whole steps: what it counts, what it feeds the contenders, and that it runs on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from launcher.bench import step
from launcher.bench.step_setting import MODELS, Setting, documents, labels, micro_batch, model_flops, plan_of

TINY = Setting("tiny", "lora", tokens=96, warmup=1, steps=2, rank=4, checkpointing=False, device="cpu")


def test_flops_of_the_8b() -> None:
    """Llama 3 8B has 6.98e9 weights in its layers' products and 0.53e9 in its head."""
    row = [[5] * 1024 for _ in range(4)]
    layers, head = 32 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336), 128256 * 4096
    attention = 6 * 4096 * 4 * 1024**2 * 32
    supervised = 4 * 410
    full = 6 * (layers * 4096 + head * supervised) + attention
    assert model_flops(MODELS["8b"], "full", 16, row) == full
    adapters = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    frozen = 4 * (layers * 4096 + head * supervised) + 6 * adapters * 4096 + attention
    assert model_flops(MODELS["8b"], "lora", 16, row) == frozen
    assert 0.6 < frozen / full < 0.7


@pytest.mark.parametrize("number", range(4))
def test_rows_are_full_and_everyone_learns_the_same_tokens(number: int) -> None:
    row = documents(TINY, number)
    assert row == documents(TINY, number)
    assert sum(map(len, row)) == TINY.tokens
    batch = micro_batch(row)
    theirs = torch.tensor([label for document in row for label in labels(document)])
    assert batch.input_ids.shape == (1, TINY.tokens)
    assert torch.equal(theirs[theirs != -100], batch.targets)
    assert torch.equal(batch.input_ids[0][batch.supervised_index + 1], batch.targets)
    starts = batch.cu_seqlens[:-1].long()
    assert (theirs[starts] == -100).all(), "a document's first token has nothing before it"
    assert 0.3 < len(batch.targets) / TINY.tokens < 0.5


def test_the_planner_decides_for_one_gpu(tmp_path: Path) -> None:
    gpu = Setting("8b", "qlora", tokens=4096, warmup=1, steps=2, rank=16, checkpointing=False, device="cuda")
    plan = plan_of(gpu, tmp_path)
    assert (plan.layout.device, plan.layout.kernels, plan.layout.workers) == ("cuda", "fused", 1)
    assert plan.layout.attention != "sdpa"
    assert not plan.layout.gradient_checkpointing
    assert plan.trajectory.method.rank == 16


def test_ours_needs_no_ray(tmp_path: Path) -> None:
    """One contender, as on a machine without Ray; its loss is that of a random model, and falls."""
    (tmp_path / "ray.py").write_text("raise ModuleNotFoundError('No module named ray')")
    command = [sys.executable, "-m", "launcher.bench.step_contenders", "slipway", json.dumps(asdict(TINY))]
    root = Path(__file__).parents[2]
    paths = f"{tmp_path}:{root}:{root / 'kernels'}"
    environment = {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)
    losses = [each["loss"] for each in said["warmup"] + said["steps"]]
    assert losses[0] == pytest.approx(torch.tensor(320.0).log().item(), abs=0.3)
    assert [each["tokens"] for each in said["steps"]] == [96, 96]
    assert said["facts"]["attention"] == "sdpa"
    assert said["facts"]["kernels"].startswith("kernels fused: add_rms_norm")


def test_the_page() -> None:
    setting = Setting("8b", "lora", tokens=4096, warmup=1, steps=2, rank=16, checkpointing=False, device="cuda")
    device = {"name": "NVIDIA H200", "memory_bytes": 141 * 10**9}

    def result(kind: str, seconds: float) -> dict[str, object]:
        taken = {"seconds": seconds, "tokens": 4096, "supervised_tokens": 1638, "loss": 11.0}
        return {
            "kind": kind,
            "versions": {"torch": "2.11.0"},
            "matmul_flops_per_s": 790e12,
            "device": device,
            "facts": {"attention": "varlen"},
            "warmup": [taken],
            "steps": [taken] * 2,
            "memory_bytes": 2**34,
        }

    missing = {"kind": "liger", "versions": {}, "matmul_flops_per_s": None, "missing": "No module named 'liger_kernel'"}
    failed = {"kind": "transformers", "failed": "OutOfMemoryError"}
    results = [result("slipway", 0.25), result("trl", 0.5), missing, failed]
    found = {
        "machine": {"date": "2026-01-01"},
        "command": "python -m launcher.bench.step",
        "comparisons": [{"setting": asdict(setting), "results": results}],
    }
    text = step.page(json.loads(json.dumps(found)))
    rows = [documents(setting, number) for number in (1, 2)]
    flops = sum(model_flops(MODELS["8b"], "lora", 16, row) for row in rows) / 2
    assert f"| {flops / 0.25 / 989e12:.1%} | {flops / 0.25 / 790e12:.1%} | 16.0 GiB |" in text.replace(
        "16 GiB", "16.0 GiB"
    )
    assert "| TRL SFTTrainer | 8,192 (8,192 to 8,192) | 2.00 | 500.0 |" in text
    assert "not installed: No module named 'liger_kernel'" in text
    assert "failed: OutOfMemoryError" in text
    assert "Measured on 2026-01-01 on one NVIDIA H200; torch 2.11.0." in text
