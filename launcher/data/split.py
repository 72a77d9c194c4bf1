"""Holding rows out for evaluation so that no later row moves an earlier one."""

from __future__ import annotations

import hashlib
import json

from launcher.data.formats import Conversation


def is_held_out(conversation: Conversation, share: float) -> bool:
    """True for about `share` (0 to 1) of all conversations, decided by each one's own words alone.

    Adding, removing or reordering rows moves no other row, and identical rows fall on the same side, so that no
    held-out row is trained on under another line number. The seed has no say: runs of different seeds are compared on
    the same held-out rows.
    """
    words = json.dumps(conversation.messages, ensure_ascii=True, separators=(",", ":"))
    draw = int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big")
    return draw < share * 2.0**64
