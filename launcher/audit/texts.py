"""What can go wrong with a sequence classification before its first step: documents of another tokenizer, classes that
the head has no output for, and padding or neighbours that are read.

The texts themselves are no longer there. What the tokenizer puts around every text stands at the ends of every
document, or it was another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from launcher.audit.finding import Checked, Finding
from launcher.audit.masks import PREPARE_AGAIN, outside, places
from launcher.data.classified import TextEncoder
from launcher.data.loader import MicroBatch
from launcher.data.store import Documents

OF_LARGEST = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
"""How far padding may move a logit, as a share of the largest: sums over other lengths are rounded otherwise."""
MAX_TOKENS = 256
"""Of each of the two documents that go through the model."""


def check_texts(
    folder: Path, numbers: list[int], tokenizer: PreTrainedTokenizerFast, rows: int, num_classes: int
) -> Checked:
    """Look at the training documents `numbers` of a prepared `folder`; the model has an embedding for `rows` tokens and
    an output for each of `num_classes`."""
    documents, ends = Documents(folder), TextEncoder(tokenizer).ends
    ids = {number: documents.input_ids(number) for number in numbers}
    where = {number: documents.where(number) for number in numbers}
    wrong = [where[number] for number in numbers if not _stands_at(ends, ids[number])]
    classless = [where[number] for number in numbers if not 0 <= documents.labels[number] < num_classes]
    findings = [
        *outside(ids, where, rows),
        *_found("texts that another tokenizer made", wrong, "the run's puts other tokens around them"),
        *_found("classes that the head has no output for", classless, f"it has {num_classes}"),
    ]
    return Checked("texts as the tokenizer gives them", tuple(findings))


def _stands_at(ends: tuple[list[int], list[int]], ids: NDArray[np.int32]) -> bool:
    before, after = ends
    return ids[: len(before)].tolist() == before and ids[len(ids) - len(after) :].tolist() == after


def _found(what: str, wrong: list[str], detail: str) -> Iterator[Finding]:
    if wrong:
        yield Finding(what, f"{places(wrong)}: {detail}", PREPARE_AGAIN)


def check_padding(
    logits_of: Callable[[MicroBatch], Tensor], folder: Path, numbers: list[int], vocabulary: int
) -> Checked:
    """Whether a document's logits are its own: the same alone as beside a longer one, whose words do not move them.

    Four forward passes without gradients. Collective under ZeRO-3.

    Args:
        logits_of: [D, C] logits of documents, without dropout or gradients
        folder: the prepared data
        numbers: of training documents, of which the shortest and the longest are taken
        vocabulary: tokens with a row of their own
    """
    documents = Documents(folder)
    by_length = sorted(numbers, key=lambda number: int(documents.lengths[number]))
    short, long = (
        torch.from_numpy(documents.input_ids(number)[:MAX_TOKENS].astype(np.int64))
        for number in (by_length[0], by_length[-1])
    )
    where = tuple(documents.where(number) for number in (by_length[0], by_length[-1]))

    def logits(*texts: Tensor) -> Tensor:
        return logits_of(_rows(texts, where))[0]

    together = logits(short, long)
    moved = {
        "padding": (logits(short) - together).abs().max().item(),
        "the words of another": (logits(short, (long + 1) % vocabulary) - together).abs().max().item(),
    }
    own = (logits((short + 1) % vocabulary, long) - together).abs().max().item()
    allowed = OF_LARGEST[together.dtype] * together.abs().max().item()
    findings = [
        Finding(
            f"{what} is read",
            f"it moves a logit of {where[0]} by {size:.3g}, and rounding by at most {allowed:.3g}",
            "set train.micro_batch_size to 1, and please report the model's family with this message",
        )
        for what, size in moved.items()
        if not size <= allowed  # NaN is no agreement either
    ]
    if not own > 0:
        detail = f"other words in {where[0]} change no logit"
        findings.append(Finding("the model does not look at its input", detail, "check the model's weights"))
    return Checked("padding and neighbours unread", tuple(findings))


def _rows(texts: Sequence[Tensor], where: Sequence[str]) -> MicroBatch:
    """Documents as a micro batch has them, each of class 0."""
    lengths = torch.tensor([len(text) for text in texts])
    ends = lengths.cumsum(0)
    return MicroBatch(
        input_ids=torch.cat(list(texts))[None],
        position_ids=torch.cat([torch.arange(len(text)) for text in texts])[None],
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), ends]).int(),
        max_seqlen=int(lengths.max()),
        supervised_index=ends - 1,
        targets=torch.zeros(len(texts), dtype=torch.int64),
        weights=None,
        where=tuple(where[: len(texts)]),
        num_tokens=int(ends[-1]),
    )
