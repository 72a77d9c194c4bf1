"""What a model folder is worth on held-out rows, in one process: the loss on them, and what its answers score."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher.data.loader import EvalData, MicroBatch, TestRow
from launcher.data.prepare import prepare
from launcher.data.prepare.work import Progress
from launcher.errors import DataError
from launcher.evaluate.answers import as_jsonl as answer_lines
from launcher.evaluate.answers import scored, try_out
from launcher.evaluate.generate import generate_answers
from launcher.evaluate.predictions import as_jsonl as prediction_lines
from launcher.evaluate.predictions import class_scores
from launcher.export.loaded import device_here, load_folder, positions, tokenizer_folder
from launcher.export.verify import classifies
from launcher.model.positions import most_tokens, refuse_long_answers
from launcher.plan.plan import DataFacts, DataPlan, GeneratePlan, HeldOutPlan, ModelPlan, SourcePlan
from launcher.recipe.schema_data import Augment, Clean, Data
from launcher.train.classification import ClassLoss, Predicting
from launcher.train.evaluate import eval_figures, evaluate_sums
from launcher.train.loss import SupervisedLoss

TOKENS_AT_ONCE = 4096
"""Of the rows whose loss is computed together: their logits are as many times the vocabulary."""


@dataclass(frozen=True)
class Worth:
    """What was found; either part is None where there were no rows for it."""

    loss: dict[str, Any] | None
    """{rows, loss, accuracy, perplexity, slices?}, or of a sequence classification what its lines `eval` say."""
    answers: dict[str, Any] | None
    """{rows, cut, <metric>: number or nested numbers, slices?}."""
    lines: bytes
    """JSON lines: of each answer {where, prompt, reference, answer, correct, cut}; of each row of a sequence
    classification {where, text, label, predicted, probabilities}."""


def evaluate_folder(
    folder: Path,
    held_out: EvalData,
    questions: Sequence[TestRow],
    settings: GeneratePlan,
    seed: int,
    slices: Sequence[str] = (),
) -> Worth:
    """Load the model of `folder`; the loss of `held_out`, then answers to `questions`, drawn by `seed` if at all.

    Both also by the values of `slices`, for which `held_out` was opened and `questions` were prepared.

    Raises:
        ModelError: the folder cannot be loaded.
        DataError: a metric that says nothing about the references, or an answer for which the model has no positions.
    """
    device = device_here()
    if questions:
        try_out(questions, settings.metrics, slices)
    model, tokenizer = load_folder(folder, device)
    if classifies(folder):
        return Worth(*predicted_classes(model, tokenizer, held_out, device))
    refuse_long_answers(most_tokens(model), questions, settings.max_new_tokens)
    found = None
    if held_out.num_documents:
        found = measured(model, SupervisedLoss(model, model, flat=False, device=device), held_out, device)
    if not questions:
        return Worth(found, None, b"")
    prompts = [row.prompt_ids for row in questions]
    given = generate_answers(model, prompts, tokenizer, settings, seed, device)
    assert given is not None, "nobody interrupts it"
    figures, lines = scored(questions, given, settings.metrics, slices)
    return Worth(found, figures, answer_lines(lines))


def predicted_classes(
    model: Any, tokenizer: Any, held_out: EvalData, device: torch.device
) -> tuple[dict[str, Any], None, bytes]:
    """Figures and predictions of a sequence classification, as its run measures them."""
    loss = Predicting(ClassLoss(model, model, device))
    found = measured(model, loss, held_out, device)
    del found["perplexity"]  # of words that could follow; a class is none
    predictions, classes = sorted(loss.predictions, key=lambda one: one.place), class_names(model.config)
    return found | class_scores(predictions, classes), None, prediction_lines(predictions, classes, tokenizer)


def measured(
    model: Any, loss: Callable[[MicroBatch], tuple[torch.Tensor, torch.Tensor]], data: EvalData, device: torch.device
) -> dict[str, Any]:
    """{rows, loss, accuracy, perplexity, slices?} of all targets of `data`, as a run measures them."""
    with alone():
        sums = evaluate_sums(model, loss, data, TOKENS_AT_ONCE, device, lambda: False)
    model.eval()
    assert sums is not None, "nobody stops it"
    return {"rows": data.num_documents} | eval_figures(sums, data)


def class_names(config: Any) -> tuple[str, ...]:
    """The classes that a head tells apart, in the order of its outputs."""
    return tuple(config.id2label[number] for number in range(len(config.id2label)))


def known_classes(folder: Path) -> tuple[str, ...]:
    """The same of a folder; that of adapters has them in its slipway.json."""
    from transformers import AutoConfig

    if (folder / "slipway.json").exists():
        return tuple(json.loads((folder / "slipway.json").read_text(encoding="utf-8"))["classes"])
    return class_names(AutoConfig.from_pretrained(folder))


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """A process group of this process alone, for what a run's ranks compute together."""
    with tempfile.TemporaryDirectory(prefix="slipway-") as folder:
        store = dist.FileStore(f"{folder}/store", 1)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def prepare_rows(
    folder: Path,
    source: SourcePlan,
    of_run: DataPlan | None,
    slices: Sequence[str],
    cache_dir: Path,
    progress: Progress | None = None,
) -> DataFacts:
    """Rows of a file as the model in `folder` takes them, by its own tokenizer and template: all of them held out, both
    for the loss and, unless they are plain text or classified, to be answered.

    `of_run`: what the model's own run did with its rows, such as longer ones than `max_length`.

    Raises:
        DataError: rows that cannot be used, or of classes that the model does not know; ModelError: a tokenizer that
            cannot be used.
    """
    from launcher.data.prepare.rows import format_of

    data = rows_plan(source, of_run, folder).model_copy(update={"slices": tuple(slices)})
    if data.head is None and format_of(source, data) != "text":
        data = data.model_copy(update={"test": data.eval})
    facts = prepare(model_plan(folder), data, seed=0, cache_dir=cache_dir, progress=progress)
    if data.head is not None and facts.classes != data.head:
        unknown = sorted(set(facts.classes) - set(data.head))
        raise DataError(
            f"{source.path} has rows of {', '.join(unknown[:5])}, which the model does not know",
            hint=f"it tells apart {', '.join(data.head[:20])}",
        )
    return facts


