"""Answers in words: batches of prompts padded on the left, with a KV cache, greedy or drawn.

An answer is a function of the model, the prompt, the settings and the row's number: not of the ranks or the ZeRO stage,
and of the batches only as far as rounding goes. B prompts of a batch, P tokens of the longest, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from launcher.data.masks import end_of_turn_id
from launcher.plan.plan import GeneratePlan

ALONE = frozenset({"minimax", "recurrent_gemma", "rwkv"})
"""Model types whose state takes in what is masked, or what stands beside: they answer one prompt at a time."""


class Answer(NamedTuple):
    """What a model says to one prompt."""

    text: str
    """Without control tokens."""
    cut: bool
    """Whether it was cut off at `max_new_tokens`, before its end."""


def generate_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    settings: GeneratePlan,
    seed: int,
    device: torch.device,
    synced: bool = False,
    interrupted: Callable[[], bool] = lambda: False,
) -> list[Answer] | None:
    """The model's answer to each of `prompts`, in their order; shared out to the ranks of an open process group, and
    the same on all of them.

    Args:
        model: a transformers or peft model, in evaluation mode, with positions for all that is said: see
            `model.positions`
        prompts: token ids, none of them empty; the place of each is its row's number
        tokenizer: of the model; with `end_tokens` of both, an answer ends
        settings: how many tokens, how many prompts at once, greedy (temperature 0) or drawn
        seed: of the draws, beside the row's number: the same rows draw alike in every evaluation of a run
        device: the model's
        synced: every rank calls forward as often as any other, as ZeRO-3 needs it
        interrupted: asked before each round of batches; True, on all ranks alike, ends it with None
    """
    grouped = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
    at_once = 1 if model.config.model_type in ALONE else settings.batch_size
    # Neighbours in length share a batch, for less padding; the largest batch comes first, so that what does not fit
    # into memory fails at once. The batches do not depend on the ranks that share them out.
    by_length = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    batches = [by_length[i : i + at_once] for i in range(0, len(by_length), at_once)]
    ends, answered = end_tokens(model, tokenizer), list[tuple[int, Answer]]()
    with plain_generation(model):
        for first in range(0, len(batches), world_size):
            if interrupted():
                return None
            has_one = first + rank < len(batches)
            if not has_one and not synced:
                continue
            rows = batches[first + rank] if has_one else batches[-1]
            answers = _answer_batch(model, rows, prompts, tokenizer, ends, settings, seed, device, synced)
            if has_one:
                answered += zip(rows, answers, strict=True)
    gathered: list[Any] = [answered] * world_size
    if grouped:
        dist.all_gather_object(gathered, answered)
    found = dict(pair for part in gathered for pair in part)
    return [Answer(*found[row]) for row in range(len(prompts))]


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the chat template's end of turn first, the tokenizer's end of text, and those of the
    model's generation config that are control tokens of this tokenizer."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    of_model = named if isinstance(named, list) else [named]
    # A base that was trained with another tokenizer may name what is a plain letter in this one.
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    found = [end_of_turn_id(tokenizer), tokenizer.eos_token_id, *(number for number in of_model if number in special)]
    return list(dict.fromkeys(number for number in found if number is not None))


@contextlib.contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """Nothing that the model's folder says of generation has a say, such as a penalty for repetition: transformers
    takes it wherever a call leaves a setting open."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    own, inner.generation_config = inner.generation_config, GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = own


class DrawnTokens(LogitsProcessor):
    """Leaves each row one token: drawn by inverting the distribution function of its most likely tokens (Devroye 1986,
    II.2), of those that together have `top_p` of the probability (Holtzman et al. 2020, arXiv:1904.09751).

    A number from 0 to 1 for a row and position is all that is drawn, and it depends on nothing else.
    """

    def __init__(self, rows: Sequence[int], prompt_length: int, settings: GeneratePlan, seed: int) -> None:
        self._prompt_length, self._temperature, self._top_p = prompt_length, settings.temperature, settings.top_p
        raw = [
            np.random.Philox(key=np.array([seed, row], dtype=np.uint64)).random_raw(settings.max_new_tokens)
            for row in rows
        ]
        self._draws = torch.from_numpy((np.stack(raw) >> np.uint64(11)) * 2.0**-53)
        """[B, max_new_tokens] fp64, below 1."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V] 0 for the token that is drawn and minus infinity for all others. `scores` are [B, V] logits."""
        logits_BV, order_BV = scores.double().sort(dim=-1, descending=True, stable=True)
        mass_BV = torch.softmax(logits_BV / self._temperature, dim=-1)
        up_to_BV = mass_BV.cumsum(dim=-1)
        kept_BV = up_to_BV - mass_BV < self._top_p
        kept_B = kept_BV.sum(dim=-1)
        total_B = up_to_BV.gather(1, kept_B[:, None] - 1)[:, 0]
        point_B = self._draws[:, input_ids.shape[1] - self._prompt_length].to(scores.device) * total_B
        place_B = torch.minimum((up_to_BV <= point_B[:, None]).sum(dim=-1), kept_B - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, order_BV.gather(1, place_B[:, None]), 0.0)


def _answer_batch(
    model: Any,
    rows: Sequence[int],
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int],
    settings: GeneratePlan,
    seed: int,
    device: torch.device,
    synced: bool,
) -> list[Answer]:
    longest = max(len(prompts[row]) for row in rows)
    ids_BP = torch.full((len(rows), longest), ends[0])
    mask_BP = torch.zeros_like(ids_BP)
    for i, row in enumerate(rows):
        ids_BP[i, longest - len(prompts[row]) :] = torch.tensor(prompts[row])
        mask_BP[i, longest - len(prompts[row]) :] = 1
    drawn = [DrawnTokens(rows, longest, settings, seed)] if settings.temperature > 0 else []
    output = model.generate(
        input_ids=ids_BP.to(device),
        attention_mask=mask_BP.to(device),
        generation_config=GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,
            # Gradient checkpointing turns the cache off, but only of a model in training mode.
            use_cache=True,
            eos_token_id=list(ends),
            pad_token_id=ends[0],
        ),
        logits_processor=LogitsProcessorList(drawn),
        # Under ZeRO-3 each token gathers every layer from all ranks, 16 GB for 8B parameters in bf16, whatever the
        # batch: larger batches cost little more. The rank that is done first goes on with the others.
        synced_gpus=synced,
    )
    answers = []
    for new in output[:, longest:].tolist():
        end = next((i for i, token in enumerate(new) if token in ends), None)
        answers.append(Answer(str(tokenizer.decode(new[:end], skip_special_tokens=True)), end is None))
    return answers
