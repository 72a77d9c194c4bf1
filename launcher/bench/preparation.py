"""Preparing data beside TRL, on this machine, in one run: chat template, mask, tokens, packs.

`python -m launcher.bench.preparation --data gsm8k/train.jsonl` (needs `pip install 'slipway[bench]'`). Ours and TRL's
SFTTrainer prepare the same rows with the same tokenizer, chat template and `max_length`, with the same number of
processes, in turns, each time in a process of its own that starts with nothing cached. Timed is the preparation alone,
imports and the loading of the tokenizer aside. Ours includes what TRL's figure leaves out: reading the file, looking
for duplicates, the report; both write what they made to disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from launcher.bench.against_trl import machine, publish, spread
from launcher.errors import RunFailed
from launcher.plan.plan import DataFacts
from launcher.plan.resolve import resolve_model
from launcher.plan.resolve_data import resolve_data
from launcher.recipe.load import load

TITLES = {"slipway": "Slipway", "trl": "TRL, answers learned", "trl-unmasked": "TRL, everything learned"}
VOCABULARY = 32_000
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tokenizer(data: Path, folder: Path) -> None:
    """A byte-level BPE of 32,000 entries trained on the rows, with ChatML as its template."""
    from launcher.data.tokenizer import train_tokenizer

    rows = [json.loads(line) for line in data.open(encoding="utf-8")]
    tokenizer = train_tokenizer((f"{row['question']}\n{row['answer']}" for row in rows), VOCABULARY)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def prepared(
    data: Path, tokenizer: Path, max_length: int, processes: int, cache: Path
) -> tuple[DataFacts, NDArray[np.int64]]:
    """One preparation of ours: its facts and the tokens of each document."""
    from launcher.data.prepare import prepare
    from launcher.data.store import Documents

    cache.mkdir(exist_ok=True)
    recipe = cache / "recipe.yaml"
    sections = {"train": [{"path": str(data.resolve())}], "max_length": max_length}
    recipe.write_text(yaml.safe_dump({"model": {"path": str(tokenizer)}, "data": sections}), encoding="utf-8")
    loaded = load(str(recipe), ())
    facts = prepare(resolve_model(loaded, cache), resolve_data(loaded), seed=0, cache_dir=cache, workers=processes)
    return facts, Documents(facts.folder).lengths


def slipway(data: Path, tokenizer: Path, max_length: int, processes: int, scratch: Path) -> dict[str, Any]:
    """One preparation of ours, and how long it takes to find it again."""
    import pandas  # noqa: F401  pyarrow imports it with the first array that it makes
    import transformers

    import launcher.data.prepare.build  # noqa: F401

    transformers.AutoTokenizer.from_pretrained(tokenizer)  # imports aside
    began = time.perf_counter()
    facts, _ = prepared(data, tokenizer, max_length, processes, scratch / "prepared")
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    prepared(data, tokenizer, max_length, processes, scratch / "prepared")
    return {
        "seconds": seconds,
        "cached_seconds": time.perf_counter() - began,
        "tokens": facts.train_tokens,
        "supervised": facts.train_supervised_tokens,
        "packs": facts.train_rows,
        "documents": facts.train_documents,
    }


def trl_unmasked(data: Path, tokenizer: Path, max_length: int, processes: int, scratch: Path) -> dict[str, Any]:
    """The same as whole conversations, of which every token is learned: the prompts too."""
    return trl(data, tokenizer, max_length, processes, scratch, masked=False)


def trl(
    data: Path, tokenizer: Path, max_length: int, processes: int, scratch: Path, masked: bool = True
) -> dict[str, Any]:
    """One preparation by SFTTrainer: prompt and completion as messages, loss on the completion, best-fit packing."""
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    rows = [json.loads(line) for line in data.open(encoding="utf-8")]
    rows = [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in rows
    ]
    if not masked:
        rows = [{"messages": row["prompt"] + row["completion"]} for row in rows]
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    clock: dict[str, Any] = {}

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            prepared = super()._prepare_dataset(*arguments, **named)
            clock["seconds"] = time.perf_counter() - began
            return prepared

    config = LlamaConfig(
        vocab_size=len(loaded), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    trainer = Timed(
        model=LlamaForCausalLM(config),
        args=SFTConfig(
            output_dir=str(scratch / "trl"),
            use_cpu=True,
            packing=True,
            max_length=max_length,
            dataset_num_proc=processes,
            completion_only_loss=masked,
            report_to="none",
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=loaded,
    )
    packed = trainer.train_dataset
    return clock | {
        "tokens": sum(map(len, packed["input_ids"])),
        "supervised": sum(label != -100 for row in packed["labels"] for label in row),
        "packs": len(packed),
        "documents": len(rows),
    }


def measured(kind: str, arguments: Sequence[str], scratch: Path) -> dict[str, Any]:
    """Run one contender in a process of its own, with an empty cache.

    Raises:
        RunFailed: it ended without an answer; with its last line.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as own:
        environment = os.environ | {"HF_DATASETS_CACHE": f"{own}/datasets", "HF_HUB_OFFLINE": "1"}
        command = [
            sys.executable,
            "-m",
            "launcher.bench.preparation",
            "--contender",
            kind,
            *arguments,
            "--scratch",
            own,
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        raise RunFailed(f"{kind} ended: {last[0]}", hint="pip install 'slipway[bench]' brings TRL")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def rate(run: dict[str, Any]) -> float:
    """Tokens a second."""
    return float(run["tokens"] / run["seconds"])


def page(found: dict[str, Any]) -> str:
    """The Markdown page of a comparison."""
    where, first = found["machine"], found["results"][0]["slipway"][0]
    versions = ", ".join(f"{name} {version}" for name, version in where["packages"].items())
    lines = [
        "| processes | contender | tokens/s, median (least to most) | ours over it | packs | padding | supervised |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in found["results"]:
        ours = result["slipway"]
        for kind, title in TITLES.items():
            runs = result[kind]
            last = runs[-1]
            ratios = [rate(mine) / rate(its) for mine, its in zip(ours, runs, strict=True)]
            cells = [
                str(result["processes"]),
                title,
                spread([rate(run) for run in runs], ",.0f"),
                spread(ratios, ".2f") if runs is not ours else "",
                f"{last['packs']}",
                f"{1 - last['tokens'] / (last['packs'] * found['max_length']):.2%}",
                f"{last['supervised']:,}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    rows = "\n".join(lines)
    cached = [run["cached_seconds"] for result in found["results"] for run in result["slipway"]]
    bound = -(-first["tokens"] // found["max_length"])
    return f"""# Preparing data beside TRL

Measured on {where["date"]} on {where["cpu"]}, {where["cpus"]} CPUs, {where["memory"]} of memory, load
{where["load_before"]:.1f} when it began; Python {where["python"]}, {versions}.

    {found["command"]}

{first["documents"]:,} documents, {first["tokens"]:,} tokens, `max_length` {found["max_length"]:,}, so at least {bound}
packs. A byte-level BPE of 32,000 entries trained on the rows, ChatML. Each figure from {found["rounds"]} preparations
in turns, each in a process of its own with an empty cache. "Ours over it" is taken within a round.

{rows}

- Timed: the preparation alone, imports and the loading of the tokenizer aside. Ours includes reading the file, looking
  for duplicates and the report. TRL's begins with the rows in memory, as `Dataset.from_list` made them.
- TRL with answers learned: prompt and completion with `completion_only_loss`, its only mask for a template without
  `generation` marks. It learns one token more of each document: the line break behind the end of turn.
- TRL with everything learned: conversations, the prompts learned as well.
- Found in the cache again: {statistics.median(cached):.3f} s.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="JSONL of question and answer, such as GSM8K's")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--processes", default="1,2", help="how many, in turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for the page and its raw numbers")
    parser.add_argument("--contender", choices=[*TITLES], help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.contender:
        contender = {"slipway": slipway, "trl": trl, "trl-unmasked": trl_unmasked}[chosen.contender]
        result = contender(
            chosen.data.resolve(), chosen.tokenizer, chosen.max_length, int(chosen.processes), chosen.scratch
        )
        sys.stdout.write(json.dumps(result) + "\n")
        return
    found: dict[str, Any] = {
        "machine": machine(),
        "command": f"python -m launcher.bench.preparation --data {chosen.data.name} --max-length {chosen.max_length}"
        f" --processes {chosen.processes} --rounds {chosen.rounds}",
        "max_length": chosen.max_length,
        "rounds": chosen.rounds,
        "results": [],
    }
    with tempfile.TemporaryDirectory(prefix="slipway-bench-") as scratch:
        tokenizer = Path(scratch) / "tokenizer"
        make_tokenizer(chosen.data, tokenizer)
        for processes in chosen.processes.split(","):
            common = ["--data", str(chosen.data), "--tokenizer", str(tokenizer), "--max-length", str(chosen.max_length)]
            compared: dict[str, Any] = {"processes": int(processes)} | {kind: [] for kind in TITLES}
            for number in range(chosen.rounds):
                turn = [*TITLES][number % len(TITLES) :] + [*TITLES][: number % len(TITLES)]
                for kind in turn:
                    run = measured(kind, [*common, "--processes", processes], Path(scratch))
                    compared[kind].append(run)
                    sys.stderr.write(f"{processes} processes, {kind}: {rate(run):,.0f} tokens/s\n")
            found["results"].append(compared)
    publish(found, page(found), chosen.out, "preparation")


if __name__ == "__main__":
    main()
