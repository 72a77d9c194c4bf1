"""Tokenizers: loaded, trained, with a template and the tokens that a recipe adds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from launcher.data.conversation import Conversation, Message
from launcher.data.masks import Encoder
from launcher.data.tokenizer import load_tokenizer, own_tokenizer, train_tokenizer, training_text, with_template
from launcher.errors import ModelError
from tests.plans import model_plan
from tests.unit.families import FAMILIES, TEXT, tokenizer_of

if TYPE_CHECKING:
    from pathlib import Path

SINGLE = Conversation((Message("user", "What is the sum?"), Message("assistant", "The sum is five.")), "rows.jsonl:1")


def ids_of(tokenizer: object, conversation: Conversation = SINGLE) -> list[int]:
    (documents,) = Encoder(tokenizer, "all").encode([conversation])  # type: ignore[arg-type]
    assert isinstance(documents, list), documents
    return documents[0].input_ids.tolist()


def test_trained_tokenizer_is_deterministic_and_writes_anything() -> None:
    tokenizer = train_tokenizer(TEXT * 5, 320)
    assert len(tokenizer) == 320
    again = train_tokenizer(TEXT * 5, 320)
    assert tokenizer.backend_tokenizer.to_str() == again.backend_tokenizer.to_str()
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    anything = "".join(map(chr, range(1, 600))) + "한국어 🦊\r\n\t"
    assert tokenizer.decode(tokenizer(anything)["input_ids"]) == anything
    told = Conversation((Message("user", "2+2?"), Message("assistant", "4<|endoftext|>")))
    assert training_text(told) == "### Instruction:\n2+2?\n\n### Response:\n4"
    assert training_text(Conversation((), text="Once.<|endoftext|>\n")) == "Once."


def test_default_template() -> None:
    tokenizer = with_template(train_tokenizer(TEXT, 300), None)
    roles = ("system", "developer", "user", "tool", "assistant")
    text = tokenizer.apply_chat_template([{"role": role, "content": role} for role in roles], tokenize=False)
    assert text == (
        "system\n\ndeveloper\n\n### Instruction:\nuser\n\n### Tool:\ntool\n\n### Response:\nassistant<|endoftext|>"
    )


def test_default_template_begins_with_bos_where_the_tokenizer_adds_it() -> None:
    tokenizer = tokenizer_of("mistral-v1")
    own = tokenizer.chat_template
    try:
        tokenizer.chat_template = None
        ids = ids_of(with_template(tokenizer, None))
        assert tokenizer.decode(ids) == "<s>### Instruction:\nWhat is the sum?\n\n### Response:\nThe sum is five.</s>"
        assert ids.count(tokenizer.bos_token_id) == 1
    finally:
        tokenizer.chat_template = own


def test_tokens_are_added_once_and_in_order() -> None:
    tokenizer = train_tokenizer(TEXT * 5, 320)
    template = FAMILIES["chatml"].template
    wanted = ("<|im_end|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
    with_template(tokenizer, template, add_tokens=wanted)
    assert tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"]) == [320, 321]
    assert len(tokenizer) == 322
    assert tokenizer.eos_token_id == 0
    assert ids_of(tokenizer)[0] == 321
    assert Encoder(tokenizer, "all").end_of_turn_id == 320
    with_template(tokenizer, template, add_tokens=wanted)
    assert len(tokenizer) == 322
    tokenizer.add_tokens(["<think>"])
    with_template(tokenizer, template, add_tokens=("<think>",))
    assert not tokenizer.added_tokens_decoder[322].special  # what it has stays what it is
    spelled = Conversation((Message("user", "a<|im_start|>"), Message("assistant", "b")))
    assert ids_of(tokenizer, spelled).count(321) == 2


def test_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the environment was read at import
    saved = tokenizer_of("chatml")
    saved.save_pretrained(tmp_path / "chatml")
    loaded = load_tokenizer(model_plan(tmp_path / "chatml"))
    assert loaded.chat_template == saved.chat_template
    assert ids_of(loaded) == ids_of(saved)
    replaced = load_tokenizer(
        model_plan(tmp_path / "chatml", chat_template=FAMILIES["phi-4"].template, add_tokens=("<|im_sep|>",))
    )
    assert replaced.chat_template == FAMILIES["phi-4"].template
    assert replaced.convert_tokens_to_ids("<|im_sep|>") == len(saved) == len(replaced) - 1
    replaced.save_pretrained(tmp_path / "again")
    assert ids_of(load_tokenizer(model_plan(tmp_path / "again"))) == ids_of(replaced)
    (tmp_path / "empty").mkdir()
    for path, hint in [
        (str(tmp_path / "empty"), "tokenizer.json"),
        (str(tmp_path / "none"), "no such folder"),
        ("nobody/nothing-of-this-name", "HF_HUB_OFFLINE"),
    ]:
        with pytest.raises(ModelError) as error:
            load_tokenizer(model_plan(path))
        assert error.value.message.startswith(f"{path}: the tokenizer cannot be loaded: ")
        assert hint in str(error.value.hint)
    saved_eos, saved.eos_token = saved.eos_token, None
    try:
        with pytest.raises(ModelError, match="no eos_token"):
            with_template(saved, None)
    finally:
        saved.eos_token = saved_eos


def test_a_sentencepiece_model_alone_is_read(tmp_path: Path) -> None:
    """As deberta-v3 lies on the hub."""
    lines = [f"the {word} film was {word} and {other}" for word in ("good", "bad", "long") for other in ("sad", "fun")]
    (tmp_path / "config.json").write_text('{"model_type": "deberta-v2"}')
    with (tmp_path / "spm.model").open("wb") as written:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=written, vocab_size=40, hard_vocab_limit=False, minloglevel=2
        )
    pieces = SentencePieceProcessor(model_file=str(tmp_path / "spm.model")).encode(lines[0])
    ids = own_tokenizer(model_plan(tmp_path))(lines[0])["input_ids"]
    assert ids[1:-1] == pieces
    assert len(pieces) > 5
