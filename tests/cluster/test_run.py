"""Runs on a real Ray of their own: to the end, through kills, to every kind of bad end; and the verbs that look at one.

One file, because they share a run: test processes share nothing.
"""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path

import pytest

from launcher.checkpoint.layout import newest_committed
from launcher.cli.app import main
from launcher.store.folder import FolderStore
from launcher.train.metrics import read
from tests.cluster.command import Command, losses, workers

pytestmark = pytest.mark.cluster
NOISE = ("ray", "deepspeed", "warning", "gloo", "torch", "raylet", "transformers]")


def test_a_run_ends_with_a_checked_model_and_says_where(uninterrupted: tuple[Path, str, str], folder: Path) -> None:
    run_dir, out, _ = uninterrupted
    assert (run_dir / "model" / "model.safetensors").exists()
    assert "checked: plain transformers gives the trained model's logits" in out
    assert "slipway chat" in out
    assert out.splitlines()[-1] == "report: uninterrupted/report.html"
    assert "finished 24 steps" in (run_dir / "report.html").read_text(encoding="utf-8")
    assert "system" in {record["kind"] for record in read(run_dir)}, "one at the end of a run of any length"
    assert len(losses(run_dir)) == 24
    answered = [record for record in read(run_dir) if record["kind"] == "answers"]
    assert [record["step"] for record in answered] == [0, 24], "before and after, under ZeRO-3 on two ranks"


def test_the_terminal_shows_the_run_and_nothing_else(uninterrupted: tuple[Path, str, str]) -> None:
    run_dir, _, err = uninterrupted
    noisy = [line for line in err.splitlines() if any(word in line.lower().split() for word in NOISE)]
    assert noisy == []
    assert "[" not in err, "a library logged to the terminal"
    assert "tok/s" in err
    assert len([line for line in err.splitlines() if line.startswith("audit: masks as meant, packs isolated in ")]) == 1
    assert (run_dir / "logs" / "worker-1.log").exists()


def test_killed_worker_then_killed_tree_then_resume_equals_the_uninterrupted_run(
    uninterrupted: tuple[Path, str, str], folder: Path
) -> None:
    run_dir = folder / "killed"
    with Command(folder, "run", "tiny.yaml", "--run-dir", run_dir) as command:
        command.wait_for("step 7:")
        os.kill(workers(run_dir)[1], signal.SIGKILL)
        command.wait_for("going on from the checkpoint of step 5")
        command.wait_for("step 13:")
        command.kill_tree()
    saved = newest_committed(FolderStore(run_dir))
    assert saved is not None
    assert saved.step == 10
    with Command(folder, "resume", run_dir, "export.enabled=false") as command:
        code, _, err = command.end()
    assert code == 0, err
    assert "going on from the checkpoint of step 10" in err
    assert losses(run_dir) == losses(uninterrupted[0])


def test_ctrl_c_saves_and_exits_130_and_a_longer_run_goes_on(folder: Path) -> None:
    run_dir = folder / "interrupted"
    with Command(folder, "run", "tiny.yaml", "--run-dir", run_dir, "checkpoint.every_steps=1000") as command:
        command.wait_for("step 3:")
        os.killpg(command.process.pid, signal.SIGINT)  # a terminal sends it to the whole group
        code, _, err = command.end()
    assert code == 130, err
    assert "hint: slipway resume" in err
    saved = newest_committed(FolderStore(run_dir))
    assert saved is not None
    assert 3 <= saved.step < 24
    assert f"stopped and saved at step {saved.step}" in (run_dir / "report.html").read_text(encoding="utf-8")
    with Command(folder, "resume", run_dir, "optimizer.lr=1") as command:
        code, _, err = command.end()
    assert code == 2
    assert "optimizer.lr: cannot change in a run already begun" in err
    assert "start a new run from this model" in err


def test_a_worker_that_raises_is_named_first_and_restarts_are_bounded(folder: Path) -> None:
    """The model's own code raises on rank 1, as a bug in a user's modelling file would."""
    model, run_dir = folder / "boom", folder / "raises"
    write_raising_model(model)
    arguments = [f"model={{path: {model}, trust_remote_code: true, tokenizer: {folder / 'uninterrupted' / 'model'}}}"]
    arguments += ["parallel.zero=0", "cluster.max_failures=1", "evaluate.every_steps=1000"]
    arguments += ["audit=off"]  # or it would be the first to call the model
    with Command(folder, "run", "tiny.yaml", *arguments, "--run-dir", run_dir) as command:
        code, _, err = command.end()
    assert code == 1, err
    errors = err[err.index("error:") :].splitlines()
    assert errors[0].startswith("error: rank 1 on ")
    assert errors[0].endswith("ValueError: boom on rank 1")
    assert errors[1] == "the run was restarted once from its last checkpoint before giving up"
    assert errors[2].startswith("last lines of ")
    assert errors[2].endswith("worker-1.log:")
    assert "ValueError: boom on rank 1" in "\n".join(errors[3:])
    assert len([record for record in read(run_dir) if record["kind"] == "start"]) == 2
    report = (run_dir / "report.html").read_text(encoding="utf-8")
    assert report.index("failed: ValueError: boom on rank 1") < report.index("Duration")
    assert "worker-1.log" in report


