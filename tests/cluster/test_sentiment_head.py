"""Real input: reviews through the recipe sentiment-head-cpu, from the command line to a folder that tells classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.train.metrics import last_of_each_step
from tests.cluster.command import Command

DATA = Path(__file__).parents[3] / "shared" / "data" / "sentiment"
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.long,
    pytest.mark.skipif(not DATA.is_dir(), reason="the reviews are not beside the repository"),
]


def test_reviews_are_told_apart_and_the_folder_tells_them_too(tmp_path: Path) -> None:
    run, files = tmp_path / "run", [DATA / f"{name}.jsonl" for name in ("rotten_tomatoes", "imdb")]
    paths = [f"data.train.{number}.path={file}" for number, file in enumerate(files)]
    with Command(tmp_path, "run", "sentiment-head-cpu", *paths, "train.max_steps=24", "--run-dir", run) as command:
        code, out, err = command.end(timeout_s=1200)
    assert code == 0, err
    evals = last_of_each_step(run, "eval")
    assert evals[0]["f1_macro"] < 0.8 < 0.95 < evals[24]["f1_macro"]
    assert f"f1 macro on 100 held-out rows: {evals[0]['f1_macro']:.1%} before, {evals[24]['f1_macro']:.1%} after" in out
    assert "checked: plain transformers gives the trained model's logits" in out
    card = (run / "model" / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-classification" in card
    assert "- evaluation F1 (macro):" in card
    predicted = [json.loads(line) for line in (run / "predictions-00000024.jsonl").read_text().splitlines()]
    assert len(predicted) == 100
    with Command(tmp_path, "chat", run, predicted[0]["text"]) as command:
        code, out, err = command.end(timeout_s=300)
    assert code == 0, err
    assert out.startswith(f"{predicted[0]['predicted']} (")
