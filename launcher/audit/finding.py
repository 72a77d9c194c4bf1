"""What an audit says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Something that would train wrong without a word."""

    what: str
    """In a few words."""
    detail: str
    """What was seen, with numbers and places."""
    hint: str
    """What to do, without a final period."""

    def __str__(self) -> str:
        return f"{self.what}: {self.detail}"


@dataclass(frozen=True)
class Checked:
    """What one check has looked at."""

    says: str
    """In a few words, such as "packs isolated"."""
    findings: tuple[Finding, ...] = ()
    skipped: bool = False
    """Whether it could not be done here; `says` has the reason."""
