"""The end of a preparation: parts become packs, lists, the report and the facts."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.data.pack import best_fit
from launcher.data.prepare import report as reports
from launcher.data.prepare.balance import Balance, balance
from launcher.data.prepare.decide import DUPLICATE, NEAR_DUPLICATE, Decisions
from launcher.data.prepare.encode import TOO_LONG
from launcher.data.prepare.rows import Rows
from launcher.data.prepare.staging import Staging
from launcher.data.store import Documents, Set, read_lists, read_weights, write_classes, write_lists
from launcher.errors import DataError
from launcher.plan.plan import DataFacts, HeldOutPlan

_SHOWN = ("where", "reason", "detail", "text")


class Assembly:
    """What lies in the staging folder once every piece is done."""

    def __init__(self, rows: Rows, sources: Sequence[int], staging: Staging, decisions: Decisions) -> None:
        self._rows, self._data, self._sources = rows, rows.data, sources
        self._staging, self._folder, self._decisions = staging, staging.folder, decisions
        self._parts = list(staging.parts(len(sources)))
        self._documents = documents = Documents(staging.folder)
        numbers = np.arange(len(documents), dtype=np.int32)
        training = documents.sets == Set.TRAIN
        self._train: NDArray[np.int32] = np.repeat(numbers[training], documents.copies[training])
        self._held_out = numbers[documents.sets == Set.EVAL]

    def pack(self) -> None:
        """Write packs.arrow, eval.arrow, classes.json, test.jsonl and dropped.jsonl.

        Raises DataError where a set has no row.
        """
        num_tests = sum(len(part["tests"]) for part in self._parts)
        self._require(len(self._train), "training", None)
        self._require(len(self._held_out), "evaluation", self._data.eval)
        self._require(num_tests, "test", self._data.test)
        train, packing = self._train, self._data.packing
        lengths = self._documents.lengths[train]
        packs = [train[p] for p in best_fit(lengths, self._data.max_length)] if packing else list(train[:, None])
        write_lists(self._folder / "packs.arrow", packs)
        write_classes(self._folder, self._decisions.classes, self._class_weights())
        write_lists(self._folder / "eval.arrow", [self._held_out] if len(self._held_out) else [])
        with (self._folder / "test.jsonl").open("w", encoding="utf-8") as stream:
            for part in self._parts:
                stream.writelines(json.dumps(test, ensure_ascii=False) + "\n" for test in part["tests"])
        # A row that could not be read may hold half a surrogate pair.
        with (self._folder / "dropped.jsonl").open("w", encoding="utf-8", errors="backslashreplace") as stream:
            for line in self._dropped:
                stream.write(json.dumps({name: line[name] for name in _SHOWN}, ensure_ascii=False) + "\n")

    def facts(self, target: Path, vocab_size: int) -> DataFacts:
        """The facts of what will be `target`."""
        documents, train, held_out = self._documents, self._train, self._held_out
        packs = read_lists(self._folder / "packs.arrow")
        content = hashlib.sha256(" ".join(part["digest"] for part in self._parts).encode())
        content.update(read_weights(self._folder).tobytes())
        for index in range(len(packs)):
            content.update(np.array([len(packs[index]), *packs[index]], dtype="<i4").tobytes())
        return DataFacts(
            folder=str(target),
            content_hash=content.hexdigest()[:16],
            train_rows=len(packs),
            train_documents=len(train),
            train_tokens=int(documents.lengths[train].sum()),
            train_supervised_tokens=int(documents.num_targets[train].sum()),
            eval_documents=len(held_out),
            eval_supervised_tokens=int(documents.num_targets[held_out].sum()),
            test_documents=sum(len(part["tests"]) for part in self._parts),
            dropped=dict(sorted(Counter(line["reason"] for line in self._left_out(range(len(self._parts)))).items())),
            vocab_size=vocab_size,
            formats={s.path: format for s, format in zip(self._data.sources, self._rows.formats, strict=True)},
        )

    def report(
        self, target: Path, seconds: Mapping[str, float], workers: int, notes: Mapping[str, int]
    ) -> reports.Report:
        """Everything that was counted, with `notes` beside those of the pieces."""
        data, documents, train, held_out = self._data, self._documents, self._train, self._held_out
        packs = read_lists(self._folder / "packs.arrow")
        prompts = np.array([len(test["prompt_ids"]) for part in self._parts for test in part["tests"]], dtype=np.int64)

        def described(numbers: NDArray[np.int32]) -> reports.SetReport:
            columns = documents.lengths[numbers], documents.num_targets[numbers], documents.num_turns[numbers]
            return reports.describe_set(*columns, data.max_length)

        return reports.build(
            key=target.name,
            data=data,
            sources=self._source_reports(),
            train=described(train),
            held_out=described(held_out),
            test=reports.describe_set(prompts, None, None, data.max_length),
            long=reports.describe_long(
                [length for part in self._parts for length in part["over"]],
                sum(part["num_training"] for part in self._parts),
                data.max_length,
            ),
            packs=reports.describe_packs(packs.sums(documents.lengths), packs.lengths, data.max_length)
            if data.packing
            else None,
            duplicates=reports.Duplicates(**self._decisions.repeats),
            labels=self._label_reports(),
            notes=self._notes() + Counter(notes),
            seconds=seconds,
            workers=workers,
        )

    @property
    def _classes(self) -> NDArray[np.int32]:
        """[documents in an epoch] class numbers."""
        return self._documents.labels[self._train]

    def _class_weights(self) -> list[float]:
        """What a supervised token of each class counts, by the documents that there are: some rows were too long."""
        ones = np.ones(len(self._train), dtype=np.int32)
        nothing = np.zeros((len(self._train), 2), dtype=np.uint64)
        how: Balance = "weights" if self._data.balance == "weights" else "none"
        _, weights = balance(how, self._classes, ones, nothing)
        found = np.ones(len(self._decisions.classes))
        found[self._classes[self._classes >= 0]] = weights[self._classes >= 0]
        return [round(float(weight), 6) for weight in found]

    @cached_property
    def _dropped(self) -> list[dict[str, Any]]:
        """Every row that was left out, in the order of the sources."""
        lines: list[dict[str, Any]] = []
        for number, (scan, part) in enumerate(zip(self._staging.scans(len(self._parts)), self._parts, strict=True)):
            start = int(self._decisions.starts[number])
            found = list(part["dropped"])
            unfit = np.flatnonzero(scan["reason"].is_valid().to_numpy())
            found += [{"row": int(r)} | scan.select(_SHOWN).slice(r, 1).to_pylist()[0] for r in unfit]
            for row in np.flatnonzero(self._decisions.of_piece(number)[0] < 0).tolist():
                if decided := self._decisions.dropped.get(start + row):
                    where = scan["where"][row].as_py()
                    found.append({"row": row, "where": where, "reason": decided[0], "detail": decided[1], "text": ""})
            lines += [{"piece": number} | line for line in sorted(found, key=lambda line: int(line["row"]))]
        return lines

    def _left_out(self, pieces: Iterable[int]) -> list[dict[str, Any]]:
        """The lines of these pieces whose rows are left out as a whole."""
        numbers = set(pieces)
        return [line for line in self._dropped if line["piece"] in numbers and not line.get("partly")]

    def _source_reports(self) -> list[reports.SourceReport]:
        data, found = self._data, []
        sizes = np.diff(self._decisions.starts)
        for index, (source, format) in enumerate(zip(data.sources, self._rows.formats, strict=True)):
            held_out = index - len(data.train)
            role = "train" if held_out < 0 else "eval" if held_out < len(data.eval.sources) else "test"
            mine = {number for number, of in enumerate(self._sources) if of == index}
            dropped = [line for line in self._dropped if line["piece"] in mine and not line.get("partly")]
            num_rows = int(sum(sizes[number] for number in mine))
            found.append(
                reports.SourceReport(
                    path=source.path,
                    role=role,
                    format=format,
                    rows=num_rows,
                    used=num_rows - len({(line["piece"], line["row"]) for line in dropped}),
                    dropped=dict(Counter(line["reason"] for line in dropped)),
                )
            )
        return found

    def _label_reports(self) -> dict[str, reports.LabelReport]:
        decisions = self._decisions
        copies = np.bincount(self._classes[self._classes >= 0], minlength=len(decisions.classes))
        columns = zip(decisions.classes, decisions.class_rows, copies, read_weights(self._folder), strict=False)
        return {
            name: reports.LabelReport(rows=int(rows), copies=int(times), weight=float(weight))
            for name, rows, times, weight in columns
        }

    def _notes(self) -> Counter[str]:
        notes: Counter[str] = Counter()
        for part in self._parts:
            notes.update(part["notes"])
        for scan in self._staging.scans(len(self._parts)):
            notes["mended"] += int(np.count_nonzero(scan["mended"].to_numpy()))
            notes["language_undecided"] += int(np.count_nonzero(scan["untold"].to_numpy()))
        notes["partly_left_out"] += sum(bool(line.get("partly")) for line in self._dropped)
        return notes

    def _require(self, count: int, kind: str, asked_for: HeldOutPlan | None) -> None:
        """Raise DataError where a set is empty that should not be."""
        if count or (asked_for is not None and not asked_for.sources and not asked_for.rows):
            return
        training = len(self._data.train)
        pieces = [n for n, source in enumerate(self._sources) if source < training or kind != "training"]
        dropped = self._left_out(pieces)
        if not dropped:
            raise DataError(f"no {kind} row is left", hint="every row went to another set: hold out fewer")
        reasons = Counter(line["reason"] for line in dropped)
        said = ", ".join(f"{number} {reason}" for reason, number in reasons.most_common())
        # Rows that repeat others are seldom what emptied a set.
        telling = [reason for reason, _ in reasons.most_common() if reason not in (DUPLICATE, NEAR_DUPLICATE)]
        telling = telling or list(reasons)
        first = next(line for line in dropped if line["reason"] == telling[0])
        hint = f"the first: {first['where']}: {first['detail']}"
        if first["reason"] == TOO_LONG:
            shortest = min(line["num_tokens"] for line in dropped if line["reason"] == TOO_LONG)
            hint = f"the shortest has {shortest} tokens: raise data.max_length, or set data.too_long: truncate_end"
        raise DataError(f"no {kind} row is left; dropped: {said}", hint=hint)
