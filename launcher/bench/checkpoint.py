"""Saving and loading beside DeepSpeed's own checkpoints and plain DCP, on this machine, in one run.

`python -m launcher.bench.checkpoint` (needs `pip install 'slipway[bench]'`) trains a scratch Llama on made-up text, on
one rank a GPU or two over gloo on a CPU, and saves it in five ways, in turns, from one engine in the same processes:
how long the loop is held up, how much a stretch of training is slowed down, what lies on the disk, what memory it took.
Then the checkpoints are loaded: by the same ranks, by one rank (DeepSpeed's through its universal conversion), and at
another ZeRO stage. No Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml

from launcher.bench.against_trl import machine, publish
from launcher.bench.checkpoint_page import TITLES, page
from launcher.driver.start import base_model_process, create_run_folder, decide, planned
from launcher.errors import RunFailed, UserError
from launcher.plan.facts import this_machine
from launcher.plan.plan import Plan
from launcher.recipe.load import load
from launcher.units import parse_count

VOCABULARY = 8192
IN_MEMORY = {"tmpfs", "ramfs"}


def scratch_llama(parameters: int, max_length: int) -> dict[str, Any]:
    """A Llama of at least so many parameters, tied embeddings, as deep for its width as Llamas are."""
    hidden = max(64, round((parameters / 0.1875) ** (1 / 3) / 64) * 64 - 64)
    intermediate = hidden * 8 // 3 // 64 * 64
    layer = 4 * hidden**2 + 3 * hidden * intermediate + 2 * hidden
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": max(1, -(-(parameters - VOCABULARY * hidden - hidden) // layer)),
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "max_position_embeddings": max_length,
        "tie_word_embeddings": True,
        "vocab_size": VOCABULARY,
    }


def write_rows(path: Path, words: int) -> None:
    """Made-up questions and answers, about so many words in all."""
    draw = random.Random(0)
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    known = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(20_000)]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(words // 10):
            row = {"question": " ".join(draw.choices(known, k=4)), "answer": " ".join(draw.choices(known, k=6))}
            file.write(json.dumps(row) + "\n")


def write_plan(chosen: argparse.Namespace, scratch: Path) -> Plan:
    """Prepare the data, decide the run, make its folder and its model."""
    write_rows(scratch / "rows.jsonl", 200_000)
    workers = chosen.ranks or this_machine().gpus or 2
    recipe: dict[str, Any] = {
        "model": {"scratch": scratch_llama(parse_count(chosen.parameters), chosen.tokens)},
        "data": {"train": [{"path": str(scratch / "rows.jsonl")}], "max_length": chosen.tokens, "packing": True},
        "train": {"global_batch_size": workers, "micro_batch_size": 1, "max_steps": 10**6, "dtype": chosen.dtype},
        "optimizer": {"lr": 1e-4, "weight_decay": 0.1},
        "schedule": {"kind": "constant", "warmup": 0},
        "parallel": {"zero": chosen.zero},
        "checkpoint": {"keep_last": 1, "background": True},
        "cluster": {"workers": workers},
    }
    (scratch / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    loaded = load(str(scratch / "recipe.yaml"), ())
    decided = decide(loaded, scratch / "run", None)
    plan = planned(decided, this_machine())
    Path(plan.run_dir).mkdir()
    with closing(base_model_process(decided)) as base_model:
        base_model.wait()
    create_run_folder(plan, loaded)
    return plan


def measure(plan: Plan, job: dict[str, Any], scratch: Path, name: str) -> dict[str, Any]:
    """A job of `checkpoint_measures` on ranks of its own.

    Raises:
        RunFailed: a rank ended without an answer.
    """
    workers = plan.layout.workers
    files = {kind: scratch / f"{name}.{kind}.json" for kind in ("plan", "job", "answer")}
    plan.save(files["plan"])
    files["job"].write_text(json.dumps(job | {"answer": str(files["answer"])}), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    command += ["-m", "launcher.bench.checkpoint_measures", str(files["plan"]), str(files["job"])]
    threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // workers)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, stdout=sys.stderr, env=os.environ | threads)
    if done.returncode or not files["answer"].exists():
        raise RunFailed(f"the ranks of {name!r} ended with exit code {done.returncode}", hint="see what they say above")
    found: dict[str, Any] = json.loads(files["answer"].read_text(encoding="utf-8"))
    return found


def convert(source: Path, target: Path) -> float:
    """Seconds of DeepSpeed's own command that turns a checkpoint into its universal form.

    Raises:
        RunFailed: with its last line.
    """
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RunFailed(f"DeepSpeed's universal conversion failed: {last}", hint="try another --zero")
    return time.perf_counter() - began


def elsewhere(plan: Plan, left: dict[str, Any], loads: int, scratch: Path) -> list[dict[str, Any]]:
    """Loading by one rank and at another ZeRO stage. What fails says so and does not cost the other measurements."""
    source = Path(left["deepspeed"])
    universal = source.with_name("universal")
    layout = plan.layout
    found: list[dict[str, Any]] = []
    # DeepSpeed's universal form is loaded at the stage that saved it.
    for changes in ({"workers": 1, "min_workers": 1}, {"zero": 2 if layout.zero == 3 else 3}):
        other = plan.model_copy(update={"layout": layout.model_copy(update=changes)})
        one: dict[str, Any] = {"ranks": other.layout.workers, "zero": other.layout.zero}
        job = {"task": "loads", "loads": loads, "left": left, "saved_in": plan.location, "universal": None}
        try:
            if "workers" in changes:
                one["conversions"] = [convert(source, universal) for _ in range(loads)]
                job["universal"] = str(universal)
        except RunFailed as error:
            found.append({"failed": error.message})
        try:
            one |= measure(other, job, scratch, f"{one['ranks']} ranks, ZeRO-{one['zero']}")
        except RunFailed as error:
            one["failed"] = error.message
        found.append(one)
    return found


def file_system(folder: Path) -> str:
    """The kind of the disk under a folder, such as ext4.

    Raises:
        UserError: it is memory.
    """
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    above = {str(folder.resolve()), *map(str, folder.resolve().parents)}
    _, kind = max((mount for mount in mounts if mount[0] in above), key=lambda mount: len(mount[0]))
    if kind in IN_MEMORY:
        raise UserError(f"{folder} is memory ({kind}), no disk", hint="name a folder on a disk with --folder")
    return kind


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--parameters", default="98M", help="of the model, at least")
    parser.add_argument("--ranks", type=int, help="one a GPU, or 2 on a CPU, unless said")
    parser.add_argument("--zero", type=int, default=3, choices=[0, 1, 2, 3], help="ZeRO stage")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--tokens", type=int, default=128, help="of a rank's row, one row a rank and step")
    parser.add_argument("--warmup", type=int, default=3, help="steps before anything is timed")
    parser.add_argument("--rounds", type=int, default=8, help="counted saves of each contender, after one to warm up")
    parser.add_argument("--steps", type=int, default=3, help="ordinary steps before each save")
    parser.add_argument("--stretches", type=int, default=3, help="stretches of each kind; 0: none")
    parser.add_argument("--stretch", type=int, default=20, help="steps of a stretch")
    parser.add_argument("--every", type=int, default=10, help="steps from save to save in a stretch")
    parser.add_argument("--loads", type=int, default=3, help="of each kind and checkpoint")
    parser.add_argument("--folder", type=Path, help="where to save: on the disk to be measured, not in memory")
    parser.add_argument("--out", type=Path, help="folder for the page and its raw numbers")
    chosen = parser.parse_args(arguments)
    said = {name: value for name, value in vars(chosen).items() if name not in ("out", "folder") and value is not None}
    found: dict[str, Any] = {
        "machine": machine(),
        "command": "python -m launcher.bench.checkpoint "
        + " ".join(f"--{name} {value}" for name, value in said.items()),
        "settings": said,
    }
    with tempfile.TemporaryDirectory(prefix="slipway-bench-", dir=chosen.folder) as name:
        scratch = Path(name).resolve()
        found["machine"]["file_system"] = file_system(scratch)
        plan = write_plan(chosen, scratch)
        found["layout"] = plan.layout.model_dump(mode="json")
        job = {"task": "saves", "contenders": list(TITLES)}
        job |= {key: said[key] for key in ("warmup", "rounds", "steps", "stretches", "stretch", "every", "loads")}
        found["saves"] = measure(plan, job, scratch, "saves")
        found["elsewhere"] = elsewhere(plan, found["saves"]["left"], chosen.loads, scratch)
    found["saves"].pop("left")  # folders of this machine, deleted by now
    publish(found, page(found), chosen.out, f"checkpoint-{plan.layout.device}")


if __name__ == "__main__":
    main()