def write_raising_model(folder: Path) -> None:
    """A model folder with code of its own, which fails on rank 1."""
    write_model(
        folder,
        "class {name}(LlamaForCausalLM):\n"
        "    def forward(self, *args, **kwargs):\n"
        "        if dist.is_initialized() and dist.get_rank() == 1:\n"
        "            raise ValueError('boom on rank 1')\n"
        "        return super().forward(*args, **kwargs)\n",
    )


def write_model(folder: Path, code: str) -> None:
    """A model folder with code of its own: the class `{name}`."""
    folder.mkdir()
    name = f"{folder.name.capitalize()}ForCausalLM"
    imports = "import torch.distributed as dist\nfrom transformers import LlamaForCausalLM\n"
    (folder / f"modeling_{folder.name}.py").write_text(imports + code.format(name=name))
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=320
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = {"AutoModelForCausalLM": f"modeling_{folder.name}.{name}"}
    (folder / "config.json").write_text(json.dumps(settings))


@pytest.mark.long  # 70 s; tests/distributed/test_audit.py has it without Ray
def test_a_model_that_mixes_packed_documents_up_is_stopped_by_the_audit_and_can_be_told_to_go_on(folder: Path) -> None:
    """Its own code forgets to hand on what keeps documents apart, as a user's modelling file might."""
    model, run_dir = folder / "leaks", folder / "audited"
    write_model(
        model,
        "class {name}(LlamaForCausalLM):\n"
        "    def forward(self, input_ids=None, logits_to_keep=0, **kwargs):\n"
        "        return super().forward(input_ids=input_ids, logits_to_keep=logits_to_keep, use_cache=False)\n",
    )
    arguments = [f"model={{path: {model}, trust_remote_code: true, tokenizer: {folder / 'uninterrupted' / 'model'}}}"]
    arguments += ["parallel.zero=0", "train.max_steps=2", "evaluate.generate=null", "export.enabled=false"]
    with Command(folder, "run", "tiny.yaml", *arguments, "--run-dir", run_dir) as command:
        code, _, err = command.end()
    assert code == 2, err
    error, hint = (line for line in err.splitlines() if line.startswith(("error:", "hint:")))
    assert error.startswith("error: the audit before the first step: packed documents see each other: from the first ")
    assert hint.endswith("; audit=warn trains all the same")
    assert not (run_dir / "logs" / "failures.jsonl").exists(), "no restart"
    assert [record["kind"] for record in read(run_dir)] == []
    with Command(folder, "resume", run_dir, "audit=warn") as command:
        code, _, err = command.end()
    assert code == 0, err
    assert "audit: packed documents see each other: from the first document to the second (" in err
    assert sorted(losses(run_dir)) == [1, 2]


@pytest.mark.long  # which failure is the first is tested in tests/unit; a bounded number of restarts just above
def test_a_killed_worker_with_no_failures_left_is_the_root_cause(folder: Path) -> None:
    run_dir = folder / "no-failures-left"
    with Command(folder, "run", "tiny.yaml", "cluster.max_failures=0", "--run-dir", run_dir) as command:
        command.wait_for("step 2:")
        os.kill(workers(run_dir)[1], signal.SIGKILL)
        code, _, err = command.end()
    assert code == 1, err
    cause = err[err.index("error:") :].splitlines()[0]
    assert cause.startswith("error: rank 1 on ")
    assert "failed: its process was killed" in cause


def test_more_workers_than_the_cluster_holds_says_what_it_has(folder: Path) -> None:
    with Command(folder, "run", "tiny.yaml", "cluster.workers=64", "--run-dir", folder / "many") as command:
        code, _, err = command.end()
    assert code == 2
    assert "the run needs 64 workers of 1 CPU; there is room for" in err
    assert "hint: set cluster.workers to at most" in err
    assert not (folder / "many").exists()


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
    shard = sorted(Path("uninterrupted/checkpoints").glob("step-*/attempt-*/*.safetensors"))[0]
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


def test_evaluate_finds_what_the_run_measured_last(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capsys, "evaluate", "uninterrupted", "--json"))
    last = {record["kind"]: record for record in read(Path("uninterrupted"))}
    assert found["eval"]["loss"] == pytest.approx(last["eval"]["loss"], rel=1e-4)
    assert found["answers"] == {key: last["answers"][key] for key in found["answers"]}
    assert len(list(Path("uninterrupted/evaluations").glob("*.json"))) == 1


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
