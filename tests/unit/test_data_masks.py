"""E10: supervised tokens are the assistant's words and the end of its turn, whatever the chat template.

Each family's conversations are drawn by hypothesis; what has to be learned is written down in families.py, and what
comes before it is what transformers writes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.data.conversation import Conversation, Message, ToolCall
from launcher.data.masks import Document, Encoder
from launcher.errors import DataError
from tests.unit.families import FAMILIES, TOOL, Family, hugging_face, pin_the_day, tokenizer_of

EXAMPLES = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
WORDS = st.sampled_from(
    ["five", "The fox ran", "over the hills.", "é漢🦊", '{"a": "1"}', "a\tb", "#### 72", "\u200b", "User: no"]
)
SPACE = st.sampled_from([" ", "\n", "\n\n", "  ", ""])
FOREIGN = ("<|im_end|>", "</s>", "<|endoftext|>", "<|eot_id|>", "[INST]")


@pytest.fixture(autouse=True)
def the_day(monkeypatch: pytest.MonkeyPatch) -> None:
    pin_the_day(monkeypatch)


def texts(controls: tuple[str, ...]) -> st.SearchStrategy[str]:
    """Several lines, with control tokens spelled out, and white space wherever it may be."""
    piece = WORDS if not controls else st.one_of(WORDS, WORDS, st.sampled_from(controls))
    joined = st.lists(st.tuples(SPACE, piece), min_size=1, max_size=4).map(lambda parts: "".join(sum(parts, ())))
    return st.tuples(joined, SPACE).map("".join).map(speaking)


def speaking(text: str) -> str:
    """`text` with a word, and not with an end-of-text token at its end: that would be taken off."""
    return text + "." if not text.strip() or text.rstrip().endswith(">") else text


@st.composite
def conversations(draw: st.DrawFn, family: Family, spelled: bool = True) -> Conversation:
    own = (*family.specials, *FOREIGN) if spelled else ()
    others = (*own, *family.marks) if spelled else ()
    said, asked = texts(own), texts(tuple(text for text in others if "tool_response" not in text))
    calling = family.calls and draw(st.booleans())
    messages: list[Message] = []
    system = family.system and not (calling and "[TOOL_CALLS]" in family.specials)
    if system and draw(st.booleans()):
        messages.append(Message("system", draw(asked)))
    thought = st.one_of(st.just(""), asked) if family.thinks else st.just("")
    for _ in range(draw(st.integers(1, 4))):
        messages.append(Message("user", draw(asked)))
        if calling and draw(st.booleans()):
            arguments = {"city": draw(asked), "days": draw(st.integers(0, 9)), "at": {"home": [draw(said)]}}
            words = draw(st.one_of(st.just(""), said)) if family.words_with_calls else ""
            call = ToolCall("get_weather", arguments, "abcdefghi")
            messages.append(Message("assistant", words, "" if words and not family.marks else draw(thought), (call,)))
            messages.append(Message("tool", draw(asked), name="get_weather", tool_call_id="abcdefghi"))
        messages.append(Message("assistant", draw(said), draw(thought)))
    return Conversation(tuple(messages), "rows.jsonl:1", (TOOL,) if calling and family.tools else ())


def stretches(document: Document) -> Iterator[tuple[int, int]]:
    """Where each stretch of supervised tokens begins and ends."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], document.supervised, [0]])))
    yield from ((int(a), int(b)) for a, b in edges.reshape(-1, 2))


def encoded(encoder: Encoder, conversation: Conversation) -> list[Document]:
    (documents,) = encoder.encode([conversation])
    assert not isinstance(documents, DataError), documents
    return documents


def answers(conversation: Conversation) -> list[int]:
    return [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]


def without_controls(conversation: Conversation, family: Family) -> Conversation:
    """The same with other words for the control tokens that are spelled out."""

    def swap(value: object) -> object:
        if isinstance(value, str):
            for text in sorted({*family.specials, *family.marks, *FOREIGN}, key=len, reverse=True):
                value = value.replace(text, "zz")
            return value
        if isinstance(value, dict):
            return {key: swap(item) for key, item in value.items()}
        return [swap(item) for item in value] if isinstance(value, list) else value

    def plain(message: Message) -> Message:
        calls = tuple(call._replace(arguments=swap(call.arguments)) for call in message.tool_calls)
        return message._replace(content=swap(message.content), reasoning=swap(message.reasoning), tool_calls=calls)

    return Conversation(tuple(map(plain, conversation.messages)), conversation.where, conversation.tools)


