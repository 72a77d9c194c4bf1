"""A Hugging Face folder from a committed checkpoint and the Plan alone.

`python -m launcher.export.folder RUN OUT merge|adapters best|last|STEP` prints the report as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.checkpoint.choose import BEST, LAST, chosen
from launcher.checkpoint.together import explained
from launcher.errors import ModelError, RunFailed, SlipwayError
from launcher.export.card import model_card
from launcher.export.verify import Agreement, verify
from launcher.plan.plan import Plan


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: str
    step: int
    merged: bool
    agreement: Agreement | None
    """The folder's logits beside the trained model's (E7); None where the run kept no probe of this step."""
    drift: float | None
    """Largest change of a logit by merging into a dequantized base; None where nothing was merged."""


def export(plan: Plan, out: Path, merge: bool, wanted: str | None = None) -> Exported:
    """Write a checkpoint's model to `out`, verified, replacing a folder that an export wrote before.

    Safetensors in shards, tokenizer, chat template, generation config, model card; adapters alone unless `merge`.
    `wanted` is `best`, `last` or a step; None: as the plan has it.

    Raises:
        CheckpointError: there is no sound checkpoint, none of the step, or it does not fit the model.
        ModelError: `merge` without adapters, or `out` holds something else.
        RunFailed: the folder does not give the trained model's logits.
    """
    from transformers import AutoTokenizer

    from launcher.export.merge import logits_of, merged_model, trained_model
    from launcher.model.added_tokens import added_ids
    from launcher.train.probe import probe_file, read_probe

    run_dir = Path(plan.run_dir)
    checkpoint, _ = chosen(plan, wanted or (BEST if plan.lifecycle.export_best else LAST))
    if out.exists() and not (out / "slipway.json").exists():
        raise ModelError(f"{out} exists and is no export of ours", hint="choose another --out")
    step = checkpoint.step
    model: Any = trained_model(plan, checkpoint, verified=True)
    probe = read_probe(run_dir, step)
    merge_drift = None
    if merge:
        before = logits_of(model, probe[0]) if probe else None
        model = merged_model(plan, model)
        if probe and before is not None:
            merge_drift = (before - logits_of(model, probe[0])).abs().max().item()
    staging = out.with_name(f".{out.name}-{os.getpid()}")
    try:
        write_folder(plan, model, AutoTokenizer.from_pretrained(Path(plan.data.folder) / "tokenizer"), staging, merge)
        agreement = None
        if probe is not None:
            try:
                agreement = verify(staging, probe_file(run_dir, step))
            except RuntimeError as error:
                raise RunFailed(f"plain transformers cannot load the exported folder: {error}") from error
        # Rounding a merged 4-bit base to the training dtype is a drift to be stated, not a fault of the folder.
        if agreement is not None and merge_drift is None and not agreement.within(plan.trajectory.dtype):
            raise RunFailed(
                f"the exported folder's logits differ from the trained model's by {agreement.largest:.3g}",
                hint="please report this with the run's plan.json",
            )
        notes = [f"Merging changed a logit by at most {merge_drift:.2e}."] if merge_drift is not None else []
        if added := added_ids(plan):
            notes.append(about_added_tokens(len(added), adapters=(staging / "adapter_config.json").exists()))
        (staging / "README.md").write_text(model_card(plan, step, agreement, notes), encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Exported(str(out), step, merge, agreement, merge_drift)


def write_folder(plan: Plan, model: Any, tokenizer: Any, folder: Path, merged: bool) -> None:
    """The files of a model folder, without its card."""
    folder.mkdir(parents=True)
    model.config.use_cache = True
    generation = None if plan.data.classes else getattr(model, "generation_config", None)
    if generation is not None:
        from launcher.evaluate.generate import end_tokens

        ends = end_tokens(model, tokenizer)
        generation.eos_token_id = ends if len(ends) > 1 else ends[0]
        generation.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    arguments: dict[str, Any] = {"max_shard_size": plan.lifecycle.max_shard_size}
    if hasattr(model, "peft_config"):
        # peft would save the whole embedding and head of a base that was given more rows: what is trained of them is
        # among the adapters.
        arguments["save_embedding_layers"] = False
    model.save_pretrained(folder, **arguments)
    if generation is not None:
        generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {
        "run": plan.location,
        "method": plan.trajectory.method.kind,
        "merged": merged,
        "dtype": plan.trajectory.dtype,
        "trajectory": plan.trajectory.hash(),
        "task": plan.trajectory.task,
        "classes": plan.data.classes,
        "pad_token_id": tokenizer.pad_token_id,
    }
    (folder / "slipway.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def about_added_tokens(count: int, adapters: bool) -> str:
    """A sentence of the model card."""
    said = f"{count} tokens were added to the base model's; their rows of the embedding and the head are trained."
    if not adapters:
        return said
    return (
        f"{said} They lie beside the adapters: AutoPeftModelForCausalLM makes room for them in the base, by hand "
        "base.resize_token_embeddings(len(tokenizer)) does, where the base has fewer rows than that."
    )


def main(arguments: list[str]) -> int:
    """Export in a process of its own, so that the launcher needs no torch and a model too large fails alone."""
    run_dir, out, merge = Path(arguments[0]), Path(arguments[1]), arguments[2] == "merge"
    wanted = arguments[3] if len(arguments) > 3 else None
    try:
        report: dict[str, Any] = asdict(export(Plan.load(run_dir / "plan.json"), out, merge, wanted))
        code = 0
    except (SlipwayError, OSError) as caught:
        error = explained("exporting the model", caught)
        report, code = {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}, error.exit_code
    sys.stdout.write(json.dumps(report) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
