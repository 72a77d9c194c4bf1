"""The audit in whole runs on two ranks: what it says of sound ones, and how a finding ends a run, or does not."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
import torch.distributed as dist
from torch import Tensor

from launcher.checkpoint.layout import committed
from launcher.data.store import DOCUMENT_SCHEMA, as_lists, mapped
from launcher.model.attention import document_borders
from launcher.plan.plan import Plan
from launcher.store.folder import FolderStore
from launcher.train.metrics import read
from launcher.train.verdict import Verdict
from launcher_kernels.norm import rms_norm
from tests.distributed.group import run_group
from tests.distributed.runs import LORA, QLORA, curve, tiny_run, train_all, variant
from tests.distributed.test_added_tokens import adding

pytestmark = pytest.mark.distributed
STEPS = 2
BOTH = ["masks as meant", "packs isolated"]
OPS = {"add_rms_norm 2", "glu 2", "linear_cross_entropy 1", "rms_norm 3", "rope 2"}

Ended = dict[str, tuple[Plan, Verdict]]


def one_document(cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Borders that are none."""
    return document_borders(cu_seqlens[[0, -1]], int(cu_seqlens[-1]))


def off_on_rank_1(x: Tensor, weight: Tensor, eps: float, **how: Any) -> Tensor:
    found = rms_norm(x, weight, eps, **how)
    return found * 1.05 if dist.get_rank() == 1 else found


@contextlib.contextmanager
def spoiled(name: str) -> Iterator[None]:
    """The code of a run whose name says what is wrong with it."""
    with contextlib.ExitStack() as stack:
        if name.startswith("leak"):
            stack.enter_context(mock.patch("launcher.train.loss.document_borders", one_document))
        if name.startswith("wrong kernel"):
            stack.enter_context(mock.patch("launcher.model.fuse.rms_norm", off_on_rank_1))
        yield


def train_spoiled(plans: dict[str, Plan]) -> list[Verdict]:
    verdicts = []
    for name, plan in plans.items():
        with spoiled(name):
            verdicts += train_all([plan])
    return verdicts


def without_ends(plan: Plan, folder: Path) -> Plan:
    """The plan over its data with the last target of each answer masked."""
    shutil.copytree(plan.data.folder, folder)
    for file in sorted((folder / "documents").glob("*.arrow")):
        table = mapped(file)
        masks = [np.array(mask, np.uint8) for mask in table["supervised"].to_pylist()]
        for mask in masks:
            mask[np.flatnonzero(np.diff(mask.astype(int), append=0) == -1)] = 0
        column = table.schema.get_field_index("supervised")
        changed = table.set_column(column, "supervised", as_lists(masks)).cast(DOCUMENT_SCHEMA)
        file.unlink()
        with pa.ipc.new_file(str(file), DOCUMENT_SCHEMA) as writer:
            writer.write_table(changed)
    return plan.model_copy(update={"data": plan.data.model_copy(update={"folder": str(folder)})})


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """{name: (plan, verdict)} of runs on two ranks, all in one process group."""
    root = tmp_path_factory.mktemp("audit")
    base = tiny_run(root)
    short = {"total_steps": STEPS, "max_steps": STEPS, "micro_batch_size": 3, "eval_every_steps": 100}
    base = variant(base, "sound", audit="strict", **short)
    fused = variant(base, "fused", kernels="fused")
    plans = {
        "sound": base,
        "off": variant(base, "off", audit="off"),
        "fused": fused,
        "fused bf16": variant(fused, "fused-bf16", dtype="bf16", zero=2, gradient_checkpointing=True),
        "fused ZeRO 3": variant(fused, "fused-3", zero=3),
        "fused LoRA ZeRO 3": variant(fused, "fused-lora-3", zero=3, method=LORA, dtype="bf16"),
        "fused QLoRA": variant(fused, "fused-qlora", zero=3, method=QLORA),
        "added tokens": variant(adding(fused, root / "base"), "added", zero=3, method=LORA),
        "leak": variant(base, "leak", zero=3),
        "leak, warn": variant(base, "leak-warn", audit="warn"),
        "leak, off": variant(base, "leak-off", audit="off"),
        "wrong kernel on one rank": variant(fused, "kernel", zero=1),
        "no ends": without_ends(variant(base, "no-ends"), root / "no-ends-data"),
        "leak and no ends": without_ends(variant(base, "both"), root / "both-data"),
    }
    verdicts = run_group(2, train_spoiled, plans, timeout_s=240.0)
    assert verdicts[0] == verdicts[1], "the ranks agree on how it ended"
    return dict(zip(plans, zip(plans.values(), verdicts[0], strict=True), strict=True))


