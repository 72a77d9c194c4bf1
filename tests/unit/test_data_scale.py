"""A million rows: memory stays flat, and everything that is found in them is found."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.plans import clean_plan, data_plan, held_out, source_plan
from tests.unit.test_data_build import scratch_model

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
PROCESSES = 2
MEASURED = """
import json, resource, sys, time
from pathlib import Path
from launcher.data.prepare import prepare
from launcher.plan.plan import DataPlan, ModelPlan
began = time.perf_counter()
model, data = ModelPlan.model_validate_json(sys.argv[1]), DataPlan.model_validate_json(sys.argv[2])
facts = prepare(model, data, seed=1, cache_dir=Path(sys.argv[3]), workers=int(sys.argv[4]))
peak = [resource.getrusage(who).ru_maxrss * 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps({"facts": facts.model_dump(), "peak": peak, "seconds": time.perf_counter() - began}))
"""


def write_rows(path: Path, count: int, repeats: int) -> Path:
    """`count` rows of 30 to 90 words, then `repeats` of them again."""
    draw = random.Random(3)
    words = ["".join(draw.choice("aeioulmnrst") for _ in range(draw.randrange(2, 9))) for _ in range(5000)]
    with path.open("w", encoding="utf-8") as stream:
        kept = []
        for number in range(count):
            question = " ".join(draw.choices(words, k=draw.randrange(10, 30)))
            answer = " ".join(draw.choices(words, k=draw.randrange(20, 60)))
            line = json.dumps({"question": f"{number}: {question}", "answer": answer}) + "\n"
            stream.write(line)
            if number < repeats:
                kept.append(line)
        stream.writelines(kept)
    return path


def measured(path: Path, cache: Path, near: float | None) -> dict[str, Any]:
    data = data_plan(source_plan(path), eval=held_out(0.001), clean=clean_plan(near_duplicates=near))
    arguments = [scratch_model(8192).model_dump_json(), data.model_dump_json(), str(cache), str(PROCESSES)]
    done = subprocess.run([sys.executable, "-c", MEASURED, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("near", [None, 0.8])
def test_a_million_rows_stay_under_4_gb(tmp_path: Path, near: float | None) -> None:
    """The parent and its processes together, counted as if nothing were shared."""
    peaks = {}
    for count in (100_000, 1_000_000):
        found = measured(write_rows(tmp_path / f"{count}.jsonl", count, repeats=1000), tmp_path / "cache", near)
        peaks[count] = found["peak"][0] + PROCESSES * found["peak"][1]
        facts = found["facts"]
        print(
            f"{count:,} rows, near {near}: parent {found['peak'][0] / 1e9:.2f} GB, a process "
            f"{found['peak'][1] / 1e9:.2f} GB, {facts['train_tokens']:,} tokens in {found['seconds']:.0f} s"
        )
        assert facts["dropped"] == {"duplicate": 1000}
        assert facts["train_documents"] + facts["eval_documents"] == count
    assert peaks[1_000_000] < 4e9
