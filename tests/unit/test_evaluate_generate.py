"""Answers from prompts by one process: drawn as they should be, ended by any end token, and by nothing that the model's
folder says of generation."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from launcher.data.tokenizer import train_tokenizer, with_template
from launcher.evaluate.generate import ALONE, DrawnTokens, end_tokens, generate_answers
from tests.plans import generate_plan

CPU = torch.device("cpu")
LOGITS = torch.tensor([[2.0, 1.0, 0.5, -1.0, -3.0]])
STOP = "<|stop|>"


def draws(count: int, **changes: Any) -> Counter[int]:
    """The first token of so many rows."""
    settings = generate_plan(**({"temperature": 1.0, "max_new_tokens": 1} | changes))
    scores = DrawnTokens(range(count), 5, settings, seed=3)(torch.zeros(count, 5), LOGITS.expand(count, -1))
    assert (torch.isfinite(scores).sum(1) == 1).all(), "one token is left, whatever picks the largest"
    return Counter(scores.argmax(1).tolist())


def test_tokens_come_as_often_as_they_are_likely() -> None:
    for temperature in (1.0, 0.5):
        found = draws(4000, temperature=temperature)
        expected = torch.softmax(LOGITS[0] / temperature, -1).tolist()
        for token, share in enumerate(expected):
            deviation = (share * (1 - share) / 4000) ** 0.5
            assert abs(found[token] / 4000 - share) < 4 * deviation, (temperature, token)


def test_top_p_leaves_the_most_likely_that_reach_it() -> None:
    """Their shares are 0.62, 0.23, 0.14, 0.03 and 0.004."""
    assert set(draws(500, top_p=0.5)) == {0}
    assert set(draws(500, top_p=0.63)) == {0, 1}
    found = draws(4000, top_p=0.8)
    assert set(found) == {0, 1}
    share = torch.softmax(LOGITS[0, :2], -1)[0].item()
    assert abs(found[0] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5


def test_draws_belong_to_seed_row_and_position() -> None:
    settings = generate_plan(temperature=1.0, max_new_tokens=6)
    logits = torch.zeros(1, 500)

    def tokens(rows: list[int], seed: int) -> list[list[int]]:
        drawn = DrawnTokens(rows, 2, settings, seed)
        columns = [drawn(torch.zeros(len(rows), 2 + i), logits.expand(len(rows), -1)).argmax(-1) for i in range(6)]
        return torch.stack(columns, 1).tolist()

    assert tokens([4, 9], 1) == tokens([4], 1) + tokens([9], 1)
    assert len({tuple(each) for each in tokens([4, 9], 1) + tokens([4, 9], 2)}) == 4
    assert len(set(tokens([4], 1)[0])) > 3


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    draw = random.Random(0)
    texts = [" ".join(draw.choices(["river", "stone", "cloud", "seven"], k=5)) for _ in range(50)]
    return with_template(train_tokenizer(iter(texts), 280), None, {}, (STOP,))


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


PROMPTS = [[5, 6, 7], [9], [30, 31, 32, 33, 34, 35], [12, 13], [40]]


def test_batches_do_not_change_answers_and_they_come_in_order(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    one = generate_plan(max_new_tokens=9, batch_size=1)
    alone = generate_answers(model, PROMPTS, tokenizer, one, 0, CPU)
    for size in (2, 5):
        assert generate_answers(model, PROMPTS, tokenizer, one.model_copy(update={"batch_size": size}), 0, CPU) == alone
    assert alone is not None
    with torch.no_grad():
        for prompt, answer in zip(PROMPTS, alone, strict=True):  # without a cache, a token at a time
            ids = list(prompt)
            for _ in range(9):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == tokenizer.eos_token_id:
                    break
            assert answer.text == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
            assert answer.cut == (ids[-1] != tokenizer.eos_token_id)


RECURRENT: dict[str, dict[str, Any]] = {
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2, "head_dim": 8},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8, "head_dim": 8},
    "rwkv": {"attention_hidden_size": 32},
}


@pytest.mark.parametrize("family", RECURRENT)
def test_a_state_that_takes_in_what_is_masked_is_of_one_prompt(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    assert family in ALONE
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    settings = sizes | {"num_key_value_heads": 2, "vocab_size": len(tokenizer), "initializer_range": 0.2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings | RECURRENT[family])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases start from zero, at which what is masked says nothing
                parameter += torch.randn(parameter.shape) * 0.1
    prompts = [[20 + i, *range(30, 30 + length)] for i, length in enumerate((2, 16, 8, 8, 1, 11))]
    one = generate_plan(max_new_tokens=8, batch_size=1)
    alone = generate_answers(model, prompts, tokenizer, one, 0, CPU)
    assert generate_answers(model, prompts, tokenizer, one.model_copy(update={"batch_size": 4}), 0, CPU) == alone


def test_an_answer_ends_at_any_end_token(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    settings = generate_plan(max_new_tokens=9)
    stop = tokenizer.convert_tokens_to_ids(STOP)
    with torch.no_grad():
        kept = model.lm_head.weight[stop].clone()
        # Prefers the token above all others.
        model.lm_head.weight[stop] = 0
        hidden = model.model(input_ids=torch.tensor([PROMPTS[1]])).last_hidden_state[0, -1]
        model.lm_head.weight[stop] = 100 * hidden
    own = model.generation_config
    try:
        assert stop not in end_tokens(model, tokenizer)
        said = generate_answers(model, [PROMPTS[1]], tokenizer, settings, 0, CPU)
        assert said is not None
        assert said[0].cut
        model.generation_config = GenerationConfig(eos_token_id=[stop, 65], repetition_penalty=9.0)
        assert end_tokens(model, tokenizer) == [tokenizer.eos_token_id, stop], "65 is a plain letter"
        assert generate_answers(model, [PROMPTS[1]], tokenizer, settings, 0, CPU) == [("", False)]
    finally:
        model.generation_config = own
        with torch.no_grad():
            model.lm_head.weight[stop] = kept


def test_what_the_folder_says_of_generation_has_no_say(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    settings = generate_plan(max_new_tokens=9)
    plain = generate_answers(model, PROMPTS, tokenizer, settings, 0, CPU)
    own = model.generation_config
    model.generation_config = GenerationConfig(repetition_penalty=9.0, do_sample=True, top_k=3, min_new_tokens=20)
    try:
        assert generate_answers(model, PROMPTS, tokenizer, settings, 0, CPU) == plain
        assert model.generation_config.repetition_penalty == 9.0, "and stays as it was"
    finally:
        model.generation_config = own


def test_an_interrupted_generation_gives_nothing(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    asked = iter([False, False, True])
    settings = generate_plan(max_new_tokens=2, batch_size=1)
    found = generate_answers(model, PROMPTS, tokenizer, settings, 0, CPU, interrupted=lambda: next(asked))
    assert found is None
