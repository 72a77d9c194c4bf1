"""E10 and what goes wrong beside it, on a sample of the prepared training documents: what is learned is what the chat
template has an assistant write, up to the end of its turn.

The prepared data has tokens and marks, and no longer the conversations. So the template is asked once more, with a
made-up conversation: what stands right before an answer, and what ends it. A mask that is shifted, or cut, or of
another tokenizer, fits that nowhere. Costs no tensor: 64 documents are looked at on the host.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from launcher.audit.finding import Checked, Finding
from launcher.data.conversation import Conversation, Message
from launcher.data.masks.encoder import Encoder
from launcher.data.store import Documents
from launcher.errors import DataError

SHOWN = 3
UNKNOWN_TOKENS = "tokens that the model does not know"
PREPARE_AGAIN = "remove the prepared data and run again, or look at it with slipway data"


@dataclass(frozen=True)
class Marks:
    """What the chat template writes around an answer."""

    before: frozenset[int]
    """Tokens right before its first."""
    ends: frozenset[int]
    """Tokens that end a turn or a text."""


@dataclass(frozen=True)
class Stretch:
    """Targets without a gap: from `start` to before `stop` of a document."""

    where: str
    ids: NDArray[np.int32]
    start: int
    stop: int


def check_masks(
    folder: Path,
    numbers: list[int],
    tokenizer: PreTrainedTokenizerFast,
    rows: int,
    max_length: int,
    formats: Collection[str],
) -> Checked:
    """Look at the documents `numbers`.

    Args:
        folder: the prepared data
        numbers: of training documents
        tokenizer: the run's, with its chat template
        rows: tokens that the model has a row for, in its embedding and its head
        max_length: tokens at which documents are cut; one of that length may have lost its end
        formats: of the data; in plain text, `text`, nothing is masked
    """
    documents = Documents(folder)
    ids = {number: documents.input_ids(number) for number in numbers}
    where = {number: documents.where(number) for number in numbers}
    stretches = {number: stretches_of(documents, number) for number in numbers}
    marks = template_marks(tokenizer)
    findings = [
        *outside(ids, where, rows),
        *_nothing_learned([where[number] for number in numbers if not stretches[number]], len(numbers)),
        *_two_beginnings([where[n] for n in numbers if begins_twice(ids[n], tokenizer.bos_token_id)], tokenizer),
        *_ends([stretch for found in stretches.values() for stretch in found], marks, max_length, tokenizer),
    ]
    learned = [stretch for found in stretches.values() for stretch in found]
    if "text" not in formats:
        findings += _all_learned(learned, max_length, tokenizer)
    if set(formats) != {"text"}:
        findings += _answers(learned, marks, tokenizer)
    return Checked("masks as meant", tuple(findings))


def stretches_of(documents: Documents, number: int) -> list[Stretch]:
    """Where a document's targets are; a first token that nothing predicts is no stretch."""
    ids, mask = documents.input_ids(number), documents.supervised(number).astype(np.int8)
    edges = np.diff(mask, prepend=0, append=0)
    borders = zip(np.flatnonzero(edges > 0).tolist(), np.flatnonzero(edges < 0).tolist(), strict=True)
    return [Stretch(documents.where(number), ids, start, stop) for start, stop in borders if stop > 1]


def template_marks(tokenizer: PreTrainedTokenizerFast) -> Marks:
    """Of a made-up conversation, with thoughts and without."""
    encoder = Encoder(tokenizer, "last")
    before, ends = set[int](), {int(tokenizer.eos_token_id)}
    asked = Message("user", "Hello")
    for answer in (Message("assistant", "Hi", learn=True), Message("assistant", "Hi", "A greeting", learn=True)):
        (found,) = encoder.encode([Conversation((asked, answer), "the chat template")])
        if isinstance(found, DataError):
            raise found
        learned = np.flatnonzero(found[-1].supervised)
        before |= {int(found[-1].input_ids[learned[0] - 1])} if learned[0] else set()
        ends.add(int(found[-1].input_ids[learned[-1]]))
    return Marks(frozenset(before), frozenset(ends))


def begins_twice(ids: NDArray[np.int32], bos: int | None) -> bool:
    """Whether two begin-of-text tokens come first."""
    return bos is not None and ids[:2].tolist() == [bos, bos]


