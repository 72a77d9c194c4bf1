"""A prepared folder made of given documents, as preparation would write it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from launcher.data.masks import Document
from launcher.data.store import DOCUMENT_SCHEMA, Set, as_lists, write_classes, write_lists


def write_prepared(
    folder: Path,
    train: Sequence[Document],
    held_out: Sequence[Document] = (),
    packs: Sequence[Sequence[int]] | None = None,
    weights: Sequence[float] | None = None,
    per_file: int = 40,
) -> None:
    """`packs` are of training documents, one each where left out. Several files and batches, as for many."""
    (folder / "documents").mkdir(parents=True)
    count = 0
    for name, kind, documents in (("train", Set.TRAIN, train), ("eval", Set.EVAL, held_out)):
        for start in range(0, len(documents), per_file):
            some = documents[start : start + per_file]
            table = pa.table(
                {
                    "input_ids": as_lists([d.input_ids for d in some]),
                    "supervised": as_lists([d.supervised for d in some]),
                    "num_targets": [d.num_targets for d in some],
                    "num_turns": [1] * len(some),
                    "label": [start + i if weights and kind is Set.TRAIN else -1 for i in range(len(some))],
                    "set": [int(kind)] * len(some),
                    "copies": [1] * len(some),
                    "where": [f"{name}.jsonl:{start + i + 1}" for i in range(len(some))],
                },
                schema=DOCUMENT_SCHEMA,
            )
            with pa.ipc.new_file(str(folder / "documents" / f"{count:05d}.arrow"), DOCUMENT_SCHEMA) as writer:
                writer.write_table(table, max_chunksize=max(1, per_file // 2))
            count += 1
    write_classes(folder, [str(i) for i in range(len(weights or ()))], weights or ())
    rows = [[i] for i in range(len(train))] if packs is None else packs
    write_lists(folder / "packs.arrow", [np.array(pack, dtype=np.int32) for pack in rows])
    numbers = np.arange(len(train), len(train) + len(held_out), dtype=np.int32)
    write_lists(folder / "eval.arrow", [numbers] if len(numbers) else [])
