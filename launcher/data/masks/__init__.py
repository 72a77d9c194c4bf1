"""From conversations to tokens and what is learned of them: see encoder.py."""

from launcher.data.masks.encoder import Document, Encoder, end_of_turn_id, without_end_markers

__all__ = ["Document", "Encoder", "end_of_turn_id", "without_end_markers"]
