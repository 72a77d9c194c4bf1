"""A run that overfits stops and gives its best model back; one that forgets is seen, and replay lowers it."""

from __future__ import annotations

import contextlib
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from launcher.checkpoint.choose import chosen
from launcher.checkpoint.manifest import read as read_manifest
from launcher.data.prepare import prepare
from launcher.model.scratch import create_scratch
from launcher.plan.plan import EarlyStoppingPlan, Plan, ReplayPlan, RetainPlan, SchedulePlan
from launcher.train.beat import doing
from launcher.train.metrics import read
from launcher.train.verdict import Verdict
from tests.checkpoints import checkpoint_at
from tests.distributed.group import run_group
from tests.distributed.runs import LLAMA, tiny_run, train_all, variant
from tests.plans import data_plan, held_out, model_plan, optimizer_plan, source_plan

pytestmark = pytest.mark.distributed

EVERY, MOST = 4, 40
STILL = SchedulePlan(kind="constant", warmup=0.0, min_lr_ratio=1.0)


def lines(plan: Plan, *kinds: str) -> list[dict[str, Any]]:
    return [record for record in read(Path(plan.run_dir)) if record["kind"] in kinds]


def write(path: Path, rows: Sequence[dict[str, str]]) -> Any:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return source_plan(path, format="prompt_completion")


def task_plan(root: Path, name: str, model: Any, data: Any, steps: int, like: Plan, **changes: Any) -> Plan:
    facts = prepare(model, data, seed=3, cache_dir=root / "prepared")
    learned = {"model": model, "data": data, "data_content_hash": facts.content_hash, "schedule": STILL}
    plan = variant(like, name, **learned, total_steps=steps, max_steps=steps, **changes)
    return plan.model_copy(update={"data": facts})


# Overfitting on purpose


def patience(evaluations: int) -> EarlyStoppingPlan:
    return EarlyStoppingPlan(patience=evaluations, min_delta=0.0)


def gap_to_probe(plan: Plan, step: int) -> float:
    """How far the logits of the run's probe of a step are from those of its checkpoint of that step."""
    from launcher.export.merge import logits_of, trained_model
    from launcher.train.probe import read_probe

    probe = read_probe(Path(plan.run_dir), step)
    assert probe is not None, f"no probe of step {step}"
    model = trained_model(plan, checkpoint_at(Path(plan.run_dir), step))
    return float((logits_of(model, probe[0]) - probe[1]).abs().max())


Turn = tuple[Plan, Verdict, float]
"""A plan as it was resumed, how it ended, and how far the probe is from the checkpoint that the model is made from."""


def at_the_first_evaluation(_: Path) -> bool:
    return doing.step == EVERY


def overfit(plan: Plan, names: Sequence[str]) -> list[Turn]:
    """Train up to a stop during the first evaluation; on until it stops early; again; with more patience; and, the best
    damaged, once more. Collective."""
    found = []
    for turn in names:
        if turn == "patient":
            plan = variant(plan, Path(plan.run_dir).name, early_stopping=patience(4))
        if turn == "damaged" and dist.get_rank() == 0:
            best = chosen(plan, "best")[0]
            shard = next((Path(plan.run_dir) / best.folder).rglob("shard-00000*"))
            content = shard.read_bytes()
            shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        dist.barrier()
        stops = mock.patch("launcher.train.run.stop_requested", at_the_first_evaluation)
        with stops if turn == "stopped" else contextlib.nullcontext():
            (verdict,) = train_all([plan])
        gap = 0.0
        if turn != "stopped" and dist.get_rank() == 0:
            gap = gap_to_probe(plan, chosen(plan, "best")[0].step)
        dist.barrier()
        found.append((plan, verdict, gap))
    return found


def turns(plan: Plan, *names: str) -> dict[str, Turn]:
    ranks = run_group(2, overfit, plan, names, timeout_s=300)
    assert [verdict for _, verdict, _ in ranks[0]] == [verdict for _, verdict, _ in ranks[1]]
    return dict(zip(names, ranks[0], strict=True))


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Turn]:
    """Answers that cannot be guessed, only learned by heart."""
    root = tmp_path_factory.mktemp("overfit")
    rows = [{"prompt": f"the number of {i}", "completion": str(7919 * i % 10007)} for i in range(24)]
    data = data_plan(write(root / "few.jsonl", rows), eval=held_out(split=0.4), max_length=64, packing=False)
    model = model_plan(root / "untrained", source="scratch", scratch=LLAMA)
    plan = task_plan(
        *(root, "overfit", model, data, MOST, tiny_run(root)),
        zero=2,
        optimizer=optimizer_plan(lr=1e-2),
        eval_every_steps=EVERY,
        checkpoint_every_steps=3 * EVERY,
        keep_last=1,
        early_stopping=patience(2),
        export_best=True,
    )
    create_scratch(model, Path(plan.data.folder) / "tokenizer", 3, root / "untrained")
    return turns(plan, "stopped", "first", "again")