def outside(ids: dict[int, NDArray[np.int32]], where: dict[int, str], rows: int) -> Iterator[Finding]:
    """Tokens beyond the `rows` that a model has one for."""
    wrong = [number for number, found in ids.items() if len(found) and (found.min() < 0 or found.max() >= rows)]
    if wrong:
        largest = max(int(ids[number].max()) for number in wrong)
        yield Finding(
            UNKNOWN_TOKENS,
            f"token {largest} of {places([where[number] for number in wrong])}, the model has {rows} rows",
            "model.tokenizer does not belong to model.path: leave it out, or name the model's own",
        )


def _nothing_learned(wrong: list[str], count: int) -> Iterator[Finding]:
    if wrong or not count:
        detail = f"{len(wrong)} of {count} documents have no target: {places(wrong)}" if count else "no document"
        yield Finding("documents that teach nothing", detail, PREPARE_AGAIN)


def _two_beginnings(wrong: list[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[Finding]:
    if wrong:
        yield Finding(
            "two begin-of-text tokens",
            f"{tokenizer.bos_token} comes twice at the beginning of {places(wrong)}",
            "the chat template writes it, and the rows or the tokenizer do too: take it out of one of them",
        )


def _ends(
    stretches: list[Stretch], marks: Marks, max_length: int, tokenizer: PreTrainedTokenizerFast
) -> Iterator[Finding]:
    """The model learns to stop."""
    names = " or ".join(tokenizer.convert_ids_to_tokens(sorted(marks.ends)))
    masked = [
        stretch.where
        for stretch in stretches
        if int(stretch.ids[stretch.stop - 1]) not in marks.ends
        and stretch.stop < len(stretch.ids)
        and int(stretch.ids[stretch.stop]) in marks.ends
    ]
    whole = [stretch for stretch in stretches if stretch.stop < len(stretch.ids) or len(stretch.ids) < max_length]
    learned = any(np.isin(stretch.ids[stretch.start : stretch.stop], list(marks.ends)).any() for stretch in stretches)
    if masked:
        detail = f"{names} follows what is learned and is masked, in {places(masked)}"
    elif whole and not learned:
        detail = f"{names} is no target in any of {len(stretches)} answers, such as {places([whole[0].where])}"
    else:
        return
    yield Finding("the end of a turn is not learned", detail + ": the model would never stop", PREPARE_AGAIN)


def _all_learned(stretches: list[Stretch], max_length: int, tokenizer: PreTrainedTokenizerFast) -> Iterator[Finding]:
    """Questions are not learned. A document that was cut may have lost them, and shows nothing."""
    whole = [stretch for stretch in stretches if len(stretch.ids) < max_length]
    if whole and all(_at_the_beginning(stretch, tokenizer.bos_token_id) for stretch in stretches):
        documents = places(list(dict.fromkeys(stretch.where for stretch in whole)))
        detail = f"every token is a target, of questions too, in all documents looked at ({documents})"
        yield Finding("nothing is masked", detail, PREPARE_AGAIN)


def _answers(stretches: list[Stretch], marks: Marks, tokenizer: PreTrainedTokenizerFast) -> Iterator[Finding]:
    """What is learned begins where an assistant begins to write."""
    inside = [stretch for stretch in stretches if not _at_the_beginning(stretch, tokenizer.bos_token_id)]
    if not marks.before or not inside:
        return
    if not any(int(stretch.ids[stretch.start - 1]) in marks.before for stretch in inside):
        seen = inside[0]
        expected = " or ".join(repr(tokenizer.decode([token])) for token in sorted(marks.before))
        yield Finding(
            "the mask does not begin where answers do",
            f"before an answer the chat template writes {expected}; {seen.where} is learned from behind "
            f"{tokenizer.decode(seen.ids[max(0, seen.start - 4) : seen.start])!r} on, and no sampled document differs",
            PREPARE_AGAIN,
        )


def _at_the_beginning(stretch: Stretch, bos: int | None) -> bool:
    return stretch.start == 0 or (stretch.start == 1 and int(stretch.ids[0]) == bos)


def places(where: list[str]) -> str:
    """The first few of them."""
    return ", ".join(where[:SHOWN]) + (f" and {len(where) - SHOWN} more" if len(where) > SHOWN else "")
