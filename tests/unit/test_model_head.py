"""The head of a sequence classification over bases of many families: what it is, what it starts from, and that a text's
logits are its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from launcher.audit.sample import sampled
from launcher.audit.texts import check_padding, check_texts
from launcher.errors import ModelError
from launcher.model.adapters import apply_method
from launcher.model.head import head_modules, own_classes, start_head
from launcher.model.load import check_classifier, from_checkpoint, run_config
from launcher.model.scratch import create_scratch
from launcher.plan.plan import Plan
from launcher.train.classification import ClassLoss
from tests.classifiers import CLASSES, bert_plan, texts
from tests.plans import method_plan, model_plan

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": SIZES,
    "roberta": SIZES | {"max_position_embeddings": 130},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "deberta-v2": SIZES | {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]},
    "modernbert": SIZES | {"local_attention": 8, "global_attn_every_n_layers": 2},
    "electra": SIZES | {"embedding_size": 32},
    "albert": SIZES | {"embedding_size": 16},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "llama": SIZES,
    "qwen2": SIZES | {"num_key_value_heads": 2},
    "gpt_neox": SIZES,
    "gemma": SIZES | {"head_dim": 8, "num_key_value_heads": 2},
}
HEADS = {
    "bert": {"classifier", "bert.pooler"},
    "distilbert": {"pre_classifier", "classifier"},
    "modernbert": {"head", "classifier"},
    "deberta-v2": {"pooler", "classifier"},
    "albert": {"classifier", "albert.pooler", "albert.pooler_activation"},
    "llama": {"score"},
}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return bert_plan(tmp_path_factory.mktemp("head"), texts(40))


def over(plan: Plan, folder: Path, family: str, kind: Any = AutoModel) -> Plan:
    """The plan over a base of a family, without dropout, that has no head for classes."""
    tokenizer = AutoTokenizer.from_pretrained(Path(plan.data.folder) / "tokenizer")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep", "bos", "eos")}
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **FAMILIES[family], **ids)
    torch.manual_seed(1)
    kind.from_config(config).save_pretrained(folder)
    changed = plan.trajectory.model_copy(update={"model": model_plan(folder)})
    return plan.model_copy(update={"trajectory": changed})


def logits_of(model: Any) -> Any:
    loss = ClassLoss(model.eval(), model, torch.device("cpu"))
    return torch.no_grad()(loss.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_of_any_family_gets_a_head(family: str, plan: Plan, tmp_path: Path) -> None:
    plan = over(plan, tmp_path / "base", family)
    folder = Path(plan.data.folder)
    model = from_checkpoint(plan, run_config(plan), dtype=torch.float32)
    again = from_checkpoint(plan, run_config(plan), dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    if family in HEADS:
        assert set(head_modules(model)) <= HEADS[family]
    heads = [weight for head in head_modules(model).values() for weight in head.parameters() if weight.dim() > 1]
    assert all(0 < weight.std() < 0.5 for weight in heads)
    assert model.config.id2label == dict(enumerate(CLASSES))
    numbers = sampled(folder, 30)
    assert not check_padding(logits_of(model), folder, numbers, plan.data.vocab_size).findings
    base = AutoModel.from_pretrained(tmp_path / "base").state_dict()
    found = model.base_model.state_dict()
    assert all(torch.equal(found[name], base[name]) for name in found.keys() & base.keys() if "pooler" not in name)


@pytest.mark.parametrize("family", ["roberta", "distilbert", "modernbert", "gpt2", "llama"])
def test_adapters_leave_the_head_to_be_trained_whole(family: str, plan: Plan, tmp_path: Path) -> None:
    plan = over(plan, tmp_path / "base", family)
    model = from_checkpoint(plan, run_config(plan), dtype=torch.float32)
    heads = set(head_modules(model))
    of_head = {
        f"base_model.model.{name}.modules_to_save.default.{inner}"
        for name in heads
        for inner, _ in model.get_submodule(name).named_parameters()
    }
    adapted = apply_method(model, method_plan("lora", rank=2), 0)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "lora_" not in name} == of_head
    assert not [name for name in trained if "lora_" in name and any(f"model.{head}." in name for head in heads)]
    assert len(trained) > len(of_head) + 8


def test_the_last_layers_are_trained_with_the_head(plan: Plan, tmp_path: Path) -> None:
    plan = over(plan, tmp_path / "base", "distilbert")
    model = from_checkpoint(plan, run_config(plan), dtype=torch.float32)
    apply_method(model, method_plan("freeze", train_last_layers=1), 0)
    trained = {name.rsplit(".", 1)[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"pre_classifier", "classifier"} <= trained
    assert all(
        name.startswith("distilbert.transformer.layer.1.") for name in trained - {"pre_classifier", "classifier"}
    )


def test_a_masked_language_model_without_a_pooler_is_a_base(plan: Plan, tmp_path: Path) -> None:
    plan = over(plan, tmp_path / "base", "bert", AutoModelForMaskedLM)
    model = from_checkpoint(plan, run_config(plan), dtype=torch.float32)
    assert model.bert.pooler.dense.weight.std() > 0
    for missing in ({"bert.encoder.layer.0.output.dense.weight", "classifier.weight"},):
        with pytest.raises(ModelError, match="no weights for 1 parts of the model below its head"):
            start_head(model, missing, 0)


def test_what_becomes_of_an_own_head_is_said(plan: Plan, tmp_path: Path) -> None:
    base = plan.trajectory.model
    assert check_classifier(base, CLASSES) == []
    model = AutoModelForSequenceClassification.from_pretrained(base.path, num_labels=2)
    model.save_pretrained(tmp_path / "own")
    own = model_plan(tmp_path / "own")
    assert own_classes(model.config) == ("LABEL_0", "LABEL_1")
    (said,) = check_classifier(own, CLASSES)
    assert said == "the model's own head tells LABEL_0, LABEL_1 apart: it starts anew for calm, glad, sad"
    (said,) = check_classifier(own, ("LABEL_0", "LABEL_1"))
    assert said == "the model tells LABEL_0, LABEL_1 apart already: its head goes on from there"


def test_what_cannot_classify_is_refused(tmp_path: Path) -> None:
    for family in ("bart", "clip"):
        AutoConfig.for_model(family).save_pretrained(tmp_path / family)
        with pytest.raises(ModelError, match=f"no sequence classification by models of type '{family}'"):
            check_classifier(model_plan(tmp_path / family), CLASSES)


def test_a_scratch_model_has_its_classes(plan: Plan, tmp_path: Path) -> None:
    model = model_plan(tmp_path / "base", source="scratch", scratch={"model_type": "bert"} | SIZES)
    create_scratch(model, Path(plan.data.folder) / "tokenizer", 3, tmp_path / "base", CLASSES)
    changed = plan.model_copy(update={"trajectory": plan.trajectory.model_copy(update={"model": model})})
    read = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    loaded = from_checkpoint(changed, run_config(changed), dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), loaded.parameters(), strict=True))


def test_the_audit_sees_texts_of_another_tokenizer_and_classes_without_an_output(plan: Plan) -> None:
    folder = Path(plan.data.folder)
    tokenizer, numbers = AutoTokenizer.from_pretrained(folder / "tokenizer"), sampled(folder, 30)
    rows = plan.data.vocab_size
    assert not check_texts(folder, numbers, tokenizer, rows, 3).findings
    (finding,) = check_texts(folder, numbers, tokenizer, rows, 2).findings
    assert finding.what == "classes that the head has no output for"
    (finding,) = check_texts(folder, numbers, tokenizer, 50, 3).findings
    assert finding.what == "tokens that the model does not know"
    tokenizer.backend_tokenizer.post_processor = None
    assert not check_texts(folder, numbers, tokenizer, rows, 3).findings, "nothing is asked for around a text"
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[SEP] $A [CLS]", special_tokens=[("[SEP]", tokenizer.sep_token_id), ("[CLS]", tokenizer.cls_token_id)]
    )
    (finding,) = check_texts(folder, numbers, tokenizer, rows, 3).findings
    assert finding.what == "texts that another tokenizer made"


def test_the_audit_sees_padding_that_is_read(plan: Plan) -> None:
    folder = Path(plan.data.folder)
    model = from_checkpoint(plan, run_config(plan), dtype=torch.float32).eval()

    class Unmasked(ClassLoss):
        def _inputs(self, batch: Any) -> dict[str, Any]:
            inputs = super()._inputs(batch)
            return inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])}

    loss = Unmasked(model, model, torch.device("cpu"))
    (finding,) = check_padding(torch.no_grad()(loss.logits), folder, sampled(folder, 30), plan.data.vocab_size).findings
    assert finding.what == "padding is read"