def lines(plan: Plan, kind: str) -> list[dict[str, Any]]:
    return [record for record in read(Path(plan.run_dir)) if record["kind"] == kind]


def test_a_sound_run_says_what_was_looked_at(ended: Ended) -> None:
    plan, verdict = ended["sound"]
    assert (verdict.kind, verdict.step) == ("finished", STEPS)
    [line] = lines(plan, "audit")
    assert (line["checked"], line["findings"]) == (BOTH, 0)
    assert 0 < line["seconds"] < 5


def test_an_audit_changes_no_step(ended: Ended) -> None:
    assert lines(ended["off"][0], "audit") == []
    assert curve(ended["sound"][0]) == curve(ended["off"][0])


@pytest.mark.parametrize(
    ("name", "adapters"),
    [
        ("fused", set()),
        ("fused bf16", set()),
        ("fused ZeRO 3", set()),
        ("fused LoRA ZeRO 3", {"lora_linear 14"}),
        ("fused QLoRA", {"qlora_linear 14"}),
    ],
)
def test_fused_kernels_are_compared_at_every_stage_and_with_adapters(
    ended: Ended, name: str, adapters: set[str]
) -> None:
    plan, verdict = ended[name]
    assert verdict.kind == "finished"
    [line] = lines(plan, "audit")
    masks, fused, packs = line["checked"]
    assert [masks, packs] == BOTH
    assert fused.startswith("fused = eager (")
    assert set(fused.removeprefix("fused = eager (").removesuffix(")").split(", ")) == OPS | adapters
    assert line["findings"] == 0


def test_rows_that_are_trained_alone_are_left_partitioned(ended: Ended) -> None:
    """peft puts the whole matrix together for whoever asks its layer for a weight."""
    plan, verdict = ended["added tokens"]
    assert verdict.kind == "finished"
    [line] = lines(plan, "audit")
    assert (len(line["checked"]), line["findings"]) == (3, 0)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("leak", "packed documents see each other"),
        ("wrong kernel on one rank", "do not compute what the model does"),
        ("no ends", "the end of a turn is not learned"),
    ],
)
def test_a_finding_ends_a_strict_run_as_a_verdict_before_its_first_step(ended: Ended, name: str, what: str) -> None:
    plan, verdict = ended[name]
    assert (verdict.kind, verdict.step, verdict.exit_code) == ("error", 0, 2)
    assert verdict.message.startswith("the audit before the first step: ")
    assert what in verdict.message
    assert verdict.hint is not None
    assert verdict.hint.endswith("; audit=warn trains all the same")
    assert lines(plan, "start") == lines(plan, "step") == lines(plan, "audit") == []
    assert committed(FolderStore(Path(plan.run_dir))) == []


def test_all_findings_are_named_at_once(ended: Ended) -> None:
    message = ended["leak and no ends"][1].message
    assert "the end of a turn is not learned" in message
    assert "packed documents see each other" in message


def test_warn_says_it_and_trains_on(ended: Ended) -> None:
    plan, verdict = ended["leak, warn"]
    assert (verdict.kind, verdict.step) == ("finished", STEPS)
    [finding] = lines(plan, "audit_finding")
    assert finding["what"] == "packed documents see each other"
    assert finding["hint"]
    [line] = lines(plan, "audit")
    assert (line["checked"], line["findings"]) == (BOTH[:1], 1)


def test_off_is_silent(ended: Ended) -> None:
    plan, verdict = ended["leak, off"]
    assert verdict.kind == "finished"
    assert lines(plan, "audit") == lines(plan, "audit_finding") == []


def stops_torchrun(plan: Plan) -> int:
    from launcher.train.run import train_alone

    Path(plan.run_dir).mkdir()
    with spoiled("leak"):
        return train_alone(plan)


def test_without_a_driver_it_ends_with_exit_code_2(ended: Ended) -> None:
    plan = variant(ended["leak"][0], "torchrun")
    assert run_group(1, stops_torchrun, plan) == [2]
    verdict = Verdict.load(Path(plan.run_dir))
    assert verdict is not None
    assert verdict.exit_code == 2
