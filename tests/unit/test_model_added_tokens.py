"""Rows for added tokens: which, where they start, that they alone are trained, and that peft computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from launcher.data.tokenizer import load_tokenizer, train_tokenizer, with_template
from launcher.errors import ModelError
from launcher.model.adapters import apply_method
from launcher.model.added_tokens import added_ids, new_tokens, notes
from launcher.model.ready import Request, make_ready
from launcher.model.scratch import scratch_config
from launcher.model.token_rows import SPREAD, add_rows
from launcher.plan.plan import MethodPlan, ModelPlan, Plan
from tests.distributed.tiny import tiny_plan
from tests.plans import method_plan, model_plan

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 50,
}
GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50}
# Its embedding multiplies what it looks up, and its logits are capped.
GEMMA: dict[str, Any] = LLAMA | {"model_type": "gemma3_text", "head_dim": 16, "final_logit_softcapping": 5.0}
PHI: dict[str, Any] = LLAMA | {"model_type": "phi", "num_key_value_heads": 2}
FAMILIES = {
    "llama": LLAMA,
    "llama-tied": LLAMA | {"tie_word_embeddings": True},
    "gpt2": GPT2,
    "gpt2-untied": GPT2 | {"tie_word_embeddings": False},
    "gemma": GEMMA,
}
CPU = torch.device("cpu")
LORA = method_plan("lora", rank=4, alpha=8.0)
FREEZE = method_plan("freeze", train_last_layers=1)


def model(config: dict[str, Any], **changes: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**(config | changes)))


def matrices(network: Any) -> list[Tensor]:
    """[V, H] of the embedding and the head."""
    return [network.get_input_embeddings().weight.detach(), network.get_output_embeddings().weight.detach()]


def trained(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def perturbed(network: Any) -> Any:
    """Adapters and rows as after some training: away from where they began."""
    draw = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in trained(network).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return network


def word_tokenizer(folder: Path, *special: str) -> Path:
    """Ten words, an end of text, and control tokens that it comes with."""
    words = {f"w{i}": i for i in range(10)} | {"<eos>": 10}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    tokenizer.add_tokens(list(special), special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


def prepared(model: ModelPlan, folder: Path) -> Path:
    """The run's tokenizer, as the data's preparation leaves it."""
    load_tokenizer(model).save_pretrained(folder)
    return folder


def plan_of(model: ModelPlan, root: Path, vocab_size: int) -> Plan:
    plan = tiny_plan(root, 0)
    facts = plan.data.model_copy(update={"folder": str(root), "vocab_size": vocab_size})
    return plan.model_copy(update={"trajectory": plan.trajectory.model_copy(update={"model": model}), "data": facts})


def test_new_are_the_tokens_that_the_tokenizer_does_not_come_with(tmp_path: Path) -> None:
    base = word_tokenizer(tmp_path / "base", "<old>")
    asked = model_plan(base, add_tokens=("<a>", "<old>", "w3", "<b>"))
    folder = prepared(asked, tmp_path / "tokenizer")
    assert new_tokens(asked, folder) == {"<a>": 12, "<b>": 13}
    assert notes(asked, folder) == [
        "model.add_tokens: the tokenizer comes with '<old>', 'w3', so no row is added; adapters leave such rows as "
        "they are"
    ]
    assert new_tokens(model_plan(base), folder) == {}
    assert notes(model_plan(base, add_tokens=("<a>",)), folder) == []


def test_the_ids_are_those_of_new_tokens_and_of_any_without_a_row(tmp_path: Path) -> None:
    base = word_tokenizer(tmp_path / "base", "<old>")  # 12 tokens
    asked = model_plan(base, add_tokens=("<a>", "<old>", "<b>"))
    prepared(asked, tmp_path / "tokenizer")
    # Rows enough, to spare, and one short of what the tokenizer came with.
    for rows, ids in ((12, (12, 13)), (64, (12, 13)), (11, (11, 12, 13))):
        model(LLAMA, vocab_size=rows).save_pretrained(base)
        assert added_ids(plan_of(asked, tmp_path, 14)) == ids
    assert added_ids(plan_of(model_plan(base, add_tokens=("<old>",)), tmp_path, 14)) == ()
    assert added_ids(plan_of(model_plan(base), tmp_path, 14)) == ()


def test_a_scratch_model_has_rows_for_what_is_added_to_its_trained_tokenizer(tmp_path: Path) -> None:
    scratch = LLAMA | {"vocab_size": 270}
    asked = model_plan(tmp_path / "base", source="scratch", scratch=scratch, add_tokens=("<a>", "<|endoftext|>"))
    words = (f"{a}{b}{c}" for a in "abcdef" for b in "ghijkl" for c in "mnopqr")
    tokenizer = with_template(train_tokenizer([" ".join(words)] * 3, 270), None)
    tokenizer.add_tokens(["<a>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert new_tokens(asked, tmp_path / "tokenizer") == {"<a>": 270}
    assert scratch_config(asked, tmp_path / "tokenizer").vocab_size == 271
    too_small = asked.model_copy(update={"scratch": LLAMA | {"vocab_size": 269}})
    with pytest.raises(ModelError, match="model.scratch.vocab_size is 269, the tokenizer has 271 tokens"):
        scratch_config(too_small, tmp_path / "tokenizer")


def test_making_a_model_ready_says_what_is_not_added(tmp_path: Path) -> None:
    base = word_tokenizer(tmp_path / "base", "<old>")
    model(LLAMA, vocab_size=12).save_pretrained(base)
    asked = model_plan(base, add_tokens=("<old>",))
    folder = prepared(asked, tmp_path / "tokenizer")
    said = make_ready(Request(model=asked, tokenizer_folder=folder, seed=0, packing=True, stamps=None)).notes
    assert said == notes(asked, folder)
    assert "'<old>'" in said[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ids", [(50, 51, 52), (44, 46, 47), (49, 50)], ids=["appended", "to spare", "both"])
def test_rows_start_near_the_mean_and_the_others_stay(family: str, ids: tuple[int, ...]) -> None:
    before, network = matrices(model(FAMILIES[family])), model(FAMILIES[family])
    add_rows(network, ids, 3, CPU)
    again = model(FAMILIES[family])
    torch.rand(7)
    add_rows(again, ids, 3, CPU)
    others = [i for i in range(50) if i not in ids]
    count = max(50, ids[-1] + 1)
    assert network.config.vocab_size == count
    for old, new, same in zip(before, matrices(network), matrices(again), strict=True):
        assert new.shape == (count, 32)
        assert torch.equal(new[others], old[others])
        assert torch.equal(new, same)
        known, rows = old[: ids[0]], new[list(ids)]
        distance = (rows - known.mean(0)) / known.std(0)
        assert 0 < distance.abs().max() < 5 * SPREAD
        assert len(rows.unique(dim=0)) == len(ids)
    tied = network.get_input_embeddings().weight is network.get_output_embeddings().weight
    assert tied == network.config.tie_word_embeddings
    other_seed = model(FAMILIES[family])
    add_rows(other_seed, ids, 4, CPU)
    assert not torch.equal(matrices(other_seed)[0], matrices(network)[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [LORA, FREEZE], ids=["lora", "freeze"])
def test_the_rows_are_trained_beside_what_the_method_trains(family: str, method: MethodPlan) -> None:
    without = trained(apply_method(model(FAMILIES[family]), method, 0))
    network = model(FAMILIES[family])
    add_rows(network, (50, 51), 0, CPU)
    adapted = apply_method(network, method, 0, (50, 51))
    rows = {name: tensor for name, tensor in trained(adapted).items() if "trainable_tokens_delta" in name}
    tied = network.config.tie_word_embeddings
    whole_head = method.kind == "freeze" and not tied
    assert [tuple(tensor.shape) for tensor in rows.values()] == [(2, 32)] * (1 if tied or whole_head else 2)
    others = {name.removeprefix("base_model.model.") for name in trained(adapted).keys() - rows.keys()}
    assert others == {name.removeprefix("base_model.model.") for name in without}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_peft(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.tensor([[3, 51, 7, 50, 50, 2, 49]])

    def results() -> tuple[Tensor, dict[str, Tensor]]:
        network = model(FAMILIES[family])
        add_rows(network, (50, 51), 0, CPU)
        adapted = perturbed(apply_method(network.double(), LORA, 0, (50, 51)))
        logits = adapted(input_ids=tokens).logits
        logits.logsumexp(-1).square().sum().backward()
        return logits.detach(), {name: parameter.grad for name, parameter in trained(adapted).items()}

    logits, gradients = results()
    monkeypatch.setattr("launcher.model.lora_adapters.compute_rows_alone", lambda model: None)
    expected, expected_gradients = results()
    assert torch.allclose(logits, expected, rtol=1e-12, atol=1e-12)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected_gradients[name], rtol=1e-10, atol=1e-12), name
    assert any(gradients[name].abs().min() > 0 for name in gradients if "trainable_tokens_delta" in name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [LORA, FREEZE], ids=["lora", "freeze"])
def test_merged_the_rows_are_in_the_matrices(family: str, method: MethodPlan) -> None:
    network = model(FAMILIES[family])
    add_rows(network, (50, 51), 0, CPU)
    frozen = [matrix.clone() for matrix in matrices(network)]
    adapted = perturbed(apply_method(network, method, 0, (50, 51))).eval()
    tokens = torch.tensor([[3, 51, 7, 50, 50, 2, 49]])
    with torch.no_grad():
        expected = adapted(input_ids=tokens).logits
        merged = adapted.merge_and_unload()
        assert torch.allclose(merged(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert not [name for name, _ in merged.named_parameters() if "trainable_tokens" in name]
    whole_head = method.kind == "freeze" and not network.config.tie_word_embeddings
    for i, (old, new) in enumerate(zip(frozen, matrices(merged), strict=True)):
        assert not torch.isclose(new[50:], old[50:]).all(1).any()
        assert torch.equal(new[:50], old[:50]) or (whole_head and i == 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_peft_makes_room_and_gives_the_same_logits(family: str, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    base, adapters = tmp_path / "base", tmp_path / "adapters"
    model(FAMILIES[family]).save_pretrained(base)
    network = AutoModelForCausalLM.from_pretrained(base)
    add_rows(network, (50, 51), 0, CPU)
    adapted = perturbed(apply_method(network, LORA, 0, (50, 51))).eval()
    adapted.save_pretrained(adapters, save_embedding_layers=False)
    word_tokenizer(adapters, *(f"<{i}>" for i in range(11, 52)))
    assert sum(tensor.numel() for tensor in trained(adapted).values()) == sum(
        tensor.numel() for tensor in load_file(adapters / "adapter_model.safetensors").values()
    )
    tokens = torch.tensor([[3, 51, 7, 50, 50, 2, 49]])
    with torch.no_grad():
        found = AutoPeftModelForCausalLM.from_pretrained(adapters)(input_ids=tokens).logits
        expected = adapted(input_ids=tokens).logits
    assert found.shape == (1, 7, 52)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_adapters_on_the_same_layers_are_refused() -> None:
    for family in ("llama", "llama-tied"):
        for target in ("lm_head", "model.embed_tokens"):
            method = LORA.model_copy(update={"targets": ("q_proj", target)})
            network = model(FAMILIES[family])
            add_rows(network, (50,), 0, CPU)
            with pytest.raises(ModelError, match=f"method.targets: rows of {target} are trained") as caught:
                apply_method(network, method, 0, (50,))
            assert caught.value.hint == f"leave {target} out of method.targets"


def test_a_head_with_a_bias_is_refused_under_adapters_only() -> None:
    for method in (LORA, FREEZE):
        network = model(PHI)
        add_rows(network, (50,), 0, CPU)
        assert network.get_output_embeddings().bias.shape == (51,)
        if method is FREEZE:  # trains that head whole
            apply_method(network, method, 0, (50,))
            continue
        with pytest.raises(ModelError, match="head has a bias") as caught:
            apply_method(network, method, 0, (50,))
        assert caught.value.hint == "use method.kind full, or leave out model.add_tokens"