@pytest.fixture(scope="module")
def resumed(overfitted: dict[str, Turn]) -> dict[str, Turn]:
    return overfitted | turns(overfitted["again"][0], "patient", "damaged")


def test_a_run_that_overfits_stops_and_says_so(overfitted: dict[str, Turn]) -> None:
    plan, verdict, gap = overfitted["first"]
    evaluated = {line["step"]: line["loss"] for line in lines(plan, "eval") if line["attempt"] == "0.2"}
    best = min(evaluated, key=evaluated.__getitem__)
    stopped = best + 2 * EVERY
    assert (verdict.kind, verdict.step, verdict.exit_code) == ("stopped_early", stopped, 0)
    assert stopped == max(evaluated) < MOST
    assert verdict.message.startswith(
        f"stopped early at step {stopped}: loss was best ({evaluated[best]:.4f}) at step {best}, and no better in 2 "
        f"evaluations; the model is that of step {best}"
    )
    assert verdict.hint is not None
    assert re.search(r"slipway resume \S+ evaluate\.early_stopping\.patience=4$", verdict.hint)
    (line, *_) = lines(plan, "stopped_early")
    assert (line["step"], line["best_step"], line["best"], line["metric"]) == (stopped, best, evaluated[best], "loss")
    bests = [line for line in lines(plan, "best") if line["attempt"] == "0.2"]
    assert [line["value"] for line in bests] == sorted((line["value"] for line in bests), reverse=True)
    assert bests[-1]["step"] == best
    (line, *_) = lines(plan, "overfitting")
    assert line["since"] == line["best_step"] == best
    assert f"overfitting since step {best}" in verdict.message
    assert gap < 1e-4  # the last measures were taken of the best, which is there to be exported


def test_an_evaluation_that_a_stop_prevented_is_made_up_for(overfitted: dict[str, Turn]) -> None:
    plan, verdict, _ = overfitted["stopped"]
    assert (verdict.kind, verdict.step) == ("stopped", EVERY)
    evaluated = [(line["attempt"], line["step"]) for line in lines(plan, "eval")]
    assert evaluated == [("0.2", step) for step in range(EVERY, overfitted["first"][1].step + 1, EVERY)]
    assert (lines(plan, "best")[0]["attempt"], lines(plan, "best")[0]["step"]) == ("0.2", EVERY)


def test_a_run_that_stopped_early_stays_where_it_is(overfitted: dict[str, Turn]) -> None:
    plan, verdict, gap = overfitted["again"]
    assert verdict == overfitted["first"][1]
    assert gap < 1e-4
    assert not [line for line in lines(plan, "step", "eval") if line["attempt"] == "0.3"]


@pytest.mark.long
def test_until_it_may_go_on(resumed: dict[str, Turn]) -> None:
    _, verdict, gap = resumed["patient"]
    assert verdict.kind == "stopped_early"
    assert verdict.step == resumed["first"][1].step + 2 * EVERY
    assert "no better in 4 evaluations" in verdict.message
    assert gap < 1e-4


@pytest.mark.long
def test_a_damaged_best_is_passed_over_and_said(resumed: dict[str, Turn]) -> None:
    plan, verdict, gap = resumed["damaged"]
    damaged = [line for line in lines(plan, "damaged_checkpoint") if line["attempt"] == "0.5"]
    best = lines(plan, "best")[-1]["step"]
    assert f"step-{best:08d} is damaged" in damaged[0]["message"]
    assert verdict.kind == "stopped_early"
    assert f"the model is that of step {best}" not in verdict.message
    assert gap < 1e-4


# Forgetting on purpose

WORDS = ("river", "stone", "cloud", "amber", "light", "north", "garden", "winter", "paper", "silver", "echo", "seven")
TASKS = {"A": dict(zip(WORDS, reversed(WORDS), strict=True)), "B": dict(zip(WORDS, sorted(WORDS), strict=True))}
"""What each task answers to a word."""


def rows_of(task: str, count: int, seed: int) -> list[dict[str, str]]:
    draw = random.Random(seed)
    words = [draw.choice(WORDS) for _ in range(count)]
    return [
        {"prompt": f"{task}: {word} {i}", "completion": f"{TASKS[task][word]} {task}"} for i, word in enumerate(words)
    ]


