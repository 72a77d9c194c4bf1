"""What an audit finds in a model and its data, and that it finds nothing in sound ones.

Real models of transformers, real tokenizers and chat templates; what is wrong is put into them on purpose.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from launcher.audit.finding import Checked
from launcher.audit.fused import SIZES, check_fused, growth_bytes, needed_bytes
from launcher.audit.masks import check_masks
from launcher.audit.packs import check_packs
from launcher.audit.sample import sampled, two_documents
from launcher.audit.small import WIDER, causal_lm, first_layers, vocabulary
from launcher.data.conversation import Conversation, Message
from launcher.data.loader import MicroBatch
from launcher.data.masks import Document, Encoder
from launcher.driver.resume import may_change
from launcher.model.attention import NAMES, document_borders
from launcher.train.loss import SupervisedLoss
from launcher_kernels.glu import glu
from launcher_kernels.lora import lora_linear
from launcher_kernels.norm import rms_norm
from tests.distributed.tiny import tiny_plan
from tests.prepared import write_prepared
from tests.unit.families import FAMILIES as TEMPLATES
from tests.unit.families import pin_the_day, tokenizer_of
from tests.unit.test_model_attention import FAMILIES, PACKED, VOCABULARY, _attention, build, pack

CPU = torch.device("cpu")
LENGTH = 64
__all__ = ["_attention"]


# Masks


@pytest.fixture
def the_day(monkeypatch: pytest.MonkeyPatch) -> None:
    pin_the_day(monkeypatch)


def conversations(thoughts: bool = False) -> list[Conversation]:
    """Of one and of two turns."""
    thought = "Two and three." if thoughts else ""
    turn = (Message("user", "What is the sum?"), Message("assistant", "The sum is five.", thought))
    more = (Message("user", "And of four and one?"), Message("assistant", "Five.", thought))
    return [Conversation(turn), Conversation(turn + more), Conversation(more + turn)] * 4


def documents_of(family: str, rows: list[Conversation] | None = None) -> list[Document]:
    encoder = Encoder(tokenizer_of(family), "all")
    made: list[Document] = []
    for found in encoder.encode(rows or conversations()):
        assert isinstance(found, list), found
        made += found
    return made


def masks(folder: Path, documents: list[Document], family: str, max_length: int = 4096, *formats: str) -> Checked:
    write_prepared(folder, documents)
    tokenizer = tokenizer_of(family)
    return check_masks(folder, sampled(folder, 64), tokenizer, len(tokenizer), max_length, formats or ("messages",))


def found(checked: Checked) -> list[str]:
    return [finding.what for finding in checked.findings]


@pytest.mark.usefixtures("the_day")
@pytest.mark.parametrize("family", TEMPLATES)
def test_nothing_is_found_in_any_familys_own_masks(family: str, tmp_path: Path) -> None:
    thinks = TEMPLATES[family].thinks
    assert masks(tmp_path / "said", documents_of(family), family).findings == ()
    thought = documents_of(family, conversations(thoughts=thinks))
    assert masks(tmp_path / "thought", thought, family).findings == ()
    text = documents_of(family, [Conversation((), text="Once upon a time."), Conversation((), text="The end.")])
    assert masks(tmp_path / "text", text, family, 4096, "text").findings == ()
    # Of rows cut at their end no answer ends, and of those cut at their beginning some begin within an answer.
    cut = [document.part(0, len(document.input_ids) - 3) for document in documents_of(family)]
    length = min(len(document.input_ids) for document in cut)
    cut = [part for document in cut if (part := document.part(0, length)).num_targets]  # as preparation leaves out
    assert masks(tmp_path / "cut", cut, family, length).findings == ()


@pytest.mark.usefixtures("the_day")
def test_a_few_answers_among_many_texts_may_be_missed(tmp_path: Path) -> None:
    texts = documents_of("chatml", [Conversation((), text="Once upon a time.")] * 200)
    mixed = [*texts, *documents_of("chatml")[:2], *texts]
    assert masks(tmp_path / "data", mixed, "chatml", 4096, "text", "messages").findings == ()


@pytest.mark.usefixtures("the_day")
def test_answers_without_the_questions_that_were_cut_off_are_sound(tmp_path: Path) -> None:
    cut = [document.part(len(document.input_ids) - 4, len(document.input_ids)) for document in documents_of("chatml")]
    assert masks(tmp_path / "data", cut, "chatml", 4).findings == ()


def shifted(document: Document) -> Document:
    """By one token: the first word is not learned, and what comes after the answer is."""
    return Document(document.input_ids, np.roll(document.supervised, 1))


def without_ends(document: Document) -> Document:
    mask = document.supervised.copy()
    mask[np.flatnonzero(np.diff(mask.astype(int), append=0) == -1)] = 0
    return Document(document.input_ids, mask)


def all_learned(document: Document) -> Document:
    return Document(document.input_ids, np.ones_like(document.supervised))


def nothing_learned(document: Document) -> Document:
    return Document(document.input_ids, np.zeros_like(document.supervised))


def begun_twice(document: Document) -> Document:
    first = document.input_ids[:1]
    ids, mask = np.concatenate([first, document.input_ids]), np.concatenate([[np.uint8(0)], document.supervised])
    return Document(ids, mask)


def of_another_tokenizer(document: Document) -> Document:
    return Document(document.input_ids + 10_000, document.supervised)


@pytest.mark.usefixtures("the_day")
@pytest.mark.parametrize("family", ["chatml", "llama-3", "default"])
@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (shifted, "the mask does not begin where answers do"),
        (without_ends, "the end of a turn is not learned"),
        (all_learned, "nothing is masked"),
        (nothing_learned, "documents that teach nothing"),
        (of_another_tokenizer, "tokens that the model does not know"),
    ],
)
def test_what_is_wrong_with_masks_is_named(
    spoil: Callable[[Document], Document], expected: str, family: str, tmp_path: Path
) -> None:
    checked = masks(tmp_path / "data", [spoil(document) for document in documents_of(family)], family)
    assert expected in found(checked)
    [finding] = [finding for finding in checked.findings if finding.what == expected]
    assert "train.jsonl:1" in finding.detail
    assert finding.hint


@pytest.mark.usefixtures("the_day")
def test_one_row_among_many_that_teaches_nothing_is_found(tmp_path: Path) -> None:
    documents = documents_of("chatml")
    documents[5] = nothing_learned(documents[5])
    [finding] = masks(tmp_path / "data", documents, "chatml").findings
    assert finding.detail == f"1 of {len(documents)} documents have no target: train.jsonl:6"


@pytest.mark.usefixtures("the_day")
def test_a_text_that_begins_twice_is_found(tmp_path: Path) -> None:
    checked = masks(tmp_path / "data", [begun_twice(document) for document in documents_of("llama-3")], "llama-3")
    assert found(checked) == ["two begin-of-text tokens"]


# Packs


def logits_through(model: Any) -> Callable[[MicroBatch], Tensor]:
    loss = SupervisedLoss(model, model, True, CPU)
    return torch.no_grad()(loss.logits)


@pytest.mark.parametrize("family", PACKED)
def test_sound_packs_move_nothing(family: str) -> None:
    checked = check_packs(logits_through(build(family, NAMES["sdpa"])), pack([19, 30]), VOCABULARY, False, "")
    assert checked == Checked("packs isolated")


def test_an_attention_that_knows_no_borders_is_found() -> None:
    """Documents end to end as if they were one: causal, so that only the second sees the first."""

    def one_document(cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        return document_borders(cu_seqlens[[0, -1]], int(cu_seqlens[-1]))

    model = build("llama", NAMES["sdpa"])
    with mock.patch("launcher.train.loss.document_borders", one_document):
        checked = check_packs(logits_through(model), pack([19, 30]), VOCABULARY, False, "do this")
    [finding] = checked.findings
    assert finding.what == "packed documents see each other"
    assert finding.detail.startswith("from the first document to the second (made up:0 and made up:1) logits move by")
    assert finding.hint == "do this"


def test_an_attention_that_sees_later_tokens_is_found() -> None:
    model = build("llama", "eager")
    for layer in model.model.layers:
        layer.self_attn.forward = MethodType(_unmasked(layer.self_attn.forward), layer.self_attn)
    checked = check_packs(logits_through(model), pack([19, 30]), VOCABULARY, False, "")
    ways = [finding.detail.split(" (")[0] for finding in checked.findings]
    assert ways == [
        "from the first document to the second",
        "from the second document to the first",
        "from a later token to an earlier one",
    ]


def _unmasked(forward: Callable[..., Any]) -> Callable[..., Any]:
    def unmasked(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **(kwargs | {"attention_mask": None}))

    return unmasked


def test_a_model_that_does_not_look_at_its_input_is_found() -> None:
    model = build("llama", NAMES["sdpa"])
    nn.init.zeros_(model.model.embed_tokens.weight)
    checked = check_packs(logits_through(model), pack([19, 30]), VOCABULARY, False, "")
    assert found(checked) == ["the model does not look at its input"]


def test_a_model_with_broken_weights_is_found() -> None:
    model = build("llama", NAMES["sdpa"])
    nn.init.constant_(model.model.norm.weight, float("nan"))
    checked = check_packs(logits_through(model), pack([19, 30]), VOCABULARY, False, "")
    assert found(checked) == ["the model computes what is no number"]
    checked = fused(model)
    assert checked.skipped
    assert "not all that the model computes is finite" in checked.says


def test_logits_of_minus_infinity_stay_where_they_are() -> None:
    model = build("llama", NAMES["sdpa"])
    model.lm_head.register_forward_hook(lambda layer, given, logits: logits.index_fill(-1, torch.tensor(7), -torch.inf))
    assert check_packs(logits_through(model), pack([19, 30]), VOCABULARY, False, "").findings == ()


def test_experts_may_round_differently_and_no_more() -> None:
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    with mock.patch.dict(FAMILIES, {"mixtral": FAMILIES["mistral"] | sizes}):
        model = build("mixtral", NAMES["sdpa"])
    assert check_packs(logits_through(model), pack([19, 30]), VOCABULARY, True, "").findings == ()
    with mock.patch("launcher.train.loss.document_borders", lambda c, n: document_borders(c[[0, -1]], int(c[-1]))):
        checked = check_packs(logits_through(model), pack([19, 30]), VOCABULARY, True, "")
    assert found(checked) == ["packed documents see each other"]


# Fused kernels


def loss_of(network: nn.Module, lm: nn.Module) -> SupervisedLoss:
    return SupervisedLoss(network, lm, lm.config._attn_implementation in NAMES.values(), CPU)  # type: ignore


def fused(model: nn.Module, tokens: int = 48) -> Checked:
    return check_fused(model, loss_of, lambda most: pack([tokens - tokens // 2, tokens // 2]), 1 << 40, lambda x: x)


def with_lora(model: Any) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_is_eager_in_every_family(family: str, dtype: torch.dtype) -> None:
    model = build(family, NAMES["sdpa"] if family in PACKED else None).to(dtype)
    before = copy.deepcopy(model.state_dict())
    checked = fused(model)
    assert checked.findings == ()
    assert checked.says.startswith("fused = eager (")
    assert "linear_cross_entropy 1" in checked.says
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not [name for name, weight in model.named_parameters() if weight.grad is not None]
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)], "the model is not fused"


def test_fused_is_eager_under_adapters() -> None:
    adapted = with_lora(build("llama", NAMES["sdpa"]))
    checked = fused(adapted)
    assert checked.findings == ()
    assert "lora_linear 14" in checked.says
    assert not [name for name, weight in adapted.named_parameters() if weight.grad is not None]


def test_a_wrong_gradient_of_adapters_is_found_though_they_begin_with_zeros() -> None:
    adapted = with_lora(build("llama", NAMES["sdpa"]))
    assert not any(weight.any() for name, weight in adapted.named_parameters() if "lora_B" in name)

    def forgetful(x: Tensor, weight: Any, bias: Any, lora_a: Tensor, *others: Any, **more: Any) -> Tensor:
        return lora_linear(x, weight, bias, 0.9 * lora_a.detach() + 0.1 * lora_a, *others, **more)

    with mock.patch("launcher.model.lora_layers.lora_linear", forgetful):
        [finding] = fused(adapted).findings
    assert "lora_A" in finding.detail


def off(x: Tensor, weight: Tensor, eps: float, **how: Any) -> Tensor:
    return rms_norm(x, weight, eps, **how) * 1.05


def off_at_one_place(x: Tensor, weight: Tensor, eps: float, **how: Any) -> Tensor:
    """The last column, as of a kernel whose mask is short by one."""
    found = rms_norm(x, weight, eps, **how)
    return torch.cat([found[..., :-1], torch.zeros_like(found[..., -1:])], -1)


def off_backward(gate: Tensor, up: Tensor, activation: Any) -> Tensor:
    """Right forward, and nine tenths of the gradient."""
    found = glu(gate, up, activation)
    return found.detach() + 0.9 * (found - found.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("op", "wrong"), [("rms_norm", off), ("rms_norm", off_at_one_place), ("glu", off_backward)])
def test_a_wrong_kernel_is_found(op: str, wrong: Any, dtype: torch.dtype) -> None:
    model = build("llama", NAMES["sdpa"]).to(dtype)
    with mock.patch(f"launcher.model.fuse.{op}", wrong):
        [finding] = fused(model, tokens=60).findings
    assert "do not compute what the model does" in finding.what
    assert "made up:0" in finding.detail
    assert "allowed" in finding.detail
    assert "model.kernels to eager" in finding.hint


def test_a_kernel_that_does_not_run_is_found() -> None:
    def too_large(x: Tensor, weight: Tensor, eps: float, **how: Any) -> Tensor:
        raise RuntimeError("out of resource: shared memory\nmore")

    with mock.patch("launcher.model.fuse.rms_norm", too_large):
        [finding] = fused(build("llama", NAMES["sdpa"])).findings
    assert "do not run here" in finding.what
    assert finding.detail == "RuntimeError: out of resource: shared memory"
    assert "model.kernels to eager" in finding.hint


def test_a_model_without_anything_to_fuse_says_so() -> None:
    nothing = mock.Mock(counts={})
    with mock.patch("launcher.audit.fused.fuse", return_value=nothing):
        assert fused(build("llama", NAMES["sdpa"])) == Checked("no kernel to fuse", skipped=True)


# Memory


@pytest.fixture(scope="module")
def wide() -> Any:
    return build(
        "llama", NAMES["sdpa"], hidden_size=128, intermediate_size=448, num_hidden_layers=4, vocab_size=4000
    ).train()


def documents(tokens: int) -> MicroBatch:
    return pack([tokens // 2 - 3, tokens - tokens // 2])


def peak_bytes(action: Callable[[], object]) -> int:
    """The most tensor memory that `action` holds at once beside what was there, by torch's own allocator on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    results: Any = profile.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([event.nbytes() for event in events]).max())


