"""Control tokens come from the chat template alone, whatever the class of the tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from launcher.data.conversation import Conversation, Message
from launcher.data.masks import Encoder
from launcher.data.masks.verbatim import Verbatim
from launcher.errors import DataError
from tests.unit.families import FAMILIES, TEXT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIALS = ("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>")
MARKS = ("<think>", "</think>")
KINDS = ("bytes", "bytes with a space", "pieces", "metaspace", "unigram", "words")
CHARACTERS = sorted(set("".join(TEXT) + "<|_>[]/thinkunkseimstart▁"))


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    if kind == "unigram":  # as T5's and XLM-R's: control tokens are pieces of the vocabulary too
        pieces = [(text, 0.0) for text in (*SPECIALS, *MARKS)] + [(character, -8.0) for character in CHARACTERS]
        words = {word for text in TEXT for word in text.split()}
        pieces += [("▁" + word, -5.0) for word in sorted(words)]
        backend = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
    elif kind == "words":  # as BERT's
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=list(SPECIALS), initial_alphabet=CHARACTERS)
        backend.train_from_iterator(TEXT * 4, trainer)
    else:
        backend = Tokenizer(models.BPE(unk_token=None if kind.startswith("bytes") else "<unk>"))
        alphabet = CHARACTERS
        if kind.startswith("bytes"):
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "bytes with a space")
            backend.decoder = decoders.ByteLevel()
            alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        elif kind == "pieces":  # Llama 2
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:  # Llama 2 as transformers converts it now
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
        trainer = trainers.BpeTrainer(
            vocab_size=500, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False
        )
        texts = [word for text in TEXT for word in text.split(" ")] if kind == "pieces" else TEXT
        backend.train_from_iterator(texts * 8, trainer)
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def letters(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """What `ids` say, without the signs that tokenizers have for spaces."""
    text = "".join(tokenizer.convert_ids_to_tokens(ids))
    for sign in ("Ġ", "Ċ", "▁", "##", " ", "\n"):
        text = text.replace(sign, "")
    return text


@pytest.mark.parametrize("kind", KINDS)
def test_spelled_out_tokens_are_the_tokens_of_their_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    verbatim = Verbatim(tokenizer, "<|im_start|>user <think> </think>")
    controls = {i for text, i in verbatim.id_of.items() if text != "<unk>"}
    assert set(verbatim.id_of) == {*SPECIALS, *MARKS}
    word = st.sampled_from(["five", "sum.", " ", "\n", *SPECIALS, *MARKS])

    @settings(max_examples=60, derandomize=True, deadline=None, database=None)
    @given(st.lists(word, max_size=6).map("".join), st.booleans())
    def check(text: str, own: bool) -> None:
        hidden, count = verbatim.hide(text, own, strip=False)
        assert count == sum(text.count(control) for control in (SPECIALS if own else SPECIALS + MARKS))
        tokens = verbatim.tokenize([["<|im_start|>user\n", hidden + "<|im_end|>\n"]])
        assert not tokens.refused
        ids = tokens.ids.tolist()
        expected = ["<|im_start|>", *(mark for mark in marks_in(text) if own), "<|im_end|>"]
        assert [tokenizer.convert_ids_to_tokens(i) for i in ids if i in controls] == expected
        if "<unk>" not in tokenizer.convert_ids_to_tokens(ids):
            whole = f"<|im_start|>user\n{text}<|im_end|>\n"
            assert letters(tokenizer, ids) == whole.replace(" ", "").replace("\n", "")
        assert verbatim.show(hidden) == text

    check()


def marks_in(text: str) -> Iterator[str]:
    while places := [(text.find(mark), mark) for mark in MARKS if mark in text]:
        place, mark = min(places)
        yield mark
        text = text[place + len(mark) :]


@pytest.mark.parametrize("kind", KINDS)
def test_strings_are_tokenized_as_in_the_whole_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    verbatim = Verbatim(tokenizer)
    strings = ["<s><|im_start|>user\nWhat is five?<|im_end|>", "<|im_start|>", "The sum", "<|im_end|> The", " fox ran."]
    tokens = verbatim.tokenize([strings, ["", "five</s>"], strings[:1]])
    assert tokens.ids[: tokens.starts[5]].tolist() == tokenizer("".join(strings), add_special_tokens=False)["input_ids"]
    assert tokens.starts[5] == tokens.starts[6]  # an empty string has no tokens
    assert len(tokens.starts) == 9
    assert tokens.ids[tokens.starts[7] - 1] == tokenizer.eos_token_id
    places = verbatim.positions(tokens.ids[: tokens.starts[5]])
    found = [tokenizer.convert_ids_to_tokens(int(i)) for i in tokens.ids[places]]
    assert found == ["<s>", "<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]


def test_control_tokens_that_take_the_space_behind_them() -> None:
    """Phi-3's do: what follows an end of turn is not cut off from it."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(tokenizer_of("bytes").backend_tokenizer.to_str())
    tokens = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>")
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False, rstrip=True) for text in tokens])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    tokenizer.chat_template = FAMILIES["phi-3"].template
    messages = [
        Message(role, word)
        for role, word in zip(["user", "assistant"] * 2, ["What?", "five", "And?", "six."], strict=True)
    ]
    (documents,) = Encoder(tokenizer, "all").encode([Conversation(tuple(messages), "rows.jsonl:1")])
    assert isinstance(documents, list), documents
    shown = [{"role": message.role, "content": message.content} for message in messages]
    assert documents[0].input_ids.tolist() == tokenizer.apply_chat_template(shown, return_dict=False)
    ends = documents[0].input_ids[documents[0].supervised == 1] == tokenizer.convert_tokens_to_ids("<|end|>")
    assert ends.sum() == documents[0].num_turns == 2


