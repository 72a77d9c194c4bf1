"""Making prepared data: one pass from the sources to the files of a folder, a thousand rows at a time."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeVar

import numpy as np

from launcher.data.formats import Conversation, Format, detect, to_conversation
from launcher.data.pack import best_fit
from launcher.data.prepare import Progress
from launcher.data.sources import read
from launcher.data.split import is_held_out
from launcher.data.store import DocumentWriter, write_packs
from launcher.data.template import Document, Encoder, without_end_markers
from launcher.data.tokenizer import (
    is_trained,
    load_tokenizer,
    train_tokenizer,
    trained_vocab_size,
    training_text,
    with_template,
)
from launcher.errors import DataError
from launcher.plan.plan import DataFacts, DataPlan, ModelPlan, SourcePlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CHUNK_ROWS = 1000
T = TypeVar("T")


class Build:
    """One pass from sources to files in `staging`."""

    def __init__(
        self, model: ModelPlan, data: DataPlan, staging: Path, progress: Progress | None, num_rows: int | None
    ) -> None:
        self._model, self._data, self._staging = model, data, staging
        self._progress, self._num_rows, self._num_done = progress, num_rows, 0
        self._formats: dict[str, str] = {}
        self._dropped: Counter[str] = Counter()
        self._notes: Counter[str] = Counter(end_markers_removed=0, truncated=0, held_out=0)
        self._shortest_too_long: int | None = None
        self._first_detail: dict[str, str] = {}

    def run(self, folder: Path) -> DataFacts:
        """Write everything but facts.json, and return the facts of what will be `folder`."""
        data, staging = self._data, self._staging
        tokenizer = self._tokenizer()
        tokenizer.save_pretrained(staging / "tokenizer")
        encoder = Encoder(tokenizer, data.supervise)
        with (
            (staging / "dropped.jsonl").open("w", encoding="utf-8") as self._dropped_file,
            DocumentWriter(staging / "train.arrow") as train,
            DocumentWriter(staging / "eval.arrow") as held_out,
        ):
            self._write(encoder, data.train, train, held_out, data.eval.split or 0.0)
            self._require(len(train.lengths), "training")
            self._notes["held_out"] = len(held_out.lengths)
            if data.eval.sources:
                self._write(encoder, data.eval.sources, held_out, held_out, 0.0)
                self._require(len(held_out.lengths), "evaluation")
            num_test = self._write_test(encoder, tokenizer.eos_token)
        self._say("pack", 0, len(train.lengths))
        lengths = np.array(train.lengths, dtype=np.int64)
        alone = list(np.arange(len(lengths), dtype=np.int32)[:, None])
        packs = best_fit(lengths, data.max_length) if data.packing else alone
        write_packs(staging / "packs.arrow", packs)
        self._say("pack", len(train.lengths), len(train.lengths))
        (staging / "notes.json").write_text(json.dumps(self._notes, indent=2) + "\n", encoding="utf-8")
        content = hashlib.sha256(f"{train.digest} {held_out.digest}".encode())
        for pack in packs:
            content.update(np.array([len(pack), *pack], dtype="<i4").tobytes())
        return DataFacts(
            folder=str(folder),
            content_hash=content.hexdigest()[:16],
            train_rows=len(packs),
            train_documents=len(lengths),
            train_tokens=int(lengths.sum()),
            train_supervised_tokens=sum(train.num_targets),
            eval_documents=len(held_out.lengths),
            eval_supervised_tokens=sum(held_out.num_targets),
            test_documents=num_test,
            dropped=dict(sorted(self._dropped.items())),
            vocab_size=len(tokenizer),
            formats=self._formats,
        )

    def _tokenizer(self) -> PreTrainedTokenizerFast:
        if not is_trained(self._model):
            return load_tokenizer(self._model)
        share = self._data.eval.split or 0.0

        def texts() -> Iterator[str]:
            # A bad row is left to the pass that counts it; a held-out one stays unseen by the vocabulary too.
            for done, conversation in enumerate(self._conversations(self._data.train, report=False), start=1):
                if not is_held_out(conversation, share):
                    yield training_text(conversation)
                if done % _CHUNK_ROWS == 0:
                    self._say("train the tokenizer", done, None)

        tokenizer = train_tokenizer(texts(), trained_vocab_size(self._model))
        return with_template(tokenizer, self._model.chat_template)

    def _conversations(self, sources: Iterable[SourcePlan], report: bool = True) -> Iterator[Conversation]:
        for source in sources:
            format: Format | None = None if source.format == "auto" else source.format
            for where, row in read(source):
                try:
                    if isinstance(row, DataError):
                        raise row
                    format = format or detect(row, where)
                    conversation = to_conversation(row, format, where)
                except DataError as error:
                    if report:
                        self._bad(where, error)
                    elif self._data.on_bad_row == "stop":
                        raise
                    continue
                self._formats[source.path] = format
                yield conversation

    def _write(
        self,
        encoder: Encoder,
        sources: Iterable[SourcePlan],
        kept: DocumentWriter,
        held_out: DocumentWriter,
        share: float,
    ) -> None:
        """Tokenize `sources` into `kept`, and the `share` of them that is held out into `held_out`."""
        for chunk in _chunks(self._conversations(sources)):
            pairs = [
                (conversation, kept_document)
                for conversation, document in zip(chunk, encoder.encode(chunk), strict=True)
                if (kept_document := self._usable(conversation.where, document)) is not None
            ]
            sides: tuple[list[tuple[Conversation, Document]], list[tuple[Conversation, Document]]] = ([], [])
            for pair in pairs:
                sides[share > 0 and is_held_out(pair[0], share)].append(pair)
            for writer, side in zip((kept, held_out), sides, strict=True):
                writer.write([document for _, document in side], [conversation.where for conversation, _ in side])
            self._advance(len(chunk))

    def _usable(self, where: str, document: Document | DataError) -> Document | None:
        """The document as it will be learned, or None for a dropped one. Raises DataError where the recipe says so."""
        if isinstance(document, DataError):
            self._bad(where, document)
            return None
        num_tokens, max_length = len(document.input_ids), self._data.max_length
        self._notes["end_markers_removed"] += document.num_markers
        if num_tokens > max_length:
            message = f"{num_tokens} tokens, and data.max_length is {max_length}"
            if self._data.too_long == "stop":
                raise DataError(
                    f"{where}: {message}", hint="raise data.max_length, or set data.too_long to drop or truncate_end"
                )
            if self._data.too_long == "drop":
                self._shortest_too_long = min(num_tokens, self._shortest_too_long or num_tokens)
                self._drop(where, "too long", message)
                return None
            self._notes["truncated"] += 1
            document = Document(document.input_ids[:max_length], document.supervised[:max_length])
        if document.num_targets == 0:
            self._drop(where, "nothing supervised", f"no supervised token in the first {max_length}")
            return None
        return document

    def _write_test(self, encoder: Encoder, eos_token: str) -> int:
        count = 0
        with (self._staging / "test.jsonl").open("w", encoding="utf-8") as stream:
            for chunk in _chunks(self._conversations(self._data.test.sources)):
                for conversation in chunk:
                    try:
                        text, ids = encoder.prompt(conversation)
                    except DataError as error:
                        self._bad(conversation.where, error)
                        continue
                    answer = without_end_markers(conversation, eos_token)[0].answer
                    _line(stream, where=conversation.where, prompt_text=text, prompt_ids=ids, answer=answer)
                    count += 1
                self._advance(len(chunk))
        if self._data.test.sources:
            self._require(count, "test")
        return count

    def _advance(self, num_rows: int) -> None:
        self._num_done += num_rows
        self._say("tokenize", self._num_done, self._num_rows)

    def _say(self, what: str, done: int, total: int | None) -> None:
        if self._progress is not None:
            self._progress(what, done, total)

    def _bad(self, where: str, error: DataError) -> None:
        if self._data.on_bad_row == "stop":
            raise error
        self._drop(where, "bad row", error.message)

    def _drop(self, where: str, reason: str, detail: str) -> None:
        self._dropped[reason] += 1
        self._first_detail.setdefault(reason, detail)
        _line(self._dropped_file, where=where, reason=reason, detail=detail.removeprefix(f"{where}: "))

    def _require(self, count: int, kind: str) -> None:
        if count:
            return
        if not self._dropped:
            raise DataError(
                f"no {kind} row is left: every one is held out for evaluation",
                hint="lower data.eval.split, now too large",
            )
        dropped = ", ".join(f"{number} {reason}" for reason, number in self._dropped.most_common())
        reason = self._dropped.most_common(1)[0][0]
        hint = f"the first: {self._first_detail[reason]}"
        if reason == "too long":
            shortest = f"the shortest has {self._shortest_too_long} tokens"
            hint = f"{shortest}: raise data.max_length, or set data.too_long: truncate_end"
        raise DataError(f"no {kind} row is left; dropped: {dropped}", hint=hint)


def _chunks(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, _CHUNK_ROWS)):
        yield chunk


def _line(stream: TextIO, **fields: object) -> None:
    stream.write(json.dumps(fields, ensure_ascii=False) + "\n")
