"""Making prepared data: read every piece, decide on all rows together, tokenize every piece, pack.

Both readings go over pieces, so that processes and machines can share them out; only the decisions between them, over a
few columns a row, and the packing, over lengths, look at everything at once.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np

from launcher.data.classified import for_texts, text_of
from launcher.data.clean import contamination
from launcher.data.conversation import Conversation
from launcher.data.prepare.assemble import Assembly
from launcher.data.prepare.decide import Decisions, decide
from launcher.data.prepare.encode import Encode, Job
from launcher.data.prepare.rows import Rows, benchmark_texts, format_of
from launcher.data.prepare.scan import Scan
from launcher.data.prepare.staging import Staging
from launcher.data.prepare.work import Progress, Spread, processes
from launcher.data.sources import Piece, pieces
from launcher.data.store import Set
from launcher.data.tokenizer import (
    is_encoder,
    is_trained,
    load_tokenizer,
    own_tokenizer,
    train_tokenizer,
    trained_vocab_size,
    training_text,
    with_template,
)
from launcher.plan.plan import DataFacts, DataPlan, ModelPlan

T = TypeVar("T")
BYTES_FOR_SEVERAL_PROCESSES = 64 * 2**20
"""Below this much text one process, whose tokenizer uses every core by itself, does about as well: on two cores 0.71M
tokens a second against 0.85M by two (docs/benchmarks)."""
PIECES, PIECE_BYTES = 64, (2**19, 2**25)
"""Text is cut into about so many pieces, of at least and at most so many bytes: enough for every process to have some,
few enough files. It follows from the data alone, so that every machine cuts alike."""
PIECE_ROWS = 5_000
"""Of tables."""


class Build:
    """One preparation, in `folder`; what an earlier one that was killed has done there is not done again."""

    def __init__(
        self,
        model: ModelPlan,
        data: DataPlan,
        seed: int,
        folder: Path,
        progress: Progress | None,
        workers: int | None,
        spread: Spread | None,
        num_bytes: int,
    ) -> None:
        self._num_bytes = num_bytes
        self._model, self._data, self._seed = model, data, seed
        self._folder, self._staging = folder, Staging(folder)
        self._progress, self._workers, self._given_spread = progress, workers, spread
        self._seconds: dict[str, float] = {}
        self._notes: Counter[str] = Counter()

    def run(self, target: Path) -> DataFacts:
        """Write everything but facts.json, and return the facts of what will be `target`."""
        decisions = self._timed("read", self._decide)
        tokenizer_folder = self._timed("tokenizer", lambda: self._tokenizer(decisions))
        self._timed("tokenize", lambda: self._encode(decisions, tokenizer_folder))
        self._say("pack", 0, None)
        assembly = Assembly(self._rows, [piece.source for piece in self._pieces], self._staging, decisions)
        self._timed("pack", assembly.pack)
        facts = assembly.facts(target, self._vocab_size)
        self._say("pack", facts.train_documents, facts.train_documents)
        assembly.report(target, self._seconds, self._num_workers, self._notes).save(self._folder / "report.json")
        self._staging.clear()
        return facts

    @cached_property
    def _rows(self) -> Rows:
        return Rows(self._data, tuple(format_of(source, self._data) for source in self._data.sources))

    @cached_property
    def _pieces(self) -> list[Piece]:
        least, most = PIECE_BYTES
        num_bytes = min(max(self._num_bytes // PIECES, least), most)
        found = (
            pieces(source, index, num_bytes=num_bytes, num_rows=PIECE_ROWS)
            for index, source in enumerate(self._data.sources)
        )
        return [piece for of_source in found for piece in of_source]

    @cached_property
    def _num_workers(self) -> int:
        if self._workers is not None:
            return self._workers
        return os.cpu_count() or 1 if self._num_bytes > BYTES_FOR_SEVERAL_PROCESSES else 1

    @cached_property
    def _spread(self) -> Spread:
        return self._given_spread or processes(self._num_workers)

    def _decide(self) -> Decisions:
        scan = Scan(self._rows, self._benchmarks())
        todo = [(i, piece) for i, piece in enumerate(self._pieces) if not self._staging.has_scan(i)]
        done = 0
        for num_rows in self._spread(scan, todo, self._staging.keep_scan):
            done += num_rows
            self._say("read", done, None)
        sources = [piece.source for piece in self._pieces]
        return decide(self._data, sources, self._staging.scans(len(sources)))

    def _benchmarks(self) -> contamination.Contamination | None:
        sources = self._data.clean.contamination
        texts = benchmark_texts(sources, self._data, self._notes)
        return contamination.build(texts) if sources else None

    def _tokenizer(self, decisions: Decisions) -> Path:
        if self._staging.tokenizer.is_dir():
            return self._staging.tokenizer
        model, classifies = self._model, self._data.head is not None
        if is_trained(model):
            encoder = classifies and is_encoder(str((model.scratch or {})["model_type"]))
            trained = train_tokenizer(self._training_texts(decisions), trained_vocab_size(model), encoder)
        if classifies:
            tokenizer = for_texts(trained if is_trained(model) else own_tokenizer(model), self._data)
        elif is_trained(model):
            tokenizer = with_template(trained, model.chat_template, model.template_kwargs, model.add_tokens)
        else:
            tokenizer = load_tokenizer(model)
        return self._staging.keep_tokenizer(tokenizer)

    def _training_texts(self, decisions: Decisions) -> Iterator[str]:
        """The words of every training row; a held-out one stays unseen by the vocabulary too."""
        for number, piece in enumerate(self._pieces):
            sets, _, _ = decisions.of_piece(number)
            for index, (_, item) in enumerate(self._rows(piece)):
                if sets[index] in (Set.TRAIN, Set.REPLAY) and isinstance(item, Conversation):
                    yield training_text(item) if self._data.head is None else text_of(item)
            self._say("train the tokenizer", decisions.starts[number + 1], decisions.starts[-1])

    def _encode(self, decisions: Decisions, tokenizer_folder: Path) -> None:
        encode = Encode(self._rows, tokenizer_folder, self._seed)
        self._vocab_size = encode.vocab_size()  # loads the tokenizer here, so that forked processes have it
        todo = [
            (number, Job(piece, *decisions.of_piece(number)))
            for number, piece in enumerate(self._pieces)
            if not self._staging.has_part(number)
        ]
        sizes = np.diff(decisions.starts)
        done = int(sizes.sum() - sum(sizes[number] for number, _ in todo))
        results = self._spread(encode, todo, self._staging.keep_part)
        for (number, _), _ in zip(todo, results, strict=True):
            done += int(sizes[number])
            self._say("tokenize", done, int(sizes.sum()))

    def _say(self, what: str, done: int, total: int | None) -> None:
        if self._progress is not None:
            self._progress(what, done, total)

    def _timed(self, phase: str, work: Callable[[], T]) -> T:
        began = time.perf_counter()
        result = work()
        self._seconds[phase] = time.perf_counter() - began
        return result
