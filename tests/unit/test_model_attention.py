"""E8 with torch's own attention: in a pack, no document sees another, in every family that dispatches; the others are
refused, and train one padded row a document."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.data.loader import MicroBatch
from launcher.errors import ModelError
from launcher.model.attention import NAMES, document_borders, register, supports_packing
from launcher.model.load import check_packing
from launcher.train.loss import SupervisedLoss
from launcher_kernels import dispatch
from tests import interpreter, packs
from tests.plans import model_plan

VOCABULARY = 101
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
OPT: dict[str, Any] = {key: SIZES[key] for key in SIZES if key not in ("intermediate_size", "num_key_value_heads")}
ENDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# Windows shorter than the documents and caps that bite, so that ignoring one would show.
PACKED: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "gpt2": GPT2 | ENDS,
    "qwen3": SIZES | {"head_dim": 16},
    "gemma2": SIZES | {"head_dim": 16, "sliding_window": 4, "attn_logit_softcapping": 0.2},
    "mistral": SIZES | {"sliding_window": 5},
    "opt": OPT | {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt_neox": {key: SIZES[key] for key in SIZES if key != "num_key_value_heads"},
    # Each token through both experts: were they chosen, other documents' tokens would change the shapes of products.
    "gpt_oss": SIZES
    | {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 2, "sliding_window": 4}
    | {"layer_types": ["sliding_attention", "full_attention"]},
}
REFUSED: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY} | ENDS,
    "gptj": GPT2 | ENDS | {"rotary_dim": 8},
    "falcon": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY} | ENDS,
    # These dispatch their attention, beside layers that know of no borders, or in chunks of a document.
    "lfm2": SIZES | {"layer_types": ["conv", "full_attention"]},
    "llama4_text": SIZES
    | {"head_dim": 16, "intermediate_size_mlp": 96, "num_local_experts": 2, "attention_chunk_size": 4}
    | {"layer_types": ["chunked_attention", "full_attention"]},
}
FAMILIES = PACKED | REFUSED


def build(family: str, implementation: str | None = None, **changes: Any) -> Any:
    """A model of one seed with weights large enough for attention to matter; None: transformers' own choice."""
    config = AutoConfig.for_model(family, **(FAMILIES[family] | {"initializer_range": 0.2} | changes))
    torch.manual_seed(0)
    # from_config keeps the object it is given: two models of one object would share their attention.
    settings = {"attn_implementation": implementation} if implementation else {}
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32, **settings).eval()


@pytest.fixture(scope="module", autouse=True)
def _attention() -> Iterator[None]:
    """Ours known to transformers; one thread, as a second only waits for work in models this small."""
    register()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


pack = partial(packs.pack, vocabulary=VOCABULARY)


def packed_logits(model: Any, batch: MicroBatch, ids: Tensor | None = None) -> Tensor:
    """[T, V] logits of a whole pack."""
    logits: Tensor = model(
        input_ids=batch.input_ids if ids is None else ids[None],
        position_ids=batch.position_ids,
        attention_mask=document_borders(batch.cu_seqlens, batch.max_seqlen),
        use_cache=False,
    ).logits[0]
    return logits


def documents_of(batch: MicroBatch) -> list[slice]:
    return [slice(start, stop) for start, stop in itertools.pairwise(batch.cu_seqlens.tolist())]


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest number."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def packs_of(*sizes: int) -> list[MicroBatch]:
    """A pack for each number of documents, of 2 to 16 tokens each."""
    draw = random.Random(1)
    return [pack([draw.randint(2, 16) for _ in range(size)], seed) for seed, size in enumerate(sizes)]


@pytest.mark.parametrize("family", PACKED)
def test_perturbing_a_document_moves_no_other(family: str) -> None:
    model, draw = build(family, NAMES["sdpa"]), random.Random(2)
    assert supports_packing(type(model), model.config)
    for batch in packs_of(2, 17, 50):
        documents = documents_of(batch)
        with torch.no_grad():
            before = packed_logits(model, batch)
            for victim in draw.sample(documents, 1):
                ids = batch.input_ids[0].clone()
                ids[victim] = (ids[victim] - 3 + 7) % (VOCABULARY - 3) + 3
                moved = (packed_logits(model, batch, ids) - before).abs().amax(-1)
                assert moved[victim].min() > 1e-3, "the document itself should have moved"
                moved[victim] = 0.0
                assert moved.max().item() == 0.0


@pytest.mark.parametrize("family", PACKED)
def test_packed_is_each_document_alone(family: str) -> None:
    """In our attention and in transformers' eager one, so that windows, caps and positions are right as well."""
    ours, eager = build(family, NAMES["sdpa"]), build(family, "eager")
    for batch in packs_of(2, 11):
        with torch.no_grad():
            packed = packed_logits(ours, batch)
            for model in (ours, eager):
                alone = [model(input_ids=batch.input_ids[:, part]).logits[0] for part in documents_of(batch)]
                assert relative(packed, torch.cat(alone)) <= 1e-5


