"""Whole runs, small enough for a dozen in one process: prepared data, a scratch model, `train_run` on every rank."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from launcher.data.prepare import prepare
from launcher.model.scratch import create_scratch
from launcher.plan.plan import Plan
from launcher.train.metrics import last_of_each_step
from launcher.train.verdict import Verdict
from tests.distributed.tiny import quiet
from tests.plans import data_plan, held_out, method_plan, model_plan, short_run, source_plan

STEPS = 20
GLOBAL_BATCH = 6
WORDS = ("river", "stone", "cloud", "seven", "amber", "light", "north", "garden", "winter", "paper", "silver", "echo")

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,  # of blocks of 64: bitsandbytes 0.50 evaluates no other 4-bit layer on CPU
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "vocab_size": 300,
}
FULL = method_plan("full")
FREEZE = method_plan("freeze", train_last_layers=1)
LORA = method_plan("lora", rank=4, alpha=64.0)
QLORA = LORA.model_copy(update={"kind": "qlora"})
METHODS = {"full": FULL, "freeze": FREEZE, "lora": LORA, "qlora": QLORA}


def conversations(count: int) -> list[dict[str, Any]]:
    """One or two turns each; every third answers with a single word, the others with up to forty: the mean of a row's
    tokens says little about the mean over all of them."""
    draw = random.Random(5)
    rows = []
    for i in range(count):
        messages = []
        for turn in range(1 + i % 2):
            length = 1 if i % 3 == 0 else draw.randint(8, 40)
            messages += [
                {"role": "user", "content": f"Say {length} of {draw.choice(WORDS)}, part {turn}"},
                {"role": "assistant", "content": " ".join(draw.choices(WORDS, k=length))},
            ]
        rows.append({"messages": messages, "kind": "short" if i % 3 == 0 else "long"})
    return rows


def tiny_run(
    root: Path, balance: Literal["none", "weights"] = "none", of_data: dict[str, Any] | None = None, **scratch: Any
) -> Plan:
    """A Plan whose data and scratch model lie ready in `root`; `of_data` changes the data's part of it, `scratch` the
    model's configuration."""
    root.mkdir(parents=True, exist_ok=True)
    rows = root / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in conversations(60)), encoding="utf-8")
    model = model_plan(root / "base", source="scratch", scratch=LLAMA | scratch)
    data = data_plan(
        source_plan(rows, format="messages"),
        eval=held_out(split=0.15),
        label="kind",
        balance=balance,
        max_length=256,
        packing=False,  # rows of a micro batch are laid end to end all the same
        too_long="stop",
    ).model_copy(update=of_data or {})
    facts = prepare(model, data, seed=3, cache_dir=root / "prepared")
    create_scratch(model, Path(facts.folder) / "tokenizer", 3, root / "base")
    return short_run(root, model, data, facts, STEPS, GLOBAL_BATCH)


def variant(plan: Plan, name: str, **changes: Any) -> Plan:
    """`plan` in a folder of its own, `changes` going to whichever part of it has the field."""
    parts = {}
    for part in ("trajectory", "layout", "lifecycle"):
        fields = getattr(plan, part)
        mine = {key: changes.pop(key) for key in list(changes) if key in type(fields).model_fields}
        parts[part] = fields.model_copy(update=mine)
    assert not changes, f"no part of a Plan has {sorted(changes)}"
    return plan.model_copy(update=parts | dict.fromkeys(("run_dir", "location"), str(Path(plan.run_dir).parent / name)))


def open_folder(plan: Plan) -> None:
    """The run's folder as a launcher leaves it to the workers. Collective."""
    if dist.get_rank() == 0:
        open_alone(plan)
    dist.barrier()


def open_alone(plan: Plan) -> None:
    """The same, from one process."""
    Path(plan.run_dir).mkdir(exist_ok=True)
    (Path(plan.run_dir) / "recipe.yaml").write_text("name: tiny\n", encoding="utf-8")
    (Path(plan.run_dir) / "environment.json").write_text('{"packages": {}}\n', encoding="utf-8")


def train_all(plans: Sequence[Plan]) -> list[Verdict]:
    """Each plan from its newest checkpoint to its end, on the ranks of the open group; all is in the runs' folders."""
    # Six seconds of imports (peft, DeepSpeed): once a process, and not before they are needed.
    from launcher.train.run import train_run

    quiet()
    verdicts = []
    for plan in plans:
        open_folder(plan)
        verdicts.append(train_run(plan, launch=0))
    return verdicts


def curve(plan: Plan, figure: str = "loss") -> list[float]:
    """One figure of every step of a run, from its metrics.jsonl."""
    steps = last_of_each_step(Path(plan.run_dir))
    return [steps[step][figure] for step in sorted(steps)]


def worst(found: list[float], expected: list[float]) -> float:
    """The largest relative difference of two curves."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
