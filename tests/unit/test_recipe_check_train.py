"""What is said about keys of training that would do nothing, or cannot go together."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.recipe.load import load
from tests.unit.test_recipe_errors import GOOD, report


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


FACTORED = "adafactor keeps sums over the rows and columns of whole matrices, which ZeRO 1 to 3 cut to pieces"
LESS = "set parallel.zero to 0 and offload to none, or use adamw_8bit or lion, which need little memory too"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "optimizer: {name: sgd, betas: [0.9, 0.95]}",
            "optimizer.betas: sgd has none\n  hint: leave it out; it is of adamw, adamw_8bit, lion",
        ),
        ("optimizer: {name: lion, eps: 1.0e-6}", "optimizer.eps: lion has none\n"),
        ("optimizer: {momentum: 0.8}", "optimizer.momentum: adamw has none\n  hint: leave it out; it is of sgd"),
        ("optimizer: {betas: [1.0, 0.9]}", "optimizer.betas: a beta of 1 never forgets its first value"),
        (
            "optimizer: {lora_plus_ratio: 16}",
            "optimizer.lora_plus_ratio: there are no adapters with method.kind full\n  hint: leave it out, or use lora",
        ),
        (
            "optimizer: {layer_decay: 0.8}\nmethod: {kind: freeze, train_last_layers: 1}",
            "optimizer.layer_decay: only the last layer is trained, none below it",
        ),
        ("optimizer: {name: adafactor}\nparallel: {zero: 2}", f"optimizer.name: {FACTORED}\n  hint: {LESS}"),
        ("optimizer: {name: adafactor}\nparallel: {offload: cpu}", f"optimizer.name: {FACTORED}"),
        (
            "method: {frozen: [embed, 'layers.(']}",
            "method.frozen.1: 'layers.(' is no regular expression",
        ),
        ("optimizer: {layer_decay: 0}", "optimizer.layer_decay: expected a number above 0, got 0"),
        ("train: {label_smoothing: 1}", "train.label_smoothing: expected a number below 1, got 1"),
        ("model: {path: gpt2, dropout: 1}", "model.dropout: expected a number below 1, got 1"),
    ],
)
def test_refused(line: str, message: str) -> None:
    text = f"data: {{train: [{{path: a.jsonl}}]}}\n{line}\n"
    text += "" if line.startswith("model") else "model: {path: gpt2}\n"
    found = report(text)
    assert found.startswith(f"x.yaml:2: {message}"), found


@pytest.mark.parametrize(
    "line",
    [
        "optimizer: {name: sgd, momentum: 0.8}",
        "optimizer: {name: lion, betas: [0.95, 0.98], layer_decay: 0.8}",
        "optimizer: {name: adafactor}\nparallel: {zero: 0}",
        "optimizer: {lora_plus_ratio: 16}\nmethod: {kind: qlora, frozen: ['layers.[0-3]\\.']}",
        "optimizer: {layer_decay: 0.8}\nmethod: {kind: freeze, train_last_layers: 2}",
    ],
)
def test_taken(line: str) -> None:
    Path("x.yaml").write_text(GOOD + line + "\n")
    load("x.yaml", [])
