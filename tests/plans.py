"""Parts of a Plan for tests, with the recipe's defaults where a test says nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.plan.plan import AugmentPlan, CleanPlan, DataPlan, HeldOutPlan, ModelPlan, SourcePlan
from launcher.recipe.schema_data import Augment, Clean, Data, Source


def source_plan(path: Path | str, **changes: Any) -> SourcePlan:
    values = {"kind": "local"} | Source(path=str(path)).model_dump() | changes
    return SourcePlan(**values)


def held_out(split: float | None = None, rows: int | None = None, sources: tuple[SourcePlan, ...] = ()) -> HeldOutPlan:
    return HeldOutPlan(split=split, rows=rows, sources=sources)


def clean_plan(**changes: Any) -> CleanPlan:
    return CleanPlan(**(Clean().model_dump() | changes))


def augment_plan(**changes: Any) -> AugmentPlan:
    values = Augment().model_dump(exclude={"function"}) | {"function_file": None, "function_name": None}
    return AugmentPlan(**(values | changes))


def data_plan(*train: SourcePlan, **changes: Any) -> DataPlan:
    parts = {"train": train, "eval": held_out(), "test": held_out(), "clean": clean_plan(), "augment": augment_plan()}
    values = Data().model_dump(exclude={"workers", "prepare_on"}) | parts | changes
    return DataPlan(**values)


def model_plan(path: Path | str, **changes: Any) -> ModelPlan:
    values: dict[str, Any] = {
        "source": "folder",
        "path": str(path),
        "revision": None,
        "scratch": None,
        "tokenizer": None,
        "chat_template": None,
        "template_kwargs": {},
        "add_tokens": (),
        "trust_remote_code": False,
        "fingerprint": None,
    }
    return ModelPlan(**(values | changes))
