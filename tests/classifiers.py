"""Sequence classifications small enough for a dozen in one process: rows, encoders made on the spot, whole Plans."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from launcher.data.prepare import prepare
from launcher.model.scratch import create_scratch
from launcher.plan.plan import ModelPlan, Plan
from tests.plans import data_plan, held_out, lifecycle, model_plan, short_run, source_plan

STEPS = 20
GLOBAL_BATCH = 6
CLASSES = ("calm", "glad", "sad")
WORDS = {
    "calm": ("quiet", "still", "slow", "evening", "lake"),
    "glad": ("bright", "funny", "lovely", "wonderful", "warm"),
    "sad": ("dull", "tedious", "awful", "grey", "lost"),
}
COMMON = ("the", "film", "was", "a", "story", "of", "people", "who", "walk", "and", "talk", "for", "hours")


def texts(count: int, seed: int = 5) -> list[dict[str, str]]:
    """{text, label}: one or two telling words among others, 1 to 30 words; `calm` is twice as frequent."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        label = CLASSES[(0, 0, 1, 2)[i % 4]]
        words = draw.choices(COMMON, k=draw.choice((0, 3, 8, 28))) + draw.choices(WORDS[label], k=draw.choice((1, 2)))
        draw.shuffle(words)
        rows.append({"text": f"{' '.join(words)} {i}", "label": label})
    return rows


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def word_piece(folder: Path, lines: Iterable[str], size: int = 300) -> PreTrainedTokenizerFast:
    """BERT's kind of tokenizer, trained on `lines`: lower case, `[CLS]` before and `[SEP]` after every text."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(lines, trainers.WordPieceTrainer(vocab_size=size, special_tokens=special))
    ends = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), special, strict=True))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=64, **{f"{name}_token": token for name, token in names.items()}
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_bert(folder: Path, lines: Sequence[str], hidden: int = 32, seed: int = 1) -> Path:
    """A folder with a BERT that has no head, as pretraining leaves it, and its tokenizer."""
    tokenizer = word_piece(folder, lines)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * hidden,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.15,  # so that 20 steps teach it something
    )
    BertModel(config).save_pretrained(folder)
    return folder


def class_plan(root: Path, model: ModelPlan, rows: Iterable[dict[str, Any]], **data: Any) -> Plan:
    """A Plan of a sequence classification whose data lie ready in `root`, and whose scratch model does."""
    root.mkdir(parents=True, exist_ok=True)
    source = source_plan(write_rows(root / "rows.jsonl", rows))
    settings: dict[str, Any] = {"eval": held_out(split=0.25), "stratify": True, "max_length": 64, "packing": False}
    plan = data_plan(source, **(settings | {"head": ()} | data))
    facts = prepare(model, plan, seed=3, cache_dir=root / "prepared")
    if model.source == "scratch":
        create_scratch(model, Path(facts.folder) / "tokenizer", 3, Path(model.path), facts.classes)
    short = short_run(root, model, plan, facts, STEPS, GLOBAL_BATCH, task="sequence_classification")
    return short.model_copy(update={"lifecycle": lifecycle(STEPS, audit="strict")})


GPT: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 300,
}


def gpt_plan(root: Path, rows: Iterable[dict[str, Any]], scratch: dict[str, Any] | None = None, **data: Any) -> Plan:
    """A small Llama, or what `scratch` says, from random weights."""
    root.mkdir(parents=True, exist_ok=True)
    return class_plan(root, model_plan(root / "base", source="scratch", scratch=scratch or GPT), rows, **data)


def bert_plan(root: Path, rows: Sequence[dict[str, Any]], **data: Any) -> Plan:
    """A BERT without a head."""
    root.mkdir(parents=True, exist_ok=True)
    return class_plan(root, model_plan(tiny_bert(root / "bert", [row["text"] for row in rows])), rows, **data)
