"""Texts and their classes: which rows have one, in which order classes come, and that the tokens are the tokenizer's
own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from launcher.data.classified import TextEncoder, class_names, classified, for_texts, text_of
from launcher.data.conversation import Conversation, Message
from launcher.data.loader import EvalData, TrainData
from launcher.data.masks import Document
from launcher.data.prepare import prepare
from launcher.data.store import Documents
from launcher.errors import DataError, ModelError
from launcher.plan.batch import BatchLayout
from launcher.plan.plan import DataFacts, ReplayPlan, SourcePlan
from tests.classifiers import CLASSES, GPT, texts, word_piece, write_rows
from tests.plans import data_plan, held_out, model_plan, source_plan

SCRATCH_BERT = {"model_type": "bert", "hidden_size": 32, "vocab_size": 300}


def prepared(root: Path, rows: list[dict[str, Any]], scratch: dict[str, Any] = GPT, **data: Any) -> DataFacts:
    source = source_plan(write_rows(root / "rows.jsonl", rows), **data.pop("source", {}))
    model = model_plan(root / "base", source="scratch", scratch=scratch)
    plan = data_plan(source, **({"head": (), "packing": False, "max_length": 64} | data))
    return prepare(model, plan, seed=3, cache_dir=root / "prepared")


def test_the_class_is_the_label_or_the_answer() -> None:
    asked, answer = Message("user", "how was it?"), Message("assistant", " positive<|endoftext|>")
    assert classified(Conversation((asked, answer))).label == "positive"
    assert text_of(classified(Conversation((asked, answer)))) == "how was it?"
    assert classified(Conversation((asked, answer), label="3 stars")).label == "3 stars"
    assert classified(Conversation((asked, answer), label=" 3 stars\t")).label == "3 stars"
    assert classified(Conversation((), text="how was it?<|endoftext|>", label="bad")).text == "how was it?"
    with pytest.raises(DataError, match="a:3: a text without a class"):
        classified(Conversation((), "a:3", text="how was it?"))
    with pytest.raises(DataError, match="a:3: a conversation of 3 messages, and no text with its class"):
        classified(Conversation((Message("system", "be brief"), asked, answer), "a:3"))


def test_classes_are_in_the_order_of_the_head() -> None:
    plain = data_plan(source_plan("a"), head=())
    labelled = data_plan(source_plan("a", labels=("poor", "fair", "good")), head=())
    assert class_names(["b", "a"], plain) == ("a", "b")
    assert class_names(["good", "poor", "a"], labelled) == ("poor", "fair", "good", "a")
    numbers = ["10", "2", "few", "-1", "1.5", "0", "9" * 5000]
    assert class_names(numbers, plain) == ("-1", "0", "1.5", "2", "10", "9" * 5000, "few")
    assert class_names(["fair"], data_plan(source_plan("a", labels=("poor ", " fair")), head=())) == ("poor", "fair")
    known = labelled.model_copy(update={"head": ("good", "fair", "poor")})
    assert class_names(["good", "poor"], known) == ("good", "fair", "poor"), "the model's own head stays usable"
    assert class_names(["good", "other"], known) == ("poor", "fair", "good", "other")
    with pytest.raises(DataError, match="every row is of the class 'a'"):
        class_names(["a"], plain)
    with pytest.raises(DataError, match="1,001 classes"):
        class_names(map(str, range(1001)), plain)


@pytest.mark.parametrize("too_long", ["truncate_end", "truncate_start"])
def test_tokens_are_what_the_tokenizer_gives_also_where_they_are_cut(too_long: str, tmp_path: Path) -> None:
    rows = [str(row["text"]) for row in texts(40)]
    tokenizer = for_texts(word_piece(tmp_path, rows), data_plan(source_plan("a"), max_length=12, too_long=too_long))
    conversations = [Conversation((), text=row, label="a") for row in rows]
    cut = 0
    for text, found in zip(rows, TextEncoder(tokenizer).encode(conversations), strict=True):
        assert isinstance(found, list)
        (document,) = found
        assert document.input_ids.tolist() == tokenizer(text, verbose=False)["input_ids"]
        assert (document.num_targets, document.num_turns) == (1, 1)
        length = len(document.input_ids)
        if length > 12:
            cut += 1
            part = document.part(0, 12) if too_long == "truncate_end" else document.part(length - 12, length)
            assert part.input_ids.tolist() == tokenizer(text, truncation=True)["input_ids"]
    assert cut > 5


def test_a_text_that_the_tokenizer_makes_nothing_of_is_a_bad_row(tmp_path: Path) -> None:
    encoder = TextEncoder(word_piece(tmp_path, ["a b"]))
    (found,) = encoder.encode([Conversation((), "a:1", text="\x00", label="a")])
    assert isinstance(found, DataError)
    assert "a:1: the tokenizer makes nothing of the text" in found.message


def test_the_tokenizer_says_what_the_model_reads(tmp_path: Path) -> None:
    tokenizer = word_piece(tmp_path, ["a b"])  # of 64 tokens
    with pytest.raises(ModelError, match="data.max_length is 65, and the model reads at most 64") as caught:
        for_texts(tokenizer, data_plan(source_plan("a"), max_length=65))
    assert caught.value.hint is not None
    assert "set data.max_length to 64" in caught.value.hint
    for_texts(tokenizer, data_plan(source_plan("a"), max_length=32, too_long="truncate_start")).save_pretrained(
        tmp_path
    )
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (again.model_max_length, again.truncation_side, again.padding_side) == (32, "left", "right")
    assert again.model_input_names == ["input_ids", "attention_mask"], "token types are all 0, as in training"
    tokenizer.pad_token = None
    tokenizer.eos_token = "[SEP]"
    assert for_texts(tokenizer, data_plan(source_plan("a"), max_length=16)).pad_token == "[SEP]"


@pytest.mark.parametrize("scratch", [GPT, SCRATCH_BERT])
def test_documents_have_one_target_their_class(scratch: dict[str, Any], tmp_path: Path) -> None:
    rows = texts(80)
    facts = prepared(tmp_path, rows, scratch, eval=held_out(split=0.25), stratify=True)
    assert facts.classes == CLASSES
    assert (facts.train_rows, facts.train_supervised_tokens, facts.eval_documents) == (60, 60, 20)
    documents = Documents(facts.folder)
    held = EvalData(facts.folder)
    assert np.bincount([documents.labels[n] for n in range(80) if documents.sets[n] == 1]).tolist() == [10, 5, 5]
    tokenizer = AutoTokenizer.from_pretrained(Path(facts.folder) / "tokenizer")
    data = TrainData(facts.folder, 6, 0)
    (batch,) = data.micro_batches(0, BatchLayout(1, 6, 1), 0)
    assert data.global_batch(0).weight == data.global_batch(0).supervised_tokens == len(batch.targets) == 6
    of_line = {f"{tmp_path / 'rows.jsonl'}:{i + 1}": row for i, row in enumerate(rows)}
    starts = batch.cu_seqlens.tolist()
    for i, where in enumerate(batch.where):
        ids = batch.input_ids[0, starts[i] : starts[i + 1]].tolist()
        assert ids == tokenizer(of_line[where]["text"])["input_ids"]
        assert CLASSES[int(batch.targets[i])] == of_line[where]["label"]
        assert int(batch.supervised_index[i]) == starts[i + 1] - 1
    if scratch is SCRATCH_BERT:
        assert tokenizer.convert_ids_to_tokens(ids)[:: len(ids) - 1] == ["[CLS]", "[SEP]"]
    # Rows are padded to the longest of a batch, which has at most the tokens asked for.
    batches = list(held.micro_batches(100, 1, 0))
    assert sum(len(one.targets) for one in batches) == 20
    assert all(len(one.targets) * one.max_seqlen <= 100 for one in batches)
    assert len(batches) < 20


def test_weights_by_class_are_weights_of_rows(tmp_path: Path) -> None:
    facts = prepared(tmp_path, texts(80), balance="weights")
    batch = TrainData(facts.folder, 80, 0).global_batch(0)
    assert batch.supervised_tokens == 80
    assert batch.weight == pytest.approx(80, rel=1e-5)
    (micro,) = TrainData(facts.folder, 80, 0).micro_batches(0, BatchLayout(1, 80, 1), 0)
    assert micro.weights is not None
    weight_of = {
        int(label): round(float(weight), 4) for label, weight in zip(micro.targets, micro.weights, strict=True)
    }
    assert weight_of == {0: 0.6667, 1: 1.3333, 2: 1.3333}


def test_prompts_with_a_word_for_an_answer_are_classified(tmp_path: Path) -> None:
    rows = [{"prompt": f"{row['text']}. It is\n", "completion": f"{row['label']}<|endoftext|>"} for row in texts(40)]
    facts = prepared(tmp_path, rows, eval=held_out(split=0.25), stratify=True)
    assert facts.formats == {str(tmp_path / "rows.jsonl"): "prompt_completion"}
    assert (facts.classes, facts.eval_documents) == (CLASSES, 5 + 3 + 3)


def test_a_text_that_is_too_long_can_be_cut_or_left_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="and data.max_length is 8") as caught:
        prepared(tmp_path, texts(40), max_length=8, too_long="stop")
    assert caught.value.hint == "raise data.max_length, or set data.too_long to drop, truncate_end or truncate_start"


def test_held_out_files_have_their_classes_too(tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other.jsonl", [{"text": f"a lake {i}", "kind": "calm"} for i in range(3)])
    rows = [{"text": row["text"], "kind": row["label"]} for row in texts(40)]
    held = held_out(sources=(source_plan(other, format="text"),))
    facts = prepared(tmp_path, rows, source={"format": "text"}, label="kind", eval=held)
    documents = Documents(facts.folder)
    assert facts.classes == CLASSES
    assert [int(documents.labels[n]) for n in range(43) if documents.sets[n] == 1] == [0, 0, 0]


def test_a_row_without_a_class_is_left_out_or_ends_the_preparation(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [*texts(20), {"text": "nobody knows", "label": None}]
    with pytest.raises(DataError, match="rows.jsonl:21: 'label' is empty"):
        prepared(tmp_path, rows)
    facts = prepared(tmp_path, rows, on_bad_row="drop")
    assert (facts.train_rows, facts.dropped) == (20, {"bad row": 1})


def test_the_preview_shows_text_and_class(tmp_path: Path) -> None:
    from launcher.report.data_rows import rows as shown

    facts = prepared(tmp_path, texts(20), SCRATCH_BERT)
    ((document,),) = shown(Path(facts.folder), "train", 0, 1)
    given = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[int(document.where.rpartition(":")[2]) - 1])
    assert "".join(piece.text for piece in document.pieces) == f"[CLS]{given['text']}[SEP]"
    assert document.figures == f"{document.num_tokens} tokens, of class {given['label']}"


def test_a_part_keeps_what_stands_around_every_text() -> None:
    from launcher.data.classified import Text

    document: Document = Text(np.arange(10, dtype=np.int32), np.zeros(10, np.uint8), before=2, after=1)
    assert document.part(0, 6).input_ids.tolist() == [0, 1, 2, 3, 4, 9]
    assert document.part(4, 10).input_ids.tolist() == [0, 1, 6, 7, 8, 9]
    assert document.part(0, 2).input_ids.tolist() == [0, 1, 9]


def test_rows_that_are_replayed_and_retained_have_classes_too(tmp_path: Path) -> None:
    def source(name: str, label: str) -> SourcePlan:
        rows = [{"text": f"a grey {name} {i}", "label": label} for i in range(10)]
        return source_plan(write_rows(tmp_path / f"{name}.jsonl", rows))

    replay = ReplayPlan(sources=(source("hour", "sad"),), share=0.2)
    facts = prepared(tmp_path, texts(40), replay=replay, retain=(source("lake", "calm"),))
    documents, retained = Documents(facts.folder), EvalData(facts.folder, None, "retain.arrow")
    assert (facts.classes, facts.train_rows, facts.retain_documents) == (CLASSES, 50, 10)
    assert [targets for batch in retained.micro_batches(1, 1, 0) for targets in batch.targets.tolist()] == [0] * 10
    replayed = [n for n in range(len(documents)) if "hour" in documents.where(n)]
    assert {int(documents.labels[n]) for n in replayed} == {2}