def one_step(model: nn.Module, tokens: int) -> None:
    """Forward, backward and the first update by AdamW."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    total, _ = loss_of(model, causal_lm(model))(pack([tokens // 8] * 8))
    total.backward()
    torch.optim.AdamW(trained, fused=True).step()
    for weight in trained:
        weight.grad = None


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_audit_takes_less_than_a_step_and_no_more_than_it_counts(wide: Any, method: str, tmp_path: Path) -> None:
    model = wide if method == "full" else with_lora(copy.deepcopy(wide))
    step_tokens = 2048
    plan = tiny_plan(tmp_path, zero=0)
    facts = plan.data.model_copy(update={"train_tokens": step_tokens * 9, "train_rows": 9})
    plan = plan.model_copy(
        update={"data": facts, "layout": plan.layout.model_copy(update={"micro_batch_size": 1, "kernels": "fused"})}
    )
    step = peak_bytes(lambda: one_step(model, step_tokens))
    grows = growth_bytes(plan, model, world_size=1)
    assert grows <= step, "what the run is said to take at least"
    with first_layers(model, 2) as copied:
        assert needed_bytes(copied(True), model, documents(64), WIDER[torch.float32]) <= grows
    taken: list[int] = []

    def audited() -> None:
        def count(place: int) -> int:
            taken.append(place)
            return place

        with mock.patch("launcher.audit.fused.UNNOTICED", 0):
            checked = check_fused(model, loss_of, documents, grows, count)
        assert checked.says.startswith("fused = eager (")

    peak = peak_bytes(audited)
    assert peak <= needed_at(model, SIZES[taken[0]]) <= grows
    lm = causal_lm(model)
    assert peak_bytes(lambda: check_packs(logits_through(lm), documents(512), VOCABULARY, False, "")) < step


def needed_at(model: nn.Module, size: tuple[int, bool]) -> int:
    tokens, large = size
    with first_layers(model, 2) as copied:
        return needed_bytes(copied(large), model, documents(tokens), WIDER[torch.float32])


def test_where_there_is_no_room_it_says_so(wide: Any) -> None:
    with mock.patch("launcher.audit.fused.UNNOTICED", 0):
        checked = check_fused(wide, loss_of, documents, 1 << 20, lambda x: x)
    assert checked.skipped
    assert checked.says.startswith("fused kernels not compared: that takes ")
    assert checked.says.endswith("the run only 1.0 MiB")


# Which documents


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """Documents of 300, 9, 400 and 2 tokens, with targets in their second half."""
    made = []
    for length in (300, 9, 400, 2):
        mask = np.zeros(length, np.uint8)
        mask[length // 2 :] = 1
        made.append(Document(np.arange(length, dtype=np.int32), mask))
    write_prepared(tmp_path / "data", made, packs=[[0, 1], [2], [3]])
    return tmp_path / "data"


def test_two_documents_are_the_longest_cut_around_their_targets(prepared: Path) -> None:
    numbers = sampled(prepared, 64)
    assert numbers == [0, 2, 3]
    batch = two_documents(prepared, numbers, 512)
    assert batch.where == ("train.jsonl:3", "train.jsonl:1")
    assert batch.cu_seqlens.tolist() == [0, 213, 512]
    for start, stop in ((0, 213), (213, 512)):
        ids = batch.input_ids[0, start:stop]
        assert torch.equal(ids, torch.arange(int(ids[0]), int(ids[0]) + stop - start)), "in one piece"
        assert batch.position_ids[0, start:stop].tolist() == list(range(stop - start))
        assert ((batch.supervised_index >= start) & (batch.supervised_index < stop - 1)).any(), "with targets"
    assert torch.equal(batch.input_ids[0, batch.supervised_index + 1], batch.targets)
    assert two_documents(prepared, [1], 512).cu_seqlens.tolist() == [0, 9, 18], "one document, twice"
    assert two_documents(prepared, numbers, 8).num_tokens == 8


def test_the_models_rows_are_those_of_its_smaller_matrix() -> None:
    assert vocabulary(build("llama")) == VOCABULARY
    assert vocabulary(with_lora(build("llama")).get_base_model()) == VOCABULARY  # type: ignore


def test_a_resume_may_change_what_a_finding_does() -> None:
    assert may_change("audit")