def test_words_of_the_template_are_no_control_tokens() -> None:
    """Gemma has runs of new lines as added tokens, and somebody's vocabulary a word."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(tokenizer_of("bytes").backend_tokenizer.to_str())
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("\n\n", "user", "<b>", "<i>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    verbatim = Verbatim(tokenizer, "<|im_start|>user\n\n<b>")
    assert set(verbatim.id_of) == {*SPECIALS, "<b>"}
    assert verbatim.hide("user\n\n<i>", own=False, strip=False) == ("user\n\n<i>", 0)


def test_stripping_leaves_none_that_joins_anew() -> None:
    verbatim = Verbatim(tokenizer_of("bytes"), "<think>")
    assert verbatim.hide("a<|im_<|im_end|>end|>b<think>", own=False, strip=True) == ("ab", 3)
    assert verbatim.hide("a<think>b</think>", own=True, strip=True) == ("a<think>b</think>", 0)
    assert verbatim.hide("a</think>", own=False, strip=True) == ("a</think>", 0)  # the template knows nothing of it


def test_what_the_tokenizer_would_forge_is_refused() -> None:
    """A control token that is looked for in normalized text may come of other characters."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    backend.train_from_iterator(TEXT, trainer)
    backend.add_special_tokens([AddedToken("</s>", special=True, normalized=True)])
    verbatim = Verbatim(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
    tokens = verbatim.tokenize([["a</s>"], ["a＜/s＞", "b</s>"], ["c</s>"]])
    assert list(tokens.refused) == [1]
    assert "makes a control token of text" in tokens.refused[1].message


def test_text_that_cannot_be_told_from_placeholders_is_refused() -> None:
    verbatim = Verbatim(tokenizer_of("bytes"))
    with pytest.raises(DataError, match="U\\+FDD0, which is no character"):
        verbatim.hide("\ufdd01\ufdd1", own=False, strip=False)
    with pytest.raises(DataError, match="half of a surrogate pair, which is no character"):
        verbatim.hide("five \ud83e", own=True, strip=False)
    hidden, _ = verbatim.hide("a</s>b", own=False, strip=False)
    tokens = verbatim.tokenize([[hidden[:2], "c"], ["d"]])  # a template that cuts
    assert list(tokens.refused) == [0]
    assert "cuts through" in tokens.refused[0].message
    assert tokens.ids[tokens.starts[2] :].tolist() == tokenizer_of("bytes")("d", add_special_tokens=False)["input_ids"]


def test_strings_that_would_merge_are_refused() -> None:
    """A vocabulary in which a text joins whatever stands before it."""
    from transformers import PreTrainedTokenizerFast

    pieces = ["▁", "\n", "a", ".", "b", "\nb", "ab", ".b"]
    backend = Tokenizer(models.BPE({text: i for i, text in enumerate(pieces)}, [("\n", "b"), ("a", "b"), (".", "b")]))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.add_special_tokens(["</s>"])
    verbatim = Verbatim(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
    tokens = verbatim.tokenize([["a", "b"], ["b", "</s>"]])
    assert list(tokens.refused) == [0]
    assert "merges the answer's beginning" in tokens.refused[0].message
