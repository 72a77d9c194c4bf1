"""From rows to conversations: which format a row has, and what it says."""

from launcher.data.formats.detect import Format, check_source, detect, renamed, to_conversations

__all__ = ["Format", "check_source", "detect", "renamed", "to_conversations"]
