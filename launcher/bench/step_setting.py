"""What `step` measures: model shapes, the plan of our own run, documents of random tokens, and the FLOPs of a step.

T tokens of a row, S supervised of them, D documents.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from launcher.plan.facts import ClusterFacts, NodeFacts
from launcher.plan.plan import DataFacts, Plan
from launcher.plan.resolve import resolve, resolve_model
from launcher.plan.resolve_data import resolve_data
from launcher.plan.size import parameter_count
from launcher.recipe.load import load

if TYPE_CHECKING:
    from launcher.data.loader import MicroBatch

_LLAMA: dict[str, Any] = {"model_type": "llama", "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
MODELS: dict[str, dict[str, Any]] = {
    "8b": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False,
    },
    "1b": _LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": True,
    },
    "tiny": _LLAMA
    | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "tie_word_embeddings": False,
    },
}
"""Llama 3.1 8B, Llama 3.2 1B, and one for CPUs."""
SUPERVISED = 0.4
"""Of each document, its last tokens."""
RATE = 1e-4


@dataclass(frozen=True)
class Setting:
    """One comparison."""

    model: str
    """Of MODELS."""
    method: str
    """`full`, `lora` or `qlora`; adapters of `rank` on all linear layers but the head."""
    tokens: int
    """Of a step: one packed row."""
    warmup: int
    steps: int
    rank: int
    checkpointing: bool
    device: str

    @property
    def config(self) -> dict[str, Any]:
        return MODELS[self.model]


def documents(setting: Setting, step: int) -> list[list[int]]:
    """The row of step `step`: random tokens in documents of random lengths that fill it; the same for everyone."""
    draw = random.Random(step)
    longest = max(4, setting.tokens // 4)
    lengths: list[int] = []
    while (left := setting.tokens - sum(lengths)) > 0:
        length = min(left, draw.randint(longest // 16 + 2, longest))
        lengths.append(left if left - length < 2 else length)
    vocabulary = setting.config["vocab_size"]
    return [[draw.randrange(3, vocabulary) for _ in range(length)] for length in lengths]


def num_supervised(length: int) -> int:
    """Of a document of so many tokens."""
    return max(1, round(SUPERVISED * length))


def labels(document: list[int]) -> list[int]:
    """As transformers takes them: -100 where nothing is learned."""
    first = len(document) - num_supervised(len(document))
    return [-100] * first + document[first:]


def micro_batch(row: list[list[int]]) -> MicroBatch:
    """A row as our loop takes it."""
    import torch

    from launcher.data.loader import MicroBatch

    lengths = [len(document) for document in row]
    flat = torch.tensor([token for document in row for token in document])
    predicted = torch.tensor([label != -100 for document in row for label in labels(document)]).nonzero().squeeze(1)
    return MicroBatch(
        input_ids=flat[None],
        position_ids=torch.tensor([position for length in lengths for position in range(length)])[None],
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        max_seqlen=max(lengths),
        supervised_index=predicted - 1,
        targets=flat[predicted],
        weights=None,
        where=tuple(f"made up:{i}" for i in range(len(row))),
        num_tokens=len(flat),
    )


def plan_of(setting: Setting, folder: Path) -> Plan:
    """What the planner decides for a run on one device, of a recipe that fixes what is compared."""
    rows = folder / "rows.jsonl"
    rows.touch()
    recipe = {
        "audit": "off",
        "model": {"scratch": setting.config, "kernels": "fused"},
        "method": {"kind": setting.method, "rank": setting.rank, "alpha": 2.0 * setting.rank},
        "data": {"train": [{"path": str(rows)}], "max_length": setting.tokens, "packing": True},
        "train": {
            "dtype": "bf16",
            "global_batch_size": 1,
            "micro_batch_size": 1,
            "max_steps": setting.warmup + setting.steps,
            "gradient_checkpointing": setting.checkpointing,
        },
        "optimizer": {"lr": RATE},
        "schedule": {"kind": "constant", "warmup": 0},
        "cluster": {"workers": 1},
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    loaded = load(str(file))
    cluster = ClusterFacts((NodeFacts("here", cpus=1, gpus=int(setting.device == "cuda")),))
    facts = DataFacts(
        folder=str(folder),
        content_hash="",
        train_rows=setting.warmup + setting.steps,
        train_documents=0,
        train_tokens=0,
        train_supervised_tokens=0,
        eval_documents=0,
        eval_supervised_tokens=0,
        test_documents=0,
        dropped={},
        vocab_size=setting.config["vocab_size"],
        formats={},
        classes=(),
        retain_documents=0,
    )
    parameters = parameter_count(setting.config)
    model, data = resolve_model(loaded, folder), resolve_data(loaded)
    return resolve(loaded, cluster, model, data, facts, parameters, "step", folder, str(folder))


def model_flops(config: Mapping[str, Any], method: str, rank: int, row: list[list[int]]) -> float:
    """FLOPs that a step on a row cannot do without.

    Matrix products of the N weights in decoder layers: 2 N T forward, 2 N T for the gradients of their inputs and,
    where they are trained, 2 N T for their own: 6 N T, or 4 N T with a frozen base. The head the same, over the S
    supervised tokens alone. Adapters of A weights: 6 A T. Causal attention over documents of L tokens: 2 d H L^2
    forward and twice that backward, in each layer. Nothing that is computed a second time counts.
    """
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    head_size = hidden // config["num_attention_heads"]
    keys = config["num_key_value_heads"] * head_size
    shapes = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden)]
    shapes += [(hidden, inner), (hidden, inner), (inner, hidden)]
    lengths = [len(document) for document in row]
    tokens, supervised = sum(lengths), sum(num_supervised(length) for length in lengths)
    passes = 6 if method == "full" else 4
    weights = layers * sum(a * b for a, b in shapes)
    adapters = 0 if method == "full" else layers * rank * sum(a + b for a, b in shapes)
    attention = 6 * hidden * sum(length**2 for length in lengths) * layers
    products = passes * (weights * tokens + config["vocab_size"] * hidden * supervised) + 6 * adapters * tokens
    return float(products + attention)
