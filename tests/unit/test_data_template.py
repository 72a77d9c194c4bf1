"""E10: supervised tokens are the assistant's words and the end of its turn, whatever the chat template."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from launcher.data.formats import Conversation
from launcher.data.template import Document, Encoder, encode, without_end_markers
from launcher.data.tokenizer import load_tokenizer, train_tokenizer, training_text, with_template
from launcher.errors import DataError, ModelError
from launcher.plan.plan import ModelPlan

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

TEXT = [
    "What is the sum of two and three? The sum of two and three is five.",
    "You are a helpful assistant. Answer briefly.",
    "Once upon a time there was a fox, and the fox ran over the hills and far away.",
    "user assistant system model Instruction Response INST 0123456789 .,:;!?\n\n### \n",
]


@dataclass(frozen=True)
class Family:
    """One family of chat templates, in the shape its models have it."""

    template: str | None
    specials: tuple[str, ...]
    end: str
    """Token that ends a turn."""
    bos: str | None = None
    words_after: str = ""
    """What the model has to write before its words, where the generation prompt stops short of them."""
    system: bool = True
    trims: bool = False


FAMILIES = {
    "default": Family(None, ("<|endoftext|>",), "<|endoftext|>"),
    "chatml": Family(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
    ),
    "llama-3": Family(
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
        "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        bos="<|begin_of_text|>",
        trims=True,
    ),
    "mistral": Family(
        "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
        ("</s>", "<s>"),
        "</s>",
        bos="<s>",
        words_after=" ",
        system=False,
    ),
    "zephyr": Family(
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>\n' + m['content'] + eos_token }}"
        "{% elif m['role'] == 'system' %}{{ '<|system|>\n' + m['content'] + eos_token }}"
        "{% else %}{{ '<|assistant|>\n' + m['content'] + eos_token }}{% endif %}"
        "{% if loop.last and add_generation_prompt %}{{ '\n<|assistant|>\n' }}"
        "{% elif not loop.last %}{{ '\n' }}{% endif %}{% endfor %}",
        ("</s>",),
        "</s>",
    ),
    "gemma": Family(
        "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        bos="<bos>",
        system=False,
        trims=True,
    ),
    "phi-3": Family(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|end|>",
    ),
    "qwen-3": Family(  # the last answer stands behind an empty thought, which the generation prompt leaves to the model
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m['content'].split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        words_after="<think>\n\n</think>\n\n",
    ),
}
SINGLE = Conversation((("user", "What is the sum?"), ("assistant", "The sum is five.")), "rows.jsonl:1")
TURNS = Conversation(
    (
        ("system", "You are a helpful assistant."),
        ("user", "What is two and three?"),
        ("assistant", "five"),
        ("user", "And four?\n"),
        ("assistant", "five"),  # the same words twice: a turn's end must not be taken from the other
        ("user", "Tell of the fox."),
        ("assistant", "The fox ran,\n\n and ran.  "),
    ),
    "rows.jsonl:2",
)


@cache
def tokenizer_of(name: str, byte_level: bool = True) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[name]
    backend = Tokenizer(models.BPE())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) if byte_level else sorted("".join(TEXT) + "<|_>[]/")
    specials = [AddedToken(text, special=True, normalized=False) for text in family.specials]
    if byte_level:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    else:  # Llama 2 and the first Mistral: a space before whatever begins, also after a control token
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    # Without a pre-tokenizer the training text is cut into words here, or whole sentences would become tokens.
    words = TEXT * 8 if byte_level else [word for text in TEXT for word in text.replace("\n", " \n ").split(" ")] * 8
    backend.train_from_iterator(words, trainer)
    if family.bos:  # Llama's tokenizer adds it by itself, so it would stand there twice with the template's own
        backend.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, backend.token_to_id(family.bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=family.specials[0],
        bos_token=family.bos,
        clean_up_tokenization_spaces=False,
    )
    return with_template(tokenizer, family.template)


def learned(document: Document, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The text of each stretch of supervised tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], document.supervised, [0]])))
    return [tokenizer.decode(document.input_ids[a:b]) for a, b in edges.reshape(-1, 2)]


def said(conversation: Conversation, family: Family) -> list[str]:
    words = [content for role, content in conversation.messages if role == "assistant"]
    return [family.words_after + (text.strip() if family.trims else text) + family.end for text in words]


def without_system(conversation: Conversation, family: Family) -> Conversation:
    messages = tuple(m for m in conversation.messages if family.system or m[0] != "system")
    return Conversation(messages, conversation.where)


@pytest.mark.parametrize("name", FAMILIES)
def test_e10_supervised_tokens_are_the_words_and_the_end_of_turn(name: str) -> None:
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    document = encode(SINGLE, tokenizer, "all")
    assert learned(document, tokenizer) == said(SINGLE, family)
    assert document.input_ids.dtype == np.int32
    assert document.supervised.dtype == np.uint8
    turns = without_system(TURNS, family)
    assert learned(encode(turns, tokenizer, "last"), tokenizer) == said(turns, family)[-1:]
    if name == "qwen-3":  # an earlier answer loses its thought once a later one is there
        with pytest.raises(DataError, match=r"rows.jsonl:2: message 3: the chat template writes what comes before"):
            encode(turns, tokenizer, "all")
    else:
        assert learned(encode(turns, tokenizer, "all"), tokenizer) == said(turns, family)


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_what_inference_sees(name: str) -> None:
    """All tokens decode to the template's own text, the prompt's are those of the whole prompt, and BOS comes once."""
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    turns = without_system(TURNS, family)
    document = encode(turns, tokenizer, "last")
    shown = [{"role": role, "content": content} for role, content in turns.messages]
    assert tokenizer.decode(document.input_ids) == tokenizer.apply_chat_template(shown, tokenize=False)
    prompt = tokenizer.apply_chat_template(shown[:-1], add_generation_prompt=True, return_dict=False)
    start = int(document.supervised.argmax())
    assert document.input_ids[:start].tolist() == prompt
    text, ids = Encoder(tokenizer, "all").prompt(turns)
    assert ids == prompt
    assert text == tokenizer.apply_chat_template(shown[:-1], add_generation_prompt=True, tokenize=False)
    if family.bos:
        assert document.input_ids.tolist().count(tokenizer.bos_token_id) == 1
        assert document.input_ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("name", FAMILIES)
def test_control_tokens_in_messages_stay_text(name: str) -> None:
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    spelled = "".join(family.specials)
    conversation = Conversation(
        (
            ("user", f"What is {spelled}?"),
            ("assistant", f"The {spelled} ends {family.end} it"),
            ("user", f"{family.end} Forget it."),
            ("assistant", f"{spelled} is five"),
        ),
        "rows.jsonl:4",
    )
    document = encode(conversation, tokenizer, "last")
    assert learned(document, tokenizer) == said(conversation, family)[-1:]
    plain = Conversation((("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")))
    specials = set(tokenizer.all_special_ids) | {tokenizer.convert_tokens_to_ids(text) for text in family.specials}

    def controls(document: Document) -> list[int]:
        return [i for i in document.input_ids.tolist() if i in specials]

    assert controls(document) == controls(encode(plain, tokenizer, "last"))
    shown = [{"role": role, "content": content} for role, content in conversation.messages]
    assert tokenizer.decode(document.input_ids) == tokenizer.apply_chat_template(shown, tokenize=False)
    text, ids = Encoder(tokenizer, "last").prompt(conversation)
    assert tokenizer.decode(ids) == text
    assert ids == document.input_ids[: len(ids)].tolist()


def test_tokenizer_that_puts_a_space_before_whatever_begins() -> None:
    """Llama 2's kind: an answer tokenized on its own would begin with a space that inference does not have."""
    tokenizer = tokenizer_of("mistral", byte_level=False)
    turns = without_system(TURNS, FAMILIES["mistral"])
    document = encode(turns, tokenizer, "all")
    shown = [{"role": role, "content": content} for role, content in turns.messages]
    assert document.input_ids.tolist() == tokenizer.apply_chat_template(shown, return_dict=False)
    assert int(document.supervised.sum()) < len(document.input_ids)
    ends = [int(i) for i in document.input_ids[document.supervised == 1] if i == tokenizer.eos_token_id]
    assert len(ends) == 3
    chatml = tokenizer_of("chatml", byte_level=False)
    document = encode(SINGLE, chatml, "all")
    text = chatml.convert_ids_to_tokens(document.input_ids[document.supervised == 1].tolist())
    assert "".join(text) == "The▁sum▁is▁five.<|im_end|>"
    spelled = Conversation((("user", "a"), ("assistant", "The <|im_end|> is")), "rows.jsonl:1")
    document = encode(spelled, chatml, "all")
    text = chatml.convert_ids_to_tokens(document.input_ids[document.supervised == 1].tolist())
    assert "".join(text) == "The▁<|im_end|>▁is<|im_end|>"
    assert document.input_ids.tolist().count(chatml.convert_tokens_to_ids("<|im_end|>")) == 2


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "without a special token"),
        (
            "{% for m in messages %}{{ m['content'] | upper + eos_token }}{% endfor %}",
            "changes the assistant's words",
        ),
        (
            "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<think>' }}{% endif %}",
            "writes what comes before an answer otherwise",
        ),
        ("{{ messages | length }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}", "otherwise"),
        ("{% for m in messages %}{{ m['content'] }} .{{ eos_token }}{% endfor %}", "without a special token"),
        ("{{ raise_exception('no system, please') }}", "refuses this conversation: no system, please"),
        ("{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}", "refuses this conversation"),
    ],
)
def test_templates_that_cannot_be_masked_exactly_are_refused(template: str, said: str) -> None:
    tokenizer = with_template(train_tokenizer(TEXT, 300), template)
    with pytest.raises(DataError) as error:
        encode(SINGLE, tokenizer, "all")
    assert error.value.message.startswith("rows.jsonl:1: ")
    assert said in error.value.message
    assert error.value.hint


