"""Sequence classification, of a GPT-style scratch model and of an encoder without a head: E1, E2, E4, E5 and E7, what
is predicted, and where a head comes from.

All cases are trained first, as in test_equalities.py; the tests compare what the runs wrote down.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    pipeline,
)

from launcher.checkpoint.deep import check, expected_of
from launcher.checkpoint.load import load_weights
from launcher.checkpoint.manifest import verify
from launcher.export.folder import write_folder
from launcher.export.merge import merged_model, trained_model
from launcher.export.verify import adapted_model, classifies
from launcher.model.head import head_modules
from launcher.plan.plan import Plan
from launcher.train.metrics import last_of_each_step, read
from launcher.train.probe import read_probe
from tests.checkpoints import checkpoint_at, copy_checkpoint
from tests.classifiers import CLASSES, STEPS, bert_plan, class_plan, gpt_plan, texts, tiny_bert
from tests.distributed.group import run_group
from tests.distributed.runs import FREEZE, LORA, QLORA, curve, train_all, variant, worst
from tests.plans import model_plan

pytestmark = pytest.mark.distributed

FP32, RESUMED_AT = 1e-5, 10
SENTIMENT = Path(__file__).parents[2].parent / "shared" / "data" / "sentiment"


@dataclass(frozen=True)
class Runs:
    """Finished runs by name."""

    plans: dict[str, Plan]

    def agree(self, name: str, with_: str, exactly: bool = False) -> None:
        found, expected = self.plans[name], self.plans[with_]
        assert curve(found, "rows") == curve(expected, "rows")
        for figure in ("loss", "grad_norm"):
            error = worst(curve(found, figure), curve(expected, figure))
            print(f"{name} = {with_}: {figure} {error:.1e}")
            assert error <= (0 if exactly else FP32), (curve(found, figure), curve(expected, figure))

    def predictions(self, name: str, step: int) -> list[dict[str, Any]]:
        return predictions(self.plans[name], step)


def predictions(plan: Plan, step: int) -> list[dict[str, Any]]:
    file = Path(plan.run_dir) / f"predictions-{step:08d}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def two_ranks(plan: Plan, name: str, zero: int, micro: int = 2, **changes: Any) -> Plan:
    return variant(plan, f"2-{name}", workers=2, zero=zero, micro_batch_size=micro, **changes)


def train_and_resume(plans: list[Plan], resumed: Plan, copies: list[Plan]) -> None:
    """Train `plans`; then go on, in `resumed`, from a checkpoint in the middle of the last of them. On one rank
    `copies` go on from there."""
    train_all(plans)
    for plan in (resumed, *copies):
        if dist.get_rank() == 0:
            copy_checkpoint(Path(plans[-1].run_dir), RESUMED_AT, Path(plan.run_dir))
    dist.barrier()
    train_all([resumed])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("classification")
    gpt, bert = gpt_plan(root / "gpt", texts(80)), bert_plan(root / "bert", texts(80), balance="weights")
    midway = {"checkpoint_every_steps": RESUMED_AT, "keep_last": 9}
    two = {
        "gpt zero 3": two_ranks(gpt, "gpt-3", 3),
        "bert freeze zero 2": two_ranks(bert, "freeze-2", 2, method=FREEZE),
        "bert lora zero 3": two_ranks(bert, "lora-3", 3, method=LORA),
        "bert zero 3": two_ranks(bert, "bert-3", 3, micro=1, **midway),
    }
    one = {
        "gpt": variant(gpt, "gpt", eval_every_steps=RESUMED_AT),
        "bert": variant(bert, "bert"),
        "bert freeze": variant(bert, "freeze", method=FREEZE),
        "bert lora": variant(bert, "lora", method=LORA),
        "bert elsewhere": variant(bert, "bert-elsewhere", micro_batch_size=3),
    }
    resumed = {"bert resumed": two_ranks(bert, "bert-3-resumed", 3, micro=1, **midway)}
    run_group(2, train_and_resume, [*two.values()], *resumed.values(), [one["bert elsewhere"]], timeout_s=600)
    run_group(1, train_all, [*one.values()], timeout_s=600)
    return Runs(one | two | resumed)


def test_e1_and_e2_ranks_micro_batches_and_zero_stages_change_nothing(runs: Runs) -> None:
    runs.agree("gpt zero 3", "gpt")
    runs.agree("bert zero 3", "bert")
    runs.agree("bert freeze zero 2", "bert freeze")
    runs.agree("bert lora zero 3", "bert lora")
    for name in ("gpt", "bert", "bert freeze", "bert lora"):
        assert sum(curve(runs.plans[name])[-5:]) < 0.98 * sum(curve(runs.plans[name])[:5]), name
    assert worst(curve(runs.plans["bert lora"]), curve(runs.plans["bert"])) > 10 * FP32


def test_e4_and_e5_resumed_is_uninterrupted(runs: Runs) -> None:
    for name, whole in (("bert resumed", "bert zero 3"), ("bert elsewhere", "bert")):
        steps = last_of_each_step(Path(runs.plans[name].run_dir))
        assert sorted(steps) == list(range(RESUMED_AT + 1, STEPS + 1))
        expected = last_of_each_step(Path(runs.plans[whole].run_dir))
        error = max(abs(steps[n]["loss"] / expected[n]["loss"] - 1) for n in steps)
        print(f"{name}: {error:.1e}")
        assert error <= (FP32 if name == "bert elsewhere" else 0)


def test_a_new_head_starts_from_the_seed_alone(runs: Runs) -> None:
    for name in ("bert zero 3", "bert lora", "bert lora zero 3", "bert freeze zero 2"):
        for found, expected in zip(runs.predictions(name, 0), runs.predictions("bert", 0), strict=True):
            assert found["where"] == expected["where"]
            assert found["probabilities"] == pytest.approx(expected["probabilities"], rel=1e-5), name
    spread = [max(row["probabilities"].values()) for row in runs.predictions("bert", 0)]
    assert max(spread) > 0.34, "a head of zeros would tell nothing apart"


def test_the_head_is_trained_whatever_the_method(runs: Runs) -> None:
    def trained(name: str) -> set[str]:
        return set(load_weights(checkpoint_at(Path(runs.plans[name].run_dir), STEPS)))

    wrapped = "base_model.model.{}.modules_to_save.default.{}"
    head = [(module, part) for module in ("classifier", "bert.pooler.dense") for part in ("weight", "bias")]
    of_lora = {name for name in trained("bert lora zero 3") if "lora_" not in name}
    assert of_lora == {
        wrapped.format(module.removesuffix(".dense"), ("dense." if "pooler" in module else "") + part)
        for module, part in head
    }
    assert not any("pooler" in name or "classifier" in name for name in trained("bert lora") if "lora_" in name)
    frozen = {f"{module}.{part}" for module, part in head}
    assert {name for name in trained("bert freeze zero 2") if ".layer." not in name} == frozen


def test_figures_are_scikit_learns_on_the_same_predictions(runs: Runs) -> None:
    for name, plan in runs.plans.items():
        evaluated = {record["step"]: record for record in read(Path(plan.run_dir)) if record["kind"] == "eval"}
        assert sorted(evaluated) == [0, 10, 20] if name == "gpt" else [0, 20]
        for step in {0, STEPS} & evaluated.keys():
            rows, line = runs.predictions(name, step), evaluated[step]
            assert len({row["where"] for row in rows}) == plan.data.eval_documents == 20
            truth, said = [row["label"] for row in rows], [row["predicted"] for row in rows]
            assert all(row["predicted"] == max(row["probabilities"], key=row["probabilities"].get) for row in rows)
            assert line["accuracy"] == pytest.approx(accuracy_score(truth, said), rel=1e-12)
            *macro, _ = precision_recall_fscore_support(truth, said, average="macro", zero_division=0.0)
            found = [line[f"{figure}_macro"] for figure in ("precision", "recall", "f1")]
            assert found == pytest.approx(macro, rel=1e-12)
            columns = precision_recall_fscore_support(truth, said, labels=CLASSES, zero_division=0.0)
            for label, *figures in zip(CLASSES, *columns, strict=True):
                assert list(line["classes"][label].values()) == pytest.approx(figures)
            loss = -sum(torch.tensor(row["probabilities"][row["label"]]).log().item() for row in rows) / len(rows)
            assert line["loss"] == pytest.approx(loss, rel=1e-5)
    told = {record["step"]: record for record in read(Path(runs.plans["gpt"].run_dir)) if record["kind"] == "eval"}
    assert told[STEPS]["accuracy"] > told[0]["accuracy"]


def test_the_audit_has_looked_at_texts_and_padding(runs: Runs) -> None:
    for plan in runs.plans.values():
        said = [record["checked"] for record in read(Path(plan.run_dir)) if record["kind"] == "audit"]
        assert said == [["texts as the tokenizer gives them", "padding and neighbours unread"]]


@pytest.mark.parametrize("name", ["gpt zero 3", "bert zero 3", "bert lora zero 3"])
def test_e7_transformers_own_pipeline_gives_what_the_run_predicted(name: str, runs: Runs, tmp_path: Path) -> None:
    """On the texts themselves: the same tokens, the same logits, the same names."""
    plan, folder = runs.plans[name], tmp_path / "model"
    checkpoint = checkpoint_at(Path(plan.run_dir), STEPS)
    model: Any = trained_model(plan, checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(Path(plan.data.folder) / "tokenizer")
    write_folder(plan, model, tokenizer, folder, merged=False)
    assert classifies(folder)
    if "lora" in name:
        adapted = adapted_model(folder).eval()
        folder = tmp_path / "merged"
        write_folder(plan, merged_model(plan, model), tokenizer, folder, merged=True)
    rows = Path(plan.trajectory.data.train[0].path).read_text(encoding="utf-8").splitlines()
    tell = pipeline("text-classification", model=str(folder), top_k=None)
    probe = read_probe(Path(plan.run_dir), STEPS)
    assert probe is not None
    with torch.no_grad():
        for loaded in (tell.model, adapted) if "lora" in name else (tell.model,):
            torch.testing.assert_close(loaded(input_ids=probe[0][None]).logits, probe[1], rtol=1e-4, atol=1e-5)
    found = runs.predictions(name, STEPS)
    given = [json.loads(rows[int(row["where"].rpartition(":")[2]) - 1])["text"] for row in found]
    for batch_size in (1, 8):  # padded by the tokenizer that lies in the folder
        for row, told in zip(found, tell(given, batch_size=batch_size), strict=True):
            assert {one["label"]: one["score"] for one in told} == pytest.approx(row["probabilities"], rel=1e-4)


def test_a_deep_check_takes_what_every_method_saves(runs: Runs) -> None:
    for name in ("gpt zero 3", "bert lora zero 3", "bert freeze zero 2"):
        checkpoint = checkpoint_at(Path(runs.plans[name].run_dir), STEPS)
        expected = expected_of(runs.plans[name], [])
        assert expected.source == "the model of the run's plan.json"
        check(checkpoint, verify(checkpoint), expected)


def classified_bert(folder: Path, base: Path, classes: tuple[str, ...]) -> Path:
    """A BERT with a head of its own for `classes`."""
    torch.manual_seed(7)
    body = AutoModel.from_pretrained(base)
    body.config.id2label = dict(enumerate(classes))
    body.config.label2id = {name: number for number, name in enumerate(classes)}
    model = BertForSequenceClassification(body.config)
    model.bert.load_state_dict(body.state_dict())
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def test_a_checkpoints_own_head_stays_where_it_tells_the_same_classes(runs: Runs, tmp_path: Path) -> None:
    """Under ZeRO-3 too, where transformers takes no weight of another shape; the others start anew, from the seed."""
    bert = runs.plans["bert zero 3"]
    plans = {}
    for name, zero in (("kept", 3), ("anew", 0), ("anew", 3)):
        classes = CLASSES if name == "kept" else ("bad", "fair", "fine", "good")
        folder = classified_bert(tmp_path / f"own-{name}", Path(bert.trajectory.model.path), classes)
        model = bert.trajectory.model.model_copy(update={"path": str(folder)})
        changed = bert.model_copy(update={"trajectory": bert.trajectory.model_copy(update={"model": model})})
        moved = changed.model_copy(update={"run_dir": str(tmp_path / "run")})
        life = {"max_steps": 1, "total_steps": 1, "checkpoint_every_steps": 1}
        plans[f"{name} {zero}"] = variant(moved, f"{name}-{zero}", zero=zero, **life)
    run_group(2, train_all, list(plans.values()), timeout_s=300)
    kept = predictions(plans["kept 3"], 0)
    tell = pipeline("text-classification", model=plans["kept 3"].trajectory.model.path, top_k=None)
    for row, told in zip(kept, tell([row["text"] for row in kept]), strict=True):
        assert {one["label"]: one["score"] for one in told} == pytest.approx(row["probabilities"], rel=1e-4)
    for zero in (0, 3):
        for found, expected in zip(predictions(plans[f"anew {zero}"], 0), runs.predictions("bert", 0), strict=True):
            assert found["probabilities"] == pytest.approx(expected["probabilities"], rel=1e-5)
    folder, anew = tmp_path / "exported", plans["anew 3"]
    tokenizer = AutoTokenizer.from_pretrained(Path(bert.data.folder) / "tokenizer")
    write_folder(anew, trained_model(anew, checkpoint_at(Path(anew.run_dir), 1)), tokenizer, folder, merged=False)
    again = AutoModelForSequenceClassification.from_pretrained(folder)
    assert again.config.id2label == dict(enumerate(CLASSES))
    assert set(head_modules(again)) == {"classifier", "bert.pooler"}


@pytest.mark.long
def test_e6_qlora_is_the_same_at_every_stage(tmp_path: Path) -> None:
    plans: dict[str, Plan] = {}
    for family, plan in (
        ("gpt", gpt_plan(tmp_path / "gpt", texts(80))),
        ("bert", bert_plan(tmp_path / "b", texts(80))),
    ):
        plans[family] = variant(plan, family, method=QLORA)
        for zero in (0, 2, 3):
            plans[f"{family} {zero}"] = two_ranks(plan, f"{family}-{zero}", zero, method=QLORA)
    run_group(1, train_all, [plans["gpt"], plans["bert"]], timeout_s=600)
    run_group(2, train_all, [plan for name, plan in plans.items() if " " in name], timeout_s=600)
    for name in plans:
        Runs(plans).agree(name, name.split()[0])


@pytest.mark.long
@pytest.mark.skipif(not SENTIMENT.is_dir(), reason="real data is not here: ../shared/data/sentiment")
def test_real_reviews_are_told_apart_by_an_encoder_made_on_the_spot(tmp_path: Path) -> None:
    """Positive reviews of one site, negative ones of another: what they look like tells them apart."""
    files = [SENTIMENT / f"{name}.jsonl" for name in ("rotten_tomatoes", "imdb")]
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    model = model_plan(tiny_bert(tmp_path / "bert", [row["prompt"] for row in rows], hidden=64))
    plan = class_plan(tmp_path / "run", model, rows, too_long="truncate_end")
    life = {"max_steps": 60, "total_steps": 60, "eval_every_steps": 60, "checkpoint_every_steps": 60}
    plan = variant(plan, "reviews", global_batch_size=16, micro_batch_size=16, **life)
    run_group(1, train_all, [plan], timeout_s=900)
    assert plan.data.classes == ("negative", "positive")
    found = {}
    for record in (record for record in read(Path(plan.run_dir)) if record["kind"] == "eval"):
        told = predictions(plan, record["step"])
        truth, said = ([row[key] for row in told] for key in ("label", "predicted"))
        assert record["accuracy"] == pytest.approx(accuracy_score(truth, said))
        assert record["f1_macro"] == pytest.approx(f1_score(truth, said, average="macro"))
        found[record["step"]] = record["accuracy"], record["f1_macro"]
    print("accuracy and F1 before and after:", found)
    assert min(found[60]) > 0.7 > max(found[0])
