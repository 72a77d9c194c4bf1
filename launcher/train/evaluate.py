"""Measuring on held-out rows: loss and token accuracy, and exact match of answers in words. All collective.

Both may take longer than a preempted machine has left: they break off when any rank says that it is to stop, all ranks
after the same batch, and then give no figure.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from launcher.data.loader import EvalData, TestRows
from launcher.plan.plan import GeneratePlan
from launcher.store.durable import replace_synced
from launcher.train.agreement import agreed
from launcher.train.beat import GENERATE, mark
from launcher.train.loss import SupervisedLoss

log = logging.getLogger(__name__)

AGREE_EVERY = 8
"""Batches of the loss between two questions whether to stop; batches of generation are slow and ask each time."""


@contextlib.contextmanager
def evaluating(engine: Any) -> Iterator[None]:
    """Dropout off and no gradients; training mode again afterwards."""
    engine.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        engine.train()


def evaluate_loss(
    engine: Any,
    loss: SupervisedLoss,
    data: EvalData,
    token_budget: int,
    device: torch.device,
    stopping: Callable[[], bool],
) -> tuple[float, float] | None:
    """Mean loss over all supervised evaluation tokens, and the share of them that were the most likely token.

    None where `stopping` of any rank said so on the way.
    """
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    with evaluating(engine):
        # As many batches on every rank: see `EvalData.micro_batches`.
        for i, batch in enumerate(data.micro_batches(token_budget, dist.get_world_size(), dist.get_rank())):
            if i % AGREE_EVERY == 0 and agreed(stopping(), device):
                return None
            mark("evaluate")
            loss_sum, correct = loss(batch)
            count = float(len(batch.targets))
            totals += torch.stack([loss_sum.double(), correct.double(), torch.tensor(count, device=device).double()])
    dist.all_reduce(totals)
    loss_total, correct_total, count_total = totals.tolist()
    return loss_total / count_total, correct_total / count_total


def exact_match(
    engine: Any,
    rows: TestRows,
    tokenizer: PreTrainedTokenizerBase,
    end_of_turn: int,
    settings: GeneratePlan,
    zero_stage: int,
    device: torch.device,
    answers_file: Path,
    stopping: Callable[[], bool],
) -> float | None:
    """Share of test rows whose greedy answer equals the reference, surrounding white space aside.

    Rows are dealt out to the ranks in batches; every rank runs the same number of batches. The answers go to
    `answers_file`, a line {"where", "prompt", "reference", "answer", "correct"} each, in the order of the rows; a disk
    that does not take them is only logged. None, and no file, where `stopping` of any rank said so on the way.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    batches = [range(i, min(i + settings.batch_size, len(rows))) for i in range(0, len(rows), settings.batch_size)]
    answered: list[tuple[int, str]] = []
    with evaluating(engine):
        for first in range(0, len(batches), world_size):
            if agreed(stopping(), device):
                return None
            mark(GENERATE)
            mine = batches[first + rank] if first + rank < len(batches) else batches[-1]
            texts = _answers(
                engine.module, [rows[i].prompt_ids for i in mine], tokenizer, end_of_turn, settings, zero_stage, device
            )
            if first + rank < len(batches):
                answered += zip(mine, texts, strict=True)
    gathered: list[Any] = [None] * world_size
    dist.all_gather_object(gathered, answered)
    answers = dict(pair for part in gathered for pair in part)
    lines = []
    for i in range(len(rows)):
        row, answer = rows[i], answers[i]
        correct = answer.strip() == row.answer.strip()
        lines.append(
            {
                "where": row.where,
                "prompt": row.prompt_text,
                "reference": row.answer,
                "answer": answer,
                "correct": correct,
            }
        )
    if rank == 0:
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        try:
            replace_synced(answers_file, content.encode("utf-8", errors="backslashreplace"))
        except OSError as error:
            log.warning("the answers are not kept: %s: %s", answers_file, error.strerror or error)
    return sum(line["correct"] for line in lines) / len(lines)


def _answers(
    model: Any,
    prompts: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    end_of_turn: int,
    settings: GeneratePlan,
    zero_stage: int,
    device: torch.device,
) -> list[str]:
    """Greedy answers to a batch of prompts, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), end_of_turn)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :] = torch.tensor(prompt)
        mask[i, longest - len(prompt) :] = 1
    output = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        num_beams=1,
        use_cache=True,
        eos_token_id=[end_of_turn],
        pad_token_id=end_of_turn,
        # Under ZeRO-3 a forward gathers parameters from all ranks: the one that is done first must go on with the
        # others.
        synced_gpus=zero_stage == 3 and dist.get_world_size() > 1,
    )
    new_tokens = output[:, longest:].tolist()
    stopped = [row[: row.index(end_of_turn)] if end_of_turn in row else row for row in new_tokens]
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in stopped]
