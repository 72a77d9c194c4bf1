"""Text as words and runs of words, so that case, punctuation and line breaks make no difference between two texts.

Scripts that leave no spaces between words count each character as one: 13 words in a row are 13 characters of Chinese.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from unicodedata import normalize

import numpy as np
import regex
from numpy.typing import NDArray

from launcher.data.conversation import SYSTEM_ROLES, Conversation, Message

_WITHOUT_SPACES = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(rf"[{_WITHOUT_SPACES}]|[[\p{{L}}\p{{M}}\p{{N}}]--[{_WITHOUT_SPACES}]]+", regex.V1)
_ASCII_BLANKS = {code: " " for code in range(128) if not chr(code).isalnum()}
# Of the polynomial that joins the hashes of n words; the first is the last word's. Odd, so that no bit is lost.
_STEP = 0x9E3779B97F4A7C15
_POWERS = np.array([pow(_STEP, exponent, 1 << 64) for exponent in range(16)], dtype=np.uint64)


def exchange(conversation: Conversation) -> str:
    """What is asked and answered, without system prompts: one that all rows share would make all rows alike."""
    return conversation.text if conversation.text is not None else _said(conversation.messages)


def question(conversation: Conversation) -> str:
    """What is said before the last answer, without system prompts."""
    return conversation.text if conversation.text is not None else _said(conversation.messages[:-1])


def _said(messages: Iterable[Message]) -> str:
    turns = (message for message in messages if message.role not in SYSTEM_ROLES)
    return "\n".join(part for turn in turns for part in (turn.reasoning, turn.content) if part)


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case and NFKC."""
    if text.isascii():  # the same words, five times as fast
        return text.lower().translate(_ASCII_BLANKS).split()
    return _WORD.findall(normalize("NFKC", text).lower())


def ngrams(words: list[str], n: int) -> NDArray[np.uint64]:
    """[max(W - n + 1, 1)] hash of every run of `n` (at most 16) of W words; of all of them where they are fewer.

    The same on every machine and in every version: BLAKE2b of each word's UTF-8, joined by a polynomial modulo 2^64.
    """
    hashes = np.fromiter(map(_hash, words), dtype=np.uint64, count=len(words))
    return np.convolve(hashes, _POWERS[: min(n, len(words))], "valid") if words else hashes


@lru_cache(maxsize=1 << 18)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