def test_one_refused_row_does_not_stop_the_others() -> None:
    tokenizer = tokenizer_of("mistral")
    wrong = Conversation((("user", "a"), ("user", "b"), ("assistant", "c")), "rows.jsonl:7")
    hidden = Conversation((("user", "\ufdd00\ufdd1"), ("assistant", "c")), "rows.jsonl:8")
    first, second, third, fourth = Encoder(tokenizer, "all").encode([SINGLE, wrong, hidden, SINGLE])
    assert isinstance(second, DataError)
    assert second.message.startswith("rows.jsonl:7: ")
    assert isinstance(third, DataError)
    assert third.message.startswith("rows.jsonl:8: U+FDD0")
    assert isinstance(first, Document)
    assert isinstance(fourth, Document)
    assert first.input_ids.tolist() == fourth.input_ids.tolist()
    assert Encoder(tokenizer, "all").encode([]) == []


def test_end_markers_of_older_files_go() -> None:
    tokenizer = tokenizer_of("mistral")
    marked = Conversation((("user", "a<|endoftext|>"), ("assistant", "five<|endoftext|> </s>\n")), "rows.jsonl:1")
    plain = Conversation((("user", "a<|endoftext|>"), ("assistant", "five")), "rows.jsonl:1")
    assert without_end_markers(marked, "</s>") == (plain, 1)
    assert without_end_markers(plain, "</s>") == (plain, 0)
    document = encode(marked, tokenizer, "all")
    assert document.num_markers == 1
    assert document.input_ids.tolist() == encode(plain, tokenizer, "all").input_ids.tolist()
    empty = Conversation((("user", "a"), ("assistant", "<|endoftext|>")), "rows.jsonl:1")
    with pytest.raises(DataError, match="message 2: the assistant says nothing"):
        encode(empty, tokenizer, "all")


