"""The folder in which data is being prepared: what is done in it is kept through any crash and never done twice.

scan/00000.arrow       what is known of a piece's rows, see scan.py
tokenizer/             appears whole
documents/00000.arrow  a piece's documents, see store.py
parts/00000.json       what else came of it; written last, so that the piece is done once it is there
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from launcher.data.prepare.encode import Part
from launcher.data.store import digest, mapped


@dataclass(frozen=True)
class Staging:
    """Writes and finds the results of pieces. Picklable."""

    folder: Path

    def keep_scan(self, number: int, table: pa.Table) -> int:
        """Write a piece's scan; returns its rows."""
        _write_table(self._scan(number), table)
        return int(table.num_rows)

    def has_scan(self, number: int) -> bool:
        return self._scan(number).exists()

    def scans(self, count: int) -> list[pa.Table]:
        """The scans of all pieces in order, mapped."""
        return [mapped(self._scan(number)) for number in range(count)]

    def keep_part(self, number: int, part: Part) -> int:
        """Write what a piece became; returns its documents."""
        _write_table(self._documents(number), part.documents)
        summary = {
            "digest": digest(part.documents),
            "num_documents": int(part.documents.num_rows),
            "dropped": part.dropped,
            "tests": part.tests,
            "slices": part.slices,
            "notes": dict(part.notes),
            "over": part.over,
            "num_training": part.num_training,
        }
        _write_text(self._part(number), json.dumps(summary, ensure_ascii=False))
        return int(part.documents.num_rows)

    def has_part(self, number: int) -> bool:
        return self._part(number).exists()

    def parts(self, count: int) -> Iterator[dict[str, Any]]:
        """{digest, num_documents, dropped, tests, slices, notes, over, num_training} of all pieces in order."""
        for number in range(count):
            yield json.loads(self._part(number).read_text(encoding="utf-8"))

    def keep_tokenizer(self, tokenizer: Any) -> Path:
        """Save a tokenizer; returns its folder."""
        beside = self.folder / ".tokenizer"
        shutil.rmtree(beside, ignore_errors=True)
        tokenizer.save_pretrained(beside)
        beside.rename(self.tokenizer)
        return self.tokenizer

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer, if it is there already."""
        return self.folder / "tokenizer"

    def clear(self) -> None:
        """Take away what only a crash would have needed."""
        for name in ("scan", "parts"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _scan(self, number: int) -> Path:
        return self.folder / "scan" / f"{number:05d}.arrow"

    def _documents(self, number: int) -> Path:
        return self.folder / "documents" / f"{number:05d}.arrow"

    def _part(self, number: int) -> Path:
        return self.folder / "parts" / f"{number:05d}.json"


def _write_table(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(exist_ok=True)
    beside = path.with_suffix(".new")
    with pa.ipc.new_file(str(beside), table.schema) as writer:
        writer.write_table(table)
    os.replace(beside, path)


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
