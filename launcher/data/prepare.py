"""Data once tokenized and packed, kept under a key of everything that decided it.

    <key>/train.arrow  eval.arrow  packs.arrow     see store.py
          test.jsonl                               {where, prompt_text, prompt_ids, answer}
          dropped.jsonl                            {where, reason, detail}: every row that was left out
          notes.json                               counts of what was changed without leaving a row out
          tokenizer/                               with the chat template in effect
          facts.json                               DataFacts

The folder appears whole or not at all: it is written beside its place, under a lock, and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeVar

from filelock import FileLock

from launcher.data.formats import Conversation, Format, detect, to_conversation
from launcher.data.sources import fingerprint, read
from launcher.data.split import is_held_out
from launcher.data.tokenizer import is_trained, tokenizer_name, trained_vocab_size
from launcher.errors import DataError, RunFolderError
from launcher.plan.plan import DataFacts, DataPlan, ModelPlan, SourcePlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from launcher.data.store import DocumentWriter
    from launcher.data.template import Document, Encoder

CODE_VERSION = 1
"""Raised with every change that gives other tokens, masks or packs for the same input."""

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, the rows done and, where known, the rows in all."""

_CHUNK_ROWS = 1000
_TOKENIZER_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".py"}
T = TypeVar("T")


def prepare(
    model: ModelPlan, data: DataPlan, *, seed: int, cache_dir: Path, progress: Progress | None = None
) -> DataFacts:
    """Tokenize, split and pack `data` for `model`, or find it done in `cache_dir`.

    Nothing here is drawn at random; `seed` is part of the key only, as everything of the trajectory that the data's
    order depends on. Raises DataError for data that cannot be used, ModelError for the tokenizer and RunFolderError
    where `cache_dir` cannot be written.
    """
    if not data.train:
        raise DataError("data.train names no file", hint="add data.train: [{path: my.jsonl}]")
    key, num_rows = _key(model, data, seed)
    folder = Path(os.path.abspath(cache_dir)) / key
    if found := _find(folder):
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if found := _find(folder):  # another process made it while this one waited
                return found
            staging = folder.with_name(f".{key}.staging")
            shutil.rmtree(staging, ignore_errors=True)  # left by a process that was killed
            staging.mkdir()
            try:
                facts = _Preparation(model, data, staging, _Meter(progress, num_rows)).run(folder)
                (staging / "facts.json").write_text(facts.model_dump_json(indent=2) + "\n", encoding="utf-8")
                staging.rename(folder)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise RunFolderError(
            f"{error.filename or folder.parent}: the prepared data cannot be written: {error.strerror or error}",
            hint="free some space there, or give another folder",
        ) from error
    return facts


def _find(folder: Path) -> DataFacts | None:
    try:
        text = (folder / "facts.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    # The cache may have been moved since.
    return DataFacts.model_validate_json(text).model_copy(update={"folder": str(folder)})


def _key(model: ModelPlan, data: DataPlan, seed: int) -> tuple[str, int | None]:
    """The cache's key, and how many rows the sources hold where that is known."""
    prints = [fingerprint(source) for source in (*data.train, *data.eval, *data.test)]
    parts = {
        "code": CODE_VERSION,
        "files": [digest for digest, _ in prints],
        "data": data.model_dump(mode="json"),
        "tokenizer": _tokenizer_identity(model),
        "chat_template": model.chat_template,
        "seed": seed,
    }
    counts = [count for _, count in prints if count is not None]
    total = sum(counts) if len(counts) == len(prints) else None
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16], total


