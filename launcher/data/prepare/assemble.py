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
from launcher.data.prepare.replay import replayed
from launcher.data.prepare.roles import Role, roles
from launcher.data.prepare.rows import Rows
from launcher.data.prepare.staging import Staging
from launcher.data.slices import check_slices
from launcher.data.store import Documents, Set, read_lists, read_weights, write_classes, write_lists, write_slices
from launcher.errors import DataError
from launcher.plan.plan import DataFacts

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
        share = self._data.replay.share if self._data.replay else 0.0
        self._replayed = replayed(documents, numbers[documents.sets == Set.REPLAY], len(self._train), share)
        self._learned = np.concatenate([self._train, self._replayed])
        self._held_out = numbers[documents.sets == Set.EVAL]
        self._retain = numbers[documents.sets == Set.RETAIN]

    def pack(self) -> None:
        """Write packs.arrow, eval.arrow, retain.arrow, slices.json, classes.json, test.jsonl and dropped.jsonl.

        Raises DataError where a set has no row.
        """
        num_tests = sum(len(part["tests"]) for part in self._parts)
        data, learned = self._data, self._learned
        self._require(len(self._train), "training", True, ("train",))
        self._require(len(self._replayed), "replay", bool(data.replay), ("replay",))
        self._require(len(self._held_out), "evaluation", bool(data.eval.sources or data.eval.rows))
        self._require(num_tests, "test", bool(data.test.sources or data.test.rows))
        self._require(len(self._retain), "retain", bool(data.retain), ("retain",))
        lengths = self._documents.lengths[learned]
        packs = [learned[p] for p in best_fit(lengths, data.max_length)] if data.packing else list(learned[:, None])
        write_lists(self._folder / "packs.arrow", packs)
        predicted = self._data.head is not None
        write_classes(self._folder, self._decisions.classes, self._class_weights(), predicted)
        write_lists(self._folder / "eval.arrow", [self._held_out] if len(self._held_out) else [])
        write_lists(self._folder / "retain.arrow", [self._retain] if len(self._retain) else [])
        if self._data.slices:
            write_slices(self._folder, self._slices())
        with (self._folder / "test.jsonl").open("w", encoding="utf-8") as stream:
            for part in self._parts:
                stream.writelines(json.dumps(test, ensure_ascii=False) + "\n" for test in part["tests"])
        # A row that could not be read may hold half a surrogate pair.
        with (self._folder / "dropped.jsonl").open("w", encoding="utf-8", errors="backslashreplace") as stream:
            for line in self._dropped:
                stream.write(json.dumps({name: line[name] for name in _SHOWN}, ensure_ascii=False) + "\n")

    def _slices(self) -> dict[str, list[str]]:
        """{column: value of each document that is held out for evaluation}. Raises DataError for a useless column."""
        columns, found = self._data.slices, [row for part in self._parts for row in part["slices"]]
        check_slices(columns, found + [test["slices"] for part in self._parts for test in part["tests"]])
        return {column: [row[column] for row in found] for column in columns}

    def facts(self, target: Path, vocab_size: int) -> DataFacts:
        """The facts of what will be `target`."""
        documents, learned, held_out = self._documents, self._learned, self._held_out
        packs = read_lists(self._folder / "packs.arrow")
        # What is only measured on decides no number: a run may begin with other rows to be retained.
        digests = [part["digest"] for part, role in zip(self._parts, self._roles, strict=True) if role != "retain"]
        content = hashlib.sha256(" ".join(digests).encode())
        content.update(read_weights(self._folder).tobytes())
        for index in range(len(packs)):
            content.update(np.array([len(packs[index]), *packs[index]], dtype="<i4").tobytes())
        return DataFacts(
            folder=str(target),
            content_hash=content.hexdigest()[:16],
            train_rows=len(packs),
            train_documents=len(learned),
            train_tokens=int(documents.lengths[learned].sum()),
            train_supervised_tokens=int(documents.num_targets[learned].sum()),
            eval_documents=len(held_out),
            eval_supervised_tokens=int(documents.num_targets[held_out].sum()),
            test_documents=sum(len(part["tests"]) for part in self._parts),
            dropped=dict(sorted(Counter(line["reason"] for line in self._left_out(range(len(self._parts)))).items())),
            vocab_size=vocab_size,
            formats={s.path: format for s, format in zip(self._data.sources, self._rows.formats, strict=True)},
            classes=self._decisions.classes if self._data.head is not None else (),
            retain_documents=len(self._retain),
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
            replay=described(self._replayed) if data.replay else None,
            retain=described(self._retain) if data.retain else None,
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
    def _roles(self) -> list[Role]:
        """[pieces] what the rows of each are for."""
        found = roles(self._data)
        return [found[source] for source in self._sources]

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
        described = zip(data.sources, roles(data), self._rows.formats, strict=True)
        for index, (source, role, format) in enumerate(described):
            mine = {number for number, of in enumerate(self._sources) if of == index}
            dropped = [line for line in self._dropped if line["piece"] in mine and not line.get("partly")]
            num_rows = int(sum(sizes[number] for number in mine))
            used = num_rows - len({(line["piece"], line["row"]) for line in dropped})
            found.append(
                reports.SourceReport(
                    path=source.path,
                    role=role,
                    format=format,
                    rows=num_rows,
                    used=used if role != "replay" else self._drawn_of(mine),
                    dropped=dict(Counter(line["reason"] for line in dropped)),
                )
            )
        return found

    def _drawn_of(self, pieces: set[int]) -> int:
        """How many rows of these pieces are replayed at all."""
        of_piece = np.repeat(np.arange(len(self._parts)), [part["num_documents"] for part in self._parts])
        drawn = [number for number in set(self._replayed.tolist()) if of_piece[number] in pieces]
        return len({self._documents.where(number) for number in drawn})

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

    def _require(self, count: int, kind: str, asked_for: bool, roles: tuple[Role, ...] = ()) -> None:
        """Raise DataError where a set is empty that should not be; its rows come from sources of `roles`, or any."""
        if count or not asked_for:
            return
        dropped = self._left_out(n for n, role in enumerate(self._roles) if not roles or role in roles)
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
