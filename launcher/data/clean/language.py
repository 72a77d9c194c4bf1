"""In which language a row speaks, as far as that can be told."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache
from typing import Any

from launcher.data.conversation import Conversation

FEWEST_BYTES = 40
"""Of UTF-8: below it a language is not told. Of 10,143 English texts of our tests' data (GSM8K, reviews, news, cut
after 40 bytes) one is called another language, and that one begins with a Spanish quotation; at 20 bytes it is 9."""
MOST_CHARACTERS = 1000
"""Read of a row: it takes 0.3 microseconds a byte, and more tells nothing new."""
_LIKELY, _UNLIKELY = 0.3, 0.05
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_VARIANTS = {"ar": ("ary", "arz"), "en": ("pcm",), "no": ("nn",), "uz": ("uzs",), "zh": ("wuu", "yue")}
"""What the library tells from the language that users write. English about numbers often passes for Nigerian Pidgin."""
_NO_LANGUAGE = "zxx"


def prose(conversation: Conversation) -> str:
    """What users and the assistant say, without code between backticks: at most MOST_CHARACTERS of it."""
    if conversation.text is not None:
        said = conversation.text
    else:
        said = "\n".join(turn.content for turn in conversation.messages if turn.role in ("user", "assistant"))
    return _CODE.sub(" ", said).strip()[:MOST_CHARACTERS]


def is_told(prose: str) -> bool:
    """Whether it is long enough to tell its language."""
    return len(prose.encode("utf-8", "surrogatepass")) >= FEWEST_BYTES


def foreign(prose: str, languages: Collection[str]) -> str | None:
    """The language of a text that is in none of `languages` (ISO 639-1); None where it is, or cannot be told.

    By py3langid's probabilities: one other language has at least 0.3 and those asked for less than 0.05 together, so
    that text in two languages, and code, which no language likes, are not taken for foreign. Depends on the version of
    py3langid, whose model is in the package.
    """
    if not is_told(prose):
        return None
    ranked = _identifier().rank(prose)
    wanted = {_NO_LANGUAGE, *languages, *(variant for code in languages for variant in _VARIANTS.get(code, ()))}
    code, probability = ranked[0]
    if probability < _LIKELY or sum(share for code, share in ranked if code in wanted) >= _UNLIKELY:
        return None
    return str(code)


@cache
def _identifier() -> Any:
    # Half a second, once a process.
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
