"""Packing beside TRL's best fit and a plain first fit, on this machine, in one run.

`python -m launcher.bench.packing --data gsm8k/train.jsonl` (needs `pip install 'slipway[bench]'`). Every contender gets
the same documents in memory and gives rows; ours and first fit give the documents' numbers, TRL's `pack_dataset` the
rows themselves, with the tokens moved, because it knows no other way. Rows are also dealt out to ranks: in the order
that they come, and by the cost of their attention, as ours are.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.bench.against_trl import machine, publish
from launcher.bench.preparation import make_tokenizer, prepared
from launcher.data.loader import attention_cost
from launcher.data.pack import best_fit

RANKS, ROWS_A_STEP = 8, 64
Lengths = NDArray[np.int64]
Packed = list[NDArray[np.int32]]


def first_fit(lengths: Lengths, capacity: int) -> Packed:
    """Each document, in the order they come, into the first row that has room."""
    rooms = np.zeros(len(lengths), dtype=np.int64)
    rows: list[list[int]] = []
    for document, length in enumerate(lengths.tolist()):
        row = int((rooms[: len(rows)] >= length).argmax()) if rows else 0
        if not rows or rooms[row] < length:
            row = len(rows)
            rows.append([])
            rooms[row] = capacity
        rows[row].append(document)
        rooms[row] -= length
    return [np.array(row, dtype=np.int32) for row in rows]


def trl_best_fit(lengths: Lengths, capacity: int) -> Callable[[], Packed]:
    """TRL's `pack_dataset`, over rows of tokens that name their document."""
    import datasets
    from trl import pack_dataset

    rows = datasets.Dataset.from_dict({"input_ids": [[number] * n for number, n in enumerate(lengths.tolist())]})

    def pack() -> Packed:
        packed = pack_dataset(rows, capacity, strategy="bfd", map_kwargs={"num_proc": 1})
        return [np.array(list(dict.fromkeys(ids)), dtype=np.int32) for ids in packed["input_ids"]]

    return pack


def imbalance(lengths: Lengths, packs: Packed, by_cost: bool) -> float:
    """How much longer steps take because ranks wait for the slowest: 0 where all rows of a micro step cost the same."""
    costs = np.array([attention_cost(lengths[pack]).sum() for pack in packs])
    order = np.random.default_rng(0).permutation(len(packs))
    waited = spent = 0.0
    for start in range(0, len(order) - ROWS_A_STEP + 1, ROWS_A_STEP):
        step = costs[order[start : start + ROWS_A_STEP]]
        step = (np.sort(step)[::-1] if by_cost else step).reshape(-1, RANKS)
        waited += step.max(1).sum()
        spent += step.mean(1).sum()
    return waited / spent - 1


def measure(name: str, lengths: Lengths, capacity: int) -> list[dict[str, Any]]:
    """All contenders on one set of documents, three times each, the fastest taken."""
    contenders: dict[str, Callable[[], Packed]] = {
        "Slipway": lambda: best_fit(lengths, capacity),
        "first fit": lambda: first_fit(lengths, capacity),
        "TRL `bfd`": trl_best_fit(lengths, capacity),
    }
    found = []
    for contender, pack in contenders.items():
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            packs = pack()
            seconds.append(time.perf_counter() - began)
        assert sorted(np.concatenate(packs).tolist()) == list(range(len(lengths)))
        found.append(
            {
                "documents": name,
                "contender": contender,
                "capacity": capacity,
                "seconds": seconds,
                "documents_per_s": len(lengths) / min(seconds),
                "rows": len(packs),
                "bound": int(-(-lengths.sum() // capacity)),
                "padding": 1 - float(lengths.sum()) / (len(packs) * capacity),
                "waiting": imbalance(lengths, packs, by_cost=False),
                "waiting_by_cost": imbalance(lengths, packs, by_cost=True),
            }
        )
        sys.stderr.write(f"{name}, {contender}: {len(lengths) / min(seconds):,.0f} documents/s\n")
    return found


def page(found: dict[str, Any]) -> str:
    """The Markdown page of a comparison."""
    where = found["machine"]
    lines = [
        "| documents | row | contender | documents/s | rows (at least) | padding | waiting, by order | by cost |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in found["results"]:
        cells = [
            one["documents"],
            f"{one['capacity']:,}",
            one["contender"],
            f"{one['documents_per_s']:,.0f}",
            f"{one['rows']:,} ({one['bound']:,})",
            f"{one['padding']:.2%}",
            f"{one['waiting']:.2%}",
            f"{one['waiting_by_cost']:.2%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    rows = "\n".join(lines)
    versions = ", ".join(f"{name} {version}" for name, version in where["packages"].items())
    return f"""# Packing

Measured on {where["date"]} on {where["cpu"]}, {where["cpus"]} CPUs, load {where["load_before"]:.1f} when it began;
Python {where["python"]}, {versions}.

    {found["command"]}

{rows}

- The fastest of three runs. Ours and first fit give document numbers; TRL's time includes moving the tokens, and it
  packs 1,000 documents at a time, which is why it needs more rows.
- Made up: lengths drawn from a log-normal distribution with a median of 300 tokens, cut at the row.
- Waiting: {ROWS_A_STEP} rows a step over {RANKS} ranks, one row at a time; how much longer a step takes because all
  ranks wait for the row that costs most, by the count of attention and linear layers (`attention_cost`). "By order"
  deals rows out as they come, "by cost" as ours are: sorted within the global batch, which holds the same rows either
  way.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="JSONL of question and answer, such as GSM8K's")
    parser.add_argument("--out", type=Path, help="folder for the page and its raw numbers")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="slipway-bench-") as scratch:
        make_tokenizer(chosen.data, Path(scratch) / "tokenizer")
        lengths = prepared(chosen.data, Path(scratch) / "tokenizer", 2048, 1, Path(scratch))[1]
    made_up = np.clip(np.random.default_rng(1).lognormal(np.log(300), 1.0, 100_000), 8, 4096).astype(np.int64)
    found: dict[str, Any] = {
        "machine": machine(),
        "command": f"python -m launcher.bench.packing --data {chosen.data.name}",
        "results": [*measure("GSM8K", lengths, 2048), *measure("made up", made_up, 4096)],
    }
    publish(found, page(found), chosen.out, "packing")


if __name__ == "__main__":
    main()
