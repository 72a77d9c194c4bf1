"""The model card: what was trained, on what, how it went, and with which versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from launcher.evaluate.value import figures
from launcher.export.verify import Agreement
from launcher.plan.plan import Plan
from launcher.train.metrics import read

EVALUATED = {
    "evaluation loss": "loss",
    "evaluation token accuracy": "accuracy",
    "evaluation F1 (macro)": "f1_macro",
    "loss on what is to be retained": "retain_loss",
}
"""What the card calls the figures of an evaluation; one of rows to be retained alone has the last only."""


def model_card(plan: Plan, step: int, agreement: Agreement | None, notes: list[str]) -> str:
    """Markdown with the hub's YAML header; figures come from the run's own files."""
    trajectory, run_dir = plan.trajectory, Path(plan.run_dir)
    header: dict[str, Any] = {"library_name": "transformers", "tags": ["slipway"]}
    header["pipeline_tag"] = "text-classification" if plan.data.classes else "text-generation"
    if trajectory.model.source == "hub":
        header["base_model"] = trajectory.model.path
    lines = ["---", yaml.safe_dump(header, sort_keys=False).strip(), "---", "", f"# {plan.name}", ""]
    base = {"hub": trajectory.model.path, "folder": trajectory.model.path, "scratch": "random weights"}
    lines += [
        f"Fine-tuned with Slipway {plan.version} from {base[trajectory.model.source]}"
        + (f" at {trajectory.model.revision}" if trajectory.model.revision else "")
        + f", method {trajectory.method.kind}, {trajectory.dtype}, {step} steps of "
        f"{trajectory.global_batch_size} rows.",
        "",
        "## Results",
        "",
        *results(run_dir, step),
        "",
        "## Data",
        "",
        f"{plan.data.train_documents} documents, {plan.data.train_tokens} tokens, "
        f"{plan.data.train_supervised_tokens} of them supervised; {plan.data.eval_documents} documents held out.",
        *(f"- {path}: {kind}" for path, kind in plan.data.formats.items()),
        "",
        "## Check",
        "",
        checked(agreement, trajectory.dtype),
        *notes,
        "",
        "## Recipe",
        "",
        "```yaml",
        (run_dir / "recipe.yaml").read_text(encoding="utf-8").strip(),
        "```",
        "",
        "## Versions",
        "",
    ]
    environment = json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))
    lines += [f"- {name}: {version}" for name, version in environment["packages"].items()]
    return "\n".join(lines) + "\n"


def results(run_dir: Path, step: int) -> list[str]:
    """First and last of each figure up to `step`."""
    found: dict[str, list[tuple[int, float]]] = {}
    for record in read(run_dir):
        if record.get("step", step + 1) > step:
            continue
        if record["kind"] == "step":
            found.setdefault("training loss", []).append((record["step"], record["loss"]))
        elif record["kind"] == "eval":
            for name, key in EVALUATED.items():
                if key in record:
                    if "f1_macro" in record:  # of a sequence classification, whose targets are no tokens
                        name = name.replace("token ", "")
                    found.setdefault(name, []).append((record["step"], record[key]))
        elif record["kind"] == "answers":
            for name, value in figures(record).items():
                found.setdefault(f"{name} of answers to test rows", []).append((record["step"], value))
    return [
        f"- {name}: {points[0][1]:.4f} at step {points[0][0]}, {points[-1][1]:.4f} at step {points[-1][0]}"
        for name, points in found.items()
    ] or ["- none measured"]


def checked(agreement: Agreement | None, dtype: str) -> str:
    """One sentence on E7."""
    if agreement is None:
        return "Logits not compared: the run kept no probe of this step."
    return (
        f"Loaded by plain transformers in a fresh process, this folder's logits differ from the trained model's by "
        f"at most {agreement.largest:.2e} (largest logit {agreement.scale:.2f}, {dtype}); "
        f"{agreement.same_token:.1%} of the most likely tokens are the same."
    )