def test_the_windows_and_caps_of_these_models_bite() -> None:
    """What the test above proves about gemma2 and mistral rests on it."""
    [batch] = packs_of(5)
    for family, changes in (
        ("mistral", {"sliding_window": 64}),
        ("gemma2", {"sliding_window": 64}),
        ("gemma2", {"attn_logit_softcapping": 50.0}),
    ):
        with torch.no_grad():
            with_, without = (packed_logits(build(family, NAMES["sdpa"], **c), batch) for c in ({}, changes))
        assert relative(with_, without) > 1e-3, (family, changes)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_our_kernels_keep_the_documents_of_a_model_apart(family: str) -> None:
    """The same through the Triton kernels, which the interpreter runs: packed is each document alone, to the bit of
    isolation."""
    interpreter.mend()
    model, eager = build(family, NAMES["triton"]), build(family, "eager")
    batch = pack([3, 9, 1])
    documents = documents_of(batch)
    ids = batch.input_ids[0].clone()
    ids[documents[1]] = (ids[documents[1]] - 3 + 7) % (VOCABULARY - 3) + 3
    with torch.no_grad(), dispatch.interpreted() as launches:
        packed, moved = packed_logits(model, batch), packed_logits(model, batch, ids)
        alone = [eager(input_ids=batch.input_ids[:, part]).logits[0] for part in documents]
    assert launches["attention_forward"] == 2 * 2, "a launch a layer and pass"
    assert relative(packed, torch.cat(alone)) <= 1e-5
    change = (moved - packed).abs().amax(-1)
    assert change[documents[1]].min() > 1e-3
    change[documents[1]] = 0.0
    assert change.max().item() == 0.0


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_loss_and_gradients_packed_are_those_of_each_document_alone(family: str) -> None:
    ours, eager = build(family, NAMES["sdpa"]), build(family, "eager")
    batch = pack([3, 17, 2, 30, 9, 24])
    packed, correct = SupervisedLoss(ours, ours, True, torch.device("cpu"))(batch)
    packed.backward()
    alone, alone_correct = losses_alone(eager, batch)
    alone.backward()
    assert relative(packed, alone) <= 1e-5
    assert correct.item() == alone_correct
    for (name, mine), theirs in zip(ours.named_parameters(), eager.parameters(), strict=True):
        assert relative(mine.grad, theirs.grad) <= 1e-5, name


def losses_alone(model: Any, batch: MicroBatch) -> tuple[Tensor, int]:
    """Sum of -log p of the batch's targets, in plain PyTorch, each document through `model` by itself."""
    logits = torch.cat([model(input_ids=batch.input_ids[:, part]).logits[0] for part in documents_of(batch)])
    predictions = logits[batch.supervised_index]
    log_p = predictions.log_softmax(-1).gather(-1, batch.targets[:, None])
    return -log_p.sum(), int((predictions.argmax(-1) == batch.targets).sum())


@pytest.mark.parametrize("family", REFUSED)
def test_packing_is_refused_where_documents_would_see_each_other(family: str, tmp_path: Path) -> None:
    AutoConfig.for_model(family, **REFUSED[family]).save_pretrained(tmp_path)
    plan = model_plan(tmp_path)
    with pytest.raises(ModelError, match=f"attention of {family} cannot be told their borders") as caught:
        check_packing(plan, packing=True)
    assert caught.value.hint == "set data.packing to false"
    check_packing(plan, packing=False)


@pytest.mark.parametrize("family", PACKED)
def test_packing_is_allowed_where_they_do_not(family: str, tmp_path: Path) -> None:
    AutoConfig.for_model(family, **PACKED[family]).save_pretrained(tmp_path)
    check_packing(model_plan(tmp_path), packing=True)


@pytest.mark.parametrize("family", REFUSED)
def test_the_others_train_padded_as_each_document_alone(family: str) -> None:
    padded_model, model = build(family), build(family)
    batch = pack([3, 17, 2, 9])
    padded, correct = SupervisedLoss(padded_model, padded_model, False, torch.device("cpu"))(batch)
    padded.backward()
    alone, alone_correct = losses_alone(model, batch)
    alone.backward()
    assert relative(padded, alone) <= 1e-5
    assert correct.item() == alone_correct
    for (name, mine), theirs in zip(padded_model.named_parameters(), model.parameters(), strict=True):
        if theirs.grad is not None:
            assert relative(mine.grad, theirs.grad) <= 1e-4, name


def test_generation_with_our_attention_is_transformers_own() -> None:
    """Padding on the left, a cache, a soft cap and sinks: what answers to test rows go through."""
    ids = torch.tensor([[0, 0, 5, 9, 17], [4, 8, 15, 16, 23]])
    mask = (ids != 0).long()
    for family in ("llama", "gemma2", "gpt2", "gpt_oss"):
        answers = [
            build(family, implementation).generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=VOCABULARY + 1
            )
            for implementation in (NAMES["sdpa"], "eager")
        ]
        assert torch.equal(*answers), family