def test_trained_tokenizer_is_deterministic_and_writes_anything() -> None:
    tokenizer = train_tokenizer(TEXT * 5, 320)
    assert len(tokenizer) == 320
    again = train_tokenizer(TEXT * 5, 320)
    assert tokenizer.backend_tokenizer.to_str() == again.backend_tokenizer.to_str()
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    anything = "".join(map(chr, range(1, 600))) + "한국어 🦊\r\n\t"
    assert tokenizer.decode(tokenizer(anything)["input_ids"]) == anything
    text = training_text(Conversation((("user", "2+2?"), ("assistant", "4<|endoftext|>"))))
    assert text == "### Instruction:\n2+2?\n\n### Response:\n4"


def test_default_template_begins_with_bos_where_the_tokenizer_adds_it() -> None:
    tokenizer = tokenizer_of("mistral")
    own = tokenizer.chat_template
    try:
        tokenizer.chat_template = None
        document = encode(SINGLE, with_template(tokenizer, None), "all")
        assert tokenizer.decode(document.input_ids) == (
            "<s>### Instruction:\nWhat is the sum?\n\n### Response:\nThe sum is five.</s>"
        )
        assert document.input_ids.tolist().count(tokenizer.bos_token_id) == 1
    finally:
        tokenizer.chat_template = own


def model_plan(path: str, chat_template: str | None = None) -> ModelPlan:
    return ModelPlan(
        source="folder",
        path=path,
        revision=None,
        scratch=None,
        tokenizer=None,
        chat_template=chat_template,
        template_kwargs={},
        add_tokens=(),
        trust_remote_code=False,
    )


def test_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the environment was read at import
    saved = tokenizer_of("chatml")
    saved.save_pretrained(tmp_path / "chatml")
    loaded = load_tokenizer(model_plan(str(tmp_path / "chatml")))
    assert loaded.chat_template == saved.chat_template
    assert encode(TURNS, loaded, "all").input_ids.tolist() == encode(TURNS, saved, "all").input_ids.tolist()
    replaced = load_tokenizer(model_plan(str(tmp_path / "chatml"), FAMILIES["zephyr"].template))
    assert replaced.chat_template == FAMILIES["zephyr"].template
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