def left_out(facts: DataFacts) -> dict[str, int]:
    """{reason: rows} of what `prepare_rows` could not use: each row once, in whichever part it was to be."""
    with (Path(facts.folder) / "dropped.jsonl").open(encoding="utf-8") as lines:
        rows = {(line["reason"], line["where"]) for line in map(json.loads, lines) if line["reason"] in facts.dropped}
    return dict(sorted(Counter(reason for reason, _ in rows).items()))


def rows_plan(source: SourcePlan, of_run: DataPlan | None, folder: Path) -> DataPlan:
    """`source` as rows to be measured on. Preparation wants rows to train on too: the same, which nobody looks at."""
    head = known_classes(folder) if classifies(folder) else None
    augment = Augment().model_dump(exclude={"function"}) | {"function_file": None, "function_name": None}
    rows = {
        "train": (source,),
        "eval": HeldOutPlan(split=None, rows=None, sources=(source,)),
        "test": HeldOutPlan(split=None, rows=None, sources=()),
        "clean": Clean(duplicates="keep", overlap="keep").model_dump() | {"contamination": ()},
        "augment": augment,
        "replay": None,
        "retain": (),
        "head": head,
    }
    rows |= {"packing": False, "balance": "none", "stratify": False, "group": None}
    if of_run is not None:
        rows["label"] = of_run.label if head is not None else None  # a column that other files need not have
        return DataPlan(**(of_run.model_dump() | rows))
    values = Data(max_length=longest(folder)).model_dump(exclude={"workers", "prepare_on"})
    return DataPlan(**(values | {"slices": ()} | rows))


def model_plan(folder: Path) -> ModelPlan:
    """Of a folder, of which preparation looks at the tokenizer."""
    return ModelPlan(
        source="folder",
        path=str(folder),
        revision=None,
        scratch=None,
        tokenizer=tokenizer_folder(folder),
        chat_template=None,
        template_kwargs={},
        add_tokens=(),
        dropout=None,
        trust_remote_code=False,
        fingerprint=None,
    )


def longest(folder: Path) -> int:
    """Tokens of a row that the model takes, as far as its configuration and tokenizer tell; 4,096 at most."""
    limits, settings = [TOKENS_AT_ONCE, positions(folder)], folder / "tokenizer_config.json"
    if settings.exists():
        limits.append(json.loads(settings.read_text(encoding="utf-8")).get("model_max_length"))
    return int(min(limit for limit in limits if limit))