def learn_and_export(plan: Plan, out: Path) -> None:
    """Train, and write what was learned as a base for others. Collective."""
    from transformers import AutoTokenizer

    from launcher.export.folder import write_folder
    from launcher.export.merge import trained_model

    train_all([plan])
    if dist.get_rank() == 0:
        model = trained_model(plan, chosen(plan, "last")[0])
        tokenizer = AutoTokenizer.from_pretrained(Path(plan.data.folder) / "tokenizer")
        write_folder(plan, model, tokenizer, out, merged=True)
    dist.barrier()


def retained_losses(plan: Plan) -> dict[int, float]:
    return {line["step"]: line["retain_loss"] for line in lines(plan, "eval")}


@pytest.fixture(scope="module")
def forgot(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Plan, Verdict]]:
    """A model learns A, then B: watched, stopped, and with rows of A among those of B."""
    root = tmp_path_factory.mktemp("forgetting")
    like = tiny_run(root)
    a, b, held = (
        write(root / f"{name}.jsonl", rows_of(name[0], 240, seed)) for seed, name in enumerate(("A", "B", "Ah"))
    )
    scratch = model_plan(root / "untrained", source="scratch", scratch=LLAMA | {"vocab_size": 320})
    common: dict[str, Any] = {"max_length": 64, "packing": False}
    pace: dict[str, Any] = {"global_batch_size": 24, "micro_batch_size": 24, "eval_every_steps": 10}
    pace["optimizer"] = optimizer_plan(lr=4e-3)
    first = task_plan(root, "first", scratch, data_plan(a, **common), 60, like, **pace)
    create_scratch(scratch, Path(first.data.folder) / "tokenizer", 3, root / "untrained")
    run_group(2, learn_and_export, first, root / "learned")
    learned = model_plan(root / "learned")
    watched = data_plan(b, retain=(held,), eval=held_out(split=0.1), **common)
    replayed = watched.model_copy(update={"replay": ReplayPlan(sources=(a,), share=0.25)})
    warn, stop = (RetainPlan(max_rows=60, limit=0.5, action=action) for action in ("warn", "stop"))  # type: ignore[arg-type]
    plans = {
        "watched": task_plan(root, "watched", learned, watched, 30, like, retain=warn, **pace),
        "replayed": task_plan(root, "replayed", learned, replayed, 40, like, retain=warn, **pace),
        "stopped": task_plan(root, "stopped", learned, watched, 30, like, retain=stop, export_best=True, **pace),
    }
    verdicts = run_group(2, train_all, list(plans.values()), timeout_s=300)
    assert verdicts[0] == verdicts[1]
    return dict(zip(plans, zip(plans.values(), verdicts[0], strict=True), strict=True))


Forgot = dict[str, tuple[Plan, Verdict]]


def test_forgetting_is_seen_and_said(forgot: Forgot) -> None:
    plan, verdict = forgot["watched"]
    losses = retained_losses(plan)
    print("retained, without replay:", losses)
    assert sorted(losses) == [0, 10, 20, 30]
    assert losses[30] > 1.5 * losses[0]
    (line,) = lines(plan, "forgetting")  # once
    assert (line["before"], line["limit"]) == (losses[0], pytest.approx(1.5 * losses[0]))
    assert line["now"] == losses[line["step"]] > line["limit"]
    assert f"the loss on evaluate.retain was {losses[0]:.4f} before the first step" in line["message"]
    assert verdict.kind == "finished"
    progress = read_manifest(checkpoint_at(Path(plan.run_dir), 30)).progress
    assert (progress["retain_before"], progress["retain_loss"]) == (losses[0], losses[30])


def test_replay_lowers_it_by_half_or_more(forgot: Forgot) -> None:
    (without, _), (plan, _) = forgot["watched"], forgot["replayed"]
    ours, theirs = retained_losses(plan), retained_losses(without)
    print("retained, with replay:", ours)
    assert ours[0] == theirs[0]
    assert ours[30] - ours[0] <= 0.5 * (theirs[30] - theirs[0])
    learned = [[line["loss"] for line in lines(run, "eval")][-1] for run in (plan, without)]
    print("task B, with and without replay:", learned)
    assert learned[0] < 1.0  # B is learned all the same


def test_beyond_the_limit_a_run_may_end(forgot: Forgot) -> None:
    plan, verdict = forgot["stopped"]
    losses = retained_losses(plan)
    assert (verdict.kind, verdict.exit_code) == ("stopped_early", 0)
    assert verdict.step == max(losses) == lines(plan, "forgetting")[0]["step"]
    assert f"stopped early at step {verdict.step}: forgetting: the loss on evaluate.retain" in verdict.message
    assert verdict.hint is not None
    assert "data.replay" in verdict.hint
    within = [step for step, loss in losses.items() if step > 0 and loss <= 1.5 * losses[0]]
    assert chosen(plan, "best")[0].step == (max(within) if within else verdict.step)