def _tokenizer_identity(model: ModelPlan) -> list[str | int | None]:
    if is_trained(model):
        return ["trained", trained_vocab_size(model)]
    name, revision = tokenizer_name(model)
    folder = Path(name)
    if not folder.is_dir():
        return [name, revision]
    files = sorted(path for path in folder.iterdir() if path.suffix in _TOKENIZER_SUFFIXES)
    return [f"{path.name}:{hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files]


class _Meter:
    """Passes progress on, a chunk at a time."""

    def __init__(self, progress: Progress | None, num_rows: int | None) -> None:
        self._progress = progress
        self._num_rows = num_rows
        self._done = 0

    def advance(self, num_rows: int) -> None:
        self._done += num_rows
        self.say("tokenize", self._done, self._num_rows)

    def say(self, what: str, done: int, total: int | None) -> None:
        if self._progress is not None:
            self._progress(what, done, total)


class _Preparation:
    """One pass from sources to files in `staging`."""

    def __init__(self, model: ModelPlan, data: DataPlan, staging: Path, meter: _Meter) -> None:
        self._model, self._data, self._staging, self._meter = model, data, staging, meter
        self._formats: dict[str, str] = {}
        self._dropped: Counter[str] = Counter()
        self._notes: Counter[str] = Counter(end_markers_removed=0, truncated=0, held_out=0)
        self._shortest_too_long: int | None = None
        self._first_detail: dict[str, str] = {}

    def run(self, folder: Path) -> DataFacts:
        """Write everything but facts.json, and return the facts of what will be `folder`."""
        # Imported here: finding prepared data must not cost what making it does.
        import numpy as np

        from launcher.data.pack import best_fit
        from launcher.data.store import DocumentWriter, write_packs
        from launcher.data.template import Encoder

        data, staging = self._data, self._staging
        tokenizer = self._tokenizer()
        tokenizer.save_pretrained(staging / "tokenizer")
        encoder = Encoder(tokenizer, data.supervise)
        with (
            (staging / "dropped.jsonl").open("w", encoding="utf-8") as self._dropped_file,
            DocumentWriter(staging / "train.arrow") as train,
            DocumentWriter(staging / "eval.arrow") as held_out,
        ):
            self._write(encoder, data.train, train, held_out, data.eval_split or 0.0)
            self._require(len(train.lengths), "training")
            self._notes["held_out"] = len(held_out.lengths)
            if data.eval:
                self._write(encoder, data.eval, held_out, held_out, 0.0)
                self._require(len(held_out.lengths), "evaluation")
            num_test = self._write_test(encoder, tokenizer.eos_token)
        self._meter.say("pack", 0, len(train.lengths))
        lengths = np.array(train.lengths, dtype=np.int64)
        packs = (
            best_fit(lengths, data.max_length)
            if data.packing
            else list(np.arange(len(lengths), dtype=np.int32)[:, None])
        )
        write_packs(staging / "packs.arrow", packs)
        self._meter.say("pack", len(train.lengths), len(train.lengths))
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
        from launcher.data.tokenizer import load_tokenizer, train_tokenizer, training_text, with_template

        if not is_trained(self._model):
            return load_tokenizer(self._model)
        share = self._data.eval_split or 0.0

        def texts() -> Iterator[str]:
            # A bad row is left to the pass that counts it; a held-out one stays unseen by the vocabulary too.
            for done, conversation in enumerate(self._conversations(self._data.train, report=False), start=1):
                if not is_held_out(conversation, share):
                    yield training_text(conversation)
                if done % _CHUNK_ROWS == 0:
                    self._meter.say("train the tokenizer", done, None)

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
            self._meter.advance(len(chunk))

    def _usable(self, where: str, document: Document | DataError) -> Document | None:
        """The document as it will be learned, or None where it is dropped. Raises DataError where the recipe says stop."""
        from launcher.data.template import Document

        if isinstance(document, DataError):
            return self._bad(where, document)
        num_tokens, max_length = len(document.input_ids), self._data.max_length
        self._notes["end_markers_removed"] += document.num_markers
        if num_tokens > max_length:
            message = f"{num_tokens} tokens, and data.max_length is {max_length}"
            if self._data.too_long == "stop":
                raise DataError(
                    f"{where}: {message}", hint="raise data.max_length, or set data.too_long to drop or truncate"
                )
            if self._data.too_long == "drop":
                self._shortest_too_long = min(num_tokens, self._shortest_too_long or num_tokens)
                return self._drop(where, "too long", message)
            self._notes["truncated"] += 1
            document = Document(document.input_ids[:max_length], document.supervised[:max_length])
        if document.num_targets == 0:
            return self._drop(where, "nothing supervised", f"no supervised token in the first {max_length}")
        return document

    def _write_test(self, encoder: Encoder, eos_token: str) -> int:
        from launcher.data.template import without_end_markers

        count = 0
        with (self._staging / "test.jsonl").open("w", encoding="utf-8") as stream:
            for chunk in _chunks(self._conversations(self._data.test)):
                for conversation in chunk:
                    try:
                        text, ids = encoder.prompt(conversation)
                    except DataError as error:
                        self._bad(conversation.where, error)
                        continue
                    answer = without_end_markers(conversation, eos_token)[0].answer
                    _line(stream, where=conversation.where, prompt_text=text, prompt_ids=ids, answer=answer)
                    count += 1
                self._meter.advance(len(chunk))
        if self._data.test:
            self._require(count, "test")
        return count

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
            hint = f"raise data.max_length (the shortest has {self._shortest_too_long} tokens), or set data.too_long: truncate"
        raise DataError(f"no {kind} row is left; dropped: {dropped}", hint=hint)


def _chunks(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, _CHUNK_ROWS)):
        yield chunk


def _line(stream: TextIO, **fields: object) -> None:
    stream.write(json.dumps(fields, ensure_ascii=False) + "\n")
