"""Dropout in any model's configuration, and NEFTune's noise: in training alone, and as their papers have them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.integrations.neftune import neftune_post_forward_hook

from launcher.data.loader import MicroBatch
from launcher.errors import ModelError
from launcher.model.adapters import apply_method
from launcher.model.fuse import fuse
from launcher.model.ready import Request, make_ready
from launcher.model.regularize import EmbeddingNoise, set_dropout
from launcher.train.loop import seed_step
from tests.model_families import FAMILIES, loss_of, pack, tiny_model
from tests.plans import method_plan, model_plan

NAMED = {
    "llama": {"attention_dropout"},
    "gpt2": {"resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"},
    "opt": {"dropout", "attention_dropout"},
    "gpt_neox": {"attention_dropout", "hidden_dropout", "classifier_dropout"},
    "bert": {"hidden_dropout_prob", "attention_probs_dropout_prob"},
    "distilbert": {"dropout", "attention_dropout", "qa_dropout", "seq_classif_dropout"},
    "phi3": {"attention_dropout", "embd_pdrop", "resid_pdrop"},
}


@pytest.mark.parametrize("family", NAMED)
def test_every_probability_that_a_configuration_names(family: str) -> None:
    before, config = AutoConfig.for_model(family).to_dict(), AutoConfig.for_model(family)
    set_dropout(config, 0.37)
    after = config.to_dict()
    changed = {name for name in after if after[name] != before[name]}
    assert changed == NAMED[family]
    assert {after[name] for name in changed} == {0.37}


def test_models_inside_a_model_too_and_whole_layers_are_left_alone() -> None:
    config = AutoConfig.for_model("gemma3")
    set_dropout(config, 0.2)
    assert config.text_config.attention_dropout == config.vision_config.attention_dropout == 0.2
    config = AutoConfig.for_model("mpt")  # which says that attn_pdrop is a whole number
    set_dropout(config, 0.2)
    assert config.attn_config.attn_pdrop == config.resid_pdrop == 0.2
    config = AutoConfig.for_model("opt", layerdrop=0.05)
    set_dropout(config, 0.2)
    assert config.layerdrop == 0.05


def test_a_model_that_has_none_is_refused_before_the_run(tmp_path: Path) -> None:
    scratch = {"model_type": "mamba", "vocab_size": 9}
    AutoConfig.for_model(**scratch).save_pretrained(tmp_path)
    plan = model_plan(tmp_path, dropout=0.1)
    with pytest.raises(ModelError, match="model.dropout: a configuration of type mamba names no dropout") as raised:
        make_ready(Request(model=plan, tokenizer_folder=tmp_path, seed=0, packing=False, stamps=None))
    assert "method.dropout is for adapters" in str(raised.value.hint)


def losses(model: Any, batch: MicroBatch, training: bool = True, seed: int = 0) -> float:
    model.train(training)
    torch.manual_seed(seed)
    with torch.no_grad():
        return float(loss_of(model)(batch)[0])


def dropping(family: str, probability: float) -> Any:
    model = tiny_model(family, **dict.fromkeys(NAMED[family] & FAMILIES[family].keys() | NAMED[family], probability))
    assert NAMED[family] <= set(vars(model.config))
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_dropout_acts_in_training_alone_and_follows_the_seed(family: str) -> None:
    """In llama it is attention's alone: of packed documents too."""
    plain, model, batch = tiny_model(family), dropping(family, 0.4), pack((5, 9, 17))
    assert losses(model, batch, training=False) == losses(plain, batch)
    first, again, other = (losses(model, batch, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert len({first, other, losses(plain, batch)}) == 3


@pytest.mark.parametrize("seed", [0, 17, 2**32 - 1])
def test_what_is_dropped_follows_from_any_seed_the_step_and_the_rank(seed: int) -> None:
    drawn = []
    for step, rank in ((0, 0), (1, 0), (0, 1), (100_000, 63)):
        seed_step(seed, step, rank)
        drawn.append(tuple(torch.rand(4).tolist()))
        seed_step(seed, step, rank)
        assert tuple(torch.rand(4).tolist()) == drawn[-1]
    assert len(set(drawn)) == 4


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_fused_layers_drop_as_the_models_own(family: str) -> None:
    batch, model, fused = pack((5, 9, 17)), dropping(family, 0.3), dropping(family, 0.3)
    assert fuse(fused).counts
    assert losses(fused, batch, seed=3) == pytest.approx(losses(model, batch, seed=3), rel=1e-5)
    assert losses(fused, batch, seed=3) != losses(fused, batch, seed=4)


def embedded(model: Any, batch: MicroBatch, training: bool = True, seed: int = 0) -> Tensor:
    """[T, H] of what the embedding gives in a pass of `batch`."""
    seen: list[Tensor] = []
    base = getattr(model, "get_base_model", lambda: model)()
    handle = base.get_input_embeddings().register_forward_hook(lambda *call: seen.append(call[2].squeeze(0)))
    losses(model, batch, training, seed)
    handle.remove()
    return seen[0]


LENGTHS = (64, 4, 200)


def long(family: str) -> Any:
    return tiny_model(family, **({"n_positions": 256} if family == "gpt2" else {"max_position_embeddings": 256}))


@pytest.mark.parametrize("added", [(), (58, 59)], ids=["full", "lora with added rows"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_noise_is_bounded_by_the_length_of_each_document_of_its_own(family: str, added: tuple[int, ...]) -> None:
    alpha, batch, model = 7.0, pack(LENGTHS), long(family)
    if added:
        model = apply_method(model, method_plan("lora"), 0, added)
    still = embedded(model, batch)
    EmbeddingNoise(model, alpha)
    noise = embedded(model, batch, seed=5) - still
    assert torch.equal(embedded(model, batch, training=False), still)
    assert torch.equal(embedded(model, batch, seed=5) - still, noise)
    assert not torch.equal(embedded(model, batch, seed=6) - still, noise)
    for length, part in zip(LENGTHS, noise.split(LENGTHS), strict=True):
        bound = alpha / math.sqrt(length * still.shape[-1])
        # 128 to 6,400 uniform numbers: the largest is near the bound, the mean near nothing.
        assert 0.97 * bound < part.abs().max().item() <= bound * (1 + 1e-5)
        assert abs(part.mean().item()) < 4 * bound / math.sqrt(3 * part.numel())


def test_noise_is_transformers_own_for_a_document_alone() -> None:
    """And with rows that are padded: GPT-J's attention knows no others."""
    batch = pack((40,))
    for family in ("llama", "gptj"):
        ours, theirs = tiny_model(family), tiny_model(family)
        EmbeddingNoise(ours, 5.0)
        embedding = theirs.get_input_embeddings()
        embedding.neftune_noise_alpha = 5.0
        embedding.register_forward_hook(neftune_post_forward_hook)
        torch.testing.assert_close(embedded(ours, batch), embedded(theirs, batch), rtol=1e-5, atol=1e-7)
        assert losses(ours, batch) == pytest.approx(losses(theirs, batch), rel=1e-6)
        assert losses(ours, batch) != losses(ours, batch, training=False)


def test_noise_of_padded_rows_counts_no_padding() -> None:
    model, batch = tiny_model("gptj"), pack((40, 3))
    still = embedded(model, batch)
    EmbeddingNoise(model, 5.0)
    noise = embedded(model, batch) - still  # [2, 40, H]
    assert noise[0].abs().max().item() <= 5.0 / math.sqrt(40 * 32) * 1.001
    assert 0.9 * 5.0 / math.sqrt(3 * 32) < noise[1, :3].abs().max().item() <= 5.0 / math.sqrt(3 * 32) * 1.001
