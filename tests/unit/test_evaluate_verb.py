"""`slipway evaluate`: the figures of a folder, beside those that plain transformers and scikit-learn give for it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from sklearn.metrics import f1_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.cli.app import main
from launcher.data.store import Documents
from launcher.errors import UserError
from launcher.export import harness
from launcher.export.evaluation import alone
from launcher.model.scratch import create_scratch
from launcher.plan.plan import Plan
from tests.distributed.runs import LLAMA, tiny_run
from tests.plans import generate_plan, held_out, model_plan


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A run that has ended, as far as `evaluate` looks at it: its model is the one that it started from."""
    root = tmp_path_factory.mktemp("evaluate")
    plan = tiny_run(root, of_data={"test": held_out(rows=6), "slices": ("kind",)})
    generate = generate_plan(rows=4, max_new_tokens=5, metrics=("exact_match", "rouge"))
    life = plan.lifecycle.model_copy(update={"generate": generate, "slices": ("kind",)})
    plan = plan.model_copy(update={"lifecycle": life})
    run = root / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"kind": "start"}\n')
    (run / "model").symlink_to(root / "base")
    plan.save(run / "plan.json")
    return plan


@pytest.fixture
def base(plan: Plan) -> Path:
    return Path(plan.trajectory.model.path)


def measured(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["evaluate", *map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    assert main(["evaluate", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def loss_of(folder: Path, data: str, numbers: list[int]) -> tuple[float, float]:
    """Mean loss and accuracy over the supervised tokens of prepared documents, one after the other."""
    documents, model = Documents(data), AutoModelForCausalLM.from_pretrained(folder).eval()
    losses, right = [], []
    for number in numbers:
        ids = torch.from_numpy(documents.input_ids(number).astype("int64"))[None]
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double()
        targets, wanted = ids[0, 1:], torch.from_numpy(documents.supervised(number)[1:].astype(bool))
        losses += torch.nn.functional.cross_entropy(logits[wanted], targets[wanted], reduction="none").tolist()
        right += (logits.argmax(-1) == targets)[wanted].tolist()
    return sum(losses) / len(losses), sum(right) / len(right)


def test_a_folder_and_a_file_are_all_it_takes(
    plan: Plan, base: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = Path(plan.trajectory.data.train[0].path)
    out = tmp_path / "answers.jsonl"
    found = measured(capsys, base, "--data", rows, "--max-new-tokens", "5", "--slices", "kind", "--out", out)
    assert found["eval"]["rows"] == 60
    assert {kind: of["rows"] for kind, of in found["eval"]["slices"]["kind"].items() if kind != "gap"} == {
        "long": 40,
        "short": 20,
    }
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["where"] for line in lines] == [f"{rows}:{i + 1}" for i in range(60)]
    assert found["answers"]["exact_match"] == sum(line["correct"] for line in lines) / 60
    assert found["answers"]["rows"] == 60
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    for line in lines[:3]:
        prompt = tokenizer(line["prompt"], return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            output = model.generate(**prompt, max_new_tokens=5, do_sample=False)
        new = output[0, prompt["input_ids"].shape[1] :]
        assert line["answer"] == tokenizer.decode(new, skip_special_tokens=True)


def test_a_run_is_measured_on_what_it_held_out_and_keeps_the_result(
    plan: Plan, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(plan.run_dir)
    found = measured(capsys, run)
    held_out = [n for n in range(len(Documents(plan.data.folder))) if Documents(plan.data.folder).sets[n] == 1]
    loss, accuracy = loss_of(base, plan.data.folder, held_out)
    assert found["eval"]["rows"] == plan.data.eval_documents == len(held_out)
    assert found["eval"]["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["eval"]["accuracy"] == pytest.approx(accuracy)
    assert found["eval"]["perplexity"] == pytest.approx(2.718281828459045**loss, rel=1e-6)
    assert found["answers"]["rows"] == 4
    assert set(found["answers"]["rouge"]) == {"rouge_1", "rouge_2", "rouge_l"}
    [kept] = (run / "evaluations").glob("*.json")
    assert json.loads(kept.read_text()) == found
    assert len(kept.with_suffix(".jsonl").read_text().splitlines()) == 4
    assert (run / "metrics.jsonl").read_text() == '{"kind": "start"}\n', "the run itself is as it was"
    assert main(["evaluate", str(run), "--rows", "2"]) == 0
    out = capsys.readouterr().out
    assert "held-out rows, 2 rows\n  loss " in out
    assert "answers, 2 rows\n" in out
    assert "--slices: the run's held-out rows were prepared without" in refused(capsys, run, "--slices", "topic")


def test_metrics_of_the_users_own_and_plain_text(
    base: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = "def count(answers, references): return {'of': len(answers)}\ndef fails(answers, references): return 1 / 0\n"
    Path("mine.py").write_text(mine)
    Path("rows.jsonl").write_text('{"prompt": "Say river", "completion": "river"}\n' * 3)
    chosen = ("--data", "rows.jsonl", "--metrics", "mine.py:count, bleu", "--max-new-tokens", "2")
    found = measured(capsys, base, *chosen)
    assert found["answers"]["count"] == {"of": 3}
    assert found["answers"]["bleu"] >= 0
    Path("text.jsonl").write_text('{"text": "the river, the stone and the cloud"}\n' * 4)
    found = measured(capsys, base, "--data", "text.jsonl", "--rows", "3")
    assert found["eval"]["rows"] == 3
    assert "answers" not in found
    for metrics, message in {
        "rogue": "--metrics: unknown metric 'rogue'\nhint: did you mean rouge?",
        "bleu, bleu": "--metrics: a second metric called bleu",
        "mine.py:rows": "--metrics: a function called rows, which means something else",
        "gone.py:count": "--metrics: 'gone.py:count' names no function in a file",
        "mine.py:fails": "raised ZeroDivisionError",
    }.items():
        assert message in refused(capsys, base, "--data", "rows.jsonl", "--metrics", metrics)
    assert "--format: 'csv' is none" in refused(capsys, base, "--data", "rows.jsonl", "--format", "csv")
    assert "--data: none.jsonl does not exist" in refused(capsys, base, "--data", "none.jsonl")
    assert "hint: name some with --data FILE" in refused(capsys, base)
    assert "is no run and has no checkpoints" in refused(capsys, base, "--checkpoint", "best")
    Path("empty").mkdir()
    assert "cannot be loaded" in refused(capsys, Path("empty"), "--data", "rows.jsonl")


def test_what_the_model_has_no_positions_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: Plan
) -> None:
    """Of a GPT-2 with 64 positions, and of adapters over it."""
    monkeypatch.chdir(tmp_path)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 300}
    model = model_plan(tmp_path / "gpt2", source="scratch", scratch={"model_type": "gpt2"} | sizes)
    create_scratch(model, Path(plan.data.folder) / "tokenizer", 3, tmp_path / "gpt2")
    whole = AutoModelForCausalLM.from_pretrained("gpt2")
    lora = LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    get_peft_model(whole, lora).save_pretrained("adapters")
    settings = json.loads(Path("adapters/adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "gpt2")
    Path("adapters/adapter_config.json").write_text(json.dumps(settings))
    rows = [{"prompt": "Say river", "completion": "river " * (99 if i == 1 else 1)} for i in range(4)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for folder in ("gpt2", "adapters"):
        found = measured(capsys, folder, "--data", "rows.jsonl", "--max-new-tokens", "3")
        assert (found["eval"]["rows"], found["answers"]["rows"]) == (3, 4)
        assert found["left_out"] == {"too long": 1}
        said = refused(capsys, folder, "--data", "rows.jsonl")
        assert re.search(r"of \d+ tokens and an answer of up to 256, and the model has positions for 64", said)


def test_a_classification_is_measured_by_class(
    plan: Plan, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = model_plan(tmp_path / "head", source="scratch", scratch=LLAMA)
    create_scratch(model, Path(plan.data.folder) / "tokenizer", 3, tmp_path / "head", ("good", "bad"))
    rows = [{"text": f"stone {i} river", "label": "good" if i % 3 else "bad"} for i in range(12)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = measured(capsys, "head", "--data", "rows.jsonl", "--out", "said.jsonl")
    lines = [json.loads(line) for line in Path("said.jsonl").read_text().splitlines()]
    truth, said = [line["label"] for line in lines], [line["predicted"] for line in lines]
    assert truth == [row["label"] for row in rows]
    assert found["eval"]["f1_macro"] == pytest.approx(f1_score(truth, said, average="macro", zero_division=0))
    assert found["eval"]["classes"]["bad"]["rows"] == 4
    assert "perplexity" not in found["eval"]
    Path("other.jsonl").write_text('{"text": "a", "label": "good"}\n{"text": "b", "label": "so-so"}\n')
    assert "has rows of so-so, which the model does not know" in refused(capsys, "head", "--data", "other.jsonl")
    with pytest.raises(UserError, match="this one tells classes apart"):
        harness.run_tasks(Path("head"), ["arc_easy"], None, None)


def test_the_harness_is_asked_for_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        harness.require()
    assert caught.value.hint == "pip install 'slipway[eval]'"


TASK = """
task: rivers
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["river", "stone"]
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.long
def test_a_task_of_the_harness_from_a_local_file(
    base: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: slipway[eval]")
    rows = [{"question": f"Say it {i}:", "answer": i % 2} for i in range(8)]
    (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rivers.yaml").write_text(TASK.replace("ROWS", str(tmp_path / "rows.json")))
    found = measured(capsys, base, "--lm-eval", tmp_path / "rivers.yaml", "--limit", "6")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    right = 0
    for row in rows[:6]:
        turn = [{"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        scores = []
        for choice in ("river", "stone"):
            ids = tokenizer(prompt + choice, return_tensors="pt", add_special_tokens=False)["input_ids"]
            before = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            with torch.no_grad():
                logs = model(ids).logits[0, before - 1 : -1].log_softmax(-1)
            scores.append(logs.gather(1, ids[0, before:, None]).sum().item())
        right += scores.index(max(scores)) == row["answer"]
    assert found["tasks"]["rivers"]["acc"] == pytest.approx(right / 6)
    assert found["tasks"]["rivers"]["rows"] == 6
    assert "eval" not in found
    said = refused(capsys, base, "--lm-eval", "hellaswagg")
    assert "--lm-eval: 'hellaswagg' is no task of the harness\nhint: did you mean hellaswag" in said


def test_a_group_of_one_is_gone_afterwards() -> None:
    for _ in range(2):
        with alone():
            assert torch.distributed.get_world_size() == 1
        assert not torch.distributed.is_initialized()