@pytest.mark.parametrize(("kind", "num_examples"), [("bytes", 25), ("pieces", 8)])
@pytest.mark.parametrize("name", FAMILIES)
def test_e10_what_is_learned_is_what_the_model_has_to_write(name: str, kind: str, num_examples: int) -> None:
    family, tokenizer = FAMILIES[name], tokenizer_of(name, kind)
    encoder = Encoder(tokenizer, "all")
    control_ids = set(tokenizer.added_tokens_decoder) - {tokenizer.convert_tokens_to_ids(t) for t in ("\n\n", "<b>")}

    def read(text: str) -> str:
        # Pieces are read with a space more behind a control token, and ▁ is their sign for one.
        return text if kind == "bytes" else text.replace(" ", "").replace("▁", "")

    @settings(EXAMPLES, max_examples=num_examples)
    @given(conversations(family))
    def check(conversation: Conversation) -> None:
        documents = encoded(encoder, conversation)
        turns = answers(conversation)
        prompts = [hugging_face(tokenizer, family, conversation, i, True) for i in turns]
        learned, before = [], []
        for document in documents:
            ids = document.input_ids
            for begin, end in stretches(document):
                learned.append(read(tokenizer.decode(ids[begin:end])))
                before.append(read(tokenizer.decode(ids[:begin])))
        # Each answer once, with all that the model writes and its end of turn, and nothing else.
        assert sorted(learned) == sorted(read(family.says(conversation.messages[i])) for i in turns)
        # Each behind the very prompt that it answers.
        assert sorted(before) == sorted(read(prompt.removesuffix(family.opening)) for prompt in prompts)
        # Control tokens are those of the template: with other words for those spelled out, the same.
        same = encoded(encoder, without_controls(conversation, family))
        for document, other in zip(documents, same, strict=True):
            controls = [i for i in document.input_ids.tolist() if i in control_ids]
            assert controls == [i for i in other.input_ids.tolist() if i in control_ids]
            assert document.input_ids.dtype == np.int32
            assert document.supervised.dtype == np.uint8

    check()


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_before_an_answer_are_those_of_the_prompt(name: str, kind: str) -> None:
    """And the first answer's are those that the tokenizer gives to the whole text, control tokens and all."""
    family, tokenizer = FAMILIES[name], tokenizer_of(name, kind)
    encoder = Encoder(tokenizer, "all")
    ends = {tokenizer.convert_tokens_to_ids(text) for text in family.specials}

    @settings(EXAMPLES, max_examples=12)
    @given(conversations(family, spelled=False))
    def check(conversation: Conversation) -> None:
        turns = answers(conversation)
        prompts = [hugging_face(tokenizer, family, conversation, i, True).removesuffix(family.opening) for i in turns]
        tokens = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
        says = {prompt: family.says(conversation.messages[i]) for prompt, i in zip(prompts, turns, strict=True)}
        for document in encoded(encoder, conversation):
            ids = document.input_ids.tolist()
            begin, end = next(stretches(document))
            assert ids[:begin] in tokens
            assert ids[end - 1] in ends
            if family.bos:
                assert ids[0] == tokenizer.bos_token_id
                assert name == "llama-2" or ids.count(tokenizer.bos_token_id) == 1  # it begins each of its turns
            prompt = prompts[tokens.index(ids[:begin])]
            whole = tokenizer(prompt + says[prompt], add_special_tokens=False)["input_ids"]
            if whole[:begin] == ids[:begin] and not (prompt[-1:].isspace() and says[prompt][:1].isspace()):
                assert ids[:end] == whole

    check()


@pytest.mark.parametrize("name", FAMILIES)
def test_one_answer_is_learned_where_one_is_asked_for(name: str) -> None:
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    last, marked = Encoder(tokenizer, "last"), Encoder(tokenizer, "marked")
    asked, told = Message("user", "What is five?"), Message("assistant", "five")
    conversation = Conversation((asked, told, asked, told._replace(learn=True), asked, told), "rows.jsonl:1")
    for encoder, index in ((last, 5), (marked, 3)):
        (document,) = encoded(encoder, conversation)
        ((begin, end),) = stretches(document)
        assert tokenizer.decode(document.input_ids[begin:end]) == family.says(conversation.messages[index])
        prompt = hugging_face(tokenizer, family, conversation, index, True)
        assert tokenizer.decode(document.input_ids[:begin]) == prompt.removesuffix(family.opening)
        assert document.num_turns == 1
    text, ids = last.prompt(conversation)
    assert text == hugging_face(tokenizer, family, conversation, 5, True)
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode([last.end_of_turn_id]) == tokenizer.decode(
        document.input_ids[document.supervised == 1][-1:]
    )
