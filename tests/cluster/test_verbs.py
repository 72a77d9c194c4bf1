"""The verbs that look at a run, on one that a real Ray has trained."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from launcher.cli.app import main

pytestmark = pytest.mark.cluster


@pytest.fixture(autouse=True)
def here(uninterrupted: tuple[Path, str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NO_COLOR", "1")


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that succeeds prints on stdout."""
    capsys.readouterr()
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def test_verify_counts_sound_checkpoints_and_names_a_damaged_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert "checkpoints are sound" in said(capsys, "verify", "uninterrupted")
    shard = sorted(Path("uninterrupted/checkpoints").glob("step-*/*.safetensors"))[0]
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    try:
        assert main(["verify", "uninterrupted"]) == 1
        out, err = capsys.readouterr()
        assert shard.name in out
        assert "are damaged" in err
    finally:
        shard.write_bytes(good)


def test_runs_lists_steps_losses_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    runs = {run["run"]: run for run in json.loads(said(capsys, "runs", ".", "--json"))}
    assert runs["uninterrupted"]["step"] == 24
    assert runs["uninterrupted"]["end"] == "finished"


def test_export_elsewhere_gives_the_same_weights(capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(said(capsys, "export", "uninterrupted", "--out", "again", "--json"))
    assert report["agreement"]["largest"] <= 1e-4 * report["agreement"]["scale"]
    again, first = Path("again/model.safetensors"), Path("uninterrupted/model/model.safetensors")
    assert again.read_bytes() == first.read_bytes()
    card = Path("again/README.md").read_text()
    assert "evaluation loss" in card
    assert "```yaml" in card


def test_export_does_not_overwrite_what_is_not_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    Path("precious").mkdir()
    assert main(["export", "uninterrupted", "--out", "precious"]) == 2
    assert "is no export of ours" in capsys.readouterr().err
    assert list(Path("precious").iterdir()) == []


def test_merging_without_adapters_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "uninterrupted", "--out", "merged", "--merge"]) == 2
    assert "no adapters to merge" in capsys.readouterr().err


def test_chat_answers_a_prompt_and_a_conversation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    once = said(capsys, "chat", "uninterrupted", "say 3 please", "--max-new-tokens", "5")
    monkeypatch.setattr("sys.stdin", io.StringIO("say 3 please\nagain\n"))
    twice = said(capsys, "chat", "uninterrupted", "--max-new-tokens", "5")
    assert twice.startswith(once)
    assert len(twice) > len(once)


def test_data_marks_exactly_what_is_learned(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "data", "tiny.yaml", "--rows", "1")
    marked = [line for line in out.splitlines() if ">>" in line]
    assert marked
    for line in marked:
        assert line.startswith(">>yes"), "only the answer, from its first word on"
        assert line.endswith("<|endoftext|><<"), "and its end-of-turn token"
    assert "supervised" in out


def test_plan_gives_the_reason_of_every_auto(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "plan", "tiny.yaml", "cluster.workers=1", "train.micro_batch_size=auto")
    reasons = dict(line.split("  ", 1) for line in out.splitlines() if line.startswith("train."))
    assert reasons["train.micro_batch_size"].strip() == "about 4096 tokens on a cpu rank"
    plan = json.loads(said(capsys, "plan", "tiny.yaml", "cluster.workers=1", "--json"))
    assert plan["origins"]["cluster.workers"] == "command line"
    assert plan["origins"]["optimizer.lr"].startswith("tiny.yaml:")
