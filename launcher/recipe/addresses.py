"""Addresses without what opens them: a recipe may name data by a URL that holds a password or a signature."""

from __future__ import annotations

import re

_USER = re.compile(r"(?<=://)[^\s/?#@\"']+(?=@)")
_SIGNED = re.compile(
    r"(?<=[?&])([\w.-]*(?:signature|sig|token|secret|password|credential|key)=)[^\s&#\"']+", re.IGNORECASE
)


def without_secrets(text: str) -> str:
    """`text`, which may be JSON, with *** for whatever stands before the host of a URL, and for keys, tokens and
    signatures in its query."""
    return _SIGNED.sub(r"\1***", _USER.sub("***", text))
